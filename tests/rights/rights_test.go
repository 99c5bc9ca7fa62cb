// Package rights proves who may do what: a role with one consumer that, and nothing else.
package rights

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// setup makes two consumers with a message each, and roles of this database's own.
func setup(t *testing.T, roles ...string) (*pgtest.DB, map[string]string) {
	t.Helper()
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table orders (id int primary key, note text);
		select sequin.create_stream('orders', '{orders}');
		select sequin.create_consumer('mailer', 'orders');
		select sequin.create_consumer('other', 'orders')`)
	names := map[string]string{}
	for _, role := range roles {
		name := role + "_" + db.Name
		names[role] = name
		db.Exec(`create role ` + name + ` login`)
		db.Cleanup(func() { db.Exec(`drop owned by ` + name + ` cascade; drop role ` + name) })
	}
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into orders values (1, 'x')`)
	for _, consumer := range []string{"mailer", "other"} {
		if n := len(pgtest.Column[int64](db, `select seq from sequin.receive($1, 10, '10s', '1ms')`, consumer)); n != 1 {
			t.Fatalf("%s got %d messages", consumer, n)
		}
	}
	return db, names
}

// code is the SQLSTATE of running a statement; empty where it succeeds.
func code(t *testing.T, conn *pgx.Conn, sql string) string {
	t.Helper()
	_, err := conn.PgConn().Exec(context.Background(), sql).ReadAll()
	var pgErr *pgconn.PgError
	switch {
	case err == nil:
		return ""
	case errors.As(err, &pgErr):
		return pgErr.Code
	}
	t.Fatalf("%s: %v", sql, err)
	return ""
}

// call writes a call of a function with nulls for what has no default.
const callsQuery = `
select format('select sequin.%I(%s)', p.proname, (
         select string_agg('null::' || format_type(t.oid, null), ', ' order by t.n)
         from unnest(p.proargtypes::oid[]) with ordinality t(oid, n)))
from pg_proc p
where p.pronamespace = 'sequin'::regnamespace and p.prokind = 'f' and p.prorettype <> 'trigger'::regtype
  and not p.oid = any ($1::regprocedure[]::oid[])
order by 1`

var consuming = []string{
	"sequin.receive(text, int, interval, interval)", "sequin.ack(text, bigint[])", "sequin.nack(text, bigint[], interval, text)",
	"sequin.extend(text, bigint[], interval)", "sequin.pop(text, int, interval)",
}

