package e2e

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// Rows that the log has nothing of are republished again and again while they change: no row of the table comes after a
// newer change with older content, and all of it together is the table.
func TestRepublishUnderWay(t *testing.T) {
	seed := pgtest.Seed(t)
	for round := range pgtest.Rounds(t, 1) {
		seed := seed + uint64(round)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { testRepublishUnderWay(t, seed) })
	}
}

func testRepublishUnderWay(t *testing.T, seed uint64) {
	t.Parallel()
	random := rand.New(rand.NewPCG(seed, 0))
	options := []string{"", ", group_by => '{id}'", ", group_by => '{}'"}[random.IntN(3)]
	t.Logf("seed %d%s", seed, options)
	const count, writers = 400, 2
	db := pgtest.New(t)
	db.Exec(`create table moving (id int primary key, step int not null, at int, note text)`)
	db.Exec(`insert into moving select n, 0, n % 9 from generate_series(1, $1::int) n`, count)
	db.Exec(`insert into moving select n, 0 from generate_series(1001, 1005) n`) // nobody moves these: the log has nothing of them
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_stream('s', '{moving}')`)
	db.Exec(`select sequin.create_consumer('c', 's', ack_wait => '20 s', backoff => '1 ms'` + options + `)`)
	db.Exec(`insert into moving values (-2, 0)`) // it begins

	ctx := context.Background()
	var stopped atomic.Bool
	defer stopped.Store(true)
	var writing, working sync.WaitGroup
	for w := range writers {
		random := rand.New(rand.NewPCG(seed, uint64(w+1)))
		conn := db.Connect()
		writing.Go(func() {
			for step := 1; !stopped.Load(); step++ {
				if err := moveRows(conn, random, count, writers, w, step); err != nil {
					t.Errorf("writer: %v", err)
					return
				}
				time.Sleep(time.Duration(random.Int64N(int64(20 * time.Millisecond)))) // so many a second
			}
		})
	}
	var mu sync.Mutex
	rows, newest := map[string]map[string]any{}, map[string]float64{}
	seen, reads := map[int64]bool{}, 0
	done := make(chan struct{})
	for w := range 4 {
		random := rand.New(rand.NewPCG(seed, uint64(100+w)))
		conn := db.Connect()
		working.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				batch, err := conn.Query(ctx, `select ack_id, seq, deliver_count, action, record_pk, record from sequin.receive('c', $1, '20 ms')`, 1+random.IntN(10))
				var ids []int64
				var id, seq int64
				var deliveries int
				var action, pk string
				var record map[string]any
				mu.Lock()
				for err == nil && batch.Next() {
					record = nil
					if err = batch.Scan(&id, &seq, &deliveries, &action, &pk, &record); err != nil {
						break
					}
					ids = append(ids, id)
					if deliveries == 1 {
						seen[seq] = true
					}
					step, _ := record["step"].(float64)
					if action == "read" {
						reads++
					}
					if action == "delete" {
						delete(rows, pk)
						continue
					}
					// A batch that was given back comes again from its first: only what is new must be newer.
					if deliveries == 1 && step < newest[pk] {
						t.Errorf("%s at step %v, as a %s, seq %d, came after step %v", pk, step, action, seq, newest[pk])
					} else if deliveries > 1 && !seen[seq] {
						t.Errorf("delivery %d of seq %d came without one before it", deliveries, seq)
					}
					if action != "read" { // the table may be ahead of the log
						newest[pk] = max(newest[pk], step)
					}
					rows[pk] = record
				}
				mu.Unlock()
				if err == nil {
					err = batch.Err()
				}
				call := "ack"
				if random.IntN(8) == 0 {
					call = "nack"
				}
				if err == nil && len(ids) > 0 {
					_, err = conn.Exec(ctx, `select sequin.`+call+`('c', $1)`, ids)
				}
				if err != nil {
					t.Errorf("worker: %v", err)
					return
				}
			}
		})
	}
	pgtest.Eventually(t, 20*time.Second, func() error {
		if state := pgtest.Value[string](db, `select state from sequin.consumers`); state != "active" {
			return fmt.Errorf("the consumer is %s", state)
		}
		return nil
	})
	republished := int64(0)
	for range 60 {
		from := random.IntN(count)
		republished += pgtest.Value[int64](db, `select sequin.republish('c', $1)`, fmt.Sprintf(`select * from moving where id between %d and %d`, from, from+20))
	}
	republished += pgtest.Value[int64](db, `select sequin.republish('c', 'table moving')`)
	stopped.Store(true)
	writing.Wait()
	awaitRow(t, db, "moving", -1)
	pgtest.Eventually(t, 60*time.Second, func() error {
		if n := pgtest.Value[int64](db, `select pending + in_flight from sequin.consumer_status`); n > 0 {
			return fmt.Errorf("%d are left", n)
		}
		return nil
	})
	close(done)
	working.Wait()
	t.Logf("%d were republished, %d of them from the table", republished, reads)
	if reads == 0 {
		t.Error("none was read from the table")
	}
	want := pgtest.Column[string](db, `select id || ' ' || step from moving order by id`)
	var got []string
	for pk, record := range rows {
		got = append(got, fmt.Sprintf("%s %v", pk, record["step"]))
	}
	slices.SortFunc(got, func(a, b string) int { return cmp.Compare(idOf(a), idOf(b)) })
	if !slices.Equal(got, want) {
		for _, row := range want {
			if !slices.Contains(got, row) {
				t.Errorf("%s is missing", row)
			}
		}
		t.Errorf("got %d rows, want %d", len(got), len(want))
	}
}

// idOf returns the number that a text begins with.
func idOf(text string) (id int) {
	_, _ = fmt.Sscan(text, &id)
	return id
}
