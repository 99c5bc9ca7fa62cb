package sql

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// kinds of consumer: by key, in total order, with a feed.
var kinds = []string{"", "group_by => '{}'", "group_by => '{grp}'"}

// rewind takes the consumer c back.
func (f *fixture) rewind(args string) {
	f.Helper()
	if got := pgtest.Value[string](f.DB, `select sequin.rewind('c', `+args+`)`); got != "rewound" {
		f.Fatalf("rewind gives %q", got)
	}
}

// drain receives and acknowledges all there is.
func (f *fixture) drain() []message {
	f.Helper()
	var all []message
	for empty := 0; empty < 3; {
		got := f.receive(`'c', 100`)
		if len(got) == 0 {
			f.Exec(`update sequin.delivery set not_before = now(), due_at = case when due_at > '-infinity' then now() else due_at end where not is_done and not is_out`)
			f.tend()
			empty++
			continue
		}
		empty = 0
		f.call("ack", ids(got), int64(len(got)))
		all = append(all, got...)
	}
	return all
}

// From the target on everything comes again, in order; what was out from there on is nobody's any more; what was out or
// waited before it still is or does.
func TestRewind(t *testing.T) {
	for i, kind := range kinds {
		for _, target := range []int{0, 40, 95, 199}[i%2 : i%2+3] {
			t.Run(fmt.Sprintf("%s to %d", kind, target), func(t *testing.T) {
				f := setup(t, "changes")
				f.Exec(`select sequin.create_consumer('beside', 's')`)
				f.consumer("c", "backoff => '1 hour'", "max_backoff => '1 hour'", "max_ack_pending => 150")
				if kind != "" {
					f.Exec(`select sequin.alter_consumer('c', ` + kind + `)`)
				}
				var rows []row
				for i := range 200 {
					rows = append(rows, row{action: "i", key: i % 37, grp: i % 11, note: fmt.Sprint(i)})
				}
				all := f.write(rows...)
				wantSeqsInAnyOrder(t, f.pop(`'beside', 1000`), all...)
				acked := map[int64]bool{}
				var out []message
				for i := range 6 {
					got := f.receive(`'c', 20`)
					n := len(got) / 3
					f.call("ack", ids(got[:n]), int64(n))
					for _, m := range got[:n] {
						acked[m.Seq] = true
					}
					if i%2 == 0 {
						f.call("nack", ids(got[n:2*n]), int64(n))
						out = append(out, got[2*n:]...)
					} else {
						out = append(out, got[n:]...)
					}
				}
				from := all[target]
				f.rewind(fmt.Sprintf("to_seq => %d", from))

				var stale, mine []int64
				for _, m := range out {
					if m.Seq >= from {
						stale = append(stale, m.AckID)
					} else {
						mine = append(mine, m.AckID)
						acked[m.Seq] = true
					}
				}
				f.call("ack", stale, 0)
				f.call("nack", stale, 0)
				f.call("extend", stale, 0)
				f.call("ack", mine, int64(len(mine)))
				var want []int64
				for _, seq := range all {
					if seq >= from || !acked[seq] {
						want = append(want, seq)
					}
				}
				if pending := pgtest.Value[int](f.DB, `select pending from sequin.consumer_status where name = 'c'`); pending != len(want) {
					t.Errorf("%d are pending, want %d", pending, len(want))
				}
				got := f.drain()
				wantSeqsInAnyOrder(t, got, want...)
				group := func(m message) int {
					i := slices.Index(all, m.Seq)
					return map[string]int{"": rows[i].key, kinds[1]: 0, kinds[2]: rows[i].grp}[kind]
				}
				last := map[int]int64{}
				for _, m := range got {
					if g := group(m); m.Seq < last[g] {
						t.Fatalf("message %d of group %d came after %d", m.Seq, g, last[g])
					} else {
						last[g] = m.Seq
					}
				}
				f.wantClean()
				wantSeqs(t, f.receive(`'beside', 10`))
			})
		}
	}
}

