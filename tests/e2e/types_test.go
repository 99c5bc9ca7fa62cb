package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/bridge/quote"
	"sequin/tests/pgtest"
)

// typed are values, as SQL, of each type that a column can have: the built-in ones, those of contrib, and a user's own.
var typed = []struct {
	name   string
	since  int // major version
	values []string
}{
	{"boolean", 0, []string{"true", "false"}},
	{`"char"`, 0, []string{"'a'", "''", "'\"'"}},
	{"char(5)", 0, []string{"'ab'", "''", "'abcde'", "'é\u2603'"}},
	{"varchar(10)", 0, []string{"'ab  '", "''"}},
	{"text", 0, []string{"''", `E'a"b\\c\n\r\t\x01\x7f'`, "repeat('x', 10000)", "'NULL'", "E'e\\u0301 \\U0001F600 \\u2028'"}},
	{"name", 0, []string{"'Odd \"name\"'", "''"}},
	{"bytea", 0, []string{`'\x'`, `'\x00ff5c27'`, "decode(repeat('00', 5000), 'hex')"}},
	{"int2", 0, []string{"-32768", "32767"}},
	{"int4", 0, []string{"-2147483648", "2147483647"}},
	{"int8", 0, []string{"-9223372036854775808", "9223372036854775807", "9007199254740993"}},
	{"oid", 0, []string{"0", "4294967295"}},
	{"float4", 0, []string{"'NaN'", "'Infinity'", "'-Infinity'", "1.1", "3.4028235e38", "1e-45"}},
	{"float8", 0, []string{"'NaN'", "'Infinity'", "'-Infinity'", "0.1", "1.7976931348623157e308", "5e-324", "1e15", "1e16"}},
	{"numeric", 0, []string{"'NaN'", "0", "-0.000", "1e-30", "12345678901234567890123456789012345678901234567890.123456789012345", "10::numeric ^ 5000 + 1"}},
	{"numeric", 14, []string{"'Infinity'", "'-Infinity'"}},
	{"numeric(10,2)", 0, []string{"1.50", "-99999999.99"}},
	{"money", 0, []string{"'12.34'", "'-1234567.89'", "0"}},
	{"date", 0, []string{"'2026-01-02'", "'infinity'", "'-infinity'", "'0044-03-15 BC'", "'99999-12-31'"}},
	{"time", 0, []string{"'24:00:00'", "'03:04:05.678901'"}},
	{"time(0)", 0, []string{"'03:04:05.6'"}},
	{"timetz", 0, []string{"'03:04:05.6+05:30'", "'24:00:00-12'"}},
	{"timestamp", 0, []string{"'2026-01-02 03:04:05.678901'", "'infinity'", "'-infinity'", "'0044-03-15 12:00 BC'", "'99999-12-31 00:00'"}},
	{"timestamptz", 0, []string{"'2026-01-02 03:04:05.678901+09'", "'infinity'", "'-infinity'", "'0044-03-15 12:00+00 BC'", "'1890-01-01 00:00+00:17:30'"}},
	{"interval", 0, []string{"'-1 year -2 mons 3 days -04:05:06.7'", "'0'", "'1 mon -1 day'", "'178000000 years'"}},
	{"interval", 17, []string{"'infinity'", "'-infinity'"}},
	{"uuid", 0, []string{"'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"}},
	{"inet", 0, []string{"'10.0.0.1/8'", "'::1'", "'2001:db8::/32'"}},
	{"cidr", 0, []string{"'10.0.0.0/8'", "'2001:db8::/32'"}},
	{"macaddr", 0, []string{"'08:00:2b:01:02:03'"}},
	{"macaddr8", 0, []string{"'08:00:2b:01:02:03:04:05'"}},
	{"bit(3)", 0, []string{"b'101'", "b'000'"}},
	{"varbit", 0, []string{"b''", "b'1'", "repeat('10', 1000)::varbit"}},
	{"point", 0, []string{"'(1,2.5)'", "'(Infinity,NaN)'", "'(0.1,1e300)'"}},
	{"line", 0, []string{"'{1,2,3}'"}},
	{"lseg", 0, []string{"'[(0,0),(1,1.5)]'"}},
	{"box", 0, []string{"'(1,1),(0,0)'"}},
	{"path", 0, []string{"'[(0,0),(1,1)]'", "'((0,0),(1,1))'"}},
	{"polygon", 0, []string{"'((0,0),(1,1),(2,0))'"}},
	{"circle", 0, []string{"'<(0,0),1.5>'"}},
	{"tsvector", 0, []string{"'a fat cat'", `'''it''''s'':1A,2B x:3'`, "''"}},
	{"tsquery", 0, []string{"'a & !b | c:*'", "'a <-> b'"}},
	// As jsonb has it: one space, one key of each, no escapes. A null inside of a document stays; one that is all of it is NULL.
	{"json", 0, []string{`'{"a": "é", "z": [1, null]}'`, "'[]'", `'"text"'`, "'1.10'"}},
	{"jsonb", 0, []string{`'{"z": 1,  "a": "\u00e9", "n": null}'`, `'"text"'`, "'1.10'", "'1e400'", `'{"": {"\\": "\""}}'`}},
	{"jsonpath", 0, []string{"'$.a[*] ? (@ > 1)'"}},
	{"pg_lsn", 0, []string{"'0/0'", "'FFFFFFFF/FFFFFFFF'"}},
	{"xid", 0, []string{"'4294967295'"}},
	{"xid8", 13, []string{"'18446744073709551615'"}},
	{"cid", 0, []string{"'1'"}},
	{"tid", 0, []string{"'(1,2)'"}},
	{"txid_snapshot", 0, []string{"'10:20:10,14,15'"}},
	{"pg_snapshot", 13, []string{"'10:20:10,14,15'"}},
	{"regclass", 0, []string{"'pg_class'", "'typed'", "'sequin.log'"}},
	{"regproc", 0, []string{"'pg_catalog.now'"}},
	{"regprocedure", 0, []string{"'pg_catalog.length(text)'"}},
	{"regoper", 0, []string{"'pg_catalog.||/'"}},
	{"regoperator", 0, []string{"'pg_catalog.+(int4,int4)'"}},
	{"regtype", 0, []string{"'timestamptz'", "'mood'", "'pg_catalog.int4[]'"}},
	{"regrole", 0, []string{"'postgres'"}},
	{"regnamespace", 0, []string{"'sequin'"}},
	{"regconfig", 0, []string{"'english'"}},
	{"regdictionary", 0, []string{"'simple'"}},
	{"regcollation", 13, []string{`'"C"'`}},
	{"refcursor", 0, []string{"'c'"}},
	{"int2vector", 0, []string{"'1 2'", "''"}},
	{"oidvector", 0, []string{"'1 2'"}},
	{"int4range", 0, []string{"'[1,5)'", "'empty'", "'(,)'"}},
	{"int8range", 0, []string{"'(,9223372036854775807)'"}},
	{"numrange", 0, []string{"'(1.5,NaN]'"}},
	{"daterange", 0, []string{"'[2026-01-01,infinity]'"}},
	{"tsrange", 0, []string{"'[2026-01-01 00:00,2026-01-02 00:00)'"}},
	{"tstzrange", 0, []string{"'[2026-01-01 00:00+09,)'"}},
	{"int4multirange", 14, []string{"'{[1,5),[7,9)}'", "'{}'"}},
	{"tstzmultirange", 14, []string{"'{[2026-01-01 00:00+09,2026-01-02 00:00+09)}'"}},
	{"texts", 0, []string{`texts('a,"(b)', 'c\d')`, "texts('', null)"}},
	{"mood", 0, []string{"'sad'", `'it''s "ok"'`}},
	{"pair", 0, []string{`row(1, 'a "b", (c)')`, "row(null, '')", "row(null, null)"}},
	{"nested", 0, []string{`row(row(1, 'a,b'), array[row(2, '{"}')::pair, null], '2026-01-01 00:00+09')`}},
	{"positive", 0, []string{"1.50", "'NaN'"}},
	{"positives", 0, []string{"'{1,2.50}'", "'{}'"}},
	{"pair_domain", 0, []string{"row(1, 'x')"}},
	{"moods", 0, []string{`array['sad', 'it''s "ok"', null]::mood[]`}},
	{"hstore", 0, []string{`'"a b"=>"c\"d", e=>null, f=>""'`, "''"}},
	{"citext", 0, []string{"'CiText'"}},
	{"ltree", 0, []string{"'a.b.c'", "''"}},
	{"lquery", 0, []string{"'*.b'"}},
	{"ltxtquery", 0, []string{"'a & b'"}},
	{"boolean[]", 0, []string{"'{t,f,null}'"}},
	{"int[]", 0, []string{"'{1,null,-3}'", "'{}'", "'{{1,2},{3,4}}'", "'[0:1]={7,8}'", "'[-1:0][2:3]={{1,2},{3,4}}'", "'{{{1}}}'"}},
	{"text[]", 0, []string{`array['', 'a"b', 'c\d', 'null', null, 'NULL', '{}', 'é,', ' x ', E'\n']`, "'[5:5]={x}'"}},
	{"numeric[]", 0, []string{"'{NaN,1e30,-0.0}'"}},
	{"float8[]", 0, []string{"'{NaN,Infinity,1e300}'"}},
	{"timestamptz[]", 0, []string{"'{2026-01-02 03:04:05+09,infinity}'"}},
	{"date[]", 0, []string{"'{2026-01-02,infinity,0044-03-15 BC}'"}},
	{"interval[]", 0, []string{"'{1 day,-04:05:06}'"}},
	{"bytea[]", 0, []string{`array['\x00'::bytea, '\x5c22']`}},
	{"json[]", 0, []string{`array['{"a": [1, "é"]}'::json, '"x"']`}},
	{"jsonb[]", 0, []string{`array['{"a": [1]}'::jsonb, null]`}},
	{"box[]", 0, []string{"array['(1,1),(0,0)'::box, '(2,2),(1,1)']"}},
	{"pair[]", 0, []string{`array[row(1,'x,"y"')::pair, null]`}},
	{"hstore[]", 0, []string{"array['a=>1'::hstore]"}},
	{"citext[]", 0, []string{"array['A', 'b']::citext[]"}},
	{"int4range[]", 0, []string{"array['[1,5)'::int4range, 'empty']"}},
	{"positive[]", 0, []string{"array[1.5, 2]::positive[]"}},
	{"char(3)[]", 0, []string{"array['a', 'bcd']::char(3)[]"}},
	{"money[]", 0, []string{"array['1234.5'::money]"}},
	{"uuid[]", 0, []string{"array['a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid]"}},
	{"xml", 0, []string{`'<a b="c">d &amp; é</a>'`}},
}

