package sql

import (
	"fmt"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// Newest versions only, as far as they are in sight, and never an older one after a newer.
func TestRowsSkipsOvertaken(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	all := f.write(
		row{action: "i", key: 1, note: "a"}, row{action: "i", key: 2, note: "b"}, row{action: "u", key: 1, note: "c"},
		row{action: "u", key: 1, note: "d"}, row{action: "d", key: 2}, row{action: "i", key: 3, note: "e"}, row{action: "d", key: 3},
		row{action: "i", key: 3, note: "f"})
	got := f.receive(`'c', 100`)
	wantSeqsInAnyOrder(t, got, all[3], all[4], all[7])
	for _, m := range got {
		if want := map[string]string{"1": "update d", "2": "delete ", "3": "insert f"}[m.Key]; want != m.Action+" "+m.Note {
			t.Errorf("row %s came as %s %s, want %s", m.Key, m.Action, m.Note, want)
		}
	}
	// What is written while a version is out comes after it.
	next := f.write(row{action: "u", key: 1, note: "g"}, row{action: "u", key: 1, note: "h"})
	wantSeqs(t, f.receive(`'c', 100`))
	f.call("ack", ids(got), 3)
	got = f.receive(`'c', 100`)
	wantSeqs(t, got, next[1])
	f.call("ack", ids(got), 1)
	f.wantClean()
}

// A version whose unchanged TOASTed columns are only in an older one does not make it superfluous.
func TestRowsKeepsWhatAVersionDoesNotRepeat(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	all := f.write(row{action: "i", key: 1, note: "a"}, row{action: "u", key: 1, note: "b"})
	f.Exec(`update sequin.log set metadata = metadata || '{"unchanged": ["note"]}' where seq = $1`, all[1])
	wantSeqs(t, f.receive(`'c', 100`), all...)
}

// In changes mode every change is a message, with the old values.
func TestChangesDeliversEach(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(row{action: "i", key: 1, note: "a"}, row{action: "u", key: 1, note: "b", changes: `{"note": "a"}`}, row{action: "d", key: 1, note: "b"})
	got := f.receive(`'c', 100`)
	wantSeqs(t, got, all...)
	if got[0].Changes != nil || got[1].Changes == nil || *got[1].Changes != `{"note": "a"}` {
		t.Errorf("changes are %v and %v", got[0].Changes, got[1].Changes)
	}
}

// The end of an old key is a delete for who follows rows, and nothing for who follows changes: there the update says it.
func TestKeyChange(t *testing.T) {
	for mode, want := range map[string]string{"rows": "[delete 1 update 2]", "changes": "[update 2]"} {
		t.Run(mode, func(t *testing.T) {
			f := setup(t, mode)
			f.consumer("c", "group_by => '{}'")
			f.consumer("by_key")
			f.consumer("no_deletes", "actions => '{insert,update}'")
			f.write(row{action: "x", key: 1}, row{action: "u", key: 2})
			var got []string
			for _, m := range f.pop(`'c', 10`) {
				got = append(got, m.Action+" "+m.Key)
			}
			if fmt.Sprint(got) != want {
				t.Errorf("got %v, want %s", got, want)
			}
			if n := len(f.pop(`'by_key', 10`)); fmt.Sprint(n) != map[string]string{"rows": "2", "changes": "1"}[mode] {
				t.Errorf("by key: %d messages", n)
			}
			if got := f.pop(`'no_deletes', 10`); len(got) != 1 || got[0].Action != "update" {
				t.Errorf("without deletes: %v", got)
			}
			f.wantClean()
		})
	}
}

func TestActions(t *testing.T) {
	f := setup(t, "changes")
	rows := []row{
		{action: "i", key: 1}, {action: "u", key: 1}, {action: "d", key: 1}, {action: "t"}, {action: "i", key: 2}, {action: "d", key: 2},
	}
	want := map[string][]int{
		"{insert}": {0, 4}, "{update}": {1}, "{delete}": {2, 5}, "{truncate}": {3}, "{insert,delete}": {0, 2, 4, 5},
		"{insert,update,delete}": {0, 1, 2, 4, 5}, "{insert,update,delete,truncate}": {0, 1, 2, 3, 4, 5},
	}
	for actions := range want {
		f.consumer(actions, "actions => '"+actions+"'")
		f.consumer(actions+" total", "actions => '"+actions+"'", "group_by => '{}'")
	}
	all := f.write(rows...)
	for actions, places := range want {
		var seqs []int64
		for _, i := range places {
			seqs = append(seqs, all[i])
		}
		wantSeqsInAnyOrder(t, f.pop(fmt.Sprintf("'%s', 100", actions)), seqs...)
		wantSeqs(t, f.pop(fmt.Sprintf("'%s total', 100", actions)), seqs...)
	}
	f.wantClean()
}

// '{}' is one group: total order, one batch at a time, whatever the table.
func TestTotalOrder(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`select sequin.create_stream('both', '{item,other}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('c', 'both', group_by => '{}', backoff => '0')`)
	all := f.write(row{action: "i", key: 1}, row{action: "i", key: 1, table: "other"}, row{action: "i", key: 2}, row{action: "u", key: 1, table: "other"},
		row{action: "d", key: 1})
	got := f.receive(`'c', 2`)
	wantSeqs(t, got, all[:2]...)
	wantSeqs(t, f.receive(`'c', 2`))
	f.call("ack", ids(got[:1]), 1)
	wantSeqs(t, f.receive(`'c', 2`))
	f.call("nack", ids(got[1:]), 1)
	got = f.receive(`'c', 10`)
	wantSeqs(t, got, all[1]) // alone: it comes again before what follows
	f.call("ack", ids(got), 1)
	got = f.receive(`'c', 10`)
	wantSeqs(t, got, all[2:]...)
	f.call("ack", ids(got), 3)
	f.wantClean()
}

