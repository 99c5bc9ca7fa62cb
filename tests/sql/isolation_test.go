package sql

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

const manyGroups = 1000

// While one delivery hangs until its ack_wait, the other groups go on: those that wait already, and those that get
// something later.
func TestHangingDelivery(t *testing.T) {
	for name, options := range map[string]string{"key": "", "columns": ", group_by => '{grp}'"} {
		t.Run(name, func(t *testing.T) {
			f := bridged(t)
			f.Exec(`select sequin.create_stream('s', '{item}', mode => 'changes'); select sequin.create_consumer('c', 's'` + options + `)`)
			f.Exec(`insert into item select i, i, 'first' from generate_series(1, $1::int) i`, manyGroups)
			f.awaitLog()
			hung := f.receive(`'c', 1, ack_wait => '1 hour'`)
			if len(hung) != 1 {
				t.Fatalf("got %d messages, want 1", len(hung))
			}

			// Those that wait: all of them, in the end; 95 of 100 within a second.
			var atOnce, got int
			began := time.Now()
			pgtest.Eventually(t, 30*time.Second, func() error {
				got += len(f.pop(`'c', 100`))
				if time.Since(began) < 5*time.Second {
					atOnce = got
				}
				return wantAtLeast(got, manyGroups-1)
			})
			if atOnce < manyGroups*95/100 {
				t.Errorf("%d of %d waiting groups went on at once", atOnce, manyGroups-1)
			}

			// And those that come.
			f.Exec(`update item set note = 'second' where id <> $1 and id % 10 = 0`, hung[0].Key)
			f.awaitLog()
			began, atOnce, got = time.Now(), 0, 0
			coming := pgtest.Value[int](f.DB, `select count(*) from item where note = 'second'`)
			pgtest.Eventually(t, 30*time.Second, func() error {
				for _, m := range f.pop(`'c', 10, '100 ms'`) {
					if m.Key == hung[0].Key || m.Note != "second" {
						t.Fatalf("got message %d of %s (%s) while %s hangs", m.Seq, m.Key, m.Note, hung[0].Key)
					}
					got++
				}
				if time.Since(began) < 5*time.Second {
					atOnce = got
				}
				return wantAtLeast(got, coming)
			})
			if atOnce < coming*95/100 {
				t.Errorf("%d of %d groups went on within a second", atOnce, coming)
			}
			f.call("ack", ids(hung), 1)
		})
	}
}

// One group that fails again and again holds back itself, and nobody else, while workers run.
func TestFailingGroup(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}', mode => 'changes'); select sequin.create_consumer('c', 's', backoff => '10 ms', max_backoff => '50 ms')`)
	f.Exec(`insert into item select i, i, 'a' from generate_series(1, $1::int) i`, manyGroups)
	f.Exec(`update item set note = 'b' where id <= 10`)
	f.awaitLog()
	var mu sync.Mutex
	done, failures := map[string]int{}, 0
	var workers sync.WaitGroup
	deadline := time.Now().Add(30 * time.Second)
	for range 4 {
		workers.Go(func() {
			for time.Now().Before(deadline) {
				for _, m := range f.receive(`'c', 10, '50 ms'`) {
					name := "ack"
					if m.Key == "7" {
						name = "nack"
					}
					var n int
					if err := f.Pool.QueryRow(context.Background(), fmt.Sprintf(`select sequin.%s('c', $1)`, name), []int64{m.AckID}).Scan(&n); err != nil || n != 1 {
						t.Errorf("%s counts %d, %v", name, n, err)
						return
					}
					mu.Lock()
					switch {
					case name == "ack":
						done[m.Key]++
					case m.Note != "a":
						t.Errorf("message %d (%s) of the failing group was handed out before its first", m.Seq, m.Note)
					default:
						failures++
					}
					mu.Unlock()
				}
				mu.Lock()
				isDone := len(done) == manyGroups-1 && failures > 5
				mu.Unlock()
				if isDone {
					return
				}
			}
		})
	}
	workers.Wait()
	if len(done) != manyGroups-1 || failures <= 5 {
		t.Errorf("%d of %d groups were done beside one that failed %d times", len(done), manyGroups-1, failures)
	}
	for key, n := range done {
		want := 1
		if pgtest.Value[bool](f.DB, `select note = 'b' from item where id = $1::text::int`, key) {
			want = 2
		}
		if n > want {
			t.Errorf("%d messages of %s were done, want %d", n, key, want)
		}
	}
}
