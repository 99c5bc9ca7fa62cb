package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// A table under random DDL and random changes, in and out of transactions, with savepoints, under each replica identity,
// and a bridge that is restarted meanwhile: each change is in the log as a trigger saw it, under the name that the table
// had, with the columns that it had; what is not there is named as unchanged, and is never null.
func TestDDLAtRandom(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	t.Logf("seed %d", seed)
	for n := range 3 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, uint64(n)))
			db := pgtest.New(t)
			db.Exec(`
				create schema other;
				create table t0 (id int primary key, code text not null unique, a text, big text);
				create table audit (id bigserial primary key, action text, schema_name text, table_name text, old jsonb, new jsonb);
				create function audit() returns trigger language plpgsql as $$
				begin
				  insert into audit (action, schema_name, table_name, old, new)
				  values (lower(tg_op), tg_table_schema, tg_table_name,
				    case when tg_op in ('UPDATE', 'DELETE') then to_jsonb(old) end, case when tg_op in ('INSERT', 'UPDATE') then to_jsonb(new) end);
				  return null;
				end $$;
				create trigger audit after insert or update or delete on t0 for each row execute function audit();
				create trigger audit_truncate after truncate on t0 execute function audit();
				select sequin.create_stream('t', '{t0}', mode => 'changes')`)
			stop := pgtest.StartBridge(t, db.URL)
			d := &ddl{random: random, table: "t0", schema: "public", identity: "default"}
			conn := db.Connect()
			for i := range 12 * pgtest.Rounds(t, 10) {
				if _, err := conn.Exec(context.Background(), d.step()); err != nil {
					t.Fatalf("%s: %v", strings.Join(d.done[max(0, len(d.done)-3):], ";\n"), err)
				}
				if i%40 == 39 {
					stop()
					stop = pgtest.StartBridge(t, db.URL)
				}
			}
			pgtest.Eventually(t, 30*time.Second, func() error {
				logged, audited := pgtest.Value[int](db, `select count(*) from sequin.log where action <> 'x'`), pgtest.Value[int](db, `select count(*) from audit`)
				if logged != audited {
					return fmt.Errorf("the log has %d changes, the audit %d", logged, audited)
				}
				return nil
			})
			for i, line := range pgtest.Column[string](db, `
				with l as (select row_number() over (order by seq) as n, *, sequin._action(action) as name, metadata -> 'unchanged' as unchanged
				           from sequin.log where action <> 'x'),
				a as (select row_number() over (order by id) as n, * from audit)
				select concat_ws(' ', a.n, a.action, a.schema_name, a.table_name, left(a.old::text, 200), left(a.new::text, 200), 'became', l.name, l.table_schema, l.table_name,
				         l.record_pk, left(l.record::text, 200), left(l.changes::text, 200), l.unchanged)
				from a join l using (n)
				where (a.action, a.schema_name, a.table_name) is distinct from (l.name, l.table_schema, l.table_name)
				   or a.action in ('insert', 'update')
				      and a.new - array(select jsonb_array_elements_text(coalesce(l.unchanged, '[]'))) is distinct from l.record
				   or a.action = 'delete' and not (l.record <@ a.old and l.record <> '{}')
				   or a.action = 'update' and l.changes is not null and not (l.changes <@ a.old)
				   or l.record_pk is null and a.action <> 'truncate'
				order by a.n`) {
				if i < 5 {
					t.Errorf("seed %d: %s", seed, line)
				}
			}
		})
	}
}

// ddl makes statements up, and remembers what they have made of the table.
type ddl struct {
	random                  *rand.Rand
	table, schema, identity string
	columns                 []string // those that were added
	made, ids               int
	done                    []string
}

func (d *ddl) name() string { return d.schema + "." + d.table }

func (d *ddl) step() string {
	var statements []string
	for range 1 + d.random.IntN(4) {
		statements = append(statements, d.statement())
	}
	sql := strings.Join(statements, "; ")
	if d.random.IntN(3) == 0 {
		// Each by itself.
		sql = strings.Join(statements, "; commit; begin; ")
	}
	if d.random.IntN(4) == 0 {
		sql += fmt.Sprintf(`; savepoint s; insert into %s (id, code) values (%d, 'gone'); rollback to s`, d.name(), d.id())
	}
	sql = "begin; " + sql + "; commit"
	d.done = append(d.done, sql)
	return sql
}

func (d *ddl) id() int {
	d.ids++
	return d.ids
}

func (d *ddl) insert() string {
	id := d.id()
	big := "null"
	if d.random.IntN(2) == 0 {
		big = "(select string_agg(md5(i::text), '') from generate_series(1, 300) i)"
	}
	return fmt.Sprintf(`insert into %s (id, code, a, big) values (%d, 'c%d', 'x', %s)`, d.name(), id, id, big)
}

