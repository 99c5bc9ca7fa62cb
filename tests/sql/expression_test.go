package sql

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// What somebody may try in the place of a filter. secret is a table that its author may not read; evil() would tell
// that it ran; and the table's columns are of types that evil() is in.
const hostileSQL = `
create extension if not exists citext;
create table secret (word text); insert into secret values ('hush');
create table ran (who text);
create function evil() returns boolean language plpgsql security invoker as $$ begin insert into ran values (current_user); return true; end $$;
create function evil(int) returns boolean language plpgsql stable as $$ begin return exists (select from secret); end $$;
create function evil_cast(text) returns int language plpgsql immutable as $$ begin perform evil(); return 1; end $$;
create function is_even(int) returns boolean language sql immutable as 'select $1 % 2 = 0';
create function runs(int) returns boolean language plpgsql volatile as $$ begin insert into ran values (current_user); return true; end $$;
create domain checked as int check (runs(value));
create type pair as (a int, b checked);
create type checks as range (subtype = checked);
create type mood as enum ('sad', 'happy');
create function mood_json(mood) returns json language plpgsql immutable as $$ begin insert into ran values (current_user); return '1'; end $$;
create type cast_mood as enum ('sad', 'happy');
create function cast_mood_json(cast_mood) returns json language plpgsql as $$ begin insert into ran values (current_user); return '1'; end $$;
create cast (cast_mood as json) with function cast_mood_json(cast_mood);
create operator === (leftarg = int, rightarg = int, function = evil_eq);`

