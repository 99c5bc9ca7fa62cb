package sql

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// keys are the keys of messages, in order.
func keys(messages []message) string {
	var keys []string
	for _, m := range messages {
		keys = append(keys, m.Key)
	}
	slices.Sort(keys)
	return strings.Join(keys, " ")
}

// records are the records of what pop gives, in the order of seq.
func (f *fixture) records(consumer string) []string {
	f.Helper()
	return pgtest.Column[string](f.DB, `select coalesce(record::text, 'null') from sequin.pop($1, 1000) order by seq`, consumer)
}

// What a filter says of each kind of message: new and old are there where the action has them, and null is not true.
func TestFilter(t *testing.T) {
	f := setup(t, "changes")
	filters := []struct{ filter, want string }{
		{`new.grp > 5`, "2 6"},
		{`new.grp > 5 or null`, "2 6"},
		{`not (new.grp > 5)`, "1 3 4"},
		{`null`, ""},
		{`'true'`, "1 2 3 4 5 6 t"},
		{`action = 'update'`, "4 6"},
		{`action in ('delete')`, "5"},
		{`action = 'truncate'`, "t"},
		{`new is null`, "5 t"},
		{`old is null`, "1 2 3 t"},
		{`old.grp = 1`, "4 5"},
		{`old.grp <> new.grp`, "4"},
		{`old.note = new.note`, "6"},
		{`old.note is distinct from new.note`, "1 2 3 4 5"},
		{`new.note = 'x'`, "3"},
		{`table_name = 'item'`, "1 2 3 4 5 6 t"},
		{`table_name <> 'item'`, ""},
		{`committed_at > '-infinity' and committed_at <= now()`, "1 2 3 4 5 6 t"},
		{`to_jsonb(new) is null`, "5 t"},
		{`to_jsonb(old) ->> 'grp' = '1'`, "4 5"},
		{`coalesce(new.id, old.id) % 2 = 0`, "2 4 6"},
		{`case action when 'insert' then new.id = 1 when 'delete' then true end`, "1 5"},
		{`(new.id, new.grp) in ((1, 1), (2, 7))`, "1"},
		{`new.id = any ('{1,2}') and new.note ~ '^[0-9]*$' and extract(year from committed_at) > 2000`, "1 2"},
		{`NEW.ID = 1 -- as it is called`, "1"},
	}
	for i, test := range filters {
		f.consumer(fmt.Sprint("c", i), "filter => $$"+test.filter+"$$", "actions => '{insert,update,delete,truncate}'")
	}
	f.write(
		row{action: "i", key: 1, grp: 1}, row{action: "i", key: 2, grp: 6},
		row{action: "i", key: 3, grp: 2, note: "x"},
		row{action: "u", key: 4, grp: 2, note: "y", changes: `{"grp": 1, "note": "z"}`},
		row{action: "d", key: 5, grp: 1},
		row{action: "u", key: 6, grp: 7, record: `{"id": 6, "grp": 7, "note": "a"}`, changes: `{}`},
		row{action: "t"})
	for i, test := range filters {
		var got []string
		for _, m := range f.pop(fmt.Sprintf(`'c%d', 100`, i)) {
			if m.Action == "truncate" {
				m.Key = "t"
			}
			got = append(got, m.Key)
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != test.want {
			t.Errorf("%s chooses %q, want %q", test.filter, s, test.want)
		}
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`); n != 0 {
		t.Errorf("%d dead letters", n)
	}
	f.wantClean()
}

// A column may have the name of what stands for all of them.
func TestTransformStar(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`alter table item add "*" int`)
	f.consumer("one", `transform => 'to_jsonb(new."*")'`)
	f.consumer("all", `transform => 'to_jsonb(new.*)'`)
	f.consumer("both", `transform => 'jsonb_build_array(new."*" + new.id, to_jsonb(old."*"), to_jsonb(new) -> ''*'')'`)
	f.write(row{action: "i", key: 1, record: `{"id": 1, "*": 7}`})
	for consumer, want := range map[string]string{"one": `7`, "all": `{"*": 7, "id": 1}`, "both": `[8, null, 7]`} {
		if got := f.records(consumer); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: got %v, want %s", consumer, got, want)
		}
	}
	f.Exec(`alter table item drop "*"`)
	if got := pgtest.Column[string](f.DB, `select name from sequin.consumers where state = 'error' order by name`); !slices.Equal(got, []string{"both", "one"}) {
		t.Errorf("without it, in error: %v", got)
	}
}

// A value of type json is read as what it is, also by what another version of the server has compiled: some quote the type's name.
func TestFilterJSON(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`alter table item add j json, add js json[]`)
	f.consumer("of_json", `filter => 'new.j ->> ''a'' = ''1'' and new.js[1] is null'`)
	f.consumer("to_json", `filter => 'new.js is null or new.js[1] is null'`, `transform => 'jsonb_build_array(new.j, new.js)'`)
	for _, quoted := range []string{"", `replace(replace(types::text, '\"', ''), 'json', '\"json\"')::text[]`, `replace(types::text, '\"', '')::text[]`} {
		if quoted != "" {
			f.Exec(`update sequin.consumer_expression set types = ` + quoted + ` where kind = 'transform'`)
		}
		f.write(row{action: "i", key: 1, record: `{"id": 1, "j": "12", "js": null}`}, row{action: "i", key: 2, record: `{"id": 2, "j": {"a": 1}, "js": [null, "x"]}`})
		if got, want := f.records("of_json"), []string{`{"j": {"a": 1}, "id": 2, "js": [null, "x"]}`}; !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", quoted, got, want)
		}
		if got, want := f.records("to_json"), []string{`["12", null]`, `[{"a": 1}, [null, "x"]]`}; !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", quoted, got, want)
		}
	}
	if errors := pgtest.Column[string](f.DB, `select error from sequin.consumers where error is not null union all select error from sequin.dead_letters`); len(errors) > 0 {
		t.Errorf("errors: %v", errors)
	}
}

// Without the whole old row there is its key.
func TestFilterOldKey(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`alter table item replica identity default`)
	f.consumer("c", `transform => 'jsonb_build_object(''was'', old.id, ''grp'', old.grp, ''old'', to_jsonb(old))'`)
	f.write(row{action: "u", key: 1, grp: 2}, row{action: "u", key: 3, grp: 2, changes: `{"id": 2}`},
		row{action: "d", key: 4, record: `{"id": 4}`},
		// It had been full, when this was written.
		row{action: "u", key: 5, grp: 2, changes: `{"grp": 9}`}, row{action: "u", key: 6, grp: 2, changes: `{}`})
	want := []string{
		`{"grp": null, "old": {"id": 1}, "was": 1}`,
		`{"grp": null, "old": {"id": 2}, "was": 2}`,
		`{"grp": null, "old": {"id": 4}, "was": 4}`,
		`{"grp": 9, "old": {"id": 5, "grp": 9, "note": ""}, "was": 5}`,
		`{"grp": null, "old": {"id": 6}, "was": 6}`,
	}
	if got := f.records("c"); !slices.Equal(got, want) {
		t.Errorf("got %s", strings.Join(got, "\n"))
	}
}

// A transform's result is the record, wherever the message goes; groups are the row's.
func TestTransform(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "backoff => '0'", "group_by => '{grp}'", "max_deliver => 3", `filter => 'new.note <> ''no'''`,
		`transform => 'case when new.id < 100 then json_build_object(''note'', ''<'' || new.note || ''>'', ''grp'', 0, ''action'', action) end'`)
	var rows []row
	for i := range 20 {
		rows = append(rows, row{action: "i", key: i, grp: i % 3, note: fmt.Sprint(i)})
	}
	rows = append(rows, row{action: "i", key: 100, grp: 9}, row{action: "i", key: 101, grp: 9, note: "no"})
	all := f.write(rows...)[:21]
	// One of a group at a time, though what was made of them has but one: by what the row says.
	first := f.receive(`'c', 1`)
	wantSeqs(t, first, all[0])
	if first[0].Note != "<0>" {
		t.Errorf("its note is %s", first[0].Note)
	}
	others := f.receive(`'c', 100`)
	if len(others) < 7 {
		t.Fatalf("%d messages while one group is held", len(others))
	}
	// Given back, kept one by one, and given up.
	f.call("nack", ids(first), 1, "delay => '0'")
	first = f.eventually(`'c', 1`)
	if first[0].Note != "<0>" || first[0].DeliverCount != 2 {
		t.Errorf("again it is %+v", first[0])
	}
	f.call("nack", ids(first), 1, "delay => '0'")
	first = f.eventually(`'c', 1`)
	f.call("nack", ids(first), 1)
	if got := pgtest.Value[string](f.DB, `select record ->> 'note' from sequin.dead_letters`); got != "<0>" {
		t.Errorf("dead it has %s", got)
	}
	f.Exec(`select sequin.redrive('c')`)
	f.alter(`group_by => '{id}'`)
	f.call("ack", ids(others), int64(len(others)))
	seen := len(others)
	for range 50 {
		for _, m := range f.pop(`'c', 100`) {
			seen++
			if m.Note != fmt.Sprintf("<%s>", m.Key) && m.Key != "100" {
				t.Errorf("%+v", m)
			}
		}
		f.tend()
	}
	if seen != 21 {
		t.Errorf("%d messages, want 21", seen)
	}
	f.wantClean()
}

// What fails on one row stops nothing: it is a dead letter, and comes back when the filter is another.
func TestFilterRowErrors(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", `filter => '10 / new.grp > 1'`, `transform => 'jsonb_build_object(''note'', new.note::int)'`)
	seqs := f.write(row{action: "i", key: 1, grp: 1, note: "1"}, row{action: "i", key: 2, grp: 0, note: "2"}, row{action: "i", key: 3, grp: 1, note: "x"},
		row{action: "i", key: 4, grp: 100, note: "4"}, row{action: "i", key: 5, grp: 1, note: "5"}, row{action: "i", key: 6, grp: 100, note: "x"})
	if n := pgtest.Value[int](f.DB, `select pending from sequin.consumer_status`); n != 2 {
		t.Errorf("%d pending, want 2", n)
	}
	got := f.pop(`'c', 10`)
	wantSeqsInAnyOrder(t, got, seqs[0], seqs[4])
	dead := pgtest.Column[string](f.DB, `select format('%s %s %s %s', seq, deliver_count, error, record ->> 'note') from sequin.dead_letters order by seq`)
	want := []string{
		fmt.Sprintf(`%d 0 filter: division by zero 2`, seqs[1]),
		fmt.Sprintf(`%d 0 transform: invalid input syntax for type integer: "x" x`, seqs[2]),
	}
	if !slices.Equal(dead, want) {
		t.Errorf("dead letters: %v, want %v", dead, want)
	}
	if got := pgtest.Value[string](f.DB, `select status || ' ' || hint from sequin.health() where name = 'consumer c'`); !strings.Contains(got, "warning select * from sequin.dead_letters") {
		t.Errorf("health() says %s", got)
	}
	// The same filter again: they fail again. Another one: one is chosen now, and one is not.
	if n := pgtest.Value[int](f.DB, `select sequin.redrive('c')`); n != 0 {
		t.Errorf("redrive counts %d, want 0", n)
	}
	// Nor does a republish stop at them, of messages or of rows.
	f.Exec(`insert into item values (1, 1, '1'), (7, 0, '7'), (8, 1, '8')`)
	f.republish(`select seq from sequin.messages where stream = 's' and seq <= `+fmt.Sprint(seqs[2]), 1)
	f.republish(`select * from item where id in (7, 8)`, 1)
	if keys := keys(f.pop(`'c', 10`)); keys != "1 8" {
		t.Errorf("rows %s came again", keys)
	}
	if got := pgtest.Column[string](f.DB, `delete from sequin.dead_letter where record_pk = '7' returning error`); !slices.Equal(got, []string{"filter: division by zero"}) {
		t.Errorf("the error of a row that was republished: %v", got)
	}
	if got := pgtest.Column[string](f.DB, `select format('%s %s %s %s', seq, deliver_count, error, record ->> 'note') from sequin.dead_letters order by seq`); !slices.Equal(got, want) {
		t.Errorf("dead letters: %v, want %v", got, want)
	}
	f.alter(`filter => 'new.grp = 0 or new.grp = 7'`)
	if n := pgtest.Value[int](f.DB, `select sequin.redrive('c')`); n != 1 {
		t.Errorf("redrive counts %d, want 1", n)
	}
	got = f.pop(`'c', 10`)
	wantSeqs(t, got, seqs[1])
	if got[0].Note != "2" {
		t.Errorf("got %+v", got[0])
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`); n != 0 {
		t.Errorf("%d dead letters", n)
	}
	f.alter(`transform => '', filter => ''`)
	next := f.write(inserts(10)...)
	wantSeqs(t, f.pop(`'c', 10`), next...)
	f.wantClean()
}

// A filter that fails on each of many does not crawl.
func TestFilterFailsOnAll(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", `filter => '1 / (new.id - new.id) = 1'`)
	const n = 5000
	f.Exec(`select sequin.pause_consumer('c')`)
	began := time.Now()
	f.write(inserts(upto(n)...)...)
	wrote := time.Since(began)
	if dead := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`); dead != n {
		t.Fatalf("%d dead letters", dead)
	}
	began = time.Now()
	if redriven := pgtest.Value[int](f.DB, `select sequin.redrive('c')`); redriven != 0 {
		t.Errorf("%d redriven", redriven)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("deciding on %d that fail took %s", n, took)
	}
	t.Logf("%d were written in %s, and tried again in %s", n, wrote, time.Since(began))
}

// A column that is dropped, renamed or retyped: the consumer says so, loses nothing, and goes on once it is altered or the
// column is back. Those that do not name it go on.
func TestFilterColumnChanges(t *testing.T) {
	for _, test := range []struct{ name, change, back, alter, problem string }{
		{"dropped", `alter table item drop grp`, `alter table item add grp int`, `filter => 'new.id <> 2'`, `filter: table public.item has no column "grp" any more`},
		{"renamed", `alter table item rename grp to team`, `alter table item rename team to grp`, `filter => 'new.id <> 2 and new.team is null'`, `has no column "grp"`},
		{"retyped", `alter table item alter grp type text`, `alter table item alter grp type int using grp::int`, `filter => 'new.grp <> ''0'''`, `column "grp" of table public.item is of type text now, and was integer`},
	} {
		for _, isAltered := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, altered %v", test.name, isAltered), func(t *testing.T) {
				f := setup(t, "changes")
				f.consumer("c", `filter => 'new.grp > 0'`)
				f.consumer("other", `filter => 'new.note <> '''''`)
				f.consumer("whole", `transform => 'to_jsonb(new) - ''grp'' - ''team'''`)
				first := f.write(row{action: "i", key: 1, grp: 1, note: "x"})
				f.Exec(test.change)
				value := `"grp": 1`
				if test.name == "retyped" {
					value = `"grp": "1"`
				}
				second := f.write(row{action: "i", key: 2, grp: 0, note: "x"}, row{action: "i", key: 3, note: "x", record: `{"id": 3, ` + value + `, "note": "x"}`})
				state := pgtest.Value[string](f.DB, `select state || ': ' || error from sequin.consumers where name = 'c'`)
				if !strings.HasPrefix(state, "error: ") || !strings.Contains(state, test.problem) {
					t.Errorf("it is %s", state)
				}
				health := pgtest.Value[string](f.DB, `select concat_ws('|', status, detail, hint) from sequin.health() where name = 'consumer c'`)
				if !strings.HasPrefix(health, "error|") || !strings.Contains(health, test.problem) || !strings.Contains(health, "alter_consumer('c', filter => ...)") {
					t.Errorf("health() says %s", health)
				}
				if state := pgtest.Value[string](f.DB, `select string_agg(state, ' ') from sequin.consumers where name <> 'c'`); state != "active active" {
					t.Errorf("the others are %s", state)
				}
				wantSeqsInAnyOrder(t, f.pop(`'other', 10`), append(slices.Clone(first), second...)...)
				if got := f.records("whole"); len(got) != 3 || got[2] != `{"id": 3, "note": "x"}` {
					t.Errorf("the whole rows are %v", got)
				}
				wantSeqs(t, f.pop(`'c', 10`), first...)
				// What it has yet to choose from is pending, and it is behind by as much.
				standing := `select pending || ' ' || oldest_unacked_seq || ' ' || (lag_seconds > 0) from sequin.consumer_status where name = 'c'`
				if got, want := pgtest.Value[string](f.DB, standing), fmt.Sprintf("2 %d true", second[0]); got != want {
					t.Errorf("it stands at %s, want %s", got, want)
				}
				if isAltered {
					f.alter(test.alter)
				} else {
					f.Exec(test.back)
				}
				// The bridge comes back to it by itself.
				if !pgtest.Value[bool](f.DB, `select sequin.bridge_tend(id) from sequin.consumers where name = 'c'`) {
					t.Error("bridge_tend does not know of it")
				}
				f.write()
				wantSeqs(t, f.pop(`'c', 10`), second[1])
				if n := pgtest.Value[int](f.DB, `select pending from sequin.consumer_status where name = 'c'`); n != 0 {
					t.Errorf("%d are left", n)
				}
				if state := pgtest.Value[string](f.DB, `select state || coalesce(error, '') from sequin.consumers where name = 'c'`); state != "active" {
					t.Errorf("now it is %s", state)
				}
				third := f.write(row{action: "i", key: 4, note: "x", record: `{"id": 4, ` + value + `, "note": "x"}`})
				wantSeqs(t, f.pop(`'c', 10`), third...)
				if n := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`); n != 0 {
					t.Errorf("%d dead letters", n)
				}
			})
		}
	}
}