func (d *ddl) statement() string {
	d.made++
	some := func() string { // of the rows
		return fmt.Sprintf(`(select id from %s order by md5(id::text || '%d') limit 2)`, d.name(), d.made)
	}
	choice := d.random.IntN(20)
	if d.identity == "nothing" && choice >= 4 && choice < 9 {
		choice = 0 // the server refuses updates and deletes
	}
	switch {
	case choice < 4:
		return d.insert()
	case choice < 6:
		return fmt.Sprintf(`update %s set a = 'y%d' where id in %s`, d.name(), d.made, some())
	case choice < 7:
		return fmt.Sprintf(`update %s set code = code || '_' where id in %s`, d.name(), some())
	case choice < 8:
		return fmt.Sprintf(`update %s set id = %d where id = (select max(id) from %s)`, d.name(), d.id()+1_000_000, d.name())
	case choice < 9:
		return fmt.Sprintf(`delete from %s where id in %s`, d.name(), some())
	case choice < 10:
		return `truncate ` + d.name()
	case choice < 12:
		c := fmt.Sprintf("c%d", d.made)
		d.columns = append(d.columns, c)
		kind := []string{"int", "int default 7", "text default 'd'", "numeric not null default 1.5", `jsonb default '{"a": [1]}'`, "boolean", "text[] default '{a,\"b,\"}'"}
		return fmt.Sprintf(`alter table %s add %s %s`, d.name(), c, kind[d.random.IntN(len(kind))])
	case choice < 13 && len(d.columns) > 0:
		c := d.columns[0]
		d.columns = d.columns[1:]
		return fmt.Sprintf(`alter table %s drop %s`, d.name(), c)
	case choice < 14 && len(d.columns) > 0:
		i := d.random.IntN(len(d.columns))
		old := d.columns[i]
		d.columns[i] = fmt.Sprintf("r%d", d.made)
		return fmt.Sprintf(`alter table %s rename %s to %s`, d.name(), old, d.columns[i])
	case choice < 15 && len(d.columns) > 0:
		return fmt.Sprintf(`alter table %s alter %s drop default, alter %[2]s drop not null, alter %[2]s type text using %[2]s::text`, d.name(), d.columns[d.random.IntN(len(d.columns))])
	case choice < 16:
		old := d.name()
		d.table = fmt.Sprintf("t%d", d.made)
		return fmt.Sprintf(`alter table %s rename to %s`, old, d.table)
	case choice < 17:
		old := d.name()
		d.schema = map[string]string{"public": "other", "other": "public"}[d.schema]
		return fmt.Sprintf(`alter table %s set schema %s`, old, d.schema)
	case choice < 19:
		d.identity = []string{"default", "full", "index", "nothing", "full"}[d.random.IntN(5)]
		if d.identity == "index" {
			return fmt.Sprintf(`alter table %s replica identity using index t0_code_key`, d.name())
		}
		return fmt.Sprintf(`alter table %s replica identity %s`, d.name(), d.identity)
	default:
		return d.insert()
	}
}

// Old values of a partition's row, as far as the partition's own replica identity gives them: what it does not is not null.
func TestPartitionIdentities(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		t.Skip("PostgreSQL 12 cannot publish a partitioned table")
	}
	db.Exec(`
		create table p (id int primary key, a text, b text) partition by range (id);
		create table p1 partition of p for values from (0) to (100);
		create table p2 (b text, a text, id int not null primary key);
		alter table p attach partition p2 for values from (100) to (200);
		alter table p replica identity full;
		alter table p2 replica identity full;
		select sequin.create_stream('p', '{p}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into p values (1, 'x', 'y'), (101, 'x', 'y')`)
	db.Exec(`update p set a = 'z'`)
	db.Exec(`update p set id = id + 1, b = 'w'`)
	db.Exec(`delete from p`)
	awaitMessages(t, db, "p",
		`insert p 1 {"a": "x", "b": "y", "id": 1} -`,
		`insert p 101 {"a": "x", "b": "y", "id": 101} -`,
		`update p 1 {"a": "z", "b": "y", "id": 1} -`,
		`update p 101 {"a": "z", "b": "y", "id": 101} {"a": "x"}`,
		`update p 2 {"a": "z", "b": "w", "id": 2} {"id": 1}`,
		`update p 102 {"a": "z", "b": "w", "id": 102} {"b": "y", "id": 101}`,
		`delete p 2 {"id": 2} -`,
		`delete p 102 {"a": "z", "b": "w", "id": 102} -`)

	// Where each partition's is full, what is null in an old row was null; but a row that has nothing but its key counts as its
	// key where the whole of it may not have been sent.
	before := messages(t, db, "p")
	db.Exec(`alter table p1 replica identity full`)
	db.Exec(`insert into p (id, a) values (1, null), (101, null), (102, 'x')`)
	db.Exec(`update p set a = 'z' where id = 1`)
	db.Exec(`update p set id = id + 2, b = 'w' where id > 100`)
	db.Exec(`update p set a = null`)
	db.Exec(`delete from p where id in (1, 104)`)
	awaitMessages(t, db, "p", append(before,
		`insert p 1 {"a": null, "b": null, "id": 1} -`,
		`insert p 101 {"a": null, "b": null, "id": 101} -`,
		`insert p 102 {"a": "x", "b": null, "id": 102} -`,
		`update p 1 {"a": "z", "b": null, "id": 1} {"a": null}`,
		`update p 103 {"a": null, "b": "w", "id": 103} {"id": 101}`,
		`update p 104 {"a": "x", "b": "w", "id": 104} {"b": null, "id": 102}`,
		`update p 1 {"a": null, "b": null, "id": 1} {"a": "z"}`,
		`update p 103 {"a": null, "b": "w", "id": 103} {}`,
		`update p 104 {"a": null, "b": "w", "id": 104} {"a": "x"}`,
		`delete p 1 {"id": 1} -`,
		`delete p 104 {"a": null, "b": "w", "id": 104} -`)...)
}

