package pipelines

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// What an event is, for each action.
func TestEvents(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table orders (id int primary key, note text); alter table orders replica identity full`)
	db.Exec(`insert into orders values (100, 'before')`)
	pgtest.StartBridge(t, db.URL)
	if got := pgtest.Value[string](db, `select sequin.create_pipeline('history', 'orders', 'orders_events', '{insert,update,delete,truncate}')`); got != "created" {
		t.Errorf("got %s", got)
	}
	db.Exec(`insert into orders values (1, 'a'), (2, 'b')`)
	db.Exec(`update orders set note = 'c' where id = 1`)
	db.Exec(`update orders set id = 3 where id = 2`)
	db.Exec(`delete from orders where id = 1`)
	db.Exec(`truncate orders`)
	awaitEvents(db, "orders_events",
		`insert 1 {"id": 1, "note": "a"} -`,
		`insert 2 {"id": 2, "note": "b"} -`,
		`update 1 {"id": 1, "note": "c"} {"note": "a"}`,
		`update 3 {"id": 3, "note": "b"} {"id": 2}`,
		`delete 1 {"id": 1, "note": "c"} -`,
		`truncate - - -`,
	)
	// The columns, to the letter.
	got := pgtest.Column[string](db, `select a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '') || a.attidentity::text
		from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
		where a.attrelid = 'orders_events'::regclass and a.attnum > 0 order by a.attnum`)
	want := []string{
		"id bigint a", "seq bigint ", "source_database_id uuid ", "source_table_oid bigint ", "source_table_schema text ", "source_table_name text ",
		"record_pk text ", "record jsonb ", "changes jsonb ", "action text ", "committed_at timestamp with time zone ",
		"inserted_at timestamp with time zone now()",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v", got)
	}
	if n := pgtest.Value[int](db, `select count(*) from orders_events e
		join sequin.sources s on s.name = 'local' and s.database_id = e.source_database_id
		where e.source_table_oid = 'orders'::regclass::oid::bigint and e.source_table_schema = 'public' and e.source_table_name = 'orders'
		  and e.committed_at <= e.inserted_at + interval '1 second' and e.committed_at > now() - interval '1 hour'`); n != 6 {
		t.Errorf("%d events say where they are from and when", n)
	}
	if n := pgtest.Value[int](db, `select count(*) from orders_events e join sequin.log l using (seq) where l.committed_at = e.committed_at`); n != 6 {
		t.Errorf("%d events have the log's seq", n)
	}
	if got := pgtest.Value[string](db, `select concat_ws(' ', source_table, event_table, actions, filter, retention, state) from sequin.pipelines where name = 'history'`); got != "public.orders public.orders_events {delete,insert,truncate,update} active" {
		t.Errorf("sequin.pipelines has %s", got)
	}
	pgtest.Eventually(t, 10*time.Second, func() error {
		if got := pgtest.Value[string](db, `select concat_ws(' ', state, pending, rows_written, lag_seconds, last_seq = (select max(seq) from orders_events), error)
			from sequin.pipeline_status where name = 'history'`); got != "active 0 6 0 t" {
			return fmt.Errorf("sequin.pipeline_status has %s", got)
		}
		return nil
	})
	if got := pgtest.Value[string](db, `select status || ': ' || detail from sequin.health() where name = 'pipeline history'`); got != "ok: 0 pending, 6 written" {
		t.Errorf("sequin.health() has %s", got)
	}
	// Dropped, its table stays, and nothing more comes.
	db.Exec(`select sequin.drop_pipeline('history')`)
	if n := pgtest.Value[int](db, `select count(*) from pg_publication_tables where pubname = 'sequin'`); n != 0 {
		t.Errorf("%d tables are still published", n)
	}
	db.Exec(`insert into orders values (4, 'd')`)
	if n := pgtest.Value[int](db, `select count(*) from orders_events`); n != 6 {
		t.Errorf("%d events", n)
	}
}

// It starts with the first commit after the call: whatever was open then and commits later is in, what had committed is not, and
// so it is when the bridge is far behind.
func TestStart(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); select sequin.create_stream('s', '{item}')`)
	stop := pgtest.StartBridge(t, db.URL)
	stop()
	db.Exec(`insert into item select generate_series(1, 1000)`)
	open, err := db.Connect().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open.Exec(t.Context(), `insert into item values (2001)`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`select sequin.create_pipeline('p', 'item', 'events')`)
	db.Exec(`insert into item values (2002)`)
	if err := open.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	pgtest.StartBridge(t, db.URL)
	awaitEvents(db, "events", `insert 2002 {"id": 2002} -`, `insert 2001 {"id": 2001} -`)
	// And a second one beside it, of fewer actions, from where it was made.
	db.Exec(`select sequin.create_pipeline('q', 'item', 'deletes', '{delete}')`)
	db.Exec(`insert into item values (3000); delete from item where id in (3000, 2001)`)
	awaitEvents(db, "deletes", `delete 2001 {"id": 2001} -`, `delete 3000 {"id": 3000} -`)
	awaitCount(db, "events", 5)
	pgtest.Eventually(t, 10*time.Second, func() error {
		if got := pgtest.Column[string](db, `select pending || ' ' || rows_written from sequin.pipeline_status order by name`); fmt.Sprint(got) != "[0 5 0 2]" {
			return fmt.Errorf("pending and written: %v", got)
		}
		return nil
	})
}

