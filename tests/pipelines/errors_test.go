package pipelines

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/schema"
	"sequin/tests/pgtest"
)

// Each wrong call has its SQLSTATE, a message that names the object, a hint that says what to do, and leaves nothing behind.
func TestErrors(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		set client_min_messages = error;
		create table orders (id int primary key, note text);
		create table bare (id int);
		create table other (id int primary key);
		create unlogged table fast (id int primary key);
		create view seen as select * from orders;
		create table parent (id int primary key) partition by range (id);
		create table part partition of parent for values from (0) to (10);
		select sequin.create_pipeline('history', 'orders', 'events'), sequin.create_pipeline('kept', 'orders', 'kept', retention => '1 day');
		create table less (like events including defaults including identity);
		alter table less drop column seq, drop column changes;
		create table typed (like events including defaults including identity);
		alter table typed alter record type json;
		create table more (like events including defaults including identity, note text not null);
		create table not_null (like events including defaults including identity);
		alter table not_null alter changes set not null;
		create table no_record (like events including defaults including identity);
		alter table no_record alter record_pk set not null, alter record set not null;
		create table all_full (id int not null); alter table all_full replica identity full;
		create table no_id (like events including defaults);
		create table no_default (like events including identity);
		create unlogged table lost (like events including defaults including identity);
		create table by_seq (like events including defaults including identity) partition by range (seq);
		create table by_default (like events including defaults including identity) partition by range (committed_at);
		create table by_default_rest partition of by_default default;
		create view shown as table events`)
	for _, test := range []struct {
		sql, code, message, hint string
	}{
		{`select sequin.create_pipeline('x', 'ordres', 'e')`, "42704", `"ordres"`, `"orders"`},
		{`select sequin.create_pipeline('x', null, 'e')`, "22023", "source_table is null", ""},
		{`select sequin.create_pipeline('x', 'orders', null)`, "22023", `"x"`, ""},
		{`select sequin.create_pipeline('x', 'orders', 'nowhere.e')`, "42704", `"nowhere"`, "create schema"},
		{`select sequin.create_pipeline('x', 'orders', 'a.b.c')`, "22023", "a.b.c", "schema.table"},
		{`select sequin.create_pipeline('x', 'orders', repeat('e', 64))`, "22023", "eee", "63"},
		{`select sequin.create_pipeline('x', 'orders', 'sequin.e')`, "22023", "sequin.e", ""},
		{`select sequin.create_pipeline('x', 'orders', 'sequin.consumer')`, "22023", "sequin.consumer", ""},
		{`set search_path = nowhere; select sequin.create_pipeline('x', 'public.orders', 'e')`, "42704", `"e"`, "schema"},
		{`select sequin.create_pipeline('', 'orders', 'e')`, "22023", "name", "48"},
		{`select sequin.create_pipeline(null, 'orders', 'e')`, "22023", "name", "48"},
		{`select sequin.create_pipeline(repeat('é', 25), 'orders', 'e')`, "22023", "name", "48"},
		{`select sequin.create_pipeline('history', 'orders', 'e')`, "42710", `"history"`, "if_not_exists"},
		{`select sequin.create_pipeline('history', 'orders', 'e', if_not_exists => true)`, "42710", `"history"`, "select sequin.drop_pipeline('history');"},
		{`select sequin.create_pipeline('history', 'other', 'events', if_not_exists => true)`, "42710", `"history"`, "select sequin.drop_pipeline('history');"},
		{`select sequin.create_pipeline('history', 'orders', 'events', '{insert}', if_not_exists => true)`, "42710", `"history"`, "sequin.alter_pipeline('history', ...)"},
		{`select sequin.create_pipeline('x', 'orders', 'e', actions => '{inserted}')`, "22023", `"x"`, "insert"},
		{`select sequin.create_pipeline('x', 'orders', 'e', actions => '{}')`, "22023", `"x"`, "insert"},
		{`select sequin.create_pipeline('x', 'orders', 'e', actions => '{null}')`, "22023", `"x"`, "insert"},
		{`select sequin.create_pipeline('x', 'orders', 'e', actions => null)`, "22023", `"x"`, "insert"},
		{`select sequin.create_pipeline('x', 'orders', 'e', retention => '0')`, "22023", "retention", ""},
		{`select sequin.create_pipeline('x', 'orders', 'e', retention => '-1 day')`, "22023", "retention", ""},
		{`select sequin.create_pipeline('x', 'orders', 'e', filter => 'new.nope')`, "42703", `pipeline "x": filter`, ""},
		{`select sequin.create_pipeline('x', 'orders', 'e', filter => '1')`, "42804", "filter", ""},
		{`select sequin.create_pipeline('x', 'bare', 'e')`, "55000", "bare", "alter table public.bare"},
		{`select sequin.create_pipeline('x', 'fast', 'e')`, "55000", "unlogged", "set logged"},
		{`select sequin.create_pipeline('x', 'seen', 'e')`, "22023", "view", ""},
		{`select sequin.create_pipeline('x', 'part', 'e')`, "22023", "partition", "parent"},
		{`select sequin.create_pipeline('x', 'sequin.log', 'e')`, "22023", "Sequin itself", ""},
		{`select sequin.create_pipeline('x', 'orders', 'less')`, "42703", `"seq"`, "alter table public.less add column seq bigint, add column changes jsonb;"},
		{`select sequin.create_pipeline('x', 'orders', 'typed')`, "42804", `"record"`, "alter table public.typed alter column record type jsonb using record::jsonb;"},
		{`select sequin.create_pipeline('x', 'orders', 'more')`, "55000", `"note"`, "alter table public.more alter column note drop not null;"},
		{`select sequin.create_pipeline('x', 'orders', 'not_null')`, "55000", `"changes"`, "alter table public.not_null alter column changes drop not null;"},
		{`select sequin.create_pipeline('x', 'orders', 'not_null', actions => '{update}')`, "55000", `"changes"`, "alter table public.not_null alter column changes drop not null;"},
		{`select sequin.create_pipeline('x', 'orders', 'no_record', actions => '{insert,truncate}')`, "55000", `"record_pk"`, "alter table public.no_record alter column record_pk drop not null;"},
		{`select sequin.create_pipeline('x', 'all_full', 'no_record')`, "55000", `"record_pk"`, "alter table public.no_record alter column record_pk drop not null;"},
		{`select sequin.create_pipeline('x', 'orders', 'no_id')`, "55000", `"id"`, "alter table public.no_id alter column id"},
		{`select sequin.create_pipeline('x', 'orders', 'by_default', retention => '1 day')`, "55000", "default partition", "alter table public.by_default detach partition public.by_default_rest;"},
		{`select sequin.create_pipeline('x', 'orders', 'no_default')`, "55000", `"inserted_at"`, "alter table public.no_default alter column inserted_at set default now();"},
		{`select sequin.create_pipeline('x', 'orders', 'lost')`, "55000", "unlogged", "alter table public.lost set logged;"},
		{`select sequin.create_pipeline('x', 'orders', 'shown')`, "22023", "a view", ""},
		{`select sequin.create_pipeline('x', 'orders', 'part')`, "22023", "a partition", ""},
		{`create temp table brief (like events including defaults including identity); select sequin.create_pipeline('x', 'orders', 'brief')`, "55000", "temporary", ""},
		{`select sequin.create_pipeline('x', 'orders', 'events', retention => '1 day')`, "55000", "partitioned", "retention"},
		{`select sequin.create_pipeline('x', 'orders', 'by_seq', retention => '1 day')`, "55000", "partitioned", "retention"},
		{`select sequin.create_pipeline('x', 'events', 'events')`, "22023", `"x"`, "another event table"},
		{`select sequin.create_pipeline('x', 'orders', 'orders')`, "22023", `pipeline "x" would capture what it writes itself`, "another event table"},
		{`select sequin.alter_pipeline('hystory')`, "42704", `"hystory"`, `"history"`},
		{`select sequin.alter_pipeline('history', actions => '{}')`, "22023", "actions", "insert"},
		{`select sequin.alter_pipeline('history', filter => 'true) or (true')`, "42601", "filter", ""},
		{`select sequin.alter_pipeline('history', retention => '1 day')`, "55000", "partitioned", "select sequin.drop_pipeline('history');"},
		{`select sequin.alter_pipeline('kept', retention => '1 ms')`, "22023", "retention", ""},
		{`select sequin.drop_pipeline('hystory')`, "42704", `"hystory"`, `"history"`},
		{`select sequin.pause_pipeline('hystory')`, "42704", `"hystory"`, `"history"`},
		{`select sequin.resume_pipeline('hystory')`, "42704", `"hystory"`, `"history"`},
	} {
		conn, err := db.Pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = conn.Conn().PgConn().Exec(t.Context(), test.sql).ReadAll()
		_, _ = conn.Exec(t.Context(), `rollback; reset search_path; drop table if exists pg_temp.brief`)
		conn.Release()
		var e *pgconn.PgError
		switch {
		case !errors.As(err, &e):
			t.Errorf("%s: got %v, want %s", test.sql, err, test.code)
		case e.Code != test.code || !strings.Contains(e.Message, test.message) || e.Hint == "" || !strings.Contains(e.Hint, test.hint):
			t.Errorf("%s: got %s: %s (hint: %s); want %s, %q and %q", test.sql, e.Code, e.Message, e.Hint, test.code, test.message, test.hint)
		}
	}
	if got := fmt.Sprint(pgtest.Column[string](db, `select name from sequin.pipelines order by 1`),
		pgtest.Column[string](db, `select relname::text from pg_class where relname ~ '^e+$' or relname = 'x'`),
		pgtest.Column[string](db, `select tablename::text from pg_publication_tables where pubname = 'sequin'`)); got != "[history kept] [] [orders]" {
		t.Errorf("what was refused has left something: %s", got)
	}
	// Each hint that is a statement mends it.
	for _, table := range []string{"less", "typed", "more", "not_null", "no_id", "no_default", "lost"} {
		db.Exec(db.Error(fmt.Sprintf(`select sequin.create_pipeline('%s', 'orders', '%[1]s')`, table)).Hint)
		db.Exec(fmt.Sprintf(`select sequin.create_pipeline('%s', 'orders', '%[1]s')`, table))
	}
	// What no event leaves null may be not null.
	db.Exec(`alter table not_null alter changes set not null;
		select sequin.create_pipeline('no_record', 'orders', 'no_record'), sequin.create_pipeline('updates', 'all_full', 'not_null', actions => '{update}')`)
	if got := pgtest.Value[string](db, `select sequin.drop_pipeline('nobody', if_exists => true) || sequin.drop_pipeline('less') || sequin.drop_pipeline('less', true)`); got != "absentdroppedabsent" {
		t.Errorf("got %s", got)
	}
}

// On PostgreSQL 12 a partitioned table cannot be captured, but may be an event table.
func TestPartitionedSource(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table parent (id int primary key, note text) partition by range (id);
		create table part partition of parent for values from (0) to (10);
		create table other partition of parent for values from (10) to (20);
		alter table parent replica identity full; alter table part replica identity full; alter table other replica identity full`)
	if db.Major() == 12 {
		if e := db.Error(`select sequin.create_pipeline('p', 'parent', 'events')`); e.Code != "0A000" || e.Hint == "" {
			t.Errorf("got %s: %s", e.Code, e.Message)
		}
		return
	}
	db.Exec(`select sequin.create_pipeline('p', 'parent', 'events')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into parent values (1, 'a'), (11, 'b'); update parent set note = 'c' where id = 11`)
	awaitEvents(db, "events", `insert 1 {"id": 1, "note": "a"} -`, `insert 11 {"id": 11, "note": "b"} -`, `update 11 {"id": 11, "note": "c"} {"note": "b"}`)
	if got := pgtest.Value[string](db, `select distinct source_table_name from events`); got != "parent" {
		t.Errorf("got %s", got)
	}
}