// A partition's old rows are what its own replica identity was when they were written, whatever has become of it, and of the
// partition, since.
func TestPartitionIdentitiesThen(t *testing.T) {
	t.Parallel()
	for _, then := range []string{
		`alter table p2 replica identity full`, `alter table p detach partition p2`, `drop table p`,
	} {
		t.Run(then, func(t *testing.T) {
			t.Parallel()
			db := pgtest.New(t)
			if db.Major() < 13 {
				t.Skip("PostgreSQL 12 cannot publish a partitioned table")
			}
			db.Exec(`create table p (id int primary key, a text, b text) partition by range (id);
				create table p1 partition of p for values from (0) to (100);
				create table p2 partition of p for values from (100) to (200);
				alter table p replica identity full;
				alter table p1 replica identity full;
				select sequin.create_stream('p', '{p}', mode => 'changes')`)
			stop := pgtest.StartBridge(t, db.URL)
			db.Exec(`insert into p values (101, 'x', 'y')`)
			awaitLog(t, db, 1)
			stop()
			db.Exec(`update p set id = 102, b = 'w'`)
			db.Exec(`delete from p`)
			db.Exec(then)
			pgtest.StartBridge(t, db.URL)
			awaitMessages(t, db, "p",
				`insert p 101 {"a": "x", "b": "y", "id": 101} -`,
				`update p 102 {"a": "x", "b": "w", "id": 102} {"id": 101}`,
				`delete p 102 {"id": 102} -`)
		})
	}
}

// A partitioned table that is renamed, or goes to another schema, comes under its new name before long, and loses nothing.
func TestPartitionedRenamed(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		t.Skip("PostgreSQL 12 cannot publish a partitioned table")
	}
	// The server is looked at so much more often.
	db.Exec(fmt.Sprintf(`alter database %s set wal_sender_timeout = '2s'`, db.Name))
	db.Exec(`create table p (id int primary key) partition by range (id); create table p1 partition of p for values from (0) to (10000);
		create schema other; select sequin.create_stream('p', '{p}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	made := 0
	awaitName := func(name string) {
		t.Helper()
		pgtest.Eventually(t, 30*time.Second, func() error {
			made++
			db.Exec(fmt.Sprintf(`insert into %s values (%d)`, name, made))
			if got := pgtest.Column[string](db, `select table_schema || '.' || table_name from sequin.log order by seq desc limit 1`); len(got) != 1 || got[0] != name {
				return fmt.Errorf("the last change is of %q, want %s", got, name)
			}
			return nil
		})
	}
	awaitName("public.p")
	db.Exec(`alter table p rename to q`)
	awaitName("public.q")
	db.Exec(`alter table q set schema other`)
	awaitName("other.q")
	awaitLog(t, db, made)
	if got := pgtest.Value[int](db, `select count(distinct record_pk)::int from sequin.log`); got != made {
		t.Errorf("the log has %d rows, want %d", got, made)
	}
}

// A partition whose old rows come without its root's key is refused, and named where it comes later; the statement that is
// named with it mends it. Until then an update of its rows is no end of them.
func TestPartitionKeys(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		t.Skip("PostgreSQL 12 cannot publish a partitioned table")
	}
	for n, test := range []struct{ root, leaf, mend string }{
		{"default", "using index p1_code", "alter table public.p1 replica identity default;"},
		{"full", "using index p1_code", "alter table public.p1 replica identity full;"},
		{"using index \"the Index\"", "default", "alter table public.p1 replica identity using index p1_id_code_idx;"},
		{"using index \"the Index\"", "using index p1_code", "alter table public.p1 replica identity using index p1_id_code_idx;"},
		{"default", "using index p1_id_code_idx", ""},
		{"using index \"the Index\"", "full", ""},
		{"default", "full", ""},
	} {
		db.Exec(`create table p (id int primary key, code text not null, a text) partition by range (id);
			create unique index "the Index" on p (id, code);
			create table p0 partition of p for values from (0) to (100) partition by range (id);
			create table p1 partition of p0 for values from (0) to (100);
			create unique index p1_code on p1 (code);
			alter table p replica identity ` + test.root + `; alter table p1 replica identity ` + test.leaf)
		if test.mend != "" {
			e := db.Error(`select sequin.create_stream('p', '{p}')`)
			if e.Code != "55000" || e.Hint != test.mend || !strings.HasPrefix(e.Message, "the replica identity of partition public.p1 lacks columns of the key of public.p:") {
				t.Errorf("%d: got %v, %s", n, e, e.Hint)
			}
			db.Exec(test.mend)
		}
		db.Exec(`select sequin.create_stream('p', '{p}')`)
		if test.mend != "" {
			db.Exec(`alter table p1 replica identity ` + test.leaf)
			awaitHealth(t, db, "error table public.p the replica identity of its partition public.p1 lacks columns of its key: updates and deletes of its rows come "+
				"without it "+test.mend)
			db.Exec(test.mend)
		}
		if got := pgtest.Column[string](db, `select detail from sequin.health() where name like 'table%'`); len(got) > 0 {
			t.Errorf("%d: health() says %q", n, got)
		}
		db.Exec(`select sequin.drop_stream('p'); drop table p`)
	}

	db.Exec(`create table p (id int primary key, code text not null, a text) partition by range (id);
		create table p1 partition of p for values from (0) to (100);
		create unique index p1_code on p1 (code);
		select sequin.create_stream('p', '{p}');
		alter table p1 replica identity using index p1_code`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into p values (1, 'x', 'a')`)
	db.Exec(`update p set code = 'y', a = 'b'`)
	db.Exec(`alter table p1 replica identity default`)
	db.Exec(`delete from p`)
	awaitMessages(t, db, "p",
		`insert p 1 {"a": "a", "id": 1, "code": "x"} -`,
		`update p 1 {"a": "b", "id": 1, "code": "y"} -`,
		`delete p 1 {"id": 1} -`)
}

