package sources

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// pair is a database with a bridge, and a source called far.
func pair(t *testing.T) (home, far *pgtest.DB) {
	t.Helper()
	t.Parallel()
	home, far = pgtest.New(t), pgtest.Empty(t)
	createSource(home, "far", far.URL)
	pgtest.StartBridge(t, home.URL)
	return home, far
}

// awaitStream waits until a stream is as wanted: active, or what its error has in it.
func awaitStream(t *testing.T, home *pgtest.DB, name, want string) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		got := pgtest.Value[string](home, `select state || coalesce(': ' || error, '') from sequin.streams where name = $1`, name)
		if !strings.HasPrefix(got, want) {
			return fmt.Errorf("stream %s is %s, not %s", name, got, want)
		}
		return nil
	})
}

func create(home *pgtest.DB, name, tables string, more string) {
	home.Helper()
	home.Exec(`select sequin.create_stream('` + name + `', '` + tables + `', source => 'far'` + more + `)`)
}

// A table that cannot be streamed is refused with the reason and the statement that mends it, and captured once it is
// mended. It never makes its owner's own updates fail.
func TestTables(t *testing.T) {
	home, far := pair(t)
	far.Exec(`
		create table good (id int primary key);
		create table bare (id int);
		create unlogged table fast (id int primary key);
		create view seen as select 1 as id;
		create table nothing (id int primary key); alter table nothing replica identity nothing;
		create schema s; create table s."Mixed Case" (id int primary key, "group" text)`)
	for name, want := range map[string]string{
		"good": "active", "bare": "error: public.bare has no primary key", "fast": "error: public.fast is an unlogged table",
		"seen": "error: public.seen is a view", "nothing": "error: public.nothing has no primary key",
		"missing": "error: table missing does not exist on the source", `s."Mixed Case"`: "active",
	} {
		create(home, name, `{"`+strings.ReplaceAll(name, `"`, `\"`)+`"}`, "")
		awaitStream(t, home, name, want)
	}
	create(home, "sorted", "{good}", ", sort_column => 'no'")
	awaitStream(t, home, "sorted", `error: sort_column: table public.good has no column "no"`)
	far.Exec(`insert into bare values (1); update bare set id = 2; insert into nothing values (1); update nothing set id = 2`)
	awaitHealth(t, home, "stream bare | error | table bare of source far: public.bare has no primary key or replica identity, "+
		"so its updates and deletes would fail once published | On the source: alter table public.bare add primary key (…)")
	far.Exec(`alter table bare add primary key (id); create table missing (id int primary key)`)
	awaitStream(t, home, "bare", "active")
	awaitStream(t, home, "missing", "active")
	far.Exec(`insert into bare values (3); insert into missing values (4); insert into s."Mixed Case" values (5, 'x')`)
	awaitMessages(t, home, `select concat_ws(' ', stream, table_schema, table_name, record_pk) from sequin.messages order by seq`,
		"bare public bare 3", "missing public missing 4", `s."Mixed Case" s Mixed Case 5`)

	// What a consumer groups by is checked as far as it is known.
	if e := home.Error(`select sequin.create_consumer('c', 's."Mixed Case"', group_by => '{groop}')`); e.Code != "42703" || !strings.Contains(e.Hint, "group") {
		t.Errorf("got %s: %s (%s)", e.Code, e.Message, e.Hint)
	}
	home.Exec(`select sequin.create_consumer('c', 's."Mixed Case"', group_by => '{group}')`)
	far.Exec(`insert into s."Mixed Case" values (6, 'y')`)
	if got := pgtest.Column[string](home, `select record_pk from sequin.pop('c', 10, '20s')`); fmt.Sprint(got) != "[6]" {
		t.Errorf("got %v", got)
	}

	// A table that is dropped there, or taken out of the publication, is said to be.
	far.Exec(`drop table missing; alter publication ` + publication(home) + ` drop table bare`)
	awaitHealth(t, home, "stream missing | error | table missing of source far: table public.missing was dropped on the source",
		"stream bare | error | table bare of source far: table public.bare is not in publication")
	far.Exec(`alter publication ` + publication(home) + ` add table bare`)
	awaitStream(t, home, "bare", "active")
	awaitHealth(t, home, `gap in source far | error | lost changes from`, `table public.bare was out of publication`)
	// Out and back in between two looks, it has missed something all the same.
	home.Exec(`select sequin.accept_gap('far')`)
	far.Exec(`alter publication ` + publication(home) + ` drop table bare`)
	far.Exec(`alter publication ` + publication(home) + ` add table bare`)
	awaitHealth(t, home, `gap in source far | error | lost changes from`, `table public.bare was out of publication`)
}

