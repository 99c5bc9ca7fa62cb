package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A value of each type is in the log as to_jsonb has it, and becomes the same row again.
func TestTypes(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	for name, value := range map[string]string{ // whatever the database says, values are printed in one way
		"datestyle": "sql, dmy", "intervalstyle": "iso_8601", "bytea_output": "escape", "timezone": "Asia/Tokyo", "extra_float_digits": "0",
	} {
		db.Exec(fmt.Sprintf("alter database %s set %s = '%s'", db.Name, name, value))
	}
	db.Exec(`
		create extension hstore;
		create extension citext;
		create extension ltree;
		create type mood as enum ('sad', 'it''s "ok"');
		create type pair as (a int, b text);
		create domain positive as numeric check (value > 0);
		create domain positives as positive[];
		create schema "Odd ""Schema""";
		create table "Odd ""Schema"""."Odd 'Table'" (
		  id int primary key, "Mixed ""Case""" text, b boolean, i2 int2, i8 int8, f4 float4, f8 float8, n numeric, m money,
		  c char(5), vc varchar(10), nm name, by bytea, d date, tm time, tz timetz, ts timestamp, tstz timestamptz, iv interval,
		  u uuid, inet inet, cidr cidr, mac macaddr, mac8 macaddr8, bits bit(3), vbits varbit, pt point, ln line, ls lseg, bx box,
		  pa path, po polygon, ci circle, tsv tsvector, tsq tsquery, xm xml, j json, jb jsonb, o oid, rc regclass, lsn pg_lsn,
		  ir int4range, tr tstzrange, e mood, co pair, dom positive, doms positives, hs hstore, ct citext, lt ltree,
		  ia int[], ta text[], ia2 int[][], tsa timestamptz[], ba boolean[], ja json[], jba jsonb[], ea mood[], coa pair[], hsa hstore[],
		  fa float8[], bya bytea[], bxa box[], bounds int[], sv int2vector, nothing text
		);`)
	db.Pool.Reset() // connections with the database's settings
	db.Exec(`select sequin.create_stream('odd', array[$$"Odd ""Schema"""."Odd 'Table'"$$])`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`
		insert into "Odd ""Schema"""."Odd 'Table'" values (
		  1, E'quote " backslash \\ tab \t newline \n e\u0301 \U0001F600 control \x01', true, -32768, 9223372036854775807, 'NaN', '-Infinity', 'NaN',
		  '-12.34', 'ab', 'cd', 'ef', '\x00ff5c', 'infinity', '24:00:00', '12:00:00+05:30', '0044-03-15 12:00:00 BC',
		  '2026-01-02 03:04:05.678901+09', '-1 year -2 mons 3 days -04:05:06.7', '00000000-0000-0000-0000-000000000001',
		  '10.0.0.1/8', '10.0.0.0/8', '08:00:2b:01:02:03', '08:00:2b:01:02:03:04:05', b'101', b'1', '(1,2.5)', '{1,2,3}', '[(0,0),(1,1)]',
		  '(1,1),(0,0)', '[(0,0),(1,1)]', '((0,0),(1,1),(2,0))', '<(0,0),1>', 'a fat cat', 'a & b', '<a b="c">d</a>',
		  '{"z": 1,  "a": "\u00e9", "z": 2}', '{"n": 1e400, "s": "\"\\"}', 1234, 'pg_class', '1/ABCDEF', '[1,5)', '[2026-01-01,)',
		  'it''s "ok"', row(1, 'a "b", (c)'), 1.50, '{1,2.50}', '"a b"=>"c\"d", e=>null', 'CiText', 'a.b.c',
		  '{1,null,-3}', array['', 'a"b', 'c\d', 'null', null, '{}', 'é'], '{{1,2},{3,4}}', array['2026-01-02 03:04:05+00'::timestamptz, 'infinity'],
		  '{t,f}', array['{"a": [1]}'::json], array['{"a": [1]}'::jsonb], array['sad'::mood], array[row(1,'x')::pair], array['a=>1'::hstore],
		  '{NaN,1e300,-0}', array['\x00'::bytea], array['(1,1),(0,0)'::box], '[0:1]={7,8}', '1 2', null),
		 (2, '', false, 0, 0, 1.1, 1e-300, 1234567890123456789012345678901234567890.12345, '0', '', '', '', '', '-infinity', '00:00', '00:00+00',
		  '-infinity', '-infinity', '0', null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null,
		  '[]', '0', null, null, null, 'empty', 'empty', null, row(null, ''), null, null, '', '', '', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',
		  '{}', '{}', '{}', '{}', '{}', '', null)`)
	awaitLog(t, db, 2)
	const table = `"Odd ""Schema"""."Odd 'Table'"`
	rows, err := db.Pool.Query(context.Background(), `
		select t.id, l.record_pk, l.table_schema, l.table_name, k.key,
		       l.record -> k.key, to_jsonb(t) -> k.key, to_jsonb(jsonb_populate_record(null::`+table+`, l.record)) -> k.key
		from sequin.log l
		join `+table+` t on t.id::text = l.record_pk
		cross join jsonb_object_keys(to_jsonb(t)) k(key)`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	count := 0
	for rows.Next() {
		var id int
		var pk, schema, name, key string
		var got, want, again json.RawMessage
		if err := rows.Scan(&id, &pk, &schema, &name, &key, &got, &want, &again); err != nil {
			t.Fatal(err)
		}
		count++
		if pk != strconv.Itoa(id) || schema != `Odd "Schema"` || name != "Odd 'Table'" {
			t.Errorf("got key %s of %s.%s", pk, schema, name)
		}
		if string(again) != string(want) {
			t.Errorf("row %d, %s: %s becomes %s, and was %s", id, key, got, again, want)
		}
		switch key {
		// Settings change how to_jsonb prints these; and where it has an object for a composite or a string for an
		// array's bounds, the log has the text of the type.
		case "tstz", "tsa", "iv", "by", "bya", "tr", "co", "coa", "hs", "hsa", "bounds", "m", "rc", "sv", "f4":
		default:
			if string(got) != string(want) {
				t.Errorf("row %d, %s: got %s, want %s", id, key, got, want)
			}
		}
	}
	if err := rows.Err(); err != nil || count < 120 {
		t.Fatalf("%d values: %v", count, err)
	}
}

// messages returns a stream's messages, a line each.
func messages(t *testing.T, db *pgtest.DB, stream string) []string {
	t.Helper()
	return pgtest.Column[string](db, `select concat_ws(' ', action, table_name, coalesce(record_pk, '-'), coalesce(record::text, '-'), coalesce(changes::text, '-'),
		metadata -> 'unchanged') from sequin.messages where stream = $1 order by seq`, stream)
}

func awaitMessages(t *testing.T, db *pgtest.DB, stream string, want ...string) {
	t.Helper()
	pgtest.Eventually(t, 20*time.Second, func() error {
		if got := messages(t, db, stream); !reflect.DeepEqual(got, want) {
			return fmt.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		return nil
	})
}

// What an update and a delete carry, under each replica identity.
func TestReplicaIdentities(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table by_key (id int primary key, a text, big text);
		create table by_row (id int primary key, a text, big text);
		alter table by_row replica identity full;
		create table by_index (id int primary key, code text not null unique, a text);
		alter table by_index replica identity using index by_index_code_key;
		create table no_key (a int, b text);
		alter table no_key replica identity full;
		create table two (b text, n int, a int, primary key (a, b));
		select sequin.create_stream(t, array[t], mode => 'changes') from unnest('{by_key,by_row,by_index,no_key,two}'::text[]) t`)
	pgtest.StartBridge(t, db.URL)
	big := `(select string_agg(md5(i::text), '') from generate_series(1, 500) i)`
	for _, table := range []string{"by_key", "by_row"} {
		db.Exec(`insert into ` + table + ` values (1, 'x', null), (2, null, ` + big + `)`)
		db.Exec(`update ` + table + ` set a = 'y' where id = 1`)
		db.Exec(`update ` + table + ` set a = 'z' where id = 2`)
		db.Exec(`update ` + table + ` set big = 'small' where id = 2`)
		db.Exec(`update ` + table + ` set id = 3 where id = 1`)
		db.Exec(`delete from ` + table + ` where id = 3`)
		db.Exec(`truncate ` + table)
	}
	value := pgtest.Value[string](db, `select string_agg(md5(i::text), '') from generate_series(1, 500) i`)
	awaitMessages(t, db, "by_key",
		`insert by_key 1 {"a": "x", "id": 1, "big": null} -`,
		`insert by_key 2 {"a": null, "id": 2, "big": "`+value+`"} -`,
		`update by_key 1 {"a": "y", "id": 1, "big": null} -`,
		`update by_key 2 {"a": "z", "id": 2} - ["big"]`,
		`update by_key 2 {"a": "z", "id": 2, "big": "small"} -`,
		`update by_key 3 {"a": "y", "id": 3, "big": null} {"id": 1}`,
		`delete by_key 3 {"id": 3} -`,
		`truncate by_key - - -`)
	awaitMessages(t, db, "by_row",
		`insert by_row 1 {"a": "x", "id": 1, "big": null} -`,
		`insert by_row 2 {"a": null, "id": 2, "big": "`+value+`"} -`,
		`update by_row 1 {"a": "y", "id": 1, "big": null} {"a": "x"}`,
		`update by_row 2 {"a": "z", "id": 2, "big": "`+value+`"} {"a": null}`,
		`update by_row 2 {"a": "z", "id": 2, "big": "small"} {"big": "`+value+`"}`,
		`update by_row 3 {"a": "y", "id": 3, "big": null} {"id": 1}`,
		`delete by_row 3 {"a": "y", "id": 3, "big": null} -`,
		`truncate by_row - - -`)
	db.Exec(`insert into by_index values (1, 'one', 'x')`)
	db.Exec(`update by_index set a = 'y'`)
	db.Exec(`update by_index set code = 'uno'`)
	db.Exec(`delete from by_index`)
	awaitMessages(t, db, "by_index",
		`insert by_index one {"a": "x", "id": 1, "code": "one"} -`,
		`update by_index one {"a": "y", "id": 1, "code": "one"} -`,
		`update by_index uno {"a": "y", "id": 1, "code": "uno"} {"code": "one"}`,
		`delete by_index uno {"code": "uno"} -`)
	db.Exec(`insert into no_key values (1, 'x'), (1, 'x')`)
	db.Exec(`update no_key set b = null`)
	db.Exec(`delete from no_key where ctid = (select min(ctid) from no_key)`)
	awaitMessages(t, db, "no_key",
		`insert no_key - {"a": 1, "b": "x"} -`,
		`insert no_key - {"a": 1, "b": "x"} -`,
		`update no_key - {"a": 1, "b": null} {"b": "x"}`,
		`update no_key - {"a": 1, "b": null} {"b": "x"}`,
		`delete no_key - {"a": 1, "b": null} -`)
	db.Exec(`insert into two values ('x,"y"', 1, 7), ('', 2, 8)`)
	db.Exec(`delete from two where a = 8`)
	awaitMessages(t, db, "two",
		`insert two 7,"x,""y""" {"a": 7, "b": "x,\"y\"", "n": 1} -`,
		`insert two 8,"" {"a": 8, "b": "", "n": 2} -`,
		`delete two 8,"" {"a": 8, "b": ""} -`)
}

// DDL in the middle of things.
func TestDDL(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, a text); select sequin.create_stream('t', '{t}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into t values (1, 'x')`)
	db.Exec(`begin; insert into t values (2, 'x'); alter table t add b int default 7; insert into t values (3, 'x', 8); commit`)
	db.Exec(`alter table t drop column a`)
	db.Exec(`insert into t values (4, 9)`)
	db.Exec(`alter table t alter b type text using 'n' || b`)
	db.Exec(`update t set b = 'm' where id = 1`)
	db.Exec(`alter table t rename b to c; alter table t rename to u`)
	db.Exec(`insert into u values (5, 'x')`)
	db.Exec(`create table t (id int primary key); insert into t values (99)`) // another table, and nobody's
	db.Exec(`alter table u drop constraint t_pkey, add column k int generated always as identity, add primary key (k)`)
	db.Exec(`insert into u values (6, 'y')`)
	awaitMessages(t, db, "t",
		`insert t 1 {"a": "x", "id": 1} -`,
		`insert t 2 {"a": "x", "id": 2} -`,
		`insert t 3 {"a": "x", "b": 8, "id": 3} -`,
		`insert t 4 {"b": 9, "id": 4} -`,
		`update t 1 {"b": "m", "id": 1} -`,
		`insert u 5 {"c": "x", "id": 5} -`,
		`insert u 6 {"c": "y", "k": 6, "id": 6} -`)
}

func TestPartitions(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		db.Exec(`create table p (id int primary key) partition by range (id)`)
		if e := db.Error(`select sequin.create_stream('p', '{p}')`); e.Code != "0A000" {
			t.Errorf("got %v", e)
		}
		t.Skip("PostgreSQL 12 cannot publish a partitioned table")
	}
	db.Exec(`
		create table p (id int, at date, a text, primary key (id, at)) partition by range (at);
		create table p1 partition of p for values from ('2026-01-01') to ('2026-02-01');
		select sequin.create_stream('p', '{p}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into p values (1, '2026-01-05', 'x')`)
	db.Exec(`create table p2 (a text, at date not null, id int not null, gone int, primary key (id, at)); alter table p2 drop gone;
		alter table p attach partition p2 for values from ('2026-02-01') to ('2026-03-01')`)
	db.Exec(`insert into p values (2, '2026-02-05', 'y')`)
	db.Exec(`insert into p2 values ('z', '2026-02-06', 3)`)
	db.Exec(`update p set at = '2026-02-07' where id = 1`) // to another partition: the row ends and begins
	db.Exec(`delete from p1`)
	db.Exec(`delete from p where id = 3`)
	awaitMessages(t, db, "p",
		`insert p 1,2026-01-05 {"a": "x", "at": "2026-01-05", "id": 1} -`,
		`insert p 2,2026-02-05 {"a": "y", "at": "2026-02-05", "id": 2} -`,
		`insert p 3,2026-02-06 {"a": "z", "at": "2026-02-06", "id": 3} -`,
		`delete p 1,2026-01-05 {"at": "2026-01-05", "id": 1} -`,
		`insert p 1,2026-02-07 {"a": "x", "at": "2026-02-07", "id": 1} -`,
		`delete p 3,2026-02-06 {"at": "2026-02-06", "id": 3} -`)
}

