package sql

import (
	"encoding/json"
	"strings"
	"testing"

	"sequin/tests/pgtest"
)

// What a session may be set to that changes how an expression is read, printed, or evaluated.
var sessionSettings = []string{
	`standard_conforming_strings = off`, `quote_all_identifiers = on`, `transform_null_equals = on`, `array_nulls = off`,
	`datestyle = 'SQL, DMY'`, `intervalstyle = 'sql_standard'`, `timezone = 'Asia/Tokyo'`, `extra_float_digits = -15`,
	`bytea_output = 'escape'`,
}

// What a DBA looks at every few seconds looks cheap to the planner, on tables that nobody has analyzed, too: else, on a server
// with JIT, it is compiled each time, for a second or two.
func TestStatusIsNotCompiled(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	for _, view := range pgtest.Column[string](db, `select c.relname::text from pg_class c where c.relnamespace = 'sequin'::regnamespace and c.relkind = 'v'
		and (c.relname like '%status' or c.relname in ('streams', 'consumers', 'pipelines', 'sources', 'deliveries', 'dead_letters', 'backfills'))`) {
		var plans []struct {
			Plan struct {
				Cost float64 `json:"Total Cost"`
			}
		}
		if err := json.Unmarshal([]byte(pgtest.Value[string](db, `explain (format json) select * from sequin.`+view)), &plans); err != nil {
			t.Fatal(err)
		}
		cost := plans[0].Plan.Cost
		if limit := pgtest.Value[float64](db, `select boot_val::float8 from pg_settings where name = 'jit_above_cost'`); cost >= limit {
			t.Errorf("%s costs %v, and from %v on it is compiled", view, cost, limit)
		}
	}
}

// An expression means what it means in any session: in the one that it is written in, and in those that it is evaluated in.
func TestExpressionSettings(t *testing.T) {
	const transform = `jsonb_build_object('text', new.note = 'a\b', 'null', new.note = null, 'array', '{NULL}'::text[],
		'date', '2024-01-02'::date, 'day', new.day::date, 'at', '2024-01-01 00:00+00'::timestamptz, 'interval', '-1 days +02:03'::interval,
		'float', 0.1::float8 + 0.2::float8, 'bytes', '\x5c00'::bytea, 'bytes as text', new.bytes::text, 'mood', new.mood)`
	const want = `{"at": "2024-01-01T00:00:00+00:00", "day": "2024-01-02", "date": "2024-01-02", "mood": "sad", "null": null, "text": true, ` +
		`"array": [null], "bytes": "\\x5c00", "float": 0.30000000000000004, "interval": "-1 days +02:03:00", "bytes as text": "\\x5c"}`
	for _, setting := range append(sessionSettings, strings.Join(sessionSettings, "; set ")) {
		name, _, _ := strings.Cut(setting, " =")
		t.Run(name, func(t *testing.T) {
			f := setup(t, "changes")
			f.Exec(`create type "Mood" as enum ('sad', 'happy'); alter table item add day text, add bytes bytea, add mood "Mood"`)
			f.consumer("plain", "transform => $$"+transform+"$$")
			conn := f.Connect()
			if _, err := conn.Exec(t.Context(), `set `+setting); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Exec(t.Context(), `select sequin.create_consumer('c', 's', transform => $1, filter => '1 / new.grp > 0')`, transform); err != nil {
				t.Fatal(err)
			}
			if got := pgtest.Column[string](f.DB, `select distinct concat(compiled, inlined, columns, types, others) from sequin.consumer_expression where kind = 'transform'`); len(got) != 1 {
				t.Errorf("it is compiled to %s", strings.Join(got, "\n and to "))
			}
			record := func(grp string) row {
				return row{action: "i", key: 1, record: `{"id": 1, "grp": ` + grp + `, "note": "a\\b", "day": "01/02/2024", "bytes": "\\x5c", "mood": "sad"}`}
			}
			f.write(record("1"), record("0"))
			for _, call := range []string{`select sequin.alter_consumer('c', group_by => '{}')`, `select sequin.alter_consumer('c', filter => '')`, `select sequin.redrive('c')`} {
				if _, err := conn.Exec(t.Context(), call); err != nil {
					t.Fatalf("%s: %v", call, err)
				}
			}
			if state := pgtest.Value[string](f.DB, `select state || coalesce(error, '') from sequin.consumers where name = 'c'`); state != "active" {
				t.Errorf("it is %s", state)
			}
			got := append(f.records("c"), f.records("c")...)
			if len(got) != 2 {
				t.Fatalf("%d messages", len(got))
			}
			for _, record := range append(got, f.records("plain")...) {
				if record != want {
					t.Errorf("got %s\nwant %s", record, want)
				}
			}
			// What it thinks of the consumer does not depend on who asks, either.
			if _, err := conn.Exec(t.Context(), `select 1 / count(*) from sequin.consumers where name = 'c' and state = 'active'`); err != nil {
				t.Error(err)
			}
		})
	}
}