func TestConsume(t *testing.T) {
	db, roles := setup(t, "worker", "nobody")
	db.Exec(`select sequin.grant_consume('mailer', $1)`, roles["worker"])
	worker, nobody := db.ConnectAs(roles["worker"]), db.ConnectAs(roles["nobody"])

	// What it may.
	var id int64
	err := worker.QueryRow(t.Context(), `select ack_id from sequin.receive('mailer', 10, '10s')`).Scan(&id)
	if err != nil {
		t.Fatal(err)
	}
	for _, call := range []string{`extend('mailer', array[$1::bigint])`, `nack('mailer', array[$1::bigint], '0')`} {
		var n int
		if err := worker.QueryRow(t.Context(), `select sequin.`+call, id).Scan(&n); err != nil || n != 1 {
			t.Errorf("%s: got %d, %v", call, n, err)
		}
	}
	var seq int64
	if err := worker.QueryRow(t.Context(), `select seq from sequin.pop('mailer', 10, '10s')`).Scan(&seq); err != nil {
		t.Errorf("pop: %v", err)
	}
	if code := code(t, worker, `select sequin.ack('mailer', '{1}')`); code != "" {
		t.Errorf("ack: got %s", code)
	}

	// And what it may not: anything on another consumer, told as if it did not know of it,
	for _, call := range []string{`receive('other')`, `pop('other')`, `ack('other', '{1}')`, `nack('other', '{1}')`, `extend('other', '{1}')`} {
		if code := code(t, worker, `select sequin.`+call); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("worker, %s: got %q", call, code)
		}
		if code := code(t, nobody, `select sequin.`+call); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("nobody, %s: got %q", call, code)
		}
	}
	// every other function,
	calls := pgtest.Column[string](db, callsQuery, consuming)
	if len(calls) < 100 {
		t.Fatalf("%d functions", len(calls))
	}
	for _, call := range calls {
		if code := code(t, worker, call); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("worker, %s: got %q", call, code)
		}
	}
	// every function at all, for a role that was given nothing,
	for _, call := range pgtest.Column[string](db, callsQuery, []string{}) {
		if code := code(t, nobody, call); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("nobody, %s: got %q", call, code)
		}
	}
	// and every table, view and sequence, by any verb.
	relations := pgtest.Column[string](db, `select c.relkind::text || ' ' || c.oid::regclass from pg_class c
		where c.relnamespace = 'sequin'::regnamespace and c.relkind in ('r', 'p', 'v', 'S') order by 1`)
	if len(relations) < 30 {
		t.Fatalf("%d relations", len(relations))
	}
	for _, relation := range relations {
		kind, name, _ := strings.Cut(relation, " ")
		verbs := []string{"table %s", "delete from %s", "insert into %s default values", "truncate %s"}
		if kind == "S" {
			verbs = []string{"select nextval('%s')", "select setval('%s', 1)", "select last_value from %s"}
		}
		if kind == "v" {
			verbs = verbs[:1]
		}
		for _, verb := range verbs {
			for role, conn := range map[string]*pgx.Conn{"worker": worker, "nobody": nobody} {
				if code := code(t, conn, fmt.Sprintf(verb, name)); code != pgerrcode.InsufficientPrivilege {
					t.Errorf("%s, "+verb+": got %q", role, name, code)
				}
			}
		}
	}
	if n := pgtest.Value[int](db, `select count(*) from pg_class c, aclexplode(c.relacl) a where c.relnamespace = 'sequin'::regnamespace and a.grantee = 0`) +
		pgtest.Value[int](db, `select count(*) from pg_proc p, aclexplode(p.proacl) a where p.pronamespace = 'sequin'::regnamespace and a.grantee = 0`) +
		pgtest.Value[int](db, `select count(*) from pg_proc p where p.pronamespace = 'sequin'::regnamespace and p.proacl is null`); n != 0 {
		t.Errorf("%d objects are PUBLIC's", n)
	}

	// Until it is taken back.
	db.Exec(`select sequin.revoke_consume('mailer', $1)`, roles["worker"])
	for _, call := range pgtest.Column[string](db, callsQuery, []string{}) {
		if code := code(t, worker, call); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("after revoke, %s: got %q", call, code)
		}
	}
}

// A group's members consume; another role they become does not; and a definer function of somebody's lends nothing.
func TestConsumeByMembership(t *testing.T) {
	db, roles := setup(t, "team", "member", "outsider")
	db.Exec(`grant ` + roles["team"] + ` to ` + roles["member"])
	db.Exec(`select sequin.grant_consume('mailer', $1)`, roles["team"])
	member := db.ConnectAs(roles["member"])
	if code := code(t, member, `select sequin.receive('mailer')`); code != "" {
		t.Errorf("a member: got %s", code)
	}
	login := db.Connect()
	if code := code(t, login, `set role `+roles["outsider"]+`; select sequin.receive('mailer')`); code != pgerrcode.InsufficientPrivilege {
		t.Errorf("the owner as an outsider: got %q", code)
	}
	_, _ = login.Exec(t.Context(), `reset role`)
	if code := code(t, login, `set role `+roles["member"]+`; select sequin.receive('mailer')`); code != "" {
		t.Errorf("the owner as a member: got %q", code)
	}
}

