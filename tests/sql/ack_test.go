package sql

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

func TestAckCounts(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.write(inserts(upto(200)...)...)
	one, two, three := f.receive(`'c', 20`), f.receive(`'c', 1`), f.receive(`'c', 30`)

	f.call("ack", ids(two), 1)
	f.call("ack", ids(two), 0) // twice is harmless
	f.call("ack", ids(one[5:8]), 3)
	f.call("ack", ids(one[5:9]), 1)
	// Of several batches in one call, in any order, some of them twice.
	all := append(append(ids(one), ids(three)...), ids(two)...)
	all = append(all, ids(three)...)
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	f.call("ack", all, int64(len(one)-4+len(three)))
	f.call("ack", all, 0)
	if got := f.receive(`'c', 10000`); len(got) != 149 {
		t.Errorf("%d messages are left, want 149", len(got))
	}
}

// What is no delivery acknowledges nothing, and breaks nothing.
func TestAckGarbage(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.consumer("d")
	f.write(inserts(upto(100)...)...)
	got := f.receive(`'c', 3`)
	theirs := f.receive(`'d', 3`)
	for _, garbage := range [][]int64{
		nil,
		{},
		{0},
		{-1},
		{math.MaxInt64},
		{math.MinInt64},
		{math.MaxInt64, math.MaxInt64 - 1},
		{math.MaxInt64, 1},
		{1, 2, 3},
		{-got[0].AckID},
		{got[0].AckID + 5},
		{got[0].AckID ^ 1<<40},
		ids(theirs),
	} {
		for _, call := range []string{"ack", "nack", "extend"} {
			f.call(call, garbage, 0)
		}
	}
	var n *int64
	for _, null := range []string{
		`select sequin.ack('c', null)`, `select sequin.ack('c', '{null}')`, `select sequin.ack('c', array[[1,2],[3,4]])`, `select sequin.nack('c', null)`,
		`select sequin.nack('c', '{null,null}')`, `select sequin.extend('c', null)`, `select sequin.ack('c', '[0:1]={5,6}')`,
	} {
		if n = pgtest.Value[*int64](f.DB, null); n == nil || *n != 0 {
			t.Errorf("%s gives %v, want 0", null, n)
		}
	}
	// Among garbage what is meant counts.
	f.call("ack", append([]int64{0, -7, math.MaxInt64, 123456789}, ids(got)...), 3)
	if n := pgtest.Value[int64](f.DB, `select sequin.ack('d', array[[$1::bigint, $2::bigint], [$3::bigint, null]])`, theirs[0].AckID, theirs[1].AckID, theirs[2].AckID); n != 3 {
		t.Errorf("an array of two dimensions acknowledged %d, want 3", n)
	}
}