// Who may configure makes pipelines of tables it may read into tables of its own; a consumer's role makes none. What the table's
// owner has put there does not run with more rights than its owner's.
func TestRights(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	deploy, worker := "deploy_"+db.Name, "worker_"+db.Name
	for _, role := range []string{deploy, worker} {
		db.Exec(`create role ` + role + ` login`)
		db.Cleanup(func() { db.Exec(`drop owned by ` + role + ` cascade; drop role ` + role) })
	}
	db.Exec(`create table orders (id int primary key, note text); create table secret (id int primary key); create table theirs (id int);
		revoke create on schema public from public; create schema app; grant create, usage on schema app to ` + deploy + `; grant select on orders to ` + deploy)
	db.Exec(`select sequin.create_stream('s', '{orders}'), sequin.create_consumer('c', 's')`)
	db.Exec(`select sequin.grant_configure($1), sequin.grant_consume('c', $2)`, deploy, worker)
	pgtest.StartBridge(t, db.URL)
	as := map[string]func(string) string{}
	for _, role := range []string{deploy, worker} {
		conn := db.ConnectAs(role)
		as[role] = func(sql string) string {
			t.Helper()
			_, err := conn.PgConn().Exec(t.Context(), sql).ReadAll()
			var e *pgconn.PgError
			if errors.As(err, &e) {
				return e.Code + ": " + e.Message
			} else if err != nil {
				t.Fatal(err)
			}
			return ""
		}
	}
	db.Exec(`create table strangers (id bigint generated always as identity, seq bigint, source_database_id uuid, source_table_oid bigint,
		source_table_schema text, source_table_name text, record_pk text, record jsonb, changes jsonb, action text, committed_at timestamptz,
		inserted_at timestamptz default now()) partition by range (committed_at)`)
	for _, sql := range []string{
		`select sequin.create_pipeline('x', 'secret', 'app.e')`, `select sequin.create_pipeline('x', 'orders', 'public.e_of_mine')`,
		`select sequin.create_pipeline('x', 'orders', 'strangers')`,
	} {
		if code := as[deploy](sql); !strings.HasPrefix(code, pgerrcode.InsufficientPrivilege) {
			t.Errorf("%s: got %q", sql, code)
		}
		if code := as[worker](sql); !strings.HasPrefix(code, pgerrcode.InsufficientPrivilege) {
			t.Errorf("worker: %s: got %q", sql, code)
		}
	}
	for _, call := range []string{"alter_pipeline('x')", "drop_pipeline('x')", "pause_pipeline('x')", "resume_pipeline('x')", "bridge_pipeline(1, 1)"} {
		if code := as[worker](`select sequin.` + call); !strings.HasPrefix(code, pgerrcode.InsufficientPrivilege) {
			t.Errorf("worker: %s: got %q", call, code)
		}
	}
	// Into a table of another's it may with INSERT, but not drop partitions of it.
	db.Exec(`grant insert on strangers to ` + deploy)
	if code := as[deploy](`select sequin.create_pipeline('x', 'orders', 'strangers', retention => '1 day')`); !strings.HasPrefix(code, pgerrcode.InsufficientPrivilege) {
		t.Errorf("a retention on a table of another's: got %q", code)
	}
	if code := as[deploy](`select sequin.create_pipeline('s', 'orders', 'strangers'), sequin.drop_pipeline('s')`); code != "" {
		t.Errorf("an event table of another's: got %s", code)
	}
	if code := as[deploy](`set search_path = app; select sequin.create_pipeline('p', 'public.orders', 'events', retention => '1 hour')`); code != "" {
		t.Fatalf("create_pipeline: got %s", code)
	}
	db.Exec(`insert into orders values (1, 'a')`)
	awaitCount(db, "app.events", 1)
	if got := pgtest.Column[string](db, `select distinct relowner::regrole::text from pg_class where relnamespace = 'app'::regnamespace and relname ~ '^events'`); fmt.Sprint(got) != "["+deploy+"]" {
		t.Errorf("the event table and its partitions are %s", got)
	}
	// It owns the table, and whatever code it puts there is not run.
	as[deploy](`create function app.evil() returns trigger language plpgsql as $$ begin execute 'create role evil superuser'; return new; end $$;
		create function app.evil_value() returns text language plpgsql as $$ begin
		  if current_user <> '` + deploy + `' then execute 'create role evil superuser'; end if; return 'x'; end $$;
		create function app.evil_index(text) returns text language plpgsql immutable as $$
		  begin if current_user <> '` + deploy + `' then raise 'evil is % now', current_user; end if; return 'x'; end $$;
		create domain app.evil_type as text check (value <> app.evil_value())`)
	id := 1
	for _, evil := range []struct{ make, undo, what string }{
		{`create trigger evil after insert on app.events for each row execute function app.evil()`, `drop trigger evil on app.events`, `"evil"`},
		{`create trigger evil before insert on app.events for each statement execute function app.evil()`, `drop trigger evil on app.events`, `"evil"`},
		{`alter table app.events add column extra text default app.evil_value()`, `alter table app.events drop column extra`, `"extra"`},
		{`alter table app.events add column extra text default query_to_xml('select 1', true, true, '')::text`, `alter table app.events drop column extra`, `"extra"`},
		{`alter table app.events add column extra app.evil_type`, `alter table app.events drop column extra`, `"extra"`},
		{`alter table app.events add constraint evil check (app.evil_index(action) = 'x') not valid`, `alter table app.events drop constraint evil`, `"evil"`},
		{`create index evil on app.events (id) where app.evil_index('x') = 'x'`, `drop index app.evil`, "index"},
		{`create rule evil as on insert to app.events do also select app.evil_value()`, `drop rule evil on app.events`, `"evil"`},
	} {
		if code := as[deploy](evil.make); code != "" {
			t.Fatalf("%s: got %s", evil.make, code)
		}
		id++
		db.Exec(`insert into orders values ($1, 'b')`, id)
		awaitError(db, "p", pgerrcode.InsufficientPrivilege, evil.what)
		if n := pgtest.Value[int](db, `select count(*) from pg_roles where rolname = 'evil'`); n != 0 {
			t.Fatalf("%s: it ran", evil.make)
		}
		if code := as[deploy](evil.undo); code != "" {
			t.Fatalf("%s: got %s", evil.undo, code)
		}
		if code := as[deploy](`select sequin.resume_pipeline('p')`); code != "" {
			t.Fatalf("resume_pipeline: got %s", code)
		}
		awaitCount(db, "app.events", id)
	}
	// What does no harm is let be.
	if code := as[deploy](`create index on app.events (record_pk); create index on app.events using gin (record); alter table app.events add column note text default 'n', add column seen_at timestamptz default clock_timestamp()`); code != "" {
		t.Fatal(code)
	}
	db.Exec(`insert into orders values (1000, 'c')`)
	awaitCount(db, "app.events", id+1)
	// Dropped, and made anew by somebody who may not read the source: they get nothing.
	db.Exec(`grant create, usage on schema app to ` + worker + `; drop table app.events`)
	if code := as[worker](`create table app.events (id bigint generated always as identity, seq bigint, source_database_id uuid, source_table_oid bigint,
		source_table_schema text, source_table_name text, record_pk text, record jsonb, changes jsonb, action text, committed_at timestamptz,
		inserted_at timestamptz default now()) partition by range (committed_at)`); code != "" {
		t.Fatal(code)
	}
	db.Exec(`insert into orders values (1001, 'd')`)
	awaitError(db, "p", pgerrcode.InsufficientPrivilege, "may not read")
	db.Exec(`grant select on orders to ` + worker)
	db.Exec(`select sequin.resume_pipeline('p')`)
	awaitCount(db, "app.events", 1)
}

