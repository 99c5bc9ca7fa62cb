package sql

import (
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// republish calls it on the consumer c, and checks how many messages it counts.
func (f *fixture) republish(query string, want int64) {
	f.Helper()
	if got := pgtest.Value[int64](f.DB, `select sequin.republish('c', $1)`, query); got != want {
		f.Fatalf("republish of %s gives %d, want %d", query, got, want)
	}
}

// Messages by seq come again, with their own seq, to this consumer only; none that is out or still to come is doubled.
func TestRepublishMessages(t *testing.T) {
	for _, kind := range append(kinds, "actions => '{insert,update}'") {
		t.Run(kind, func(t *testing.T) {
			f := setup(t, "changes")
			options := []string{"backoff => '1 hour'", "max_backoff => '1 hour'"}
			if kind != "" {
				options = append(options, kind)
			}
			f.consumer("c", options...)
			f.Exec(`select sequin.create_consumer('beside', 's')`)
			all := f.write(inserts(1, 2, 3, 1, 2, 3)...)
			f.pop(`'beside', 100`)
			query := fmt.Sprintf(`select seq from sequin.messages where stream = 's' and seq in (%d, %d, %d)`, all[0], all[1], all[3])
			f.republish(query, 3) // all of it is still to come
			wantSeqsInAnyOrder(t, f.drain(), all...)
			f.republish(query, 3)
			f.republish(query, 3) // waits already
			got := f.drain()
			wantSeqsInAnyOrder(t, got, all[0], all[1], all[3])
			wantAscending(t, got)
			f.wantClean()

			f.republish(query, 3)
			got = f.receive(`'c', 10`)
			f.republish(query, 3) // some are out
			more := f.drain()
			f.call("ack", ids(got), int64(len(got)))
			wantSeqsInAnyOrder(t, append(append(got, more...), f.drain()...), all[0], all[1], all[3])
			f.wantClean()

			// Out with their lane's lease, and behind a held group.
			next := f.write(inserts(1, 2, 1, 2)...)
			out := f.receive(`'c', 2`)
			f.call("nack", ids(out[:1]), 1)
			f.republish(fmt.Sprintf(`select * from sequin.messages where stream = 's' and seq >= %d`, next[0]), 4)
			f.call("ack", ids(out[1:]), int64(len(out[1:])))
			f.Exec(`update sequin.delivery set not_before = now(), due_at = case when due_at > '-infinity' then now() else due_at end where not is_done and not is_out`)
			wantSeqsInAnyOrder(t, append(out[1:], f.drain()...), next...)
			wantSeqsInAnyOrder(t, f.pop(`'beside', 10`), next...)
			f.wantClean()
		})
	}
}

// A message that was acknowledged in the lane's lease, or one by one and not removed yet, comes again.
func TestRepublishSettled(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "group_by => '{}'", "max_deliver => 2", "backoff => '0'")
	all := f.write(inserts(1, 2, 3, 4)...)
	got := f.receive(`'c', 4`)
	f.call("ack", ids(got[:2]), 2)
	f.republish(fmt.Sprintf(`select %d as seq union all select %d`, all[0], all[3]), 2)
	f.call("ack", ids(got[2:]), 2)
	wantSeqs(t, f.drain(), all[0])
	f.wantClean()

	// A dead letter is one no more.
	f.republish(fmt.Sprintf(`select %d as seq`, all[1]), 1)
	for range 2 {
		got = f.receive(`'c', 1`)
		f.call("nack", ids(got), 1, "'0'")
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`); n != 1 {
		t.Fatalf("%d dead letters", n)
	}
	f.republish(`select seq from sequin.dead_letters`, 1)
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`); n != 0 {
		t.Errorf("%d dead letters are left", n)
	}
	wantSeqs(t, f.drain(), all[1])
	f.wantClean()
}