// A role that configures makes streams of what it may read, reads the views, and consumes nothing.
func TestConfigure(t *testing.T) {
	db, roles := setup(t, "admin")
	db.Exec(`select sequin.grant_configure($1)`, roles["admin"])
	db.Exec(`select sequin.create_pipeline('kept', 'orders', 'orders_events'); select sequin.backfill('other')`)
	admin := db.ConnectAs(roles["admin"])
	for _, sql := range []string{
		`select * from sequin.streams`, `select * from sequin.consumers`, `select * from sequin.consumer_status`,
		`select sequin.pause_consumer('other')`, `select sequin.resume_consumer('other')`, `select sequin.pause_pipeline('kept')`,
		`select sequin.resume_pipeline('kept')`, `select * from sequin.health()`, `select sequin.version()`,
	} {
		if code := code(t, admin, sql); code != "" {
			t.Errorf("%s: got %s", sql, code)
		}
	}
	for _, sql := range []string{
		`select sequin.create_consumer('x', 'orders')`, `select sequin.receive('other')`, `select sequin.pop('other')`,
		`select sequin._forget(1)`, `select sequin.bridge_commit(1, 1, '0/1', 1, '{}', '{}')`, `table sequin.log`, `table sequin.consumer`,
		`delete from sequin.consumer`, `select sequin.set_retention('0')`, `select sequin.accept_gap()`,
	} {
		if code := code(t, admin, sql); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("%s: got %q", sql, code)
		}
	}
	// What it may not read it does not have delivered, filtered or given up: errors would tell what is in it.
	readers := []string{
		`select sequin.alter_consumer('other', ack_wait => '1 minute')`, `select sequin.alter_consumer('other', filter => 'new.id::int > 0')`,
		`select sequin.backfill('other', filter => 'new.id::int > 0')`, `select sequin.backfill('other')`, `select sequin.cancel_backfill(1)`,
		`select sequin.rewind('other', to_row => '0')`, `select sequin.redrive('other')`, `select sequin.revoke_consume('other', current_user)`,
		`select sequin.republish('other', 'select 1::bigint as seq')`,
		`select sequin.alter_pipeline('kept', filter => 'new.id::int > 0')`, `select sequin.drop_pipeline('kept')`,
		`select sequin.drop_consumer('other')`, `select sequin.drop_stream('orders')`,
	}
	for _, sql := range readers {
		if code := code(t, admin, sql); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("%s: got %q", sql, code)
		}
	}
	// Nor does it see rows, or let itself or others.
	for _, sql := range []string{
		`select * from sequin.messages`, `select * from sequin.dead_letters`, `select * from sequin.deliveries`, `select sequin.grant_consume('other', ` + "'" + roles["admin"] + `')`,
		`select sequin.grant_configure('` + roles["admin"] + `')`, `select sequin.revoke_configure('` + roles["admin"] + `')`,
	} {
		if code := code(t, admin, sql); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("%s: got %q", sql, code)
		}
	}
	db.Exec(`grant select on orders to ` + roles["admin"])
	if code := code(t, admin, `select sequin.grant_consume('other', '`+roles["admin"]+`'), sequin.revoke_consume('other', '`+roles["admin"]+`')`); code != "" {
		t.Errorf("grant_consume of a table it may read: got %s", code)
	}
	for _, sql := range append(readers, `select sequin.create_consumer('x', 'orders')`) {
		if code := code(t, admin, "begin; "+sql+"; rollback"); code == pgerrcode.InsufficientPrivilege {
			t.Errorf("%s, of a table it may read: got %s", sql, code)
		}
		_, _ = admin.Exec(t.Context(), "rollback")
	}
	// What reaches other databases is the owner's, and what is in them.
	db.Exec(`select sequin.create_source('far', 'host=127.0.0.1 port=1 password=hidden'); select sequin.create_stream('far', '{t}', source => 'far')`)
	for _, sql := range []string{
		`select sequin.create_source('x', 'host=x')`, `select sequin.alter_source('far', 'host=x')`, `select sequin.drop_source('far')`,
		`select sequin.create_stream('x', '{t}', source => 'far')`, `select sequin.create_consumer('y', 'far')`,
		`table sequin.source`, `select sequin.bridge_conninfo(2)`,
	} {
		if code := code(t, admin, sql); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("%s: got %q", sql, code)
		}
	}
	for _, sql := range []string{`table sequin.sources`, `table sequin.source_status`, `table sequin.streams`} {
		if code := code(t, admin, sql); code != "" {
			t.Errorf("%s: got %s", sql, code)
		}
	}
	db.Exec(`select sequin.drop_stream('far'); select sequin.drop_source('far')`)
	// Of a table with row level security the log shows more than the role may read.
	db.Exec(`alter table orders enable row level security`)
	if code := code(t, admin, `select sequin.create_consumer('y', 'orders')`); code != pgerrcode.InsufficientPrivilege {
		t.Errorf("create_consumer on a table with row level security: got %q", code)
	}
	db.Exec(`alter table orders disable row level security`)
	db.Exec(`select sequin.revoke_configure($1)`, roles["admin"])
	for _, call := range pgtest.Column[string](db, callsQuery, []string{}) {
		if code := code(t, admin, call); code != pgerrcode.InsufficientPrivilege {
			t.Errorf("after revoke, %s: got %q", call, code)
		}
	}
}