// Several tables in one stream: by key each for itself, by columns together, in commit order.
func TestSeveralTables(t *testing.T) {
	f := setup(t, "changes")
	f.Exec(`select sequin.create_stream('both', '{item,other}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('c', 'both', group_by => '{grp}'), sequin.create_consumer('d', 'both')`)
	all := f.write(
		row{action: "i", key: 1, grp: 1}, row{action: "i", key: 1, grp: 1, table: "other"}, row{action: "i", key: 2, grp: 2},
		row{action: "u", key: 1, grp: 1, table: "other"}, row{action: "u", key: 2, grp: 1})
	got := f.receive(`'c', 1`)
	wantSeqs(t, got, all[0])
	two := f.receive(`'c', 10`)
	wantSeqs(t, two, all[2]) // the rest of group 1 waits
	f.call("ack", ids(got), 1)
	three := f.receive(`'c', 10`)
	wantSeqs(t, three, all[1], all[3], all[4])
	f.call("ack", ids(append(two, three...)), 4)

	if got := f.receive(`'d', 1`); got[0].Seq != all[0] {
		t.Errorf("the first by key is %d", got[0].Seq)
	}
	wantSeqsInAnyOrder(t, f.receive(`'d', 10`), all[1], all[2], all[3], all[4])
}

// A group that fails holds back itself, and its messages come in order when it goes on, however many have passed by.
func TestHeldGroup(t *testing.T) {
	for _, groupBy := range []string{"null", "'{grp}'"} {
		t.Run(groupBy, func(t *testing.T) {
			f := setup(t, "changes")
			f.consumer("c", "backoff => '0'", "group_by => "+groupBy)
			first := f.write(row{action: "i", key: 1, grp: 1})
			f.call("nack", ids(f.receive(`'c', 1`)), 1, "delay => '1 hour'")
			var rows []row
			for i := range 700 {
				rows = append(rows, row{action: "u", key: 1, grp: 1, note: fmt.Sprint(i)})
				for key := 2; key < 6; key++ {
					rows = append(rows, row{action: "u", key: key, grp: key})
				}
			}
			all := f.write(rows...)
			others := 0
			for others < 4*700 {
				got := f.pop(`'c', 500`)
				if len(got) == 0 {
					t.Fatalf("beside a held group %d of %d messages", others, 4*700)
				}
				others += len(got)
				for _, m := range got {
					if m.Key == "1" {
						t.Fatalf("message %d of a held group was handed out", m.Seq)
					}
				}
			}
			if n := pgtest.Value[int](f.DB, `select pending from sequin.consumer_status`); n != 701 {
				t.Errorf("%d messages are pending, want 701", n)
			}
			f.Exec(`update sequin.delivery set not_before = now(), due_at = now()`)
			got := f.receive(`'c', 1000`)
			wantSeqs(t, got, first...)
			f.call("ack", ids(got), 1)
			var seen []int64
			for len(seen) < 700 {
				got := f.pop(`'c', 250`)
				if len(got) == 0 {
					f.tend()
				}
				seen = append(seen, seqs(got)...)
			}
			for i, seq := range seen {
				if seq != all[5*i] {
					t.Fatalf("message %d came as number %d, want %d", seq, i, all[5*i])
				}
			}
			f.wantClean()
		})
	}
}