// Nothing is written while it is paused, the log is kept for it, and nothing is lost.
func TestPause(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key);
		select sequin.create_pipeline('p', 'item', 'events'), sequin.create_pipeline('q', 'item', 'others'), sequin.set_retention('0 seconds')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1)`)
	awaitCount(db, "events", 1)
	for _, call := range []string{"resume unchanged", "pause paused", "pause unchanged"} {
		verb, want, _ := strings.Cut(call, " ")
		if got := pgtest.Value[string](db, `select sequin.`+verb+`_pipeline('p')`); got != want {
			t.Errorf("%s: got %s, want %s", verb, got, want)
		}
	}
	last := 1
	pgtest.Eventually(t, time.Minute, func() error { // until the log would have dropped what it needs
		last++
		db.Exec(`insert into item values ($1)`, last)
		if n := pgtest.Value[int](db, `select count(*) from sequin.log_segment`); n < 3 {
			return fmt.Errorf("%d segments", n)
		}
		return nil
	})
	awaitCount(db, "others", last)
	if n := pgtest.Value[int](db, `select count(*) from events`); n != 1 {
		t.Errorf("%d events while it was paused", n)
	}
	if got := pgtest.Value[string](db, `select state || ' ' || pending from sequin.pipeline_status where name = 'p'`); got != fmt.Sprintf("paused %d", last-1) {
		t.Errorf("got %s", got)
	}
	if got := pgtest.Value[string](db, `select sequin.resume_pipeline('p')`); got != "resumed" {
		t.Errorf("got %s", got)
	}
	awaitCount(db, "events", last)
	pgtest.Eventually(t, time.Minute, func() error { // and then the log lets go of it
		last++
		db.Exec(`insert into item values ($1)`, last)
		if n := pgtest.Value[int](db, `select count(*) from sequin.log_segment`); n > 2 {
			return fmt.Errorf("%d segments, and everything was written", n)
		}
		return nil
	})
	awaitCount(db, "events", last)
	awaitCount(db, "others", last)
	if n := pgtest.Value[int](db, `select count(*) from sequin.gap`); n != 0 {
		t.Errorf("%d gaps", n)
	}
}

// Actions are changed on the way.
func TestAlter(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); select sequin.create_pipeline('p', 'item', 'events', actions => '{delete}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1), (2); delete from item where id = 1`)
	awaitCount(db, "events", 1)
	if got := pgtest.Value[string](db, `select sequin.alter_pipeline('p', actions => '{delete}')`); got != "unchanged" {
		t.Errorf("got %s", got)
	}
	if got := pgtest.Value[string](db, `select sequin.alter_pipeline('p', actions => '{insert,delete}')`); got != "altered" {
		t.Errorf("got %s", got)
	}
	db.Exec(`insert into item values (3); delete from item where id = 2`)
	awaitEvents(db, "events", `delete 1 {"id": 1} -`, `insert 3 {"id": 3} -`, `delete 2 {"id": 2} -`)
	// The same definition again is none, however many say it at once, and another is refused.
	made := make(chan string, 8)
	for range cap(made) {
		go func() {
			var result string
			if err := db.Pool.QueryRow(context.Background(), `select sequin.create_pipeline('q', 'item', 'made', if_not_exists => true)`).Scan(&result); err != nil {
				result = err.Error()
			}
			made <- result
		}()
	}
	results := map[string]int{}
	for range cap(made) {
		results[<-made]++
	}
	if results["created"] != 1 || results["unchanged"] != cap(made)-1 {
		t.Errorf("got %v", results)
	}
	if got := pgtest.Value[string](db, `select sequin.create_pipeline('p', 'item', 'events', '{delete,insert}', if_not_exists => true)`); got != "unchanged" {
		t.Errorf("got %s", got)
	}
	if e := db.Error(`select sequin.create_pipeline('p', 'item', 'other', '{delete,insert}', if_not_exists => true)`); e.Code != "42710" {
		t.Errorf("got %s", e.Code)
	}
	if n := pgtest.Value[int](db, `select count(*) from pg_class where relname = 'other'`); n != 0 {
		t.Error("what was refused has left a table")
	}
}