// What is gone but no column: an extension, with its operators.
func TestFilterExtensionGoes(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`create extension citext`)
	f.consumer("c", `filter => 'new.note::citext = ''A'''`)
	f.write(row{action: "i", key: 1, note: "a"})
	f.Exec(`drop extension citext`)
	f.write(row{action: "i", key: 2, note: "a"})
	if got := pgtest.Value[string](f.DB, `select state || error from sequin.consumers`); !strings.Contains(got, "error") || !strings.Contains(got, "citext") {
		t.Errorf("it is %s", got)
	}
	f.Exec(`create extension citext`)
	f.write(row{action: "i", key: 3, note: "b"})
	if got := keys(f.pop(`'c', 10`)); got != "1 2" {
		t.Errorf("got %s", got)
	}
	f.wantClean()
}

// An enum's label that is not there any more makes every message fail: that is no reason to give them up.
func TestFilterLabelGoes(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`create type mood as enum ('sad', 'happy'); alter table item add feeling mood`)
	f.consumer("c", `filter => 'new.feeling = ''sad'''`)
	f.write(row{action: "i", key: 1, record: `{"id": 1, "feeling": "sad"}`})
	if got := keys(f.pop(`'c', 10`)); got != "1" {
		t.Errorf("got %s", got)
	}
	f.Exec(`alter type mood rename value 'sad' to 'blue'`)
	f.write(row{action: "i", key: 2, record: `{"id": 2, "feeling": "blue"}`})
	if got := pgtest.Value[string](f.DB, `select state || error from sequin.consumers`); !strings.Contains(got, `error`) || !strings.Contains(got, `"sad"`) {
		t.Errorf("it is %s", got)
	}
	f.alter(`filter => 'new.feeling = ''blue'''`)
	f.write(row{action: "i", key: 3, record: `{"id": 3, "feeling": "happy"}`})
	if got := keys(f.pop(`'c', 10`)); got != "2" {
		t.Errorf("got %s", got)
	}
	f.wantClean()
}