// Dates and times are as their author writes them, like those of any statement of the same session.
func TestExpressionTimes(t *testing.T) {
	f := setup(t, "changes")
	conn := f.Connect()
	if _, err := conn.Exec(t.Context(), `set timezone = 'Asia/Tokyo'; set datestyle = 'SQL, DMY'; set intervalstyle = 'sql_standard';
		select sequin.create_consumer('c', 's', transform => $$jsonb_build_object('at', '2024-01-01 09:00'::timestamptz, 'date', '01/02/2024'::date,
			'interval', '-1 2:03'::interval)$$)`); err != nil {
		t.Fatal(err)
	}
	f.write(inserts(1)...)
	const want = `{"at": "2024-01-01T00:00:00+00:00", "date": "2024-02-01", "interval": "-1 days -02:03:00"}`
	if got := f.records("c"); len(got) != 1 || got[0] != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// What a role writes into a string of a filter stays in the string, whatever it sets where the filter is evaluated with the
// rights of the owner.
func TestStringStaysOne(t *testing.T) {
	f := setup(t, "changes")
	worker := "worker_" + f.Name
	f.Exec(`create role ` + worker + ` login`)
	f.Cleanup(func() { f.Exec(`drop owned by ` + worker + ` cascade; drop role ` + worker) })
	f.Exec(`select sequin.grant_configure($1)`, worker)
	f.Exec(`grant select on item, sequin.messages to ` + worker + `; grant create on schema public to ` + worker)
	f.Exec(`create table ran (who text); grant insert on ran to public`)
	conn := f.ConnectAs(worker)
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	exec(`create function pwn() returns boolean language plpgsql as $$ begin insert into public.ran values (current_user); return true; end $$`)
	exec(`select sequin.create_consumer('c', 's', filter => $1)`, `new.note = E'\\\' or public.pwn()))) --' or new.note = 'a' and 1 / new.grp > 0`)
	seqs := f.write(row{action: "i", key: 1, grp: 1, note: "a"}, row{action: "i", key: 2, grp: 0, note: "a"})
	for _, call := range []string{
		`set standard_conforming_strings = off`,
		`select sequin.alter_consumer('c', group_by => '{}')`,
		`select sequin.alter_consumer('c', group_by => '{grp}')`,
		`select sequin.redrive('c')`,
		`select sequin.rewind('c', to_seq => $1)`,
		`select sequin.republish('c', $$select id from public.item$$)`,
		`select sequin.republish('c', $$select seq from sequin.messages where record_pk = '1'$$)`,
	} {
		if strings.Contains(call, "$1") {
			exec(call, seqs[0])
		} else {
			exec(call)
		}
	}
	f.write(row{action: "i", key: 3, grp: 1, note: "a"})
	if got := keys(f.pop(`'c', 10`)); got != "1" && got != "1 3" {
		t.Errorf("got %s", got)
	}
	if who := pgtest.Column[string](f.DB, `select distinct who from ran`); len(who) > 0 {
		t.Errorf("the function ran as %v", who)
	}
}

// A query that is republished is its caller's: what it means in the session is what it means here.
func TestRepublishIsInTheSession(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	f.write(row{action: "i", key: 1, record: `{"id": 1, "note": "a"}`})
	f.Exec(`insert into item values (1, 1, E'a\\b')`)
	conn := f.Connect()
	var n int
	for setting, want := range map[string]int{"on": 0, "off": 1} {
		if _, err := conn.Exec(t.Context(), `set standard_conforming_strings = `+setting); err != nil {
			t.Fatal(err)
		}
		if err := conn.QueryRow(t.Context(), `select sequin.republish('c', $1)`, `select id from item where note = 'a\\b'`).Scan(&n); err != nil || n != want {
			t.Errorf("%s: got %d, %v", setting, n, err)
		}
	}
}