// Each is refused when the consumer is made, with this SQLSTATE; or it is harmless: what it chooses of ten rows is known.
var hostile = []struct {
	name, filter string
	code         string
	chosen       int
}{
	{name: "two statements", filter: `true; drop table item`, code: "42601"},
	{name: "out of the parentheses", filter: `true) or (select true`, code: "42601"},
	{name: "out and on", filter: `true); drop table item; --`, code: "42601"},
	{name: "a comment that hides the rest", filter: `new.id <= 3 -- and false`, chosen: 3},
	{name: "a comment that hides a parenthesis", filter: `new.id <= 3 /* ) /* ) */ ( */`, chosen: 3},
	{name: "a comment without end", filter: `true /* /* */`, code: "42601"},
	{name: "a parenthesis in a comment", filter: `(new.id <= 3 -- )`, code: "42601"},
	{name: "a string without end", filter: `new.note = '1`, code: "42601"},
	{name: "a string with everything", filter: `new.note = ') -- ; /*' or new.id <= 2`, chosen: 2},
	{name: "a doubled quote", filter: `new.note = 'it''s' or new.id = 1`, chosen: 1},
	{name: "an escaped quote", filter: `new.note = E'\'); drop table item; --' or new.id = 1`, chosen: 1},
	{name: "a backslash that is no escape", filter: `new.note = '\' or new.id = 1`, chosen: 1},
	{name: "unicode strings", filter: `new.note = U&'\0031' or U&"new"."grp" = 99`, chosen: 1},
	{name: "a name in quotes with a quote", filter: `new."no""te" = '1'`, code: "42703"},
	{name: "dollar quotes", filter: `new.note = $$1$$ or new.note = $a$2$a$`, chosen: 2},
	{name: "dollar quotes that hide", filter: `new.note = $a$); drop table item; $$ -- $a$ or new.id = 1`, chosen: 1},
	{name: "a space that is a letter", filter: "xmlelement(name \u3000$$) is not null); drop table item; select (xmlelement(name \u3000$$) is not null", code: "42601"},
	{name: "a collation", filter: `new.note collate "C" < '2'`, chosen: 2},
	{name: "dollar quotes without end", filter: `new.note = $a$1$b$`, code: "42601"},
	{name: "dollar quotes to begin with", filter: `$$1$$ = new.note or $a$2$a$ = new.note`, chosen: 2},
	{name: "dollar quotes to begin with, and out", filter: `$a$ ( $a$ = '') or (true`, code: "42601"},
	{name: "a name with dollars", filter: `true or a$$) or (true or $$ = ''`, code: "42601"},
	{name: "a name with dollars and digits", filter: `true or a$1$$) or (true or $$ = ''`, code: "42601"},
	{name: "a name of all planes", filter: `true or 𝒳$$) or (true or $$ = ''`, code: "42601"},
	{name: "a string that goes on", filter: "new.note = E'1'\n'\\'' ); drop table item; --'", code: "42601"},
	{name: "a string that goes on after a comment", filter: "new.note = E'1' --\n'\\'' ); drop table item; --'", code: "42601"},
	{name: "a string in parts", filter: "new.note = E'\\x'\n'31' or new.note = 'a'\n'\\' or new.id = 1", chosen: 1},
	{name: "a parameter", filter: `new.id = $1`, code: "42703"},
	{name: "a subquery", filter: `exists (select from secret)`, code: "42601"},
	{name: "a subquery in a row", filter: `(select word from secret) = 'hush'`, code: "42601"},
	{name: "an array of a subquery", filter: `cardinality(array(select word from secret)) = 1`, code: "42601"},
	{name: "table", filter: `(table secret) = 'hush'`, code: "42601"},
	{name: "values", filter: `(values (true))`, code: "42601"},
	{name: "with", filter: `(with x as (insert into ran values ('x') returning 1) select true)`, code: "42601"},
	{name: "union", filter: `true union select true`, code: "42601"},
	{name: "from", filter: `true from secret`, code: "42601"},
	{name: "another column", filter: `true as x, true`, code: "42601"},
	{name: "a row", filter: `new.id, true`, code: "42804"},
	{name: "a row that is compared", filter: `(new.id, new.note) <= (3, '9')`, chosen: 3},
	{name: "the whole row", filter: `new is not null and new = old is not true`, chosen: 10},
	{name: "the whole row as text", filter: `new::text like '(1,%'`, chosen: 1},
	{name: "a function with side effects", filter: `evil()`, code: "42601"},
	{name: "a function that reads", filter: `evil(new.id)`, code: "42601"},
	{name: "an immutable function of one's own", filter: `is_even(new.id)`, code: "42601"},
	{name: "a volatile function", filter: `random() < 0.5`, code: "42601"},
	{name: "sleep", filter: `pg_sleep(100) is not null`, code: "42601"},
	{name: "a sequence", filter: `nextval('sequin.turn') > 0`, code: "42601"},
	{name: "a setting", filter: `set_config('role', 'postgres', false) <> ''`, code: "42601"},
	{name: "a look at a setting", filter: `current_setting('data_directory') like '/%'`, code: "42601"},
	{name: "a file", filter: `pg_read_file('/etc/passwd') like 'root%'`, code: "42601"},
	{name: "a directory", filter: `pg_ls_dir('/') = 'etc'`, code: "42804"},
	{name: "query_to_xml", filter: `query_to_xml('select * from secret', true, true, '') is not null`, code: "42601"},
	{name: "table_to_xml", filter: `table_to_xml('secret', true, true, '')::text like '%hush%'`, code: "42601"},
	{name: "database_to_xml", filter: `database_to_xml(true, true, '') is not null`, code: "42601"},
	{name: "ts_rewrite", filter: `ts_rewrite('a'::tsquery, 'select ''a''::tsquery, word::tsquery from secret') is not null`, code: "42601"},
	{name: "pg_input_is_valid", filter: `to_regclass('secret') is not null`, code: "42601"},
	{name: "a large object", filter: `lo_import('/etc/passwd') > 0`, code: "42601"},
	{name: "terminating others", filter: `pg_terminate_backend(1)`, code: "42601"},
	{name: "an aggregate", filter: `count(*) > 0`, code: "42601"},
	{name: "an aggregate of a column", filter: `bool_or(new.id > 0)`, code: "42601"},
	{name: "a window function", filter: `row_number() over () = 1`, code: "42601"},
	{name: "a set", filter: `generate_series(1, 3) = 1`, code: "42804"},
	{name: "a set of a column", filter: `unnest(array[true, false])`, code: "42804"},
	{name: "an operator of one's own", filter: `new.id === 1`, code: "42601"},
	{name: "a cast that fails at once", filter: `new.id = 'x'::int`, code: "42804"},
	{name: "what fails at once", filter: `1 / 0 = 1`, code: "42804"},
	{name: "what fails at once in a branch", filter: `case when new.id is not null then 1 / 0 = 1 end`, code: "42804"},
	{name: "what fails at once if", filter: `new.id is not null and action = 'insert' and (''::text)::boolean`, code: "42804"},
	{name: "a cast of one's own", filter: `new.feeling::json is not null`, code: "42804"},
	{name: "a cast inside to_jsonb", filter: `to_jsonb(new.feeling) = '"sad"'`, chosen: 10},
	{name: "a cast of a literal", filter: `to_jsonb('sad'::cast_mood) = '1'`, code: "42601"},
	{name: "a domain", filter: `new.id::checked > 0`, code: "42601"},
	{name: "a domain of a literal", filter: `'1'::checked > 0`, code: "42601"},
	{name: "domains in an array", filter: `'{1}'::checked[] is not null`, code: "42501"},
	{name: "a domain in a row", filter: `'(1,2)'::pair is not null`, code: "42501"},
	{name: "a domain in a range", filter: `'[1,2]'::checks is not null`, code: "42501"},
	{name: "a domain in a populated row", filter: `(jsonb_populate_record(null::pair, '{"b": 1}')).b = 1`, code: "42601"},
	{name: "a domain by its input function", filter: `domain_in('1', 'checked'::regtype, -1) is not null`, code: "42601"},
	{name: "columns of domains", filter: `new.n = 1 and new.ns = '{1,2}' and new.p = '(1,2)' and new.r = '[1,2)'`, chosen: 10},
	{name: "the whole of them", filter: `to_jsonb(new) ->> 'n' = '1'`, chosen: 10},
	{name: "a reference to what it is evaluated in", filter: `_sequin_m.record is null`, code: "42703"},
	{name: "what a probe is made of", filter: `record is null`, code: "42703"},
	{name: "whether there is a row", filter: `has_new or has_old`, code: "42703"},
	{name: "a reference in unicode", filter: `U&"\005fsequin_m".U&"\005fsequin_record" is null`, code: "42703"},
	{name: "a row in unicode", filter: `U&"\005fsequin_m" is not null`, code: "42703"},
	{name: "a row in unicode, cast", filter: `U&"\005fsequin_m".record is not null`, code: "42703"},
	{name: "a name that shadows", filter: `abs(new.id) = 1 and upper(new.note) = '0'`, chosen: 1},
	{name: "a column called as a name", filter: `new.action = 'x' and action = 'insert'`, chosen: 10},
	{name: "an unreadable function", filter: `citext_eq(new.note::citext, '1')`, chosen: 1},
	{name: "who it is", filter: `current_user = 'postgres'`, chosen: 10}, // which says nothing of the message, and no more than a view of sequin's
	{name: "xml with an entity", filter: `xml('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>')::text like '%root%'`, chosen: 0},
	{name: "very long", filter: `new.id in (` + strings.Repeat("0, ", 20000) + `1)`, chosen: 1},
	{name: "too long", filter: strings.Repeat(" ", 100001) + "true", code: "22023"},
	{name: "very deep", filter: strings.Repeat("(", 40000) + "true" + strings.Repeat(")", 40000), code: "42601"},
	{name: "a conjunction of thousands", filter: "new.id = 1" + strings.Repeat(" and true", 5000), chosen: 1},
	{name: "null", filter: `null`, chosen: 0},
	{name: "nothing", filter: " \n\t", code: "42601"},
	{name: "only a comment", filter: "-- true", code: "42601"},
	{name: "a keyword", filter: `select`, code: "42601"},
	{name: "default", filter: `default`, code: "42601"},
	{name: "an asterisk", filter: `*`, code: "42601"},
	{name: "another row's columns", filter: `item.id = 1`, code: "42703"},
	{name: "system columns", filter: `new.ctid is not null`, code: "42703"},
}