// Without the right to make temporary tables a filter cannot be checked: that is said, and how to mend it.
func TestFilterTemporary(t *testing.T) {
	db, roles := setup(t, "admin")
	db.Exec(`select sequin.grant_configure($1)`, roles["admin"])
	db.Exec(`grant select on orders to ` + roles["admin"])
	before := db.ConnectAs(roles["admin"])
	if code := code(t, before, `select sequin.create_consumer('x', 'orders', filter => 'new.id > 1')`); code != "" {
		t.Fatalf("got %s", code)
	}
	db.Exec(`revoke temporary on database ` + db.Name + ` from public`)
	var hint string
	for name, conn := range map[string]*pgx.Conn{"a session that has made some": before, "another": db.ConnectAs(roles["admin"])} {
		_, err := conn.Exec(t.Context(), `select sequin.create_consumer('y', 'orders', filter => 'new.id > 1')`)
		var e *pgconn.PgError
		if !errors.As(err, &e) || e.Code != pgerrcode.InsufficientPrivilege || !strings.Contains(e.Message, `consumer "y": filter: `) {
			t.Errorf("%s: got %v", name, err)
			continue
		}
		hint = e.Hint
	}
	db.Exec(hint)
	if code := code(t, before, `select sequin.create_consumer('y', 'orders', filter => 'new.id > 1')`); code != "" {
		t.Errorf("after %s: got %s", hint, code)
	}
}

