package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// pop waits for so many messages of a consumer, and returns a line for each, sorted.
func pop(t *testing.T, db *pgtest.DB, consumer string, count int) []string {
	t.Helper()
	var got []string
	pgtest.Eventually(t, 20*time.Second, func() error {
		got = append(got, pgtest.Column[string](db, `select concat_ws(' ', action, record_pk, coalesce(record::text, '-')) from sequin.pop($1, 100)`, consumer)...)
		if len(got) < count {
			return fmt.Errorf("%s has had %v", consumer, got)
		}
		return nil
	})
	slices.Sort(got)
	return got
}

// A filter sees a value of each type as it was, whatever the database's settings are: composites, and what is made of
// them, as text.
func TestFilterTypes(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	for name, value := range map[string]string{
		"datestyle": "sql, dmy", "intervalstyle": "iso_8601", "bytea_output": "escape", "timezone": "Asia/Tokyo", "extra_float_digits": "0",
	} {
		db.Exec(fmt.Sprintf("alter database %s set %s = '%s'", db.Name, name, value))
	}
	db.Exec(`
		create extension hstore; create extension citext;
		create type mood as enum ('sad', 'it''s "ok"'); create type pair as (a int, b text);
		create domain positive as numeric check (value > 0); create domain positives as positive[];
		create table odd (
		  id int primary key, "Mixed ""Case""" text, b boolean, i2 int2, i8 int8, f4 float4, f8 float8, n numeric, nn numeric(10, 3), m money,
		  c char(5), vc varchar(10), nm name, by bytea, d date, tm time, tz timetz, ts timestamp, tstz timestamptz, iv interval,
		  u uuid, inet inet, cidr cidr, mac macaddr, bits bit(3), vbits varbit, pt point, bx box, pa path, ci circle, tsv tsvector, tsq tsquery,
		  xm xml, jb jsonb, o oid, rc regclass, lsn pg_lsn, ir int4range, tr tstzrange, e mood, co pair, dom positive, doms positives,
		  hs hstore, ct citext, ia int[], ta text[], ia2 int[][], tsa timestamptz[], ba boolean[], jba jsonb[], ea mood[], coa pair[], hsa hstore[],
		  fa float8[], bya bytea[], bxa box[], bounds int[], action "char", nothing text)`)
	db.Pool.Reset()
	db.Exec(`select sequin.create_stream('odd', '{odd}')`)
	columns := pgtest.Column[string](db, `select attname::text from pg_attribute where attrelid = 'odd'::regclass and attnum > 0`)
	var parts []string
	for some := range slices.Chunk(columns, 20) {
		var pairs []string
		for _, c := range some {
			pairs = append(pairs, fmt.Sprintf(`%s, new.%s::text`, "$$"+c+"$$", pgx.Identifier{c}.Sanitize()))
		}
		parts = append(parts, "jsonb_build_object("+strings.Join(pairs, ", ")+")")
	}
	db.Exec(`select sequin.create_consumer('texts', 'odd', transform => $1)`, strings.Join(parts, " || "))
	db.Exec(`select sequin.create_consumer('typed', 'odd', filter => $1)`, `
		new."Mixed ""Case""" like 'quote%' and new.b and new.i8 = 9223372036854775807 and new.f4 = 'NaN' and new.f8 = '-infinity' and new.n = 'NaN'
		and new.nn > 1.4999 and new.c = 'ab' and new.by = '\x00ff5c' and new.d = 'infinity' and new.tz = '12:00+05:30' and new.ts < '0001-01-01'
		and new.tstz = '2026-01-01 18:04:05.678901Z' and new.iv < '0' and new.inet << '10.0.0.0/7' and new.bits = b'101' and new.tsv @@ 'fat'
		and new.jb -> 's' = '"\"\\"' and new.rc = 'pg_class'::regclass and 4 <@ new.ir and new.e > 'sad' and new.co = '(1,"a ""b"", (c)")'
		and new.dom = 1.5 and 2.5 = any (new.doms) and new.hs -> 'a b' = 'c"d' and new.ct = 'CITEXT' and new.ia[3] = -3 and 'é' = any (new.ta)
		and new.ia2[2][1] = 3 and new.tsa[2] = 'infinity' and new.jba[1] -> 'a' = '[1]' and new.ea = '{sad}' and new.bounds[0] = 7
		and new.action = 'x' and action = 'insert' and new.nothing is null and date_part('hour', new.tstz) = 18`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`
		insert into odd values (
		  1, E'quote " backslash \\ tab \t newline \n e\u0301 \U0001F600', true, -32768, 9223372036854775807, 'NaN', '-Infinity', 'NaN', 1.5,
		  '-12.34', 'ab', 'cd', 'ef', '\x00ff5c', 'infinity', '24:00:00', '12:00:00+05:30', '0044-03-15 12:00:00 BC',
		  '2026-01-02 03:04:05.678901+09', '-1 year -2 mons 3 days -04:05:06.7', '00000000-0000-0000-0000-000000000001',
		  '10.0.0.1/8', '10.0.0.0/8', '08:00:2b:01:02:03', b'101', b'1', '(1,2.5)', '(1,1),(0,0)', '((0,0),(1,1),(2,0))', '<(0,0),1>',
		  'a fat cat', 'a & b', '<a b="c">d</a>', '{"n": 1e40, "s": "\"\\"}', 1234, 'pg_class', '1/ABCDEF', '[1,5)', '[2026-01-01,)',
		  'it''s "ok"', row(1, 'a "b", (c)'), 1.50, '{1,2.50}', '"a b"=>"c\"d", e=>null', 'CiText',
		  '{1,null,-3}', array['', 'a"b', 'c\d', 'null', null, '{}', 'é'], '{{1,2},{3,4}}', array['2026-01-02 03:04:05+00'::timestamptz, 'infinity'],
		  '{t,f}', array['{"a": [1]}'::jsonb], array['sad'::mood], array[row(1,'x')::pair], array['a=>1'::hstore],
		  '{NaN,1e300,-1}', array['\x00'::bytea], array['(1,1),(0,0)'::box], '[0:1]={7,8}', 'x', null)`)
	db.Exec(`insert into odd (id) values (2)`)
	if got := pop(t, db, "typed", 1); len(got) != 1 || !strings.HasPrefix(got[0], "insert 1 ") {
		t.Errorf("typed: %v", got)
	}
	conn := db.Connect()
	if _, err := conn.Exec(t.Context(), `set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'postgres'; set bytea_output = 'hex'; set extra_float_digits = 1`); err != nil {
		t.Fatal(err)
	}
	for _, line := range pop(t, db, "texts", 2) {
		id, text, _ := strings.Cut(strings.TrimPrefix(line, "insert "), " ")
		var got map[string]*string
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			t.Fatal(err)
		}
		for _, c := range columns {
			var want *string
			if err := conn.QueryRow(context.Background(), `select `+pgx.Identifier{c}.Sanitize()+`::text from odd where id::text = $1`, id).Scan(&want); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got[c], want) {
				t.Errorf("row %s, %s: got %v, want %v", id, c, show(got[c]), show(want))
			}
		}
	}
	if dead := pgtest.Column[string](db, `select consumer || ' ' || error from sequin.dead_letters`); len(dead) > 0 {
		t.Errorf("dead letters: %v", dead)
	}
}

