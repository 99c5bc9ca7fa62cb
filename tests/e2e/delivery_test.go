package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// One consumer, eight workers that do anything to it, and a writer that does anything to its tables: nothing is lost,
// doubled or out of order. Which kind of consumer it is, follows from the seed.
func TestRandomDelivery(t *testing.T) {
	seed := pgtest.Seed(t)
	for round := range pgtest.Rounds(t, 2) {
		seed := seed + uint64(round)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { testRandomDelivery(t, seed) })
	}
}

const (
	randomWorkers = 8
	randomTime    = 8 * time.Second
)

func testRandomDelivery(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	mode := []string{"rows", "changes"}[random.IntN(2)]
	groupBy := []string{"null", "null", "'{grp}'", "'{}'"}[random.IntN(4)]
	tables := []string{"item", "other"}[:1+random.IntN(2)]
	limit := []int{10000, 10000, 1, 5, 120}[random.IntN(5)]
	maxDeliver := []string{"null", "null", "3"}[random.IntN(3)]
	keys := []int{5, 40, 400}[random.IntN(3)]
	t.Logf("seed %d: mode %s, group_by %s, tables %v, max_ack_pending %d, max_deliver %s, %d keys", seed, mode, groupBy, tables, limit, maxDeliver, keys)

	db := pgtest.New(t)
	for _, table := range tables {
		db.Exec(fmt.Sprintf(`create table %s (id int primary key, grp int not null, step int not null);
			alter table %[1]s replica identity full`, table))
	}
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_stream('s', $1::text[], mode => $2)`, "{"+strings.Join(tables, ",")+"}", mode)
	db.Exec(fmt.Sprintf(`select sequin.create_consumer('c', 's', group_by => %s, ack_wait => '400 ms', backoff => '10 ms',
		max_backoff => '100 ms', max_ack_pending => %d, max_deliver => %s)`, groupBy, limit, maxDeliver))

	groupOf := func(table, pk string, record map[string]any) string {
		switch groupBy {
		case "'{}'":
			return ""
		case "null":
			return table + " " + pk
		default:
			return fmt.Sprint(record["grp"])
		}
	}
	h := &history{}
	workers := make([]*worker, randomWorkers)
	for i := range workers {
		workers[i] = &worker{
			t: t, db: db, consumer: "c", groupOf: groupOf, history: h, ackWait: 400 * time.Millisecond,
			random: rand.New(rand.NewPCG(seed, uint64(i+1))),
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var running sync.WaitGroup
	running.Go(func() {
		defer cancel()
		time.Sleep(randomTime) // so much happens in it, unless the machine is busy with something else
		for began := time.Now(); time.Since(began) < 2*time.Minute && !h.isEventful(); {
			time.Sleep(100 * time.Millisecond)
		}
	})
	pause := 30 * time.Millisecond // so that workers catch up now and then
	if limit <= 5 {
		pause = 300 * time.Millisecond
	}
	running.Go(func() { writeAtRandom(ctx, t, db, tables, keys, pause, rand.New(rand.NewPCG(seed, 100))) })
	for _, w := range workers {
		running.Go(func() { w.run(ctx) })
	}
	running.Wait()

	// What was given up is put back, and then all is acknowledged.
	dead := map[int64]bool{}
	redrive := func() {
		// These and no others: one that is given up between the two is for the next time.
		seqs := pgtest.Column[int64](db, `select seq from sequin.dead_letters`)
		for _, seq := range seqs {
			dead[seq] = true
		}
		db.Exec(`select sequin.redrive('c', $1)`, seqs)
	}
	awaitCaptured(t, db, tables[0])
	redrive()
	deadline := time.Now().Add(time.Minute)
	done := make(chan struct{})
	for _, w := range workers {
		running.Go(func() {
			conn, err := pgx.Connect(context.Background(), db.URL)
			if err != nil {
				t.Errorf("connect: %v", err)
				return
			}
			w.conn = conn
			defer conn.Close(context.Background())
			w.drain(func() bool {
				select {
				case <-done:
					return false
				default:
					return w.conn != nil
				}
			})
		})
	}
	for {
		redrive()
		var left string
		if err := db.Pool.QueryRow(context.Background(), leftSQL).Scan(&left); err != nil {
			t.Fatal(err)
		}
		if left == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("left over: %s", left)
			for _, line := range pgtest.Column[string](db, `select d::text from (select seq, lane, group_hash, deliver_count, not_before, due_at, lease, pick, is_out, is_done, leased_at, error from sequin.delivery order by lane, group_hash, seq limit 40) d
				union all select h::text from sequin.held_group h
				union all select l::text from pg_locks l where locktype = 'advisory'
				union all select a::text from pg_stat_activity a where datname = current_database()`) {
				t.Log(line)
			}
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	close(done)
	running.Wait()

	c := &check{t: t, bySeq: map[int64]*message{}, dead: dead, isRows: mode == "rows", limit: limit}
	c.maxTries, _ = strconv.Atoi(maxDeliver)
	readLog(t, db, c, groupOf)
	c.run(h)
	folded := c.fold()
	for _, table := range tables {
		if got, want := folded[table], tableRows(t, db, table); !reflect.DeepEqual(got, want) {
			t.Errorf("table %s, folded from its messages: %v\nas it is: %v", table, got, want)
		}
	}
	t.Logf("%d messages, %d deliveries, %d calls to settle them, %d dead letters", len(c.messages), len(h.deliveries), len(h.settlements), len(dead))
	if !h.isEventful() {
		t.Error("hardly anything happened")
	}
}

// leftSQL says what is not as it is for a consumer that has had everything.
const leftSQL = `
select concat_ws('; ',
  (select format('%s pending, %s in flight', pending, in_flight) from sequin.consumer_status where pending > 0 or in_flight > 0),
  (select format('%s tracked', count(*)) from sequin.delivery having count(*) > 0),
  (select format('%s held', count(*)) from sequin.held_group having count(*) > 0),
  (select format('%s dead', count(*)) from sequin.dead_letter having count(*) > 0),
  (select string_agg(l::text, ' ') from (select distinct on (consumer_id, lane) * from sequin.lane order by consumer_id, lane, prev desc) l
   where lease is not null or out_count <> 0 or tracked <> 0 or fresh <> 0 or held <> 0 or held_back <> 0 or permits is not null))`

// awaitCaptured waits until what has been written is in the log: the last of it is a row of its own.
func awaitCaptured(t *testing.T, db *pgtest.DB, table string) {
	t.Helper()
	db.Exec(`insert into ` + table + ` values (9999, 0, 0)`)
	pgtest.Eventually(t, 60*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.messages where stream = 's' and record_pk = '9999')`) {
			return fmt.Errorf("the last row is not in the log")
		}
		return nil
	})
}