// What somebody puts in the way of names does not lead a definer function astray.
func TestShadows(t *testing.T) {
	db, roles := setup(t, "worker")
	db.Exec(`select sequin.grant_consume('mailer', $1)`, roles["worker"])
	db.Exec(`create schema evil; grant usage, create on schema evil to ` + roles["worker"])
	worker := db.ConnectAs(roles["worker"])
	for _, sql := range []string{
		`create function evil.clock_timestamp() returns timestamptz language plpgsql as $$ begin raise 'shadow'; end $$`,
		`create function evil.format(text, variadic text[]) returns text language plpgsql as $$ begin raise 'shadow'; end $$`,
		`create function evil.eq(int, int) returns boolean language plpgsql as $$ begin raise 'shadow'; end $$`,
		`create operator evil.= (leftarg = int, rightarg = int, function = evil.eq)`,
		`create function evil.eqt(text, text) returns boolean language plpgsql as $$ begin raise 'shadow'; end $$`,
		`create operator evil.= (leftarg = text, rightarg = text, function = evil.eqt)`,
		`create type evil.text as (a int)`,
		`set search_path = evil, pg_catalog`,
	} {
		if _, err := worker.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	var seq int64
	if err := worker.QueryRow(t.Context(), `select seq from sequin.pop('mailer', 10, '10s')`).Scan(&seq); err != nil {
		t.Errorf("pop: %v", err)
	}
	for _, p := range pgtest.Column[string](db, `select p.oid::regprocedure::text from pg_proc p
		where p.pronamespace = 'sequin'::regnamespace and p.prosecdef and not exists (
		  select from unnest(p.proconfig) c where c like 'search_path=pg_catalog, pg_temp')`) {
		t.Errorf("%s is a definer without a search_path of its own", p)
	}
	if pgtest.Value[int](db, `select count(*) from pg_proc where proname = 'create_stream' and proconfig is not null`) > 0 {
		t.Error("create_stream looks names up elsewhere than its caller")
	}
}

// What a role's types run, where a value is read or written as text, does not run with the owner's rights.
func TestTypes(t *testing.T) {
	db, roles := setup(t, "maker")
	maker := roles["maker"]
	db.Exec(`select sequin.grant_configure($1)`, maker)
	db.Exec(`create table ran (who text); grant insert on ran to public; create schema made authorization ` + maker)
	conn := db.ConnectAs(maker)
	run := func(sql, want string) {
		t.Helper()
		if got := code(t, conn, sql); got != want {
			t.Errorf("%s: got %q, want %q", sql, got, want)
		}
	}
	run(`create function made.note(text) returns boolean language plpgsql as $$ begin insert into public.ran values (current_user); return true; end $$;
		create domain made.word as text check (made.note(value));
		create type made.pair as (a made.word);
		create function made.text(made.pair) returns text language plpgsql as $$ begin insert into public.ran values (current_user); return 'a'; end $$;
		create cast (made.pair as text) with function made.text(made.pair);
		create function made.json(made.pair) returns json language plpgsql as $$ begin insert into public.ran values (current_user); return '1'; end $$;
		create cast (made.pair as json) with function made.json(made.pair);
		create table made.item (id made.word primary key, sort made.pair, words made.word[], pairs made.pair[], pair made.pair);
		insert into made.item values ('a', row('b'), '{c}', array[row('d')::made.pair], row('e')), ('b', null, null, null, null)`, "")
	run(`select sequin.create_stream('by_pair', '{made.item}', sort_column => 'sort')`, pgerrcode.InsufficientPrivilege)
	run(`select sequin.create_stream('by_words', '{made.item}', sort_column => 'words')`, pgerrcode.InsufficientPrivilege)
	run(`select sequin.create_stream('items', '{made.item}')`, "")
	run(`select sequin.create_consumer('items', 'items', start_at => 'row', start_row => 'a')`, "")
	run(`select sequin.create_consumer('chosen', 'items', filter => $$new.id <> 'c'$$)`, "")
	run(`insert into made.item values ('c'), ('d')`, "")
	received := func(consumer string, want int) {
		t.Helper()
		pgtest.Eventually(t, 30*time.Second, func() error {
			if want -= len(pgtest.Column[int64](db, `select seq from sequin.pop($1, 10, '1s')`, consumer)); want > 0 {
				return fmt.Errorf("%s: %d messages are missing", consumer, want)
			}
			return nil
		})
	}
	received("items", 4)
	received("chosen", 1)
	run(`select sequin.republish('items', 'select * from made.item')`, "")
	received("items", 4)
	run(`select sequin.rewind('items', to_row => 'b')`, "")
	received("items", 3)
	run(`select * from sequin.sync('items', (select cursor from sequin.sync('items', null, 1)), 2)`, "")

	// Nor do casts of its own, or policies.
	run(`create type made.mood as enum ('glad', 'so-so', 'sad');
		create table made.moody (id made.mood primary key, n int);
		create function made.text(made.mood) returns text language plpgsql as $$ begin insert into public.ran values (current_user); return 'sad'; end $$;
		create cast (made.mood as text) with function made.text(made.mood) as assignment;
		create function made.json(made.mood) returns json language plpgsql as $$ begin insert into public.ran values (current_user); return to_json(format('%s', $1)); end $$;
		create cast (made.mood as json) with function made.json(made.mood);
		create function made.mood(text) returns made.mood language plpgsql as $$ begin insert into public.ran values (current_user); return 'sad'; end $$;
		create cast (text as made.mood) with function made.mood(text) as assignment;
		insert into made.moody values ('glad', 1), ('so-so', 2), ('sad', 3)`, "")
	run(`select sequin.create_stream('moods', '{made.moody}')`, "")
	// What is no domain could become one under its name.
	run(`select sequin.create_consumer('moods', 'moods', start_at => 'row', start_row => 'so-so')`, pgerrcode.InsufficientPrivilege)
	run(`select sequin.create_consumer('moods', 'moods', filter => $$'sad'::made.mood is not null$$)`, pgerrcode.SyntaxError)
	run(`select sequin.create_consumer('moods', 'moods', filter => $$new.id = 'it is text here'$$); select sequin.drop_consumer('moods')`, "")
	db.Exec(`alter type made.mood owner to current_user; alter schema made owner to current_user; grant all on schema made to ` + maker)
	run(`select sequin.create_consumer('moods', 'moods', start_at => 'row', start_row => 'so-so')`, "")
	received("moods", 2)
	run(`select sequin.rewind('moods', to_row => 'sad')`, "")
	received("moods", 1)
	run(`select sequin.backfill('moods', filter => 'new.n > 1')`, "")
	received("moods", 2)
	run(`select sequin.republish('moods', 'select * from made.moody')`, "")
	received("moods", 3)
	run(`select * from sequin.sync('moods', (select cursor from sequin.sync('moods', null, 1)), 2)`, "")
	// The last of the rows may have come before the backfill has ended.
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.backfills where state in ('waiting', 'running')`); n > 0 {
			return fmt.Errorf("%d backfills are not over", n)
		}
		return nil
	})
	if bad := pgtest.Column[string](db, `select error from sequin.backfills where state <> 'done'`); len(bad) > 0 {
		t.Errorf("backfills failed: %q", bad)
	}
	run(`create function made.allow() returns boolean language plpgsql as $$ begin insert into public.ran values (current_user); return true; end $$;
		alter table made.moody enable row level security; alter table made.moody force row level security;
		create policy p on made.moody using (made.allow())`, "")
	_, _ = code(t, conn, `select * from sequin.sync('moods')`), code(t, conn, `select sequin.republish('moods', 'select * from made.moody')`)
	if who := pgtest.Column[string](db, `select distinct who from ran where who <> $1`, maker); len(who) > 0 {
		t.Errorf("what %s wrote ran as %v", maker, who)
	}
}

// Code of a role that the server runs while it looks after a table, or fills a materialized view, for somebody else, has that
// role's rights there, whoever session_user is.
func TestMaintenance(t *testing.T) {
	db, roles := setup(t, "worker", "admin")
	db.Exec(`select sequin.grant_consume('mailer', $1)`, roles["worker"])
	db.Exec(`select sequin.grant_configure($1)`, roles["admin"])
	db.Exec(`create table said (role text, answer text); grant all on said to public`)
	for _, test := range []struct{ role, call string }{
		{"worker", `seq::text from sequin.receive('other', 10)`},
		{"worker", `seq::text from sequin.pop('other', 10)`},
		{"worker", `seq::text from sequin.pop('other', 1)`},
		{"worker", `sequin.ack('other', '{1}')::text`},
		{"worker", `sequin.nack('other', '{1}')::text`},
		{"worker", `sequin.extend('other', '{1}')::text`},
		{"admin", `sequin.grant_consume('other', current_user)`},
		{"admin", `sequin.drop_consumer('other')`},
		{"admin", `sequin.alter_consumer('other', ack_wait => '1 hour')`},
		{"admin", `sequin.rewind('other', to_seq => 0)`},
		{"admin", `sequin.create_consumer('mine', 'orders')`},
		{"admin", `record_pk from sequin.sync('orders')`},
		{"admin", `sequin.create_source('far', 'host=127.0.0.1')`},
	} {
		role := roles[test.role]
		conn := db.ConnectAs(role)
		db.Exec(fmt.Sprintf(`create schema theirs_%[1]s authorization %[1]s`, role))
		if _, err := conn.Exec(t.Context(), fmt.Sprintf(`
			create table theirs_%[1]s.trap (a int);
			create function theirs_%[1]s.say() returns int language plpgsql as $$
			declare v text;
			begin
			  select %[2]s into v;
			  insert into public.said values ('%[1]s', 'did it: ' || coalesce(v, ''));
			  return 1;
			exception when others then
			  insert into public.said values ('%[1]s', sqlstate);
			  return 1;
			end $$;
			create function theirs_%[1]s.said(int) returns int language plpgsql immutable as $$ begin return theirs_%[1]s.say(); end $$;
			insert into theirs_%[1]s.trap values (1);
			create materialized view theirs_%[1]s.view as select theirs_%[1]s.say() with no data`, role, test.call)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), fmt.Sprintf(`create index trap_said on theirs_%[1]s.trap (theirs_%[1]s.said(a))`, role)); err != nil {
			t.Fatal(err)
		}
		for _, sql := range []string{`analyze theirs_%s.trap`, `reindex table theirs_%s.trap`, `refresh materialized view theirs_%s.view`} {
			db.Exec(`delete from said`)
			db.Exec(fmt.Sprintf(sql, role))
			for _, answer := range pgtest.Column[string](db, `select answer from said`) {
				if answer != pgerrcode.InsufficientPrivilege {
					t.Errorf("%s, in %s: %s", test.call, sql, answer)
				}
			}
			if n := pgtest.Value[int](db, `select count(*) from said`); n == 0 {
				t.Errorf("%s: nothing was run in %s", test.call, sql)
			}
		}
		db.Exec(fmt.Sprintf(`drop schema theirs_%s cascade`, role))
	}
	if n := len(pgtest.Column[int64](db, `select seq from sequin.pop('other', 10, '10s')`)); n != 1 {
		t.Errorf("of one message %d are left", n)
	}
}

// Who may configure may call what views are made of, and learns nothing by it of tables that it may not read.
func TestViewsFunctions(t *testing.T) {
	db, roles := setup(t, "admin")
	db.Exec(`select sequin.grant_configure($1)`, roles["admin"])
	db.Exec(`select sequin.receive('other')`)
	const query = `select count(*) from sequin._deliveries(jsonb_populate_record(null::sequin.consumer, $1))`
	consumer := pgtest.Value[string](db, `select to_jsonb(c)::text from sequin.consumer c where c.name = 'other'`)
	var n int
	if err := db.ConnectAs(roles["admin"]).QueryRow(t.Context(), query, consumer).Scan(&n); err != nil || n != 0 {
		t.Errorf("got %d deliveries, %v", n, err)
	}
	if n := pgtest.Value[int](db, query, consumer); n != 1 {
		t.Errorf("the owner got %d deliveries", n)
	}
}

// In a dump a grant is to a role of that name, not of that number.
func TestGrantsAreToNames(t *testing.T) {
	db, roles := setup(t, "worker")
	db.Exec(`select sequin.grant_consume('mailer', $1)`, roles["worker"])
	if got := pgtest.Value[string](db, `select g.role::text from sequin.consumer_grant g`); got != roles["worker"] {
		t.Errorf("got %s", got)
	}
}

// Somebody's operator in the caller's own path is not what a call of the caller's runs.
func TestPlantedOperator(t *testing.T) {
	db, _ := setup(t)
	db.Exec(`create function evil(oid[], oid) returns oid[] language plpgsql as $$ begin raise 'planted'; end $$;
		create operator || (leftarg = oid[], rightarg = oid, function = evil);
		create function format(text, text) returns text language plpgsql as $$ begin raise 'planted'; end $$;
		create table item (id int primary key);
		select sequin.create_stream('items', '{item, orders}');
		select sequin.create_consumer('items', 'items', filter => 'new.id > 0');
		select sequin.create_pipeline('items', 'item', 'item_events', filter => 'new.id > 0');
		select sequin.republish('mailer', 'select * from orders')`)
}