// Names of any kind, and a table that has more columns than it must.
func TestNames(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create schema "Odd ""S"; create table "Odd ""S"."T é" (id int primary key)`)
	db.Exec(`select sequin.create_pipeline('Ö "p', '"Odd ""S"."T é"', '"Odd ""S"."É '' v"', retention => '1 day')`)
	db.Exec(`set search_path = "Odd ""S"; select sequin.create_pipeline('q', '"T é"', 'Plain'); reset search_path`)
	db.Exec(`create table mine (note text default 'mine', id bigint generated by default as identity, seq bigint, source_database_id uuid,
		source_table_oid bigint, source_table_schema text, source_table_name text, record_pk text, record jsonb, changes jsonb, action text,
		committed_at timestamptz, inserted_at timestamptz default now(), amount numeric generated always as ((record ->> 'id')::numeric) stored)`)
	db.Exec(`select sequin.create_pipeline('r', '"Odd ""S"."T é"', 'mine')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into "Odd ""S"."T é" values (7)`)
	awaitEvents(db, `"Odd ""S"."É ' v"`, `insert 7 {"id": 7} -`)
	awaitEvents(db, `"Odd ""S".plain`, `insert 7 {"id": 7} -`)
	awaitEvents(db, `mine`, `insert 7 {"id": 7} -`)
	if got := pgtest.Value[string](db, `select concat_ws(' ', note, amount, source_table_schema, source_table_name) from mine`); got != `mine 7 Odd "S T é` {
		t.Errorf("got %s", got)
	}
	// It follows both tables through renames.
	db.Exec(`alter table mine rename to ours; alter table "Odd ""S"."T é" rename to u`)
	db.Exec(`insert into "Odd ""S".u values (8)`)
	awaitEvents(db, `ours`, `insert 7 {"id": 7} -`, `insert 8 {"id": 8} -`)
	if got := pgtest.Value[string](db, `select source_table || ' ' || event_table from sequin.pipelines where name = 'r'`); got != `"Odd ""S".u public.ours` {
		t.Errorf("got %s", got)
	}
}

// An event table is streamed as any table is, and captured; what it writes itself a pipeline may not capture.
func TestStreamOfEvents(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, note text)`)
	db.Exec(`select sequin.create_pipeline('p', 'item', 'events')`)
	db.Exec(`select sequin.create_stream('s', '{events}'), sequin.create_consumer('c', 's')`)
	db.Exec(`select sequin.create_pipeline('again', 'events', 'more')`)
	for _, sql := range []string{
		`select sequin.create_pipeline('x', 'item', 'item')`, `select sequin.create_pipeline('x', 'events', 'events')`,
		`select sequin.create_pipeline('x', 'more', 'events')`,
	} {
		if e := db.Error(sql); e.Code != "22023" && e.Code != "42703" || e.Hint == "" {
			t.Errorf("%s: got %s: %s", sql, e.Code, e.Message)
		}
	}
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1, 'a'), (2, 'b')`)
	got := pgtest.Column[string](db, `select record ->> 'action' || ' ' || (record -> 'record' ->> 'note') from sequin.pop('c', 10, '20s')`)
	if fmt.Sprint(got) != "[insert a insert b]" {
		t.Errorf("got %v", got)
	}
	awaitCount(db, "more", 2)
	awaitCount(db, "events", 2)
	// A stream goes and the pipeline's table is still captured, and the other way round.
	db.Exec(`select sequin.create_stream('items', '{item}'), sequin.drop_stream('items')`)
	db.Exec(`insert into item values (3, 'c')`)
	awaitCount(db, "more", 3)
	db.Exec(`select sequin.drop_pipeline('again')`)
	db.Exec(`insert into item values (4, 'd')`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where stream = 's'`); n != 4 {
			return fmt.Errorf("%d messages", n)
		}
		return nil
	})
}

// A large value that an update leaves as it is is in its event with replica identity full, and not without.
func TestUnchangedLargeValue(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	for _, table := range []string{"plain", "whole"} {
		db.Exec(`create table ` + table + ` (id int primary key, note text, large text);
			alter table ` + table + ` alter large set storage external; select sequin.create_pipeline('` + table + `', '` + table + `', '` + table + `_events')`)
	}
	db.Exec(`alter table whole replica identity full`)
	pgtest.StartBridge(t, db.URL)
	for _, table := range []string{"plain", "whole"} {
		db.Exec(`insert into ` + table + ` values (1, 'a', repeat('x', 10000)); update ` + table + ` set note = 'b'`)
		awaitCount(db, table+"_events", 2)
		if got, want := pgtest.Value[int](db, `select coalesce(length(record ->> 'large'), 0) from `+table+`_events where action = 'update'`),
			map[string]int{"plain": 0, "whole": 10000}[table]; got != want {
			t.Errorf("%s: the update's record has %d bytes of the large value, want %d", table, got, want)
		}
	}
}