// A role that is no superuser installs, and makes pipelines; into another's table with that role's rights only, and whatever that
// role's own triggers do they do not run.
func TestPlainRole(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	plain, deploy := "plain_"+db.Name, "deploy_"+db.Name
	db.Exec(`create role ` + plain + ` login replication; create role ` + deploy + ` login`)
	db.Cleanup(func() {
		db.Exec(`drop owned by ` + plain + ` cascade; drop owned by ` + deploy + ` cascade; drop role ` + plain + `; drop role ` + deploy)
	})
	db.Exec(`grant create on database ` + db.Name + ` to ` + plain)
	db.Exec(`create schema app authorization ` + plain)
	if err := schema.Up(t.Context(), db.URLAs(plain), pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
	conn, other := db.ConnectAs(plain), db.ConnectAs(deploy)
	exec := func(conn *pgx.Conn, sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	exec(conn, `create table app.orders (id int primary key)`)
	exec(conn, `select sequin.create_pipeline('mine', 'app.orders', 'app.events', retention => '1 day')`)
	exec(conn, `select sequin.grant_configure('`+deploy+`'); grant usage, create on schema app to `+deploy+`; grant select on app.orders to `+deploy)
	_, err := other.Exec(t.Context(), `select sequin.create_pipeline('theirs', 'app.orders', 'app.others', retention => '1 day')`)
	var e *pgconn.PgError
	if !errors.As(err, &e) || e.Code != pgerrcode.InsufficientPrivilege || !strings.HasPrefix(e.Hint, "grant ") {
		t.Fatalf("got %v", err)
	}
	db.Exec(e.Hint)
	exec(other, `select sequin.create_pipeline('theirs', 'app.orders', 'app.others', retention => '1 day')`)
	pgtest.StartBridge(t, db.URLAs(plain))
	exec(conn, `insert into app.orders values (1)`)
	awaitCount(db, "app.events", 1)
	awaitCount(db, "app.others", 1)
	exec(other, `create function app.evil() returns trigger language plpgsql as $$ begin execute 'drop table app.orders'; return null; end $$;
		create trigger evil after insert on app.others execute function app.evil()`)
	exec(conn, `insert into app.orders values (2)`)
	awaitError(db, "theirs", pgerrcode.InsufficientPrivilege, `"evil"`)
	awaitCount(db, "app.events", 2)
	exec(other, `drop trigger evil on app.others`)
	awaitCount(db, "app.others", 2)
}