// A row comes as the newest message that the log has of it, else as the table has it; and before what comes later.
func TestRepublishRows(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			f := setup(t, "rows")
			f.Exec(`insert into item values (1, 1, 'in the log'), (2, 2, 'old'), (3, 3, 'old')`)
			f.Exec(`create table wide ("a b" text, n numeric, primary key ("a b", n), seq int, doc json)`)
			options := []string{}
			if kind != "" {
				options = append(options, kind)
			}
			f.consumer("c", options...)
			all := f.write(row{action: "i", key: 1, note: "a"}, row{action: "u", key: 1, note: "b"}, row{action: "i", key: 9})
			f.drain()
			f.republish(`select id from item where id <= 2 union all select 1`, 2)
			f.republish(`select * from item where id = 2`, 1)
			got := f.receive(`'c', 10`)
			f.call("ack", ids(got), int64(len(got)))
			got = append(got, f.drain()...)
			byKey := map[string][]message{}
			for _, m := range got {
				byKey[m.Key] = append(byKey[m.Key], m)
			}
			if m := byKey["1"]; len(m) != 1 || m[0].Seq != all[1] || m[0].Action != "update" {
				t.Errorf("row 1 came as %+v", m)
			}
			// Twice: the second query could not know of the first.
			if m := byKey["2"]; len(m) != 2 || m[0].Action != "read" || m[0].Note != "old" || m[0].Seq == m[1].Seq {
				t.Errorf("row 2 came as %+v", m)
			}
			f.wantClean()

			f.republish(`select * from item where id = 3`, 1)
			next := f.write(row{action: "u", key: 3, note: "new", hash: pgtest.Value[int32](f.DB, `select sequin._key_hash($1, '3')`, f.route)})
			got = f.drain()
			if len(got) != 2 || got[0].Note != "old" || got[1].Seq != next[0] {
				t.Errorf("row 3 came as %+v", got)
			}
			f.republish(`select * from item where id = 3`, 1)
			wantSeqs(t, f.drain(), next...)
			f.wantClean()

			// It stays where a consumer goes back.
			f.republish(`select * from item where id = 2`, 1)
			f.rewind(fmt.Sprintf("to_seq => %d", next[0]))
			got = f.drain()
			if len(got) != 2 {
				t.Errorf("after a rewind %+v", got)
			}
			f.wantClean()
		})
	}
}

// Rows are found in the log by their keys, however long it is.
func TestRepublishReadsLittle(t *testing.T) {
	const count = 20_000
	f := setup(t, "rows")
	f.Exec(`insert into item select n, n, 'old' from generate_series(1, 200) n`)
	f.consumer("c")
	// Of newer segments the planner knows nothing.
	for at := 1; at < count; at += 1000 {
		f.write(inserts(upto(at + 999)[at-1:]...)...)
		f.lastSeq = pgtest.Value[int64](f.DB, `select sequin._open_segment(1)::bigint << 32`)
	}
	f.drain()
	f.reads(f.Connect(), "republish", count, func(tx pgx.Tx) {
		var n int
		if err := tx.QueryRow(t.Context(), `select sequin.republish('c', 'select * from item')`).Scan(&n); err != nil || n != 200 {
			t.Errorf("%d rows come again: %v", n, err)
		}
	}, f.segments()...)
}

// The keys and JSON of whatever types there are; a table that has a column called seq.
func TestRepublishTypes(t *testing.T) {
	f := setup(t, "rows")
	f.Exec(`create table wide ("a b" text, n numeric(6, 2), ok bool, at timestamptz, seq int, doc json, primary key ("a b", n, ok, at))`)
	f.Exec(`select sequin.create_stream('w', '{wide,item}'); select sequin.create_consumer('c', 'w')`)
	f.write(inserts(1)...)
	f.drain()
	f.Exec(`set timezone = 'Asia/Tokyo'; insert into wide values ('x,"y"', 1.50, true, '2026-01-02 03:04:05+00', 12, '{"b":1,  "a":"\u0000"}')`)
	if e := f.Error(`select sequin.republish('c', 'select * from wide')`); e.Code != "22023" || !strings.Contains(e.Hint, "key") {
		t.Errorf("what jsonb cannot hold: %s %s, hint %s", e.Code, e.Message, e.Hint)
	}
	f.republish(`select "a b", n, ok, at, seq from wide`, 1)
	got := f.drain()
	if len(got) != 1 || got[0].Key != `"x,""y""",1.50,t,2026-01-02 03:04:05+00` {
		t.Fatalf("got %+v", got)
	}
	f.republish(`select * from item`, 0)
}