func publication(home *pgtest.DB) string {
	return pgtest.Value[string](home, `select publication_name from sequin.sources where name = 'far'`)
}

func awaitMessages(t *testing.T, home *pgtest.DB, query string, want ...string) {
	t.Helper()
	pgtest.Eventually(t, 20*time.Second, func() error {
		if got := pgtest.Column[string](home, query); fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("got %q, want %q", got, want)
		}
		return nil
	})
}

// One table is one, however streams spell it, and whoever else streams it; the last one that goes takes it along.
func TestSameTable(t *testing.T) {
	home, far := pair(t)
	far.Exec(`create table a (id int primary key, note text); create table b (id int primary key)`)
	create(home, "one", "{a}", ", mode => 'changes'")
	awaitStream(t, home, "one", "active")
	create(home, "two", "{public.a,b}", "")
	home.Exec(`select sequin.create_consumer('c', 'two')`)
	awaitStream(t, home, "two", "active")
	create(home, "twice", "{b,public.b}", "")
	awaitStream(t, home, "twice", "error: the stream names table public.b twice")
	if got := pgtest.Value[string](home, `select sequin.create_stream('two', '{public.a,b}', source => 'far', if_not_exists => true)`); got != "unchanged" {
		t.Errorf("the same stream again is %s", got)
	}
	if e := home.Error(`select sequin.create_stream('two', '{a,b}', source => 'far', if_not_exists => true)`); e.Code != "42710" {
		t.Errorf("another stream of the name: got %s", e.Code)
	}
	far.Exec(`insert into a values (1); insert into b values (2)`)
	if n := len(pgtest.Column[int64](home, `select seq from sequin.pop('c', 10, '20s') limit 1`)); n != 1 {
		t.Errorf("got %d messages", n)
	}
	awaitMessages(t, home, `select stream || ' ' || table_name || record_pk from sequin.messages where stream <> 'twice' order by stream, seq`, "one a1", "two a1", "two b2")
	if n := pgtest.Value[int](home, `select count(*) from sequin.source_table where table_name = 'a'`); n != 1 {
		t.Errorf("table a is known %d times", n)
	}

	// A rename there is followed.
	far.Exec(`alter table a rename to c; insert into c values (3)`)
	awaitMessages(t, home, `select table_name || record_pk from sequin.messages where stream = 'one' order by seq`, "a1", "c3")

	// Who goes last takes the table out of the publication; who comes again misses nothing from then on.
	home.Exec(`select sequin.drop_consumer('c'); select sequin.drop_stream('two'); select sequin.drop_stream('twice')`)
	awaitPublished(t, far, "public.c")
	home.Exec(`select sequin.drop_stream('one')`)
	awaitPublished(t, far)
	create(home, "one", "{c}", "")
	awaitStream(t, home, "one", "active")
	far.Exec(`insert into c values (4)`)
	awaitMessages(t, home, `select table_name || record_pk from sequin.messages where stream = 'one' order by seq`, "c4")
	// At once, too: before the bridge has let go of it.
	for i := range 5 {
		home.Exec(`select sequin.drop_stream('one')`)
		create(home, "one", "{c}", "")
		awaitStream(t, home, "one", "active")
		far.Exec(`insert into c values ($1)`, 10+i)
		awaitMessages(t, home, `select table_name || record_pk from sequin.messages where stream = 'one' order by seq desc limit 1`, fmt.Sprintf("c%d", 10+i))
	}
}