// A role that configures tries them all. None of what they are after happens: nothing is read that it may not read, and
// nothing runs with other rights than its own.
func TestHostileFilters(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`create function evil_eq(int, int) returns boolean language plpgsql immutable as $$ begin perform evil(); return true; end $$`)
	f.Exec(hostileSQL)
	f.Exec(`alter table item add action text, add n checked, add ns checked[], add p pair, add r checks, add feeling mood`)
	admin := "admin_" + f.Name
	f.Exec(`create role ` + admin + ` login`)
	f.Cleanup(func() { f.Exec(`drop owned by ` + admin + ` cascade; drop role ` + admin) })
	f.Exec(`select sequin.grant_configure($1)`, admin)
	f.Exec(`grant select on item to ` + admin + `; grant create on schema public to ` + admin)
	f.Exec(`create schema shadow; grant usage on schema shadow to ` + admin)
	f.Exec(`
		create function shadow.abs(int) returns int language sql immutable as 'select 1';
		create function shadow.upper(text) returns text language plpgsql as $$ begin insert into public.ran values (current_user); return '0'; end $$`)
	conn := f.ConnectAs(admin)
	if _, err := conn.Exec(t.Context(), `set search_path = public, shadow`); err != nil {
		t.Fatal(err)
	}
	made := map[string]int{}
	for i, test := range hostile {
		name := fmt.Sprintf("c%d", i)
		_, err := conn.Exec(t.Context(), `select sequin.create_consumer($1, 's', filter => $2)`, name, test.filter)
		var e *pgconn.PgError
		switch {
		case err == nil && test.code == "":
			made[name] = i
		case errors.As(err, &e) && e.Code == test.code:
		default:
			t.Errorf("%s: %.100s: got %v, want %q", test.name, test.filter, err, test.code)
		}
	}
	var rows []row
	for i := range 10 {
		rows = append(rows, row{action: "i", key: i + 1, record: fmt.Sprintf(
			`{"id": %d, "grp": 0, "note": "%d", "action": "x", "n": 1, "ns": [1, 2], "p": "(1,2)", "r": "[1,2)", "feeling": "sad"}`, i+1, i)})
	}
	f.write(rows...)
	for name, i := range made {
		got := len(f.messages(f.Pool, fmt.Sprintf(`select 0::bigint, seq, action, table_name, record_pk, '', null::text, 1 from sequin.pop('%s', 100)`, name)))
		dead := pgtest.Value[string](f.DB, `select coalesce(min(error), '') from sequin.dead_letters where consumer = $1`, name)
		if got != hostile[i].chosen || dead != "" {
			t.Errorf("%s: %.100s: it chooses %d, want %d %s", hostile[i].name, hostile[i].filter, got, hostile[i].chosen, dead)
		}
	}
	if who := pgtest.Column[string](f.DB, `select distinct who from ran`); len(who) > 0 && (len(who) > 1 || who[0] != admin) {
		t.Errorf("functions ran as %v", who)
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from pg_class where relname like '\_sequin%' or relname = 'item' and relkind <> 'r'`); n != 0 {
		t.Errorf("%d relations are left", n)
	}
}

// A type, a function or a cast that comes to be, or to be another, after the consumer was made is not run by it.
func TestFilterIsNotLedAstray(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`create type mood as enum ('sad', 'happy'); alter table item add feeling mood; create table ran (who text)`)
	f.consumer("c", `filter => $$new.feeling::text = 'sad' and 'happy'::mood > 'sad'$$`, `transform => 'to_jsonb(new)'`)
	one := func(key int) row {
		return row{action: "i", key: key, record: fmt.Sprintf(`{"id": %d, "feeling": "sad"}`, key)}
	}
	f.write(one(1))
	f.Exec(`create function evil(mood) returns json language plpgsql as $$ begin insert into ran values (current_user); return '1'; end $$;
		create function evil_text(mood) returns text language plpgsql as $$ begin insert into ran values (current_user); return '1'; end $$;
		create cast (mood as json) with function evil(mood); create cast (mood as text) with function evil_text(mood)`)
	f.write(one(2))
	if state := pgtest.Value[string](f.DB, `select state from sequin.consumers`); state != "error" {
		t.Errorf("with a cast of somebody's it is %s", state)
	}
	f.Exec(`drop cast (mood as json); drop cast (mood as text)`)
	f.write(one(3))
	f.Exec(`alter table item drop feeling; drop type mood cascade;
		create function runs(text) returns boolean language plpgsql as $$ begin insert into ran values (current_user); return true; end $$;
		create domain mood as text check (runs(value)); alter table item add feeling mood`)
	f.Exec(`truncate ran`) // adding it has run it, as it should
	f.write(one(4))
	if n := pgtest.Value[int](f.DB, `select count(*) from ran`); n != 0 {
		t.Errorf("%d times a function was run", n)
	}
	if state := pgtest.Value[string](f.DB, `select state from sequin.consumers`); state != "error" {
		t.Errorf("with another type it is %s", state)
	}
	f.alter(`filter => $$new.feeling = 'sad'$$`)
	f.write()
	if got := f.pop(`'c', 10`); len(got) != 4 {
		t.Errorf("%d messages", len(got))
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from ran`); n != 0 {
		t.Errorf("%d times a function was run", n)
	}
}