// Two rows whose groups have the same hash: held together, neither loses a message.
func TestGroupsOfOneHash(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "backoff => '0'", "max_deliver => 2")
	rows := func(keys ...int) []row {
		rows := inserts(keys...)
		for i := range rows {
			rows[i].hash = 4242
		}
		return rows
	}
	count := len(f.write(rows(1)...))
	f.call("nack", ids(f.receive(`'c', 1`)), 1, "delay => '1 hour'")
	// The lane passes both by, in two steps; then the other one fails as well.
	all := f.write(rows(2, 1, 1, 2)...)
	f.write(row{action: "i", key: 3, hash: 4242 + 64})
	if got := f.pop(`'c', 10`); len(got) != 1 || got[0].Key != "3" {
		t.Fatalf("beside them: %v", got)
	}
	more := f.write(rows(2, 1)...)
	wantSeqs(t, f.pop(`'c', 10`))
	f.Exec(`update sequin.delivery set not_before = now(), due_at = now()`)
	f.call("nack", ids(f.receive(`'c', 10`)), 1) // a dead letter now
	got := f.receive(`'c', 1`)
	wantSeqs(t, got, all[0])
	f.call("nack", ids(got), 1)
	count += len(all) + len(more)
	var seen []int64
	for len(seen) < count-1 {
		got := f.eventually(`'c', 2`)
		f.call("ack", ids(got), int64(len(got)))
		seen = append(seen, seqs(got)...)
	}
	for i, seq := range append(all, more...) {
		if seen[i] != seq {
			t.Fatalf("got %v, want %v", seen, append(all, more...))
		}
	}
	f.wantClean()
}

// A worker that takes long is overtaken by other groups of its lane; what it has stays its own.
func TestOvertake(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	same := func(key int) row { return row{action: "i", key: key, hash: int32(64 * key)} } // all in one lane
	all := f.write(same(1), same(2), same(1), same(3))
	slow := f.receive(`'c', 2`)
	wantSeqs(t, slow, all[:2]...)
	wantSeqs(t, f.receive(`'c', 10`)) // not at once
	got := f.eventually(`'c', 10`)
	wantSeqs(t, got, all[3])
	f.call("ack", ids(got), 1)
	f.call("ack", ids(slow), 2)
	wantSeqs(t, f.eventually(`'c', 10`), all[2])
}

// More workers than lanes, a message each: they all get one.
func TestManySlowWorkers(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", `ack_wait => '10 minutes'`)
	f.write(inserts(upto(400)...)...)
	got := 0
	deadline := time.Now().Add(2 * time.Minute)
	for got < 200 && time.Now().Before(deadline) {
		got += len(f.receive(`'c', 1, '200 ms'`))
	}
	if got < 200 {
		t.Errorf("%d workers have a message, want 200", got)
	}
}

// A log in several segments is one log.
func TestSegments(t *testing.T) {
	for _, groupBy := range []string{"null", "'{}'", "'{grp}'"} {
		t.Run(groupBy, func(t *testing.T) {
			f := setup(t, "changes")
			f.consumer("c", "group_by => "+groupBy)
			var all []int64
			for range 3 {
				all = append(all, f.write(inserts(upto(100)...)...)...)
				f.Exec(`update sequin.log_segment set opened_at = now() - interval '2 days'`)
				segment := pgtest.Value[int64](f.DB, `select sequin.bridge_rotate(1, $1)`, f.lastSeq)
				if segment<<32 <= f.lastSeq {
					t.Fatalf("segment %d is not a new one after %d", segment, f.lastSeq)
				}
				f.lastSeq = segment << 32
			}
			var seen []message
			for len(seen) < len(all) {
				got := f.eventually(`'c', 40`)
				f.call("ack", ids(got), int64(len(got)))
				seen = append(seen, got...)
			}
			wantAscending(t, seen)
			wantSeqsInAnyOrder(t, seen, all...)
			f.wantClean()
		})
	}
}