// A time is that of the first commit at or after it; a consumer may go back before it was made, or has begun.
func TestRewindToTime(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			f := setup(t, "changes")
			var all []int64
			for i := range 30 {
				all = append(all, f.write(inserts(i)...)...)
			}
			f.Exec(`select sequin.bridge_trim_source(1, null)`)
			f.Exec(`update sequin.log set committed_at = '2026-01-01'::timestamptz + (seq & 4294967295) * interval '1 minute'`)
			f.Exec(`update sequin.log_segment set opened_at = '2026-01-01'`)
			options := []string{}
			if kind != "" {
				options = append(options, kind)
			}
			f.consumer("c", options...)
			n := all[0] & 4294967295
			f.rewind(fmt.Sprintf("to_time => '2026-01-01'::timestamptz + interval '%d minutes'", n+20))
			wantSeqsInAnyOrder(t, f.drain(), all[20:]...)
			f.wantClean()
			f.rewind(fmt.Sprintf("to_time => '2026-01-01'::timestamptz + interval '%d minutes 1 second'", n+20))
			wantSeqsInAnyOrder(t, f.drain(), all[21:]...)
			f.rewind(`to_time => '2026-01-01'`)
			wantSeqsInAnyOrder(t, f.drain(), all...)
			f.rewind(`to_time => '2026-03-01'`) // nothing since
			wantSeqs(t, f.drain())
			next := f.write(inserts(100)...)
			wantSeqs(t, f.drain(), next...)
			f.rewind(fmt.Sprintf("to_seq => %d", next[0]))
			wantSeqs(t, f.drain(), next...)
			f.wantClean()
		})
	}
}

func TestRewindErrors(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	f.Exec(`select sequin.create_stream('quiet', '{other}'), sequin.create_consumer('quiet', 'quiet')`)
	all := f.write(inserts(1, 2, 3)...)
	for _, test := range []struct{ args, code, message, hint string }{
		{`'c'`, "22023", "one target", "to_seq"},
		{`'c', to_seq => 1, to_time => now()`, "22023", "one target", "to_seq"},
		{`'c', to_seq => -5`, "22023", fmt.Sprint(all[0]), "to_row"},
		{`'c', to_time => '2001-01-01'`, "22023", fmt.Sprintf("seq %d, of 20", all[0]), "sequin.rewind('c', to_row"},
		{fmt.Sprintf(`'c', to_seq => %d`, all[2]+1), "22023", fmt.Sprint(all[2]), "messages"},
		{`'c', to_time => now() + interval '1 minute'`, "22023", "not come", "to_time"},
		{`'c', to_row => 'one'`, "22023", "integer", "id"},
		{`'d', to_seq => 1`, "42704", `"d"`, `"c"`},
		{`'quiet', to_time => '2001-01-01'`, "22023", "has no message of its stream yet", "sequin.rewind('quiet', to_row"},
	} {
		e := f.Error(`select sequin.rewind(` + test.args + `)`)
		if e.Code != test.code || !strings.Contains(e.Message, test.message) || !strings.Contains(e.Hint, test.hint) {
			t.Errorf("%s: %s %s, hint %s", test.args, e.Code, e.Message, e.Hint)
		}
	}
	// Its segment is gone.
	f.Exec(`select sequin._open_segment(1)`)
	f.lastSeq = 1 << 32
	next := f.write(inserts(4)...)
	f.drain()
	f.Exec(`update sequin.setting set keep = '0'; update sequin.log_segment set closed_at = now() - interval '1 hour' where id = 0`)
	f.tend()
	if got := pgtest.Value[int](f.DB, `select sequin.bridge_retain(1)`); got != 0 {
		t.Fatalf("dropped segment %d", got)
	}
	e := f.Error(`select sequin.rewind('c', to_seq => $1)`, all[0])
	if e.Code != "22023" || !strings.Contains(e.Message, fmt.Sprint(next[0])) || !strings.Contains(e.Hint, "to_row") {
		t.Errorf("older than the log: %s %s, hint %s", e.Code, e.Message, e.Hint)
	}
	f.rewind(fmt.Sprintf("to_seq => %d", next[0]))
	wantSeqs(t, f.drain(), next...)
}