func TestRepublishErrors(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`create table twin (id int primary key, grp int, note text)`)
	f.Exec(`select sequin.create_stream('two', '{item,twin}')`)
	f.consumer("c")
	f.Exec(`select sequin.create_consumer('d', 'two')`)
	f.Exec(`create table bare (id int, note text); alter table bare replica identity full`)
	f.Exec(`select sequin.create_stream('bare', '{bare}'); select sequin.create_consumer('e', 'bare')`)
	f.write(inserts(1)...)
	f.Exec(`create function touch() returns int language sql volatile as 'insert into other values (1); select 1'`)
	for _, test := range []struct{ consumer, query, code, message, hint string }{
		{"c", `select note from item`, "22023", "neither seq nor the key", "select seq from sequin.messages where stream = 's' and ...; or select * from public.item"},
		{"c", `select note from item where false`, "22023", "note", "public.item"},
		{"c", `select 99 as seq`, "22023", "no message 99", "sequin.messages"},
		{"c", `select null::bigint as seq`, "22023", "null", "bigint"},
		{"c", `select 'x' as seq`, "22023", "x", "bigint"},
		{"c", `select 1 as seq; drop table item`, "22023", "multi", "one SELECT"},
		{"c", `insert into item values (5) returning id`, "22023", "INSERT", "one SELECT"},
		{"c", `delete from item`, "22023", `consumer "c": the query cannot be republished: cannot open DELETE`, "one SELECT"},
		{"c", `with gone as (delete from item returning id) select id from gone`, "22023", "not allowed", "one SELECT"},
		{"c", ``, "22023", "", "one SELECT"},
		{"c", `selekt 1`, "42601", "selekt", ""},
		{"c", `select * from nowhere`, "42P01", "nowhere", ""},
		{"d", `select id from item`, "22023", "public.item, public.twin", ""},
		{"x", `select 1 as seq`, "42704", `"x"`, ""},
		{"c", `select 'abc' as id`, "22023", `consumer "c": the query returns what is no key of public.item`, "id"},
		{"c", `select 3000000000 as id`, "22023", `consumer "c": the query returns what is no key of public.item`, "id"},
		{"e", `select * from bare`, "22023", "neither seq nor the key", "select seq from sequin.messages where stream = 'bare' and ...;"},
	} {
		e := f.Error(`select sequin.republish($1, $2)`, test.consumer, test.query)
		if e.Code != test.code || !strings.Contains(e.Message, test.message) || !strings.Contains(e.Hint, test.hint) {
			t.Errorf("%s: %s %s, hint %s", test.query, e.Code, e.Message, e.Hint)
		}
	}
	if e := f.Error(`select sequin.republish('c', null)`); e.Code != "22023" {
		t.Errorf("null: %s %s", e.Code, e.Message)
	}
	f.republish(`select id from item where false`, 0)
	f.republish(`select seq from sequin.messages where false`, 0)
	if e := f.Error(`select sequin.republish('e', 'select * from bare')`); strings.Contains(e.Hint, "from public.bare") {
		t.Errorf("the hint for a table without a key is what was run: %s", e.Hint)
	}
	for _, sql := range []string{`select sequin.backfill('e')`, `select sequin.rewind('e', to_row => '1')`} {
		if e := f.Error(sql); e.Code != "55000" || !strings.Contains(e.Hint, "sequin.rewind('e', to_time") || strings.Contains(e.Hint, "start_at") {
			t.Errorf("%s: %s %s, hint %s", sql, e.Code, e.Message, e.Hint)
		}
	}
	f.Exec(`drop table item`)
	if e := f.Error(`select sequin.republish('c', 'select 1 as id')`); e.Code != "55000" ||
		!strings.Contains(e.Message, "public.item was dropped") || !strings.Contains(e.Hint, "sequin.messages") {
		t.Errorf("dropped: %s %s, hint %s", e.Code, e.Message, e.Hint)
	}
}