// A worker that was presumed dead cannot acknowledge another's work.
func TestAckFence(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "ack_wait => '100 ms'", "backoff => '0'")
	all := f.write(inserts(1, 2, 3)...)
	first := f.receive(`'c', 3`)
	wantSeqsInAnyOrder(t, first, all...)
	second := f.eventually(`'c', 3, ack_wait => '1 minute'`)
	for len(second) < 3 {
		second = append(second, f.eventually(`'c', 3, ack_wait => '1 minute'`)...)
	}
	wantSeqsInAnyOrder(t, second, all...) // the same seq: an idempotency key
	for i := range second {
		if second[i].DeliverCount != 2 {
			t.Errorf("delivery %d of message %d", second[i].DeliverCount, second[i].Seq)
		}
	}
	for _, call := range []string{"ack", "nack", "extend"} {
		f.call(call, ids(first), 0)
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.deliveries where state = 'out'`); n != 3 {
		t.Errorf("%d deliveries are out, want 3", n)
	}
	f.call("ack", append(ids(first), ids(second)...), 3)
	f.wantClean()
}

// One that is late, but whose message nobody has taken meanwhile, is in time.
func TestAckLate(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "ack_wait => '20 ms'", "backoff => '1 minute'", "max_backoff => '1 minute'")
	f.write(inserts(1, 2, 3, 4)...)
	got := f.receive(`'c', 4`)
	f.awaitExpiry()
	f.call("ack", ids(got[:1]), 1)
	f.tend() // takes the others back
	wantSeqs(t, f.receive(`'c', 4`))
	f.call("ack", ids(got[:2]), 1)
	f.call("nack", ids(got[2:3]), 0) // taken back already
	f.call("extend", ids(got[2:3]), 0)
	f.call("ack", ids(got[1:]), 2)
	f.wantClean()
}

// awaitExpiry waits until the leases of all deliveries have run out.
func (f *fixture) awaitExpiry() {
	f.Helper()
	for pgtest.Value[bool](f.DB, `select exists (select from sequin.deliveries where state = 'out')`) {
		time.Sleep(5 * time.Millisecond) // a lease is a time
	}
}

func TestNack(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(inserts(1, 2, 1, 3, 2)...)
	got := f.receive(`'c', 10`)
	wantSeqsInAnyOrder(t, got, all...)
	of := map[int64]int64{}
	for _, m := range got {
		of[m.Seq] = m.AckID
	}
	if e := f.Error(`select sequin.nack('c', '{}', delay => '-1 s')`); e.Code != "22023" || e.Hint == "" {
		t.Errorf("a negative delay: %s %s, hint %q", e.Code, e.Message, e.Hint)
	}
	f.call("nack", []int64{of[all[0]], of[all[2]]}, 2, "delay => '0'", "error => 'no such host'")
	f.call("nack", []int64{of[all[0]]}, 0)
	f.call("ack", []int64{of[all[0]]}, 0)
	if got := pgtest.Value[string](f.DB, `select distinct error from sequin.deliveries where state = 'waiting'`); got != "no such host" {
		t.Errorf("the error is %q", got)
	}
	// It comes again, in order; other groups have nothing to do with it.
	again := f.receive(`'c', 10`)
	wantSeqs(t, again, all[0], all[2])
	for _, m := range again {
		if m.DeliverCount != 2 {
			t.Errorf("delivery %d of message %d, want 2", m.DeliverCount, m.Seq)
		}
	}
	// What follows in the group waits for it.
	later := f.write(inserts(1, 3)...)
	wantSeqs(t, f.receive(`'c', 10`)) // 3 is out as well
	f.call("nack", ids(again[:1]), 1, "delay => '1 hour'")
	f.call("ack", ids(again[1:]), 1)
	f.call("ack", []int64{of[all[1]], of[all[3]], of[all[4]]}, 3)
	wantSeqs(t, f.receive(`'c', 10`), later[1])
	if n := pgtest.Value[int](f.DB, `select waiting from sequin.consumer_status`); n != 1 {
		t.Errorf("%d messages wait, want 1", n)
	}
}

// One that is followed by itself is extended with those that are taken out of its lane in the same call.
func TestExtendSomeAgain(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "group_by => '{}'", "ack_wait => '1 hour'")
	f.write(inserts(1, 2, 3, 4)...)
	got := f.receive(`'c', 4`)
	f.call("extend", ids(got[1:2]), 1, "'2 hours'")
	f.call("extend", ids(got[:2]), 2, "'10 hours'")
	left := pgtest.Column[float64](f.DB, `select extract(epoch from expires_at - clock_timestamp())::float8 / 3600 from sequin.deliveries order by seq`)
	if len(left) != 4 || left[0] < 9 || left[1] < 9 || left[2] > 1 || left[3] > 1 {
		t.Errorf("hours left: %v", left)
	}
	f.call("extend", ids(got), 4, "'20 hours'")
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.deliveries where expires_at > clock_timestamp() + interval '19 hours'`); n != 4 {
		t.Errorf("%d of 4 are extended", n)
	}
	f.call("ack", ids(got), 4)
}