// Several tables, whose columns of one name are of several types; a name in capitals; a dropped table.
func TestFilterTables(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`create table "Other" (id int primary key, grp text, "Note" text, action int)`)
	f.Exec(`select sequin.create_stream('two', '{item, "\"Other\""}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('c', 'two', filter => 'new.grp::text > ''1'' and table_name in (''item'', ''Other'')', transform => 'row_to_json(new)')`)
	if e := f.Error(`select sequin.create_consumer('d', 'two', filter => 'new.note = ''x''')`); e.Code != "42703" || !strings.Contains(e.Message, `filter, for table public."Other": `) {
		t.Errorf("a column of one of them: %s %s", e.Code, e.Message)
	}
	if e := f.Error(`select sequin.create_consumer('d', 'two', filter => 'new.grp > 1')`); e.Code != "42804" || !strings.Contains(e.Message, `filter, for table public."Other": `) {
		t.Errorf("a type of one of them: %s %s", e.Code, e.Message)
	}
	other := func(key int, grp string) row {
		return row{action: "i", key: key, table: "Other", record: fmt.Sprintf(`{"id": %d, "grp": %q, "Note": "N", "action": 7}`, key, grp)}
	}
	f.routes["Other"] = pgtest.Value[int32](f.DB, `select id from sequin.source_table where table_name = 'Other'`)
	f.write(row{action: "i", key: 1, grp: 1}, row{action: "i", key: 2, grp: 2}, other(3, "0"), other(4, "b"))
	want := []string{`{"id": 2, "grp": 2, "note": ""}`, `{"id": 4, "grp": "b", "Note": "N", "action": 7}`}
	if got := f.records("c"); !slices.Equal(got, want) {
		t.Errorf("got %v", got)
	}
	f.Exec(`select sequin.create_consumer('e', 'two', filter => $$action = 'insert' and new.grp::text <> 'z'$$)`)
	f.Exec(`update sequin.consumer set start_lsn = '0/1' where name = 'e'`)
	f.write(other(5, "c"), row{action: "i", key: 6, grp: 6})
	f.Exec(`drop table "Other"`)
	f.write(other(7, "d"), row{action: "i", key: 8, grp: 8})
	// What it was is known for a filter that names columns, and not for one that takes the row as a whole.
	if got := keys(f.messages(f.Pool, `select 0::bigint, seq, action, table_name, record_pk, '', null::text, 1 from sequin.pop('e', 100)`)); got != "5 6 7 8" {
		t.Errorf("got %s", got)
	}
	if got := f.records("c"); len(got) != 3 {
		t.Errorf("got %v", got)
	}
	if got := pgtest.Column[string](f.DB, `select record_pk from sequin.dead_letters where consumer = 'c'`); !slices.Equal(got, []string{"7"}) {
		t.Errorf("dead are %v", got)
	}
}