// readLog reads what there was to deliver.
func readLog(t *testing.T, db *pgtest.DB, c *check, groupOf func(table, pk string, record map[string]any) string) {
	t.Helper()
	rows, err := db.Pool.Query(context.Background(),
		`select seq, table_name, record_pk, record from sequin.messages where stream = 's' order by seq`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	newest := map[string]*message{}
	for rows.Next() {
		m := &message{}
		var table, pk string
		var record map[string]any
		if err := rows.Scan(&m.seq, &table, &pk, &record); err != nil {
			t.Fatal(err)
		}
		m.group, m.row = groupOf(table, pk, record), table+" "+pk
		if old := newest[m.row]; old != nil {
			old.isNew = false
		}
		m.isNew, newest[m.row] = true, m
		c.messages, c.bySeq[m.seq] = append(c.messages, m), m
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
}

func tableRows(t *testing.T, db *pgtest.DB, table string) map[string]any {
	t.Helper()
	rows := map[string]any{}
	for _, text := range pgtest.Column[string](db, `select to_jsonb(t)::text from `+table+` t`) {
		var row map[string]any
		if err := json.Unmarshal([]byte(text), &row); err != nil {
			t.Fatal(err)
		}
		rows[fmt.Sprint(row["id"])] = row
	}
	return rows
}

// writeAtRandom inserts, updates, deletes and renames rows, several to a transaction.
func writeAtRandom(ctx context.Context, t *testing.T, db *pgtest.DB, tables []string, keys int, pause time.Duration, random *rand.Rand) {
	conn := db.Connect()
	step := 0
	for ctx.Err() == nil {
		tx, err := conn.Begin(context.Background())
		if err != nil {
			t.Errorf("begin: %v", err)
			return
		}
		for range 1 + random.IntN(20) {
			step++
			table, id := tables[random.IntN(len(tables))], random.IntN(keys)
			switch n := random.IntN(100); {
			case n < 80:
				_, err = tx.Exec(context.Background(), fmt.Sprintf(`insert into %s values ($1, $2, $3)
					on conflict (id) do update set grp = excluded.grp, step = excluded.step`, table), id, random.IntN(8), step)
			case n < 90:
				_, err = tx.Exec(context.Background(), fmt.Sprintf(`delete from %s where id = $1`, table), id)
			default:
				_, err = tx.Exec(context.Background(), fmt.Sprintf(`update %s t set id = $2, step = $3
					where id = $1 and not exists (select from %[1]s o where o.id = $2)`, table), id, random.IntN(keys), step)
			}
			if err != nil {
				t.Errorf("write: %v", err)
				return
			}
		}
		end := tx.Commit
		if random.IntN(20) == 0 {
			end = tx.Rollback
		}
		if err := end(context.Background()); err != nil {
			t.Errorf("end: %v", err)
			return
		}
		time.Sleep(time.Duration(random.Int64N(int64(pause))))
	}
}