// What is wrong is said in words of Sequin's: with the consumer, a position where there is one, and a hint; and nothing of
// the statement that it was found out with.
func TestExpressionErrors(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`alter table item add "Total" int, add amount numeric`)
	for _, test := range []struct{ filter, code, message, hint string }{
		{`new.amont > 1 or new.amont < 0`, "42703", `column new.amont does not exist at position 1`, `new.amount`},
		{`'new.amont' = '' or new.amont < 0`, "42703", `column new.amont does not exist at position 21`, `new.amount`},
		{`foo > foo`, "42703", `column "foo" does not exist at position 1`, `to_jsonb(new)`},
		{`new."Total" > 5 or total > 5`, "42703", `column "total" does not exist at position 20`, `new.Total`},
		{`record is null`, "42703", `column "record" does not exist at position 1`, `to_jsonb(new)`},
		{`actoin = 'insert'`, "42703", `column "actoin" does not exist at position 1`, `"action"`},
		{`item.id = 1`, "42703", `"item" at position 1`, `to_jsonb(new)`},
		{`new.id = $1 or new.grp = $1`, "42703", `there is no parameter $1`, ``},
		{`new.note collate "nope" = 'x'`, "42703", `collation "nope"`, ``},
		{`new.amount operator(nosuch.=) 1`, "42703", `"nosuch" does not exist at position 21`, ``},
		{`new.note::nope = new.note::nope`, "42703", `type "nope" does not exist at position 11`, ``},
		{`nope(new.id) or nope(new.id)`, "42703", `function nope(integer) does not exist at position 1`, ``},
		{`'x'::regclass is null`, "42703", `relation "x" does not exist`, ``},
		{`new.id = 1 = = 1`, "42601", `syntax error at or near "=" at position 12`, ``},
		{`new.id = 1 and (new.id >= 2 or new.id => 3)`, "42601", `syntax error at or near "=>" at position 39`, ``},
		{`new.note is is null`, "42601", `syntax error at or near "is" at position 13`, ``},
		{`'is' is null and new.id::int is is null`, "42601", `syntax error at or near "is" at position 33`, ``},
		{`new.id >`, "42601", `syntax error at the end of it, at position 9`, ``},
		{`default`, "42601", ``, ``},
		{`count(*) > 1`, "42601", `it has an aggregate function: count at position 1`, ``},
		{`bool_or(new.id > 0)`, "42601", `it has an aggregate function`, ``},
		{`new.id = 1 and row_number() over () = 1`, "42601", `it has a window function: row_number at position 16`, ``},
		{`sum(new.id) over (order by new.id) = 1`, "42601", `it has a window function: sum at position 1`, ``},
		{`generate_series(1, 2) = 1`, "42804", `it returns a set`, ``},
		{`coalesce(generate_series(1, 2), 1) = 1`, "42804", `set`, ``},
		{`new.note like 'a' and new.note and true`, "42804", `argument of AND must be type boolean`, ``},
		{`case new.id when 1 then true else 2 end`, "42804", `CASE types`, ``},
		{`new.id = any (1)`, "42804", `requires array on right side`, ``},
		{`new.id = new.note or new.id = 1`, "42804", `operator does not exist: integer = text`, `type cast`},
		{`lower(new.id) = 'x'`, "42804", `function lower(integer) does not exist at position 1`, `type cast`},
		{`new.id = 'x'`, "42804", `"x" at position`, ``},
		{`1 / 0 > 1`, "42804", `division by zero at position 1`, ``},
		{`new.id = 1 and new.note`, "42804", `argument of AND must be type boolean, not type text at position 12`, ``},
		{`not new.id`, "42804", `at position 1`, ``},
		{`new.id = coalesce(new.id, new.note)`, "42804", `COALESCE types integer and text cannot be matched at position 10`, ``},
		{`new.note like 3`, "42804", `text ~~ integer at position 10`, ``},
		{`1 < max(new.id)`, "42601", `it has an aggregate function at position 5`, ``},
		{`(new.note).a > 1`, "42804", ` at position `, ``},
		{`1 = any (3)`, "42804", ` at position 5`, ``},
	} {
		e := f.Error(`select sequin.create_consumer('x', 's', filter => $1)`, test.filter)
		if e.Code != test.code || !strings.HasPrefix(e.Message, `consumer "x": filter: `) || !strings.Contains(e.Message, test.message) ||
			e.Hint == "" || !strings.Contains(e.Hint, test.hint) {
			t.Errorf("%s: got %s: %s (hint: %s); want %s, %q and %q", test.filter, e.Code, e.Message, e.Hint, test.code, test.message, test.hint)
		}
		if !strings.Contains(e.Message, " at position ") {
			t.Errorf("%s: %s does not say where", test.filter, e.Message)
		}
		if e.InternalQuery != "" || strings.Contains(e.Message+e.Detail+e.Hint, "_sequin") {
			t.Errorf("%s: it shows what it is checked by: %s %s %s %s", test.filter, e.Message, e.Detail, e.Hint, e.InternalQuery)
		}
	}
}