// Partitions that come and go, are moved into, and are truncated.
func TestPartitionsComeAndGo(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		t.Skip("PostgreSQL 12 cannot publish a partitioned table")
	}
	db.Exec(`
		create table p (id int, k text, a text, primary key (id, k)) partition by list (k);
		create table pa partition of p for values in ('a') partition by range (id);
		create table pa1 partition of pa for values from (0) to (10);
		select sequin.create_stream('p', '{p}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into p values (1, 'a', 'x')`)
	db.Exec(`begin; create table pb partition of p for values in ('b'); insert into p values (2, 'b', 'x'); insert into pb values (3, 'b', 'x');
		alter table p add c int; insert into p values (4, 'b', 'x', 7); commit`)
	db.Exec(`create table pc (k text not null, gone int, id int not null, c int, a text, primary key (id, k)); alter table pc drop gone`)
	if db.Major() > 14 { // 13 and 14 forget to look again at what they have seen as a table of its own
		db.Exec(`insert into pc values ('c', 5, null, 'before it belongs to anything')`)
	}
	db.Exec(`alter table p attach partition pc for values in ('c')`)
	db.Exec(`insert into p values (6, 'c', 'x', 8)`)
	db.Exec(`update p set k = 'c' where id = 1`)
	db.Exec(`create table pa2 partition of pa for values from (10) to (20); insert into pa values (11, 'a', 'deep')`)
	db.Exec(`alter table p detach partition pb`)
	db.Exec(`truncate p`)
	db.Exec(`insert into p values (12, 'a', 'last')`)
	awaitMessages(t, db, "p",
		`insert p 1,a {"a": "x", "k": "a", "id": 1} -`,
		`insert p 2,b {"a": "x", "k": "b", "id": 2} -`,
		`insert p 3,b {"a": "x", "k": "b", "id": 3} -`,
		`insert p 4,b {"a": "x", "c": 7, "k": "b", "id": 4} -`,
		`insert p 6,c {"a": "x", "c": 8, "k": "c", "id": 6} -`,
		`delete p 1,a {"k": "a", "id": 1} -`,
		`insert p 1,c {"a": "x", "c": null, "k": "c", "id": 1} -`,
		`insert p 11,a {"a": "deep", "c": null, "k": "a", "id": 11} -`,
		`truncate p - - -`,
		`insert p 12,a {"a": "last", "c": null, "k": "a", "id": 12} -`)
}

// A truncate of several tables is a message of each; one that cascades, also of those that it takes along.
func TestTruncates(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table a (id int primary key); create table b (id int primary key, a int references a); create table c (id serial primary key);
		create table quiet (id int primary key, a int references a);
		select sequin.create_stream('all', '{a,b,c}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`begin; insert into a values (1); truncate a, c restart identity cascade; insert into a values (2); commit`)
	awaitMessages(t, db, "all",
		`insert a 1 {"id": 1} -`, `truncate a - - -`, `truncate c - - -`, `truncate b - - -`, `insert a 2 {"id": 2} -`)
}

// Transactions in two phases come when they are committed; what is rolled back, whole or to a savepoint, never does.
func TestTransactionsOfAllKinds(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, map[string]string{"max_prepared_transactions": "10"}))
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	stop := pgtest.StartBridge(t, db.URL)
	for _, sql := range []string{
		`begin; insert into t values (1); prepare transaction 'kept'`,
		`begin; insert into t values (2); prepare transaction 'lost'`,
		`insert into t values (3)`,
		`begin; insert into t values (4); savepoint a; insert into t values (5); savepoint b; insert into t values (6); rollback to a;
		 insert into t values (7); savepoint c; insert into t values (8); release c; commit`,
		`begin; insert into t values (9); rollback`,
		`do $$ begin for i in 10..12 loop begin insert into t values (i); if i = 11 then raise 'no'; end if; exception when others then null; end; end loop; end $$`,
		`rollback prepared 'lost'`,
		// What others write into the WAL is nothing to us, whatever it is called, and whether it is rolled back.
		`select pg_logical_emit_message(false, 'sequin', 'x'), pg_logical_emit_message(true, 'sequin', 'x')`,
		`begin; insert into t values (14); select pg_logical_emit_message(false, 'sequin', 'x'); rollback`,
		// What a subscription of this database's own applies is a change like any other.
		`select pg_replication_origin_create('upstream')`,
		`do $$ begin perform pg_replication_origin_session_setup('upstream'); insert into t values (15); perform pg_replication_origin_session_reset(); end $$`,
	} {
		db.Exec(sql)
	}
	awaitKeys(t, db, "3", "4", "7", "8", "10", "12", "15")
	stop()
	pgtest.StartBridge(t, db.URL)
	db.Exec(`commit prepared 'kept'`)
	db.Exec(`insert into t values (13)`)
	awaitKeys(t, db, "3", "4", "7", "8", "10", "12", "15", "1", "13")
	if pgtest.Value[bool](db, `select coalesce(bool_or((to_jsonb(s) ->> 'two_phase')::boolean), false) from pg_replication_slots s`) {
		t.Error("the slot is two-phase")
	}
}