// What is tracked is read a few times a call, and not once a message, by a session that made its plans when there was
// next to nothing, and on a planner that thinks so still.
func TestTrackedIsReadLittle(t *testing.T) {
	const count = 1000
	f := setup(t, "changes")
	f.consumer("c")
	conn := f.Connect()
	reads := func(what string, most int, call func(pgx.Tx)) {
		t.Helper()
		f.reads(conn, what, most, call)
	}
	const emptied = -count // where much has been tracked, and little is left
	for _, written := range []int{1, 1, count, 30 * count, emptied} {
		if written == emptied {
			f.Exec(`insert into sequin.delivery (
			  consumer_id, seq, lane, group_hash, deliver_count, not_before, is_out, route_id, committed_at, action, table_schema, table_name, metadata)
			select 0, n, 0, hashint4(n), 1, now(), true, 0, now(), 'i', '', '', '{}' from generate_series(1, 40000) n`)
			f.Exec("delete from sequin.delivery where consumer_id = 0 and seq > 10")
			f.Exec("vacuum sequin.delivery")
			written = count
		}
		f.Exec("analyze sequin.delivery; analyze sequin.held_group")
		f.write(inserts(upto(written)...)...)
		n := min(written, count) // of the most, all from a few lanes
		for round := range 3 {
			var got []message
			reads(fmt.Sprintf("receive %d of %d messages", round+1, n), 20*n+20, func(tx pgx.Tx) {
				pgtest.Eventually(t, 30*time.Second, func() error {
					got = append(got, f.receiveIn(tx, fmt.Sprintf(`'c', %d`, n-len(got)))...)
					return want(len(got), n)
				})
			})
			if round == 0 {
				for rest := f.receive(`'c', 10000`); len(rest) > 0; rest = f.receive(`'c', 10000`) {
					f.call("ack", ids(rest), int64(len(rest)))
				}
			}
			if round == 2 {
				reads(fmt.Sprintf("ack of %d messages", n), 20*n+20, func(tx pgx.Tx) { f.callIn(tx, "ack", ids(got), int64(n)) })
				break
			}
			reads(fmt.Sprintf("nack %d of %d messages", round+1, n), 20*n+20, func(tx pgx.Tx) {
				f.callIn(tx, "nack", ids(got), int64(n), "delay => '0'")
			})
		}
	}
}