// What is compared in words would be by the system's operator, where the type has one of its own: by the operator it is.
func TestComparedInWords(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`create extension citext; create extension hstore; alter table item add email citext, add h hstore`)
	for _, test := range []struct{ filter, problem string }{
		{`new.id = 1 and old.email is distinct from new.email`, `is distinct from with an operator that is not the system's: public.=(public.citext,public.citext) at position 29`},
		{`old.email is not distinct from 'A'`, `is distinct from with an operator that is not the system's: public.=(public.citext,public.citext) at position 18`},
		{`old.h is distinct from new.h`, `is distinct from with an operator that is not the system's: public.=(public.hstore,public.hstore) at position 10`},
		{`row(new.id, new.email) is distinct from row(1, 'A'::citext)`, `is distinct from with an operator that is not the system's: public.=(public.citext,public.citext) at position 27`},
		{`nullif(new.email, 'A') is null`, `nullif with an operator that is not the system's: public.=(public.citext,public.citext) at position 1`},
		{`case new.email when 'A' then true end`, `a case with a value with an operator that is not the system's: public.=(public.citext,public.citext) at position 1`},
		{`case new.email when 'A'::text then true when old.email then true end`, `a case with a value with an operator that is not the system's: public.=(public.citext,public.citext) at position 1`},
		{`(new.id, new.email) < (1, 'A')`, `a comparison of rows with an operator that is not the system's: public.<(public.citext,public.citext) at position 21`},
		{`(new.email, new.id) >= ('A', 1)`, `a comparison of rows with an operator that is not the system's: public.>=(public.citext,public.citext) at position 21`},
	} {
		e := f.Error(`select sequin.create_consumer('x', 's', filter => $1)`, test.filter)
		if e.Code != "42601" || e.Message != `consumer "x": filter: it has `+test.problem || !strings.Contains(e.Hint, "is not true") {
			t.Errorf("%s: got %s: %s (hint: %s), want %s", test.filter, e.Code, e.Message, e.Hint, test.problem)
		}
	}
	for i, filter := range []string{
		`(old.email = new.email) is not true`, `new.email = 'A'`, `'A' <> new.email is not null`, `new.email in ('A', 'B')`, `case when new.email = 'A' then true end`,
		`case new.id when 1 then new.email = 'A' end`, `case when case new.id when 1 then true end then new.email = 'A' end`,
		`(new.id, new.email) = (1, 'A')`, `new.note is distinct from old.note and (new.id, new.note) >= (1, '')`, `new.email between 'A' and 'B'`, `nullif(new.id, 2) = 1`,
	} {
		f.consumer(fmt.Sprintf("c%d", i), "filter => $$"+filter+"$$")
	}
	f.write(row{action: "i", key: 1, record: `{"id": 1, "note": "x", "email": "a"}`})
	if got := pgtest.Column[string](f.DB, `select name from sequin.consumer_status where pending <> 1`); len(got) > 0 {
		t.Errorf("not chosen by %v", got)
	}
}