// A transaction far larger than memory allows is captured in bounded memory, and nobody sees a part of it.
func TestLargeTransaction(t *testing.T) {
	t.Parallel()
	count := 200_000
	if n, err := strconv.Atoi(os.Getenv("SEQUIN_LARGE")); err == nil {
		count = n
	}
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, a text, b text); select sequin.create_stream('t', '{t}'), sequin.create_consumer('c', 't')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t select i, repeat('x', 50), repeat('y', 50) from generate_series(1, $1::int) i`, count)
	peak := 0
	pgtest.Eventually(t, 5*time.Minute, func() error {
		peak = max(peak, residentKB(t, b.Cmd.Process.Pid))
		n := pgtest.Value[int](db, `select count(*) from sequin.pop('c')`)
		if n == 0 {
			return fmt.Errorf("nothing is there to receive yet")
		}
		return nil
	})
	if got := pgtest.Value[string](db, `select (select count(*) from sequin.log) || ' ' || (select pending from sequin.consumer_status)`); got !=
		fmt.Sprintf("%d %d", count, count-1) {
		t.Errorf("of %d rows, the log has and the consumer has still to get %s", count, got)
	}
	t.Logf("%d rows, at most %d kB resident", count, peak)
	if peak > 150<<10 {
		t.Errorf("the bridge took %d kB", peak)
	}
}

// residentKB returns a process's peak of resident memory, where the system says it.
func residentKB(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Skip("only Linux says how much memory a process takes")
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	return 0
}