// The same definition again is a no-op, and another filter another definition.
func TestFilterIfNotExists(t *testing.T) {
	f := setup(t, "changes")
	const call = `select sequin.create_consumer('c', 's', filter => 'new.id > 1', transform => 'to_jsonb(new)', if_not_exists => true)`
	for _, want := range []string{"created", "unchanged"} {
		if got := pgtest.Value[string](f.DB, call); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	for _, other := range []string{strings.Replace(call, "> 1", "> 2", 1), strings.Replace(call, "(new)", "(old)", 1), strings.Replace(call, "filter => 'new.id > 1', ", "", 1)} {
		if e := f.Error(other); e.Code != "42710" {
			t.Errorf("%s: %s %s", other, e.Code, e.Message)
		}
	}
	if got := pgtest.Value[string](f.DB, `select filter || '; ' || transform from sequin.consumers`); got != "new.id > 1; to_jsonb(new)" {
		t.Errorf("it shows %s", got)
	}
}

// What is pending is decided on anew; what an earlier filter has left out stays out, and what is out is its worker's.
func TestAlterFilter(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "backoff => '0'")
	all := f.write(inserts(upto(40)...)...)
	out := f.receive(`'c', 5`)
	f.alter(`filter => 'new.id % 2 = 0'`)
	if got := pgtest.Value[string](f.DB, `select sequin.alter_consumer('c', filter => 'new.id % 2 = 0')`); got != "unchanged" {
		t.Errorf("the same again: %s", got)
	}
	if e := f.Error(`select sequin.alter_consumer('c', filter => 'new.nope')`); e.Code != "42703" {
		t.Errorf("a bad one: %s %s", e.Code, e.Message)
	}
	f.write(inserts(101, 102)...)
	f.call("ack", ids(out), 5)
	isOut := map[int64]bool{}
	for _, m := range out {
		isOut[m.Seq] = true
	}
	var want []int64
	for i, seq := range all {
		if !isOut[seq] && (i+1)%2 == 0 {
			want = append(want, seq)
		}
	}
	some := f.receive(`'c', 5`)
	f.alter(`filter => '', transform => 'jsonb_build_object(''note'', new.id + 1)'`)
	f.write(inserts(103)...)
	f.call("ack", ids(some), int64(len(some)))
	rest := f.pop(`'c', 100`)
	wantSeqsInAnyOrder(t, append(some, rest...), append(want, f.lastSeq-1, f.lastSeq)...)
	for _, m := range rest {
		if m.Note != fmt.Sprint(1+atoi(t, m.Key)) {
			t.Errorf("%+v", m)
		}
	}
	f.wantClean()
}