// What is not in the WAL as rows is refused by what it is; and a streamed table cannot become it.
func TestNotStreamable(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	conn := db.Connect()
	for _, test := range []struct{ make, name, want string }{
		{`create unlogged table u (id int primary key)`, "u", "is an unlogged table"},
		{`create temporary table tmp (id int primary key)`, "tmp", "is a temporary table"},
		{`create sequence s`, "s", "is a sequence"},
		{`create view v as select 1 as id`, "v", "is a view"},
		{`create materialized view mv as select 1 as id`, "mv", "is a materialized view"},
	} {
		if _, err := conn.Exec(t.Context(), test.make); err != nil {
			t.Fatal(err)
		}
		_, err := conn.Exec(t.Context(), `select sequin.create_stream('x', array[$1])`, test.name)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v", test.make, err)
		}
	}
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	if e := db.Error(`alter table t set unlogged`); !strings.Contains(e.Message, "publication") {
		t.Errorf("got %v", e)
	}
	if db.Major() < 13 {
		return
	}
	// Partitions may be anything, and become so while their table is streamed.
	db.Exec(`create table p (id int primary key) partition by range (id);
		create table p1 partition of p for values from (0) to (10);
		create unlogged table p2 partition of p for values from (10) to (20)`)
	if e := db.Error(`select sequin.create_stream('p', '{p}')`); e.Code != "55000" || !strings.HasPrefix(e.Hint, "alter table public.p2 set logged;") {
		t.Errorf("got %v, %s", e, e.Hint)
	}
	db.Exec(`drop table p2; select sequin.create_stream('p', '{p}')`)
	db.Exec(`create unlogged table p2 partition of p for values from (10) to (20)`)
	awaitHealth(t, db, "error table public.p its partition public.p2 is unlogged or foreign: what is written there is not captured", "alter table public.p2 set logged;")
	db.Exec(`drop table p2; alter table p1 replica identity nothing`)
	awaitHealth(t, db, "error table public.p its partition public.p1 has no primary key or replica identity", "alter table public.p1")
	db.Exec(`alter table p1 replica identity default`)
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where name like 'table%'`); n != 0 {
		t.Errorf("health() has %d tables", n)
	}
}

// A replica identity that includes more than its key, and keys whose columns are renamed.
func TestKeys(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int, a text, primary key (id) include (a)); alter table t replica identity full;
		select sequin.create_stream('t', '{t}', mode => 'changes')`)
	stop := pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into t values (1, 'x')`)
	db.Exec(`update t set a = 'y'`)
	awaitMessages(t, db, "t", `insert t 1 {"a": "x", "id": 1} -`, `update t 1 {"a": "y", "id": 1} {"a": "x"}`)
	stop()
	db.Exec(`insert into t values (2, 'x')`)
	db.Exec(`alter table t rename id to id2`)
	db.Exec(`insert into t values (3, 'x')`)
	pgtest.StartBridge(t, db.URL)
	awaitMessages(t, db, "t", `insert t 1 {"a": "x", "id": 1} -`, `update t 1 {"a": "y", "id": 1} {"a": "x"}`,
		`insert t 2 {"a": "x", "id": 2} -`, `insert t 3 {"a": "x", "id2": 3} -`)
}

// A replica identity whose index was dropped names no columns: the primary key does.
func TestKeyWithoutIdentity(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, code text not null unique); alter table t replica identity using index t_code_key;
		select sequin.create_stream('t', '{t}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into t values (1, 'a')`)
	db.Exec(`alter table t drop constraint t_code_key`)
	db.Exec(`insert into t values (2, 'b')`)
	awaitMessages(t, db, "t", `insert t a {"id": 1, "code": "a"} -`, `insert t 2 {"id": 2, "code": "b"} -`)
}