// pieces is what random expressions are made of.
var pieces = []string{
	"new.id", "old.id", "new.note", "new", "old", "action", "table_name", "committed_at", "(", ")", "(", ")", "'", "''", "'x'", `"`, "$$", "$a$", "E'", `\`,
	"U&'", "--", "/*", "*/", "\n", ";", ",", "=", "<", ">", "and", "or", "not", "is", "null", "true", "false", "in", "between", "like", "::", "int", "text", "1", "0",
	"select", "from", "item", "case", "when", "then", "else", "end", "+", "-", "*", "/", ".", "[", "]", "array", "coalesce", "lower", "count", "drop table item", "$1", "é", "☃",
	"any", "exists", "over", "as", "x", "cast", "to_jsonb", "{", "}", "@>", "->>", "#>", "interval '1 day'", "now()", "random()", "\x01", "%s", "%", "union", "with", "values",
}

func randomExpression(random *rand.Rand) string {
	var b strings.Builder
	for range 1 + random.IntN(14) {
		switch random.IntN(12) {
		case 0:
			b.WriteRune(rune(1 + random.IntN(0x2fff)))
		case 1, 2, 3:
			// Something that may be right.
			b.WriteString([]string{"(new.id > 1)", "new.note = 'x'", "action = 'insert'", "old is null", "(true)", " and ", " or ", "not "}[random.IntN(8)])
			continue
		default:
			b.WriteString(pieces[random.IntN(len(pieces))])
		}
		if random.IntN(3) > 0 {
			b.WriteByte(' ')
		}
	}
	return b.String()
}

// Any text is either refused, with a reason, or it is one expression; and whatever it is, nothing else happens.
func TestRandomFilters(t *testing.T) {
	f := setup(t, "changes")
	seed := pgtest.Seed(t)
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	const tables = `select string_agg(format('%s %s', c.oid, c.relname), ' ' order by c.oid) from pg_class c
		where c.relnamespace = 'public'::regnamespace or c.relname like '\_sequin%'`
	before := pgtest.Value[string](f.DB, tables)
	conn := f.Connect()
	made := 0
	for range 1000 * pgtest.Rounds(t, 1) {
		expression := randomExpression(random)
		err := pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), `select sequin.create_consumer('c', 's', filter => $1)`, expression); err != nil {
				return err
			}
			made++
			// What was compiled is one expression: it compiles to itself.
			var compiled, again string
			if err := tx.QueryRow(t.Context(), `select compiled from sequin.consumer_expression`).Scan(&compiled); err != nil {
				return err
			}
			source := strings.TrimSuffix(strings.TrimPrefix(strings.ReplaceAll(compiled, "_sequin.", ""), "("), " IS TRUE)")
			if _, err := tx.Exec(t.Context(), `select sequin.create_consumer('d', 's', filter => $1)`, source); err != nil {
				return fmt.Errorf("compiled to %s: %s", compiled, err.Error())
			}
			if err := tx.QueryRow(t.Context(), `select compiled from sequin.consumer_expression order by consumer_id desc limit 1`).Scan(&again); err != nil {
				return err
			}
			if again != compiled {
				return fmt.Errorf("compiled to %s, and that to %s", compiled, again)
			}
			return errDone
		})
		var e *pgconn.PgError
		switch {
		case errors.Is(err, errDone):
		case errors.As(err, &e) && (e.Code[:2] == "42" || e.Code[:2] == "22" || e.Code[:2] == "0A"):
		default:
			t.Fatalf("seed %d: %q: %v", seed, expression, err)
		}
	}
	if made == 0 {
		t.Error("none of them was an expression")
	}
	if after := pgtest.Value[string](f.DB, tables); after != before {
		t.Errorf("seed %d: there were %s, and are %s", seed, before, after)
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.consumers`); n != 0 {
		t.Errorf("%d consumers are left", n)
	}
}