// A value of each type is inserted, updated to another, and deleted; and what is in the log, and in an event log table, read as the table's type again,
// is the row that a trigger saw: the new one, and with the changes put over it the old one.
func TestEachType(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	for name, value := range map[string]string{ // whatever the database says, values are printed in one way
		"datestyle": "sql, dmy", "intervalstyle": "sql_standard", "bytea_output": "escape", "timezone": "Asia/Kolkata", "extra_float_digits": "-5",
		"xmlbinary": "hex", "search_path": "public, pg_catalog",
	} {
		db.Exec(fmt.Sprintf("alter database %s set %s to %s", db.Name, name, settingValue(name, value)))
	}
	db.Exec(`create extension hstore; create extension citext; create extension ltree;
		create type mood as enum ('sad', 'it''s "ok"');
		create domain moods as mood[];
		create type pair as (a int, b text);
		create type nested as (p pair, ps pair[], at timestamptz);
		create domain pair_domain as pair;
		create domain positive as numeric check (value > 0);
		create domain positives as positive[];
		create type texts as range (subtype = text);`)
	db.Pool.Reset() // connections with the database's settings
	_, err := db.Pool.Exec(t.Context(), `select xmlparse(content 'x')`)
	hasXML := err == nil
	var columns []string
	var values [][]string
	rows := 0
	for i, c := range typed {
		if c.since > db.Major() || c.name == "xml" && !hasXML {
			continue
		}
		columns = append(columns, fmt.Sprintf("c%d %s", i, c.name))
		values = append(values, c.values)
		rows = max(rows, len(c.values))
	}
	db.Exec(`create table typed (id int primary key)`)
	for _, c := range columns {
		db.Exec(`alter table typed add ` + c)
	}
	db.Exec(`alter table typed replica identity full;
		create table audit (id bigserial primary key, action text, old typed, new typed);
		create function audit() returns trigger language plpgsql as $$
		begin
		  insert into audit (action, old, new) values (lower(tg_op), case when tg_op <> 'INSERT' then old end, case when tg_op <> 'DELETE' then new end);
		  return null;
		end $$;
		create trigger audit after insert or update or delete on typed for each row execute function audit();
		select sequin.create_stream('typed', '{typed}', mode => 'changes');
		select sequin.create_pipeline('typed', 'typed', 'typed_events')`)
	pgtest.StartBridge(t, db.URL)
	row := func(k int) string {
		list := []string{fmt.Sprint(k)}
		for _, v := range values {
			list = append(list, v[k%len(v)])
		}
		return strings.Join(list, ", ")
	}
	for k := range rows {
		db.Exec(fmt.Sprintf(`insert into typed values (%s)`, row(k)))
	}
	db.Exec(`insert into typed (id) values (-1)`) // all null
	for k := range rows {
		var set []string
		for i, v := range values {
			set = append(set, fmt.Sprintf("%s = %s", strings.Fields(columns[i])[0], v[(k+1)%len(v)]))
		}
		db.Exec(fmt.Sprintf(`update typed set %s where id = %d`, strings.Join(set, ", "), k))
	}
	db.Exec(`update typed set c0 = true where id = -1`)
	db.Exec(`delete from typed`)
	changes := pgtest.Value[int](db, `select count(*) from audit`)
	awaitLog(t, db, changes)
	sameRows(t, db, "typed", `select seq, action, record, changes from sequin.messages where stream = 'typed'`, columns)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from typed_events`); n != changes {
			return fmt.Errorf("the event log table has %d of %d changes", n, changes)
		}
		return nil
	})
	sameRows(t, db, "typed", `select seq, action, record, changes from typed_events`, columns)
}

func settingValue(name, value string) string {
	if name == "search_path" {
		return value
	}
	return "'" + value + "'"
}

// sameRows compares changes of a table, in order of seq (of the log, or of an event log table), with those that its trigger
// has put into audit.
func sameRows(t *testing.T, db *pgtest.DB, table, changes string, columns []string) {
	t.Helper()
	var compare []string
	for _, c := range append([]string{"id int"}, columns...) {
		name := strings.Fields(c)[0]
		compare = append(compare, fmt.Sprintf(`(%s, (coalesce(a.new, a.old)).%s::text, (g.new).%s::text, (a.old).%s::text, (g.old).%s::text)`,
			quote.Literal(c), name, name, name, name))
	}
	query := fmt.Sprintf(`
		with l as (select row_number() over (order by seq) as n, * from (%s) l),
		a as (select row_number() over (order by id) as n, * from audit a)
		select format('%%s %%s: the log has (%%s, was %%s), the table had (%%s, was %%s)', a.action, v.name, left(v.got, 60), left(v.got_old, 60),
		         left(v.want, 60), left(v.want_old, 60))
		from a
		left join l on l.n = a.n and l.action = a.action
		left join lateral (
		  select jsonb_populate_record(null::%[2]s, l.record) as new,
		         case when l.action = 'update' then jsonb_populate_record(a.new, l.changes) else a.old end as old) g on true
		cross join lateral (values %[3]s) v(name, want, got, want_old, got_old)
		where (v.want, v.want_old) is distinct from (v.got, v.got_old)`,
		changes, table, strings.Join(compare, ", "))
	different := pgtest.Column[string](db, query)
	for i, d := range different {
		if i < 20 {
			t.Error(d)
		}
	}
	if len(different) > 0 {
		t.Errorf("%d values differ", len(different))
	}
}

// What the log's jsonb cannot hold stops nothing: json that jsonb does not take is kept as its text, what is no text of the
// encoding is replaced, and a key that no index takes is cut short.
func TestOddValues(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table odd (id text primary key, j json, jb jsonb, c "char", js json[]);
		alter table odd replica identity full;
		select sequin.create_stream('odd', '{odd}', mode => 'changes')`)
	pgtest.StartBridge(t, db.URL)
	for i, value := range []string{
		`"\u0000"`, `{"a": "x\u0000y"}`, `["\ud83d"]`, `["\ude00\ud83d"]`, `1e1000000`, strings.Repeat("[", 5000) + strings.Repeat("]", 5000),
		`{"n": ` + strings.Repeat("9", 5000) + `}`,
	} {
		db.Exec(`insert into odd (id, j, js) values ($1, $2, array[$2::json, '1'])`, fmt.Sprint(i), value)
		db.Exec(`update odd set j = '{}' where id = $1`, fmt.Sprint(i))
		if got := pgtest.Value[bool](db, `select $1::json is not null`, value); !got {
			t.Fatal(value)
		}
		awaitLog(t, db, 2*i+2)
		if got := pgtest.Value[string](db, `select record ->> 'j' from sequin.messages where action = 'insert' order by seq desc limit 1`); got != value {
			t.Errorf("%.100s became %.100s", value, got)
		}
		if got := pgtest.Value[string](db, `select changes ->> 'j' from sequin.messages where action = 'update' order by seq desc limit 1`); got != value {
			t.Errorf("%.100s became %.100s", value, got)
		}
	}
	db.Exec(`delete from odd`)
	db.Exec(`do $$ declare v jsonb := '1'; begin for i in 1..1500 loop v := jsonb_build_array(v); end loop; insert into odd (id, jb) values ('deep', v); end $$`)
	for _, n := range []int{-1, -56, -128} {
		db.Exec(`insert into odd (id, c) values ($1::text, ($2::int)::"char")`, fmt.Sprint("char ", n), n)
	}
	// A key as long as an index takes, which does not get shorter by compression.
	key := pgtest.Value[string](db, `select left(string_agg(md5(i::text), ''), 2690) from generate_series(1, 100) i`)
	db.Exec(`insert into odd (id) values ($1)`, key)
	db.Exec(`update odd set j = '1' where id = $1`, key)
	db.Exec(`insert into odd (id) values ('last')`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where record_pk = 'last'`); n != 1 {
			return fmt.Errorf("capture has not come so far")
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select max(count) from (select count(*) from sequin.messages where length(record_pk) > 1000 group by record_pk) k`); n != 2 {
		t.Errorf("%d messages are of the long key", n)
	}
	if got := pgtest.Value[string](db, `select record ->> 'id' from sequin.messages where length(record_pk) > 1000 limit 1`); got != key {
		t.Errorf("the long key is %.50s in its record", got)
	}
}