// A row's key is what it was when it was written, whatever its columns, or others, have come to be called since, and
// whatever the key is by now.
func TestKeysThen(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, make, first, then string
		want                    []string
	}{
		{
			"renamed twice", `create table t (id int primary key, n int); alter table t replica identity full`, `insert into t values (1, 0)`,
			`alter table t rename id to b; update t set n = 1; alter table t rename b to c`,
			[]string{`insert t 1 {"n": 0, "id": 1} -`, `update t 1 {"b": 1, "n": 1} {"n": 0}`},
		},
		{
			"renamed twice beside a dropped one",
			`create table t (x int, id int primary key, n int); alter table t drop x; alter table t replica identity full`, `insert into t values (1, 0)`,
			`alter table t rename id to b; update t set n = 1; alter table t rename b to c`,
			[]string{`insert t 1 {"n": 0, "id": 1} -`, `update t 1 {"b": 1, "n": 1} {"n": 0}`},
		},
		{
			"names changed places", `create table t (id int primary key, code int, n int); alter table t replica identity full`, `insert into t values (1, 2, 0)`,
			`begin; update t set n = 1; alter table t rename id to tmp; alter table t rename code to id; alter table t rename tmp to code; update t set n = 2; commit`,
			[]string{
				`insert t 1 {"n": 0, "id": 1, "code": 2} -`, `update t 1 {"n": 1, "id": 1, "code": 2} {"n": 0}`,
				`update t 1 {"n": 2, "id": 2, "code": 1} {"n": 1}`,
			},
		},
		{
			"another key", `create table t (id int, k text, n int, primary key (k, id))`, `insert into t values (1, 'x', 0)`,
			`update t set n = 1; alter table t drop constraint t_pkey, add primary key (id); update t set n = 2`,
			[]string{
				`insert t x,1 {"k": "x", "n": 0, "id": 1} -`, `update t x,1 {"k": "x", "n": 1, "id": 1} -`, `update t 1 {"k": "x", "n": 2, "id": 1} -`,
			},
		},
		{
			"another column of its name", `create table t (id int primary key, new_id bigint not null); alter table t replica identity full`,
			`insert into t values (1, -1)`,
			`update t set new_id = 1; begin; alter table t drop constraint t_pkey; alter table t rename id to old_id; alter table t rename new_id to id; alter table t add primary key (id); commit; update t set old_id = 0`,
			[]string{
				`insert t 1 {"id": 1, "new_id": -1} -`, `update t 1 {"id": 1, "new_id": 1} {"new_id": -1}`, `update t 1 {"id": 1, "old_id": 0} {"old_id": 1}`,
			},
		},
		{
			"another order", `create table t (x int, y text, v int, primary key (y, x))`, `insert into t values (1, 'a', 0)`,
			`update t set v = 1; alter table t drop constraint t_pkey, add primary key (x, y); update t set v = 2`,
			[]string{
				`insert t a,1 {"v": 0, "x": 1, "y": "a"} -`, `update t a,1 {"v": 1, "x": 1, "y": "a"} -`, `update t 1,a {"v": 2, "x": 1, "y": "a"} -`,
			},
		},
		{
			"another key of whole rows", `create table t (id int primary key, code int not null, v int); alter table t replica identity full`,
			`insert into t values (1, 100, 0)`,
			`update t set v = 1; alter table t drop constraint t_pkey, add primary key (code); update t set v = 2; analyze t; update t set v = 3`,
			[]string{
				`insert t 1 {"v": 0, "id": 1, "code": 100} -`, `update t 1 {"v": 1, "id": 1, "code": 100} {"v": 0}`,
				`update t 100 {"v": 2, "id": 1, "code": 100} {"v": 1}`, `update t 100 {"v": 3, "id": 1, "code": 100} {"v": 2}`,
			},
		},
		{
			"another key in a savepoint", `create table t (id int primary key, code int not null, v int); alter table t replica identity full`,
			`insert into t values (1, 100, 0)`,
			`begin; update t set v = 1; savepoint s; alter table t drop constraint t_pkey, add primary key (code); release s; commit; update t set v = 2`,
			[]string{
				`insert t 1 {"v": 0, "id": 1, "code": 100} -`, `update t 1 {"v": 1, "id": 1, "code": 100} {"v": 0}`,
				`update t 100 {"v": 2, "id": 1, "code": 100} {"v": 1}`,
			},
		},
		{
			"names changed places, and others'", `create table t (id int primary key, code int, n int); alter table t replica identity full`,
			`insert into t values (1, 2, 3)`,
			`begin; alter table t rename id to tmp; alter table t rename code to id; alter table t rename tmp to code; commit; ` +
				`insert into t (code, id, n) values (11, 12, 13); ` +
				`begin; alter table t rename code to tmp; alter table t rename n to code; alter table t rename tmp to n; commit; ` +
				`insert into t (n, id, code) values (21, 22, 23)`,
			[]string{
				`insert t 1 {"n": 3, "id": 1, "code": 2} -`, `insert t 11 {"n": 13, "id": 12, "code": 11} -`, `insert t 21 {"n": 21, "id": 22, "code": 23} -`,
			},
		},
		{
			"others dropped and added", `create table t (x int, id int primary key, n int); alter table t replica identity full`, `insert into t values (7, 1, 0)`,
			`update t set n = 1; alter table t drop x, add y int; update t set n = 2`,
			[]string{
				`insert t 1 {"n": 0, "x": 7, "id": 1} -`, `update t 1 {"n": 1, "x": 7, "id": 1} {"n": 0}`, `update t 1 {"n": 2, "y": null, "id": 1} {"n": 1}`,
			},
		},
	} {
		for _, isBehind := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, behind %t", test.name, isBehind), func(t *testing.T) {
				t.Parallel()
				db := pgtest.New(t)
				db.Exec(test.make + `; select sequin.create_stream('t', '{t}', mode => 'changes')`)
				stop := pgtest.StartBridge(t, db.URL)
				conn := db.Connect()
				db.Exec(test.first)
				awaitMessages(t, db, "t", test.want[0])
				if isBehind {
					stop()
				}
				for _, statement := range strings.SplitAfter(test.then, "; ") {
					if _, err := conn.Exec(t.Context(), statement); err != nil {
						t.Fatal(err)
					}
				}
				if isBehind {
					pgtest.StartBridge(t, db.URL)
				}
				awaitMessages(t, db, "t", test.want...)
			})
		}
	}
}