func atoi(t *testing.T, text string) int {
	t.Helper()
	var n int
	if _, err := fmt.Sscan(text, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// Workers, a writer and alter_consumer at once: each message once, whatever filter it met, as each lets it through.
func TestAlterFilterUnderWay(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	conn := f.Connect()
	altered := make(chan struct{})
	go func() {
		defer close(altered)
		for i := range 7 {
			options := []string{`filter => 'new.id > 0'`, `transform => 'to_jsonb(new)'`, `filter => 'new.id >= 1', group_by => '{grp}'`, `transform => ''`, `filter => '', group_by => '{id}'`}[i%5]
			if _, err := conn.Exec(context.Background(), `select sequin.alter_consumer('c', `+options+`)`); err != nil {
				f.TB.Errorf("%s: %v", options, err)
				return
			}
			time.Sleep(50 * time.Millisecond) // it keeps the workers from all there is, each time
		}
	}()
	seen := make(chan []int64)
	stop := make(chan struct{})
	for range 3 {
		worker := f.Connect()
		go func() {
			var mine []int64
			defer func() { seen <- mine }()
			for {
				got := f.receiveIn(worker, `'c', 9, '20 ms'`)
				if len(got) == 0 {
					select {
					case <-stop:
						return
					default:
						continue
					}
				}
				var n int
				if err := worker.QueryRow(context.Background(), `select sequin.ack('c', $1)`, ids(got)).Scan(&n); err != nil || n != len(got) {
					f.TB.Errorf("ack counted %d of %d: %v", n, len(got), err)
					return
				}
				mine = append(mine, seqs(got)...)
			}
		}()
	}
	var all []int64
	for isAltered := false; !isAltered; {
		// Not more than the workers get done: each change decides on what is pending.
		if pgtest.Value[int](f.DB, `select pending from sequin.consumer_status`) < 500 {
			all = append(all, f.write(inserts(upto(50)...)...)...)
		}
		select {
		case <-altered:
			isAltered = true
		default:
		}
	}
	f.write()
	close(stop)
	var got []int64
	for range 3 {
		got = append(got, <-seen...)
	}
	for more := f.pop(`'c', 1000`); len(more) > 0; more = f.pop(`'c', 1000`) {
		got = append(got, seqs(more)...)
	}
	slices.Sort(got)
	if !slices.Equal(got, all) {
		t.Errorf("%d messages were delivered, %d of them once, want %d", len(got), len(slices.Compact(got)), len(all))
	}
}
