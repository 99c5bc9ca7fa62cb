package sql

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// Where all that may be out is, whoever asks for more looks once, and not in each lane anew.
func TestMaxAckPendingReached(t *testing.T) {
	const limit = 1000
	f := setup(t, "changes")
	f.consumer("c", fmt.Sprintf("max_ack_pending => %d", limit))
	f.write(inserts(upto(3 * limit)...)...)
	out, empty := 0, 0
	pgtest.Eventually(t, 30*time.Second, func() error {
		got := len(f.receive(`'c', 100`))
		out += got
		if empty++; got > 0 {
			empty = 0
		}
		if empty < 5 {
			return fmt.Errorf("%d are out, and %d were had just now", out, got)
		}
		return nil
	})
	if out < limit*9/10 || out > limit {
		t.Errorf("%d are out, and max_ack_pending is %d", out, limit)
	}
	f.reads(f.Connect(), "receive", 1500, func(tx pgx.Tx) {
		if got := f.receiveIn(tx, `'c', 100`); len(got) > 0 {
			t.Errorf("%d more", len(got))
		}
	}, "lane", "floor", "consumer", "delivery")
}

// No more than max_ack_pending messages are out or backing off, whoever asks, and however many are asked for.
func TestMaxAckPending(t *testing.T) {
	for _, limit := range []int{1, 5, 63, 150, 1000} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			f := setup(t, "rows")
			f.consumer("c", fmt.Sprintf("max_ack_pending => %d", limit), "backoff => '1 hour'", "max_backoff => '1 hour'")
			f.write(inserts(upto(3000)...)...)

			var mu sync.Mutex
			var out []message
			grab := func(batch int) {
				var workers sync.WaitGroup
				for range 6 {
					conn := f.Connect()
					workers.Go(func() {
						for empty := 0; empty < 2; {
							got := f.receiveIn(conn, fmt.Sprintf(`'c', %d, '200 ms'`, batch))
							if len(got) == 0 {
								empty++
							}
							mu.Lock()
							out = append(out, got...)
							mu.Unlock()
						}
					})
				}
				workers.Wait()
			}
			batches := []int{1, 7, 50}
			if limit >= 150 {
				batches = batches[1:] // a message at a time, it takes long
			}
			for round, batch := range batches {
				grab(batch)
				if len(out) > limit || len(out) < min(limit, 150)*2/3 {
					t.Fatalf("round %d: %d messages are out, and max_ack_pending is %d", round, len(out), limit)
				}
				// What backs off counts as well.
				half := len(out) / 2
				f.call("nack", ids(out[:half]), int64(half))
				if got := f.receive(fmt.Sprintf(`'c', %d`, limit)); len(got) > limit-len(out) {
					t.Fatalf("round %d: %d messages more, and only %d of %d are free", round, len(got), limit-len(out), limit)
				} else {
					f.call("ack", ids(got), int64(len(got)))
				}
				f.Exec(`update sequin.delivery set not_before = clock_timestamp(), due_at = case when due_at is not null then clock_timestamp() end`)
				again := f.receive(`'c', 10000`)
				if len(again) < half {
					t.Fatalf("round %d: %d came again, want %d", round, len(again), half)
				}
				out = append(out[half:], again...)
				f.call("ack", ids(out), int64(len(out)))
				out = nil
			}
			for {
				got := f.pop(`'c', 10000`)
				if len(got) == 0 {
					break
				}
			}
			f.wantClean()
		})
	}
}

// A large limit is a limit for each way to it: batches that are larger than a lane's part of it.
func TestMaxAckPendingLargeBatches(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "max_ack_pending => 2000")
	f.write(inserts(upto(6000)...)...)
	var mu sync.Mutex
	out := 0
	var workers sync.WaitGroup
	for range 6 {
		conn := f.Connect()
		workers.Go(func() {
			for range 4 {
				n := len(f.receiveIn(conn, `'c', 700`))
				mu.Lock()
				out += n
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	if out > 2000 {
		t.Errorf("%d messages are out, and max_ack_pending is 2000", out)
	}
	// Six who ask at once may keep some of it from each other. One gets what is left.
	for n := 1; n > 0; out += n {
		n = len(f.receive(`'c', 700`))
	}
	if out > 2000 || out < 1500 {
		t.Errorf("%d messages are out in the end, and max_ack_pending is 2000", out)
	}
}

// What a held group was held back for, and what is put back from the dead, counts from when it is handed out.
func TestMaxAckPendingOfWhatComesBack(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "max_ack_pending => 3", "max_deliver => 1")
	f.write(inserts(upto(20)...)...)
	for range 10 {
		got := f.receive(`'c', 2`)
		f.call("nack", ids(got), 2)
	}
	if n := pgtest.Value[int64](f.DB, `select sequin.redrive('c')`); n != 20 {
		t.Fatalf("%d dead letters, want 20", n)
	}
	more := f.write(inserts(upto(20)...)...)
	done := map[string]int{}
	for total := 0; total < 40; {
		got := f.receive(`'c', 100`)
		if len(got) == 0 || len(got) > 3 {
			t.Fatalf("%d messages after %d, and max_ack_pending is 3", len(got), total)
		}
		if rest := f.receive(`'c', 100`); len(got)+len(rest) > 3 {
			t.Fatalf("%d messages and %d more, and max_ack_pending is 3", len(got), len(rest))
		} else {
			got = append(got, rest...)
		}
		for _, m := range got {
			if isMore := m.Seq >= more[0]; isMore != (done[m.Key] == 1) {
				t.Fatalf("message %d came when %d of its group were done", m.Seq, done[m.Key])
			}
		}
		total += len(got)
		f.call("ack", ids(got), int64(len(got)))
		for _, m := range got {
			done[m.Key]++
		}
	}
	f.wantClean()
}

// A message that was put back is not kept from its group's turn by one that was given back and waits behind it.
func TestMaxAckPendingRedriveBeforeNacked(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "max_ack_pending => 1", "max_deliver => 2", "backoff => '0'")
	all := f.write(inserts(1, 1)...)
	for range 2 {
		f.call("nack", ids(f.receive(`'c', 5`)), 1)
	}
	f.call("nack", ids(f.receive(`'c', 5`)), 1)
	f.Exec(`select sequin.redrive('c')`)
	for _, seq := range all {
		got := f.receive(`'c', 5`)
		wantSeqs(t, got, seq)
		wantSeqs(t, f.receive(`'c', 5`))
		f.call("ack", ids(got), 1)
	}
	f.wantClean()
}

// A transaction that has little and stays open keeps no more than that from the others.
func TestMaxAckPendingBesideOpenTransaction(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "max_ack_pending => 5")
	f.write(inserts(1)...)
	ctx := context.Background()
	tx, err := f.Connect().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got := f.receiveIn(tx, `'c', 5`); len(got) != 1 {
		t.Fatalf("got %d messages, want 1", len(got))
	}
	f.write(inserts(upto(200)...)...)
	if got := f.receive(`'c', 5`); len(got) != 4 {
		t.Errorf("beside it %d messages, want 4", len(got))
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	if got := f.receive(`'c', 5`); len(got) != 1 {
		t.Errorf("after it %d messages, want 1", len(got))
	}
}