// A bridge that is started again knows the key as it was where the log ends, whatever another stream has been made by since.
func TestKeyOnRecord(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, make, then, first, second string }{
		{
			"another key", `create table t (id int primary key, code int); alter table t replica identity full`,
			`alter table t drop constraint t_pkey, add primary key (code)`, `insert t 1 {"id": 1, "code": 100} -`, `insert t 2 {"id": 2, "code": 200} -`,
		},
		{
			"another name beside a dropped one", `create table t (gone int default 0, id int, code int, primary key (code, id))`,
			`alter table t drop gone, add a int, add b int; alter table t rename code to number`,
			`insert t 100,1 {"id": 1, "code": 100, "gone": 0} -`, `insert t 200,2 {"id": 2, "code": 200, "gone": 0} -`,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.New(t)
			db.Exec(test.make + `; select sequin.create_stream('t', '{t}', mode => 'changes')`)
			stop := pgtest.StartBridge(t, db.URL)
			db.Exec(`insert into t (id, code) values (1, 100)`)
			awaitMessages(t, db, "t", test.first)
			stop()
			db.Exec(`insert into t (id, code) values (2, 200)`)
			db.Exec(test.then)
			db.Exec(`select sequin.create_stream('again', '{t}')`)
			pgtest.StartBridge(t, db.URL)
			awaitMessages(t, db, "t", test.first, test.second)
		})
	}
}

// Generated columns: from 18 on the stored ones are there, and never is an update of the user's made to fail.
func TestGeneratedColumns(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, a int, d int generated always as (a * 2) stored); alter table t replica identity full;
		select sequin.create_stream('t', '{t}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into t (id, a) values (1, 2)`)
	db.Exec(`update t set a = 3`)
	if db.Major() >= 18 {
		awaitMessages(t, db, "t", `insert t 1 {"a": 2, "d": 4, "id": 1} -`, `update t 1 {"a": 3, "d": 6, "id": 1} {"a": 2, "d": 4}`)
		db.Exec(`create table v (id int primary key, a int, d int generated always as (a * 2) virtual)`)
		db.Exec(`select sequin.create_stream('v', '{v}')`)
		db.Exec(`insert into v (id, a) values (1, 2); update v set a = 3; delete from v`)
		awaitMessages(t, db, "v", `insert v 1 {"a": 2, "id": 1} -`, `update v 1 {"a": 3, "id": 1} -`, `delete v 1 {"id": 1} -`)
		db.Exec(`create table w (id int primary key, a int, d int generated always as (a * 2) virtual); alter table w replica identity full`)
		if e := db.Error(`select sequin.create_stream('w', '{w}')`); e.Code != "55000" || !strings.Contains(e.Hint, "replica identity default") {
			t.Errorf("got %v", e)
		}
		// What would make them fail is not said to mend anything, and named where it is there.
		noticed := notices(t, db, `drop table w; select sequin.create_stream('w', '{v}', mode => 'changes'), sequin.create_pipeline('w', 'v', 'v_events')`)
		if strings.Contains(noticed, "alter table") || strings.Count(noticed, "They cannot be had beside a virtual generated column") != 2 {
			t.Errorf("got %s", noticed)
		}
		db.Exec(`alter table v replica identity full`)
		awaitHealth(t, db, "error table public.v the table has replica identity full and a virtual generated column: its updates and deletes fail "+
			"alter table public.v replica identity default;")
		db.Exec(`alter table v replica identity default;
			create table p (id int primary key, a int, d int generated always as (a * 2) virtual) partition by range (id); select sequin.create_stream('p', '{p}');
			create table p1 partition of p for values from (0) to (100); alter table p1 replica identity full; insert into p values (1, 2)`)
		if e := db.Error(`update p set a = 3`); !strings.Contains(e.Detail, "unpublished generated columns") {
			t.Errorf("got %v", e)
		}
		mend := "alter table public.p1 replica identity default;"
		awaitHealth(t, db, "error table public.p its partition public.p1 has replica identity full and a virtual generated column: updates and deletes of its "+
			"rows fail "+mend)
		db.Exec(mend)
		db.Exec(`update p set a = 3`)
		if got := pgtest.Column[string](db, `select detail from sequin.health() where name like 'table%'`); len(got) > 0 {
			t.Errorf("health() says %q", got)
		}
		return
	}
	awaitMessages(t, db, "t", `insert t 1 {"a": 2, "id": 1} -`, `update t 1 {"a": 3, "id": 1} {"a": 2}`)
}