func awaitPublished(t *testing.T, far *pgtest.DB, want ...string) {
	t.Helper()
	pgtest.Eventually(t, 20*time.Second, func() error {
		got := pgtest.Column[string](far, `select format('%I.%I', schemaname, tablename) from pg_publication_tables where pubname like 'sequin\_%' order by 1`)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("published are %v, not %v", got, want)
		}
		return nil
	})
}

// Captured is what is committed after the stream is active, whoever was writing to the table just then.
func TestPublishBesideWriters(t *testing.T) {
	t.Parallel()
	// On a server of its own: making a slot, anywhere on a server, waits for what is writing there.
	home, far := pgtest.New(t), pgtest.EmptyOn(t, pgtest.NewCluster(t, nil))
	createSource(home, "far", far.URL)
	pgtest.StartBridge(t, home.URL)
	awaitHealth(t, home, "source far | ok")
	far.Exec(`create table t (id int primary key); create table free (id int primary key)`)
	writer, err := far.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := writer.Exec(t.Context(), `insert into t values (1)`); err != nil {
		t.Fatal(err)
	}
	create(home, "t", "{t}", "")
	create(home, "free", "{free}", "")
	// It waits, and not for so long that others could not write; a table besides does not wait with it.
	awaitStream(t, home, "t", "error: table public.t is being written to")
	awaitStream(t, home, "free", "active")
	if _, err := writer.Exec(t.Context(), `insert into t values (2)`); err != nil {
		t.Fatal(err)
	}
	if err := writer.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitStream(t, home, "t", "active")
	far.Exec(`insert into t values (3)`)
	awaitMessages(t, home, `select record_pk from sequin.messages where stream = 't' order by seq`, "3")
}

// Partitions come under their root's name; types of the source's own are as at home.
func TestValues(t *testing.T) {
	home, far := pair(t)
	far.Exec(`create type mood as enum ('fine', 'bad'); create domain price as numeric(10, 2);
		create table t (a int, b text, m mood, p price[], primary key (b, a))`)
	create(home, "t", "{t}", "")
	awaitStream(t, home, "t", "active")
	far.Exec(`insert into t values (1, 'x,y', 'bad', '{1.50,2}')`)
	awaitMessages(t, home, `select record_pk || ' ' || record::text from sequin.messages order by seq`,
		`"x,y",1 {"a": 1, "b": "x,y", "m": "bad", "p": [1.50, 2.00]}`)
	if far.Major() < 13 {
		far.Exec(`create table parts (id int primary key) partition by range (id)`)
		create(home, "parts", "{parts}", "")
		awaitStream(t, home, "parts", "error: public.parts is partitioned, and PostgreSQL 12 cannot publish")
		return
	}
	far.Exec(`create table parts (id int primary key) partition by range (id); create table part_1 partition of parts for values from (0) to (10)`)
	create(home, "parts", "{parts}", "")
	create(home, "part", "{part_1}", "")
	awaitStream(t, home, "parts", "active")
	awaitStream(t, home, "part", "error: public.part_1 is a partition")
	far.Exec(`create table keyless (id int) partition by range (id); alter table keyless replica identity full`)
	create(home, "keyless", "{keyless}", "")
	awaitStream(t, home, "keyless", "error: public.keyless is partitioned and has no primary key")
	if far.Major() < 18 {
		far.Exec(`create table made (a int, k int generated always as (a * 2) stored primary key)`)
		create(home, "made", "{made}", "")
		awaitStream(t, home, "made", "error: the key of public.made has a generated column")
	}
	far.Exec(`insert into parts values (1)`)
	awaitMessages(t, home, `select table_name || ' ' || record_pk from sequin.messages where stream = 'parts'`, "parts 1")
}