func show(s *string) string {
	if s == nil {
		return "null"
	}
	return fmt.Sprintf("%q", *s)
}

// Partitions have their columns in an order of their own; a row's partition says nothing of its table.
func TestFilterPartitions(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		t.Skip("PostgreSQL 12 cannot publish a partitioned table")
	}
	db.Exec(`
		create table p (id int, at date, a text, "B" int, primary key (id, at)) partition by range (at);
		create table p1 partition of p for values from ('2026-01-01') to ('2026-02-01');
		create table p2 ("B" int, gone int, a text, at date not null, id int not null, primary key (id, at)); alter table p2 drop gone;
		alter table p attach partition p2 for values from ('2026-02-01') to ('2026-03-01');
		alter table p replica identity full; alter table p1 replica identity full; alter table p2 replica identity full;
		select sequin.create_stream('changes', '{p}', mode => 'changes');
		select sequin.create_stream('rows', '{p}');
		select sequin.create_consumer('changes', 'changes', filter => $$coalesce(new."B", old."B") > 5 and table_name = 'p'$$,
		  transform => $$jsonb_build_object('a', new.a, 'was', old.a, 'b', new."B", 'whole', new::text)$$);
		select sequin.create_consumer('rows', 'rows', filter => $$coalesce(new.at, old.at) >= '2026-02-01'$$, transform => 'to_jsonb(new) - ''id''')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into p values (1, '2026-01-05', 'x', 1), (2, '2026-01-06', 'x', 6), (3, '2026-02-05', 'y', 7)`)
	db.Exec(`update p set a = 'z' where id > 1`)
	db.Exec(`delete from p where id = 3`)
	db.Exec(`insert into p values (4, '2026-02-07', 'end', 9)`)
	want := []string{
		`delete 3,2026-02-05 {"a": null, "b": null, "was": "z", "whole": null}`,
		`insert 2,2026-01-06 {"a": "x", "b": 6, "was": null, "whole": "(2,2026-01-06,x,6)"}`,
		`insert 3,2026-02-05 {"a": "y", "b": 7, "was": null, "whole": "(3,2026-02-05,y,7)"}`,
		`insert 4,2026-02-07 {"a": "end", "b": 9, "was": null, "whole": "(4,2026-02-07,end,9)"}`,
		`update 2,2026-01-06 {"a": "z", "b": 6, "was": "x", "whole": "(2,2026-01-06,z,6)"}`,
		`update 3,2026-02-05 {"a": "z", "b": 7, "was": "y", "whole": "(3,2026-02-05,z,7)"}`,
	}
	if got := pop(t, db, "changes", len(want)); !slices.Equal(got, want) {
		t.Errorf("changes:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// Of rows, the newest version comes, and the end.
	got := pop(t, db, "rows", 2)
	if !slices.Contains(got, `delete 3,2026-02-05 -`) || !slices.Contains(got, `insert 4,2026-02-07 {"B": 9, "a": "end", "at": "2026-02-07"}`) {
		t.Errorf("rows: %v", got)
	}
}

// A filter in error stands still and loses nothing; the bridge goes on with it by itself, with no change to wake it.
func TestFilterErrorEnds(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table orders (id int primary key, amount int);
		select sequin.create_stream('orders', '{orders}');
		select sequin.create_consumer('c', 'orders', filter => 'new.amount > 5')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into orders select i, i from generate_series(1, 10) i`)
	if got := pop(t, db, "c", 5); len(got) != 5 {
		t.Errorf("got %v", got)
	}
	db.Exec(`alter table orders rename amount to total`)
	db.Exec(`insert into orders select i, i from generate_series(11, 15) i`)
	awaitLog(t, db, 15)
	db.Exec(`alter table orders rename total to amount`)
	// They were written under the other name: what is not known is not above 5.
	db.Exec(`insert into orders values (16, 16)`)
	if got := pop(t, db, "c", 1); !slices.Equal(got, []string{`insert 16 {"id": 16, "amount": 16}`}) {
		t.Errorf("got %v", got)
	}
	db.Exec(`alter table orders rename amount to total`)
	db.Exec(`insert into orders values (17, 17)`)
	awaitLog(t, db, 17)
	if state := pgtest.Value[string](db, `select state from sequin.consumers`); state != "error" {
		t.Errorf("it is %s", state)
	}
	db.Exec(`select sequin.alter_consumer('c', filter => 'new.total > 5')`)
	if got := pop(t, db, "c", 1); !slices.Equal(got, []string{`insert 17 {"id": 17, "total": 17}`}) {
		t.Errorf("got %v", got)
	}
}