// What a rewind has been told to go back to is not dropped meanwhile.
func TestRewindHoldsLog(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(inserts(1, 2, 3)...)
	f.drain()
	f.endSegment()
	next := f.write(inserts(4)...)
	f.drain()
	tx := f.begin("")
	if _, err := tx.Exec(t.Context(), `select sequin.rewind('c', to_seq => $1)`, all[0]); err != nil {
		t.Fatal(err)
	}
	if e := f.Error(`select sequin.bridge_retain(1)`); e.Code != "55P03" {
		t.Errorf("retain: %s %s", e.Code, e.Message)
	}
	f.end(tx.Commit)
	if got := pgtest.Value[*int](f.DB, `select sequin.bridge_retain(1)`); got != nil {
		t.Errorf("segment %d was dropped", *got)
	}
	wantSeqsInAnyOrder(t, f.drain(), append(all, next...)...)
}

// A dead letter that comes again anyway is not doubled by redrive.
func TestRedriveAfterRewind(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			f := setup(t, "changes")
			options := []string{"max_deliver => 1", "backoff => '0'"}
			if kind != "" {
				options = append(options, kind)
			}
			f.consumer("c", options...)
			all := f.write(inserts(1, 2, 3, 1, 2, 3)...)
			got := f.receive(`'c', 3`)
			f.call("nack", ids(got), int64(len(got)))
			f.drain()
			f.rewind(fmt.Sprintf("to_seq => %d", all[0]))
			if n := pgtest.Value[int](f.DB, `select sequin.redrive('c')`); n != len(got) {
				t.Errorf("redrive gives %d, want %d", n, len(got))
			}
			wantSeqsInAnyOrder(t, f.drain(), all...)
			f.wantClean()
		})
	}
}

// Eight workers that do anything, and rewinds to anywhere meanwhile: after the last one everything from there on comes
// again, in the order of its group, and so does what is republished after it; nothing is left.
func TestRewindUnderWay(t *testing.T) {
	seed := pgtest.Seed(t)
	for round := range pgtest.Rounds(t, 1) {
		seed := seed + uint64(round)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			testRewindUnderWay(t, setup(t, "changes"), seed, kinds[seed%3])
		})
	}
}