// What backs off costs nobody anything until it is due.
func TestBackingOffIsNotRead(t *testing.T) {
	const count = 1000
	f := setup(t, "changes")
	f.consumer("c")
	f.backOff(count)
	f.write(inserts(count + 1)...)
	conn := f.Connect()
	const most = 100
	f.reads(conn, "receive", most, func(tx pgx.Tx) { f.receiveIn(tx, `'c', 1`) })
	f.reads(conn, "pop", most, func(tx pgx.Tx) {
		if _, err := tx.Exec(t.Context(), `select * from sequin.pop('c', 10)`); err != nil {
			t.Fatal(err)
		}
	})
	for _, call := range []string{`bridge_tend(id)`, `bridge_notify(array[0])`} {
		f.reads(conn, call, most, func(tx pgx.Tx) {
			if _, err := tx.Exec(t.Context(), `select sequin.`+call+` from sequin.consumers`); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// reads calls something in a transaction, and fails the test where it reads more of some tables than it may: of what is
// tracked, where none is named.
func (f *fixture) reads(conn *pgx.Conn, what string, most int, call func(pgx.Tx), tables ...string) {
	f.Helper()
	tx, err := conn.Begin(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	if len(tables) == 0 {
		tables = []string{"delivery", "held_group"}
	}
	const read = `select coalesce(sum(seq_tup_read + idx_tup_fetch), 0), coalesce(sum((
			select sum(pg_stat_get_xact_tuples_returned(i.indexrelid)) from pg_index i where i.indrelid = relid)), 0)
		from pg_stat_xact_all_tables where schemaname = 'sequin' and relname = any ($1)`
	var before, after, entriesBefore, entries int
	if err := tx.QueryRow(f.Context(), read, tables).Scan(&before, &entriesBefore); err != nil {
		f.Fatal(err)
	}
	call(tx)
	if err := tx.QueryRow(f.Context(), read, tables).Scan(&after, &entries); err != nil {
		f.Fatal(err)
	}
	if err := tx.Commit(f.Context()); err != nil {
		f.Fatal(err)
	}
	entries -= entriesBefore
	f.Logf("%s reads %d rows, by %d entries of indexes", what, after-before, entries)
	if after-before > most {
		f.Errorf("%s reads %d rows, and not %d at most", what, after-before, most)
	}
	// Those of rows that are dead by then, too, which are no rows.
	if entries > 5*most {
		f.Errorf("%s reads %d entries of indexes, and not %d at most", what, entries, 5*most)
	}
}

// The delay doubles from one delivery to the next, with jitter, up to max_backoff.
func TestNackBackoff(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "backoff => '40 ms'", "max_backoff => '300 ms'")
	f.write(inserts(1)...)
	for count, want := range []float64{0.04, 0.08, 0.16, 0.3, 0.3} {
		got := f.eventually(`'c', 1`)
		if got[0].DeliverCount != count+1 {
			t.Errorf("delivery %d, want %d", got[0].DeliverCount, count+1)
		}
		began := time.Now()
		f.call("nack", ids(got), 1)
		left := pgtest.Value[float64](f.DB, `select extract(epoch from not_before - clock_timestamp())::float8 from sequin.delivery`)
		if left > min(want*1.2, 0.3) || left < want-time.Since(began).Seconds()-0.01 {
			t.Errorf("after delivery %d it backs off for %v s, want %v and up to a fifth more", count+1, left, want)
		}
	}
}

func TestExtend(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "ack_wait => '1 minute'")
	f.write(inserts(upto(300)...)...)
	got := f.receive(`'c', 200`)
	expires := func() map[int64]int {
		rows, err := f.Pool.Query(t.Context(), `select ack_id, round(extract(epoch from expires_at - clock_timestamp()) / 60)::int from sequin.deliveries`)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		minutes := map[int64]int{}
		for rows.Next() {
			var id int64
			var n int
			if err := rows.Scan(&id, &n); err != nil {
				t.Fatal(err)
			}
			minutes[id] = n
		}
		return minutes
	}
	f.call("extend", ids(got), 200, "'10 minutes'")
	for id, minutes := range expires() {
		if minutes != 10 {
			t.Fatalf("delivery %d ends in %d minutes, want 10", id, minutes)
		}
	}
	// A part of a batch; again; and without saying how long.
	f.call("extend", ids(got[50:60]), 10, "'30 minutes'")
	f.call("extend", ids(got[55:65]), 10, "'20 minutes'")
	f.call("extend", ids(got[58:59]), 1)
	minutes := expires()
	for i, m := range got {
		want := 10
		switch {
		case i == 58:
			want = 1
		case i >= 55 && i < 65:
			want = 20
		case i >= 50 && i < 55:
			want = 30
		}
		if minutes[m.AckID] != want {
			t.Errorf("delivery %d of the batch ends in %d minutes, want %d", i, minutes[m.AckID], want)
		}
	}
	if e := f.Error(`select sequin.extend('c', '{}', '0')`); e.Code != "22023" || e.Hint == "" {
		t.Errorf("ack_wait 0: %s %s, hint %q", e.Code, e.Message, e.Hint)
	}
	f.call("ack", ids(got), 200)
	f.call("extend", ids(got), 0)
	f.call("ack", ids(f.receive(`'c', 200`)), 100)
	f.wantClean()
}

// An extended delivery does not expire when the others of its batch do.
func TestExtendOutlastsItsBatch(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "ack_wait => '50 ms'", "backoff => '0'")
	all := f.write(inserts(upto(30)...)...)
	got := f.receive(`'c', 30`)
	f.call("extend", ids(got[10:12]), 2, "'1 minute'")
	var again []message
	for len(again) < 28 {
		again = append(again, f.eventually(`'c', 30, ack_wait => '1 minute'`)...)
	}
	wantSeqs(t, f.receive(`'c', 30`))
	wantSeqsInAnyOrder(t, append(again, got[10:12]...), all...)
	f.call("ack", ids(got), 2)
	f.call("ack", ids(again), 28)
	f.wantClean()
}