// notices runs statements, and returns what the server has noted, with its hints.
func notices(t *testing.T, db *pgtest.DB, sql string) string {
	t.Helper()
	config := db.Pool.Config().ConnConfig
	var all strings.Builder
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { fmt.Fprintln(&all, n.Message, n.Hint) }
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// Databases of other encodings: what they hold comes through as it is, and nothing of it stops the bridge.
func TestEncodings(t *testing.T) {
	t.Parallel()
	for _, encoding := range []string{"LATIN1", "SQL_ASCII", "EUC_JP", "WIN1251"} {
		t.Run(encoding, func(t *testing.T) {
			t.Parallel()
			db := pgtest.NewIn(t, `encoding '`+encoding+`' lc_collate 'C' lc_ctype 'C'`)
			db.Exec(fmt.Sprintf(`alter database %s set client_encoding = %s`, db.Name, encoding))
			db.Pool.Reset()
			// A letter that each has, made of bytes, as the driver speaks UTF-8.
			letter := map[string]string{"LATIN1": `\xe9`, "SQL_ASCII": `\xff80`, "EUC_JP": `\xa4a2`, "WIN1251": `\xe6`}[encoding]
			db.Exec(fmt.Sprintf(`create function letter() returns text language sql immutable as $$ select convert_from('%s', '%s') $$`, letter, encoding))
			db.Exec(`do $$ begin execute format('create table %I (id int primary key, %I text, j json)', 't' || letter(), letter()); end $$`)
			db.Exec(`do $$ begin perform sequin.create_stream('t', array['t' || letter()], mode => 'changes'); end $$`)
			pgtest.StartBridge(t, db.URL)
			db.Exec(`do $$ begin execute format('insert into %I values (1, letter(), ''{"a": "\u00e9\u2603"}''), (2, ''x'' || letter(), to_json(letter()))', 't' || letter()); end $$`)
			awaitLog(t, db, 2)
			for _, sql := range []string{
				`select bool_and(table_name = 't' || letter()) from sequin.log`,
				`select record ->> letter() = letter() from sequin.log where record_pk = '1'`,
				`select record ->> letter() = 'x' || letter() from sequin.log where record_pk = '2'`,
				`select record ->> 'j' = '{"a": "\u00e9\u2603"}' from sequin.log where record_pk = '1'`,
				`select record ->> 'j' = letter() from sequin.log where record_pk = '2'`,
			} {
				if !pgtest.Value[bool](db, sql) {
					t.Errorf("not so: %s", sql)
				}
			}
		})
	}
}

// Whatever a database and a role have as their settings, the bridge does its work.
func TestSettings(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	settings := map[string]string{
		"statement_timeout": "50ms", "lock_timeout": "10ms", "idle_in_transaction_session_timeout": "50ms",
		"default_transaction_read_only": "on", "default_transaction_isolation": "serializable", "default_transaction_deferrable": "on",
		"search_path": "nowhere", "row_security": "off", "client_min_messages": "error", "synchronous_commit": "off", "timezone": "Asia/Tokyo",
		"wal_sender_timeout": "2s", "standard_conforming_strings": "off", "quote_all_identifiers": "on", "check_function_bodies": "off",
	}
	if db.Major() >= 14 {
		settings["idle_session_timeout"] = "100ms"
	}
	if db.Major() >= 17 {
		settings["transaction_timeout"] = "50ms"
	}
	db.Exec(`create table t (id int primary key, at timestamptz, a text); select sequin.create_stream('t', '{t}'); select sequin.create_consumer('c', 't')`)
	// What the schema's owner sets is the hardest: these are its own.
	role := "owner_" + db.Name
	db.Exec(`create role ` + role + ` superuser login`)
	db.Cleanup(func() { db.Exec(`drop role ` + role) })
	for name, value := range settings {
		for _, of := range []string{"database " + db.Name, "role " + role} {
			db.Exec(fmt.Sprintf(`alter %s set %s = '%s'`, of, name, value))
		}
	}
	b := pgtest.BridgeProcess(t, db.URLAs(role))
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t select i, '2026-01-01 00:00+00', 'a\b' from generate_series(1, 20000) i`)
	awaitLog(t, db, 20000)
	time.Sleep(3 * time.Second) // longer than any of them
	db.Exec(`insert into t values (0)`)
	awaitLog(t, db, 20001)
	if got := pgtest.Value[string](db, `select record::text from sequin.log where record_pk = '7'`); got != `{"a": "a\\b", "at": "2026-01-01T00:00:00+00:00", "id": 7}` {
		t.Errorf("got %s", got)
	}
	if strings.Count(b.Log(), "msg=capturing") != 1 || strings.Contains(b.Log(), "level=WARN") {
		t.Errorf("it was interrupted: %s", b.Log())
	}
	if err := b.Stop(); err != nil {
		t.Errorf("%v: %s", err, b.Log())
	}
}