func testRewindUnderWay(t *testing.T, f *fixture, seed uint64, kind string) {
	random := rand.New(rand.NewPCG(seed, 0))
	limit := []int{20, 120, 10000}[random.IntN(3)]
	t.Logf("seed %d: %q, max_ack_pending %d", seed, kind, limit)
	options := []string{"backoff => '1 ms'", "max_backoff => '20 ms'", "ack_wait => '300 ms'", fmt.Sprintf("max_ack_pending => %d", limit)}
	if kind != "" {
		options = append(options, kind)
	}
	f.consumer("c", options...)
	var all []row
	var allSeqs []int64
	write := func(n int) {
		var rows []row
		for range n {
			rows = append(rows, row{action: "i", key: random.IntN(60), grp: random.IntN(9), note: fmt.Sprint(len(all) + len(rows))})
		}
		allSeqs = append(allSeqs, f.write(rows...)...)
		all = append(all, rows...)
	}
	write(200)

	var mu sync.Mutex
	var given []message
	ctx := context.Background()
	stop := make(chan struct{})
	var workers sync.WaitGroup
	work := func(w int) {
		random := rand.New(rand.NewPCG(seed, uint64(w+1)))
		conn := f.Connect()
		call := func(name string, ids []int64, args string) {
			if _, err := conn.Exec(ctx, `select sequin.`+name+`('c', $1`+args+`)`, ids); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for {
			select {
			case <-stop:
				return
			default:
			}
			got := f.receiveIn(conn, fmt.Sprintf(`'c', %d, '10 ms'`, 1+random.IntN(20)))
			mu.Lock()
			given = append(given, got...)
			mu.Unlock()
			n := random.IntN(len(got) + 1)
			switch random.IntN(12) {
			case 0:
				call("nack", ids(got[:n]), ", '1 ms'")
			case 1: // forgotten
			case 2:
				call("extend", ids(got[:n]), ", '500 ms'")
				call("ack", ids(got[:n]), "")
			default:
				call("ack", ids(got), "")
			}
		}
	}
	for w := range 8 {
		workers.Go(func() { work(w) })
	}
	var from, turn int64
	for range 8 {
		write(1 + random.IntN(60))
		time.Sleep(time.Duration(random.Int64N(int64(100 * time.Millisecond)))) // the workers go on meanwhile
		f.tend()
		f.republish(fmt.Sprintf(`select unnest('{%d,%d}'::bigint[]) as seq`, allSeqs[0], allSeqs[1+random.IntN(len(allSeqs)-1)]), 2)
		from = allSeqs[random.IntN(len(allSeqs))]
		tx := f.begin("")
		if _, err := tx.Exec(ctx, `select sequin.rewind('c', to_seq => $1)`, from); err != nil {
			t.Fatal(err)
		}
		// Leases from here on have a later turn.
		if err := tx.QueryRow(ctx, `select last_value from sequin.turn`).Scan(&turn); err != nil {
			t.Fatal(err)
		}
		f.end(tx.Commit)
		var stale []int64
		mu.Lock()
		for _, m := range given {
			if m.Seq >= from && m.AckID>>20 <= turn {
				stale = append(stale, m.AckID)
			}
		}
		mu.Unlock()
		f.call("ack", stale, 0)
		f.Exec(`select sequin.bridge_feed(c.consumer_id, 100000) from sequin.bridge_consumers() c where c.has_feed`)
	}
	write(50)
	settled := func() {
		t.Helper()
		pgtest.Eventually(t, 60*time.Second, func() error {
			f.tend()
			return want(pgtest.Value[int](f.DB, `select (pending + in_flight)::int from sequin.consumer_status where name = 'c'`), 0)
		})
	}
	settled()
	republishedFrom := pgtest.Value[int64](f.DB, `select last_value from sequin.turn`)
	republished := map[int64]bool{}
	for range 30 {
		seq := allSeqs[random.IntN(len(allSeqs))]
		republished[seq] = true
		f.republish(fmt.Sprintf(`select %d as seq`, seq), 1)
	}
	settled()
	close(stop)
	workers.Wait()

	// The first deliveries since the last rewind, in the order in which they were handed out.
	slices.SortFunc(given, func(a, b message) int { return cmp.Compare(a.AckID, b.AckID) })
	first := map[int64]bool{}
	newest := map[int]int64{}
	for _, m := range given {
		if m.AckID>>20 > republishedFrom {
			delete(republished, m.Seq)
		}
		if m.AckID>>20 <= turn || m.Seq < from || first[m.Seq] {
			continue
		}
		first[m.Seq] = true
		r := all[slices.Index(allSeqs, m.Seq)]
		g := map[string]int{"": r.key, kinds[1]: 0, kinds[2]: r.grp}[kind]
		if m.Seq < newest[g] {
			t.Errorf("message %d of group %d came after %d", m.Seq, g, newest[g])
		}
		newest[g] = max(newest[g], m.Seq)
	}
	for _, seq := range allSeqs {
		if seq >= from && !first[seq] {
			t.Errorf("message %d did not come again after the rewind to %d", seq, from)
		}
		if republished[seq] {
			t.Errorf("message %d did not come again when it was republished", seq)
		}
	}
	f.Exec(`select sequin.bridge_trim(c.consumer_id, sequin.bridge_trim(c.consumer_id, null)) from sequin.bridge_consumers() c`)
	f.wantClean()
}

// A time before a table was streamed, though the log goes back so far, is gone back to with a warning.
func TestRewindBeforeStreamed(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(inserts(1, 2)...)
	f.Exec(`update sequin.source_table set created_at = '2026-01-01 00:30+00'`)
	f.Exec(`update sequin.log_segment set opened_at = '2026-01-01'`)
	config, err := pgx.ParseConfig(f.URL + "&timezone=UTC")
	if err != nil {
		t.Fatal(err)
	}
	var notices []string
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		notices = append(notices, n.Severity+" "+n.Message+" "+n.Hint)
	}
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for to, want := range map[string]string{
		`to_time => '2026-01-01 00:29+00'`: `[WARNING consumer "c": what was committed before 2026-01-01 00:30:00+00 is not all in the log: ` +
			`it is when public.item was first streamed Go back in the table instead: select sequin.rewind('c', to_row => ...);]`,
		`to_time => '2026-01-01 00:30+00'`:  `[]`,
		fmt.Sprintf(`to_seq => %d`, all[0]): `[]`,
	} {
		notices = nil
		if _, err := conn.Exec(t.Context(), `select sequin.rewind('c', `+to+`)`); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(notices); got != want {
			t.Errorf("%s: got %s, want %s", to, got, want)
		}
	}
}