// Where the grammar ends an expression is where the server says that it does, to whom it tells the position.
func TestSyntaxPlace(t *testing.T) {
	f := setup(t, "changes")
	seed := pgtest.Seed(t)
	random := rand.New(rand.NewPCG(seed, 1))
	conn := f.Connect()
	compared := 0
	for range 2000 * pgtest.Rounds(t, 1) {
		expression := randomExpression(random)
		var isWhole bool
		if err := conn.QueryRow(t.Context(), `select sequin._check_expression('x', false, $1) is not null`, expression).Scan(&isWhole); err != nil {
			continue
		}
		_, err := conn.Prepare(t.Context(), "", "select (\n"+expression+"\n) is true")
		var e *pgconn.PgError
		if !errors.As(err, &e) || e.Code != "42601" || !strings.HasPrefix(e.Message, "syntax error at or near") {
			continue
		}
		want := int(e.Position) - len("select (\n")
		if e.Message == `syntax error at or near ")"` && want > len([]rune(expression)) {
			want = len([]rune(expression)) + 1
		}
		got := pgtest.Value[int](f.DB, `select coalesce(sequin._syntax_place($1), 0)`, expression)
		// Of the same operators or parameters side by side, and of a not that goes with what follows, the first.
		if got < 1 || got > want ||
			strings.Trim(strings.ReplaceAll(string([]rune(expression)[got-1:want-1]), "not ", ""), "+-*/<>=~!@#%^&|`?:.$,;0123456789") != "" {
			t.Errorf("seed %d: %q: got %d, and it is %s at %d", seed, expression, got, e.Message, want)
		}
		compared++
	}
	if compared < 100 {
		t.Errorf("%d of them were compared", compared)
	}
}

var errDone = errors.New("done")
