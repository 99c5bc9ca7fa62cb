package backfill

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// writers change a table at random: each has keys of its own, and a row's version only ever rises.
type writers struct {
	db   *pgtest.DB
	rows int
	wait string // synchronous_commit
	stop chan struct{}
	all  sync.WaitGroup
	n    atomic.Int64 // transactions
}

func startWriters(db *pgtest.DB, seed uint64, count, rows int, pause time.Duration, synchronousCommit string) *writers {
	db.Exec(`create table item (id int primary key, rank int, version bigint not null, note text); create sequence version`)
	db.Exec(`insert into item select n, nullif(n * 7919 % 100, 0), nextval('version'), 'row ' || n from generate_series(1, $1::int) n`, rows)
	w := &writers{db: db, rows: rows, wait: synchronousCommit, stop: make(chan struct{})}
	for i := range count {
		w.all.Go(func() { w.write(rand.New(rand.NewPCG(seed, uint64(i))), i, count, pause) })
	}
	return w
}

func (w *writers) end() {
	close(w.stop)
	w.all.Wait()
}

func (w *writers) write(random *rand.Rand, me, count int, pause time.Duration) {
	ctx := context.Background()
	conn := w.db.Connect()
	if _, err := conn.Exec(ctx, `select set_config('synchronous_commit', $1, false)`, w.wait); err != nil {
		w.db.Errorf("set up: %v", err)
		return
	}
	key := func() int { return random.IntN(w.rows/count+20)*count + me + 1 }
	for {
		select {
		case <-w.stop:
			return
		case <-time.After(time.Duration(random.Int64N(int64(2 * pause)))):
		}
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			changes := 1 + random.IntN(4)
			if random.IntN(100) == 0 {
				changes = 300
			}
			for range changes {
				var sql string
				switch random.IntN(10) {
				case 0, 1:
					sql = fmt.Sprintf(`delete from item where id = %d`, key())
				case 2:
					to := key()
					sql = fmt.Sprintf(`update item set id = %d, version = nextval('version') where id = %d and not exists (select from item where id = %[1]d)`, to, key())
				case 3:
					sql = fmt.Sprintf(`savepoint a; update item set version = nextval('version'), note = 'gone' where id = %d; rollback to a`, key())
				case 4:
					sql = fmt.Sprintf(`savepoint a; update item set version = nextval('version'), rank = %d where id = %d; release a`, random.IntN(100), key())
				default:
					sql = fmt.Sprintf(`insert into item values (%d, %d, nextval('version'), 'new') on conflict (id) do update set version = nextval('version'), note = 'again'`,
						key(), random.IntN(100))
				}
				if _, err := tx.Exec(ctx, sql); err != nil {
					return err
				}
			}
			if random.IntN(20) == 0 {
				return errRollback
			}
			return nil
		})
		if err != nil && err != errRollback {
			w.db.Errorf("write: %v", err)
			return
		}
		w.n.Add(1)
	}
}

var errRollback = fmt.Errorf("rolled back on purpose")

// reader is a consumer's worker, and what it has had.
type reader struct {
	name     string
	isTotal  bool // its messages come in one order
	isAgain  bool // it asks for rows that it has had
	from     int  // its history begins with this key; -1: it has none
	messages []message
}

// read receives until there is nothing more, once done is closed.
func (r *reader) read(db *pgtest.DB, done <-chan struct{}) error {
	for {
		isDone := false
		select {
		case <-done:
			isDone = true
		default:
		}
		got, err := receive(context.Background(), db, r.name, 700, "100 ms")
		r.messages = append(r.messages, got...)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		if isDone && len(got) == 0 {
			return nil
		}
	}
}

type row struct {
	ID      int
	Rank    *int
	Version int64
}

// check folds what came, and compares it with the table.
func (r *reader) check(t *testing.T, table map[string]string) {
	t.Helper()
	now := map[string]string{}
	versions := map[string]int64{}
	seqs := map[int64]bool{}
	var last *row
	reads := 0
	for i, m := range r.messages {
		if seqs[m.Seq] {
			t.Errorf("%s: message %d came twice: %+v", r.name, i, m)
			return
		}
		seqs[m.Seq] = true
		if m.Action == "delete" {
			delete(now, m.Key)
			continue
		}
		var got row
		if err := json.Unmarshal([]byte(m.Record), &got); err != nil {
			t.Errorf("%s: %v", r.name, err)
			return
		}
		if v := versions[m.Key]; got.Version < v || got.Version == v && !(m.Action == "read" && r.isAgain) {
			t.Errorf("%s: message %d, %+v, came after version %d", r.name, i, m, v)
			return
		}
		versions[m.Key] = got.Version
		now[m.Key] = m.Record
		if m.Action != "read" {
			continue
		}
		reads++
		if r.isTotal && !r.isAgain {
			if reads != i+1 {
				t.Errorf("%s: message %d, %+v, is read, and comes after changes", r.name, i, m)
				return
			}
			if last != nil && !isBefore(*last, got) {
				t.Errorf("%s: message %d, %+v, comes after %+v", r.name, i, m, last)
				return
			}
			last = &got
		}
	}
	t.Logf("%s: %d messages, %d read", r.name, len(r.messages), reads)
	for key, record := range table {
		var want row
		if err := json.Unmarshal([]byte(record), &want); err != nil {
			t.Fatal(err)
		}
		if got, ok := now[key]; got != record && (ok || r.from == 0) {
			t.Errorf("%s: row %s is %q, and in the table %s", r.name, key, got, record)
			return
		}
	}
	for key, record := range now {
		if table[key] != record {
			t.Errorf("%s: row %s is %s, and in the table %q", r.name, key, record, table[key])
			return
		}
	}
}

// isBefore tells whether a row comes before another by rank, nulls last, and then id.
func isBefore(a, b row) bool {
	switch {
	case a.Rank == nil || b.Rank == nil:
		return a.Rank != nil || b.Rank == nil && a.ID < b.ID
	case *a.Rank != *b.Rank:
		return *a.Rank < *b.Rank
	}
	return a.ID < b.ID
}

// Whatever is written meanwhile, and however often the bridge is killed, what a consumer has had comes to what the table
// is; no row comes older than it came before; history comes first, and in order.
func TestBeside(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	t.Logf("seed %d", seed)
	rounds := pgtest.Rounds(t, 1)
	rows := 20_000
	if rounds > 1 {
		rows = 200_000
	}
	for round := range rounds {
		beside(t, seed+uint64(round), rows)
		if t.Failed() {
			t.Fatalf("seed %d", seed+uint64(round))
		}
	}
}

func beside(t *testing.T, seed uint64, rows int) {
	random := rand.New(rand.NewPCG(seed, 1000))
	db := pgtest.New(t)
	w := startWriters(db, seed, 3, rows, 3*time.Millisecond, "on")
	db.Exec(`select sequin.create_stream('s', '{item}'), sequin.create_stream('ranked', '{item}', sort_column => 'rank')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")

	all := []*reader{
		{name: "now", from: -1},
		{name: "again", from: -1, isAgain: true},
		{name: "again fed", from: -1, isAgain: true},
		{name: "beginning"},
		{name: "ranked", isTotal: true},
		{name: "grouped"},
		{name: "row", from: -1},
	}
	db.Exec(`select sequin.create_consumer('now', 's'), sequin.create_consumer('again', 's'),
		sequin.create_consumer('again fed', 's', actions => '{insert,update,delete,truncate}')`)
	var readers sync.WaitGroup
	done := make(chan struct{})
	start := func(r *reader) {
		readers.Go(func() {
			if err := r.read(db, done); err != nil {
				t.Error(err)
			}
		})
	}
	for _, r := range all[:3] {
		start(r)
	}
	pause := func() { time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond) } // a random moment is the point
	kill := func() {
		if random.IntN(2) == 0 {
			b.Kill()
			b = pgtest.BridgeProcess(t, db.URL)
		}
	}
	for _, step := range []struct {
		sql    string
		reader *reader
	}{
		{`select sequin.create_consumer('beginning', 's', start_at => 'beginning')`, all[3]},
		{`select sequin.backfill('again')::text`, nil},
		{`select sequin.create_consumer('ranked', 'ranked', group_by => '{}', start_at => 'beginning')`, all[4]},
		{`select sequin.create_consumer('grouped', 's', group_by => '{id}', start_at => 'beginning')`, all[5]},
		{`select sequin.backfill('again fed')::text`, nil},
		{fmt.Sprintf(`select sequin.create_consumer('row', 's', start_at => 'row', start_row => '%d')`, rows/2), all[6]},
		{`select sequin.backfill('again', '100')::text`, nil},
	} {
		pause()
		db.Exec(step.sql)
		if step.reader != nil {
			start(step.reader)
		}
		pause()
		kill()
	}
	for range 3 {
		pause()
		kill()
	}
	pgtest.Eventually(t, 3*time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.backfills where state <> 'done'`); n > 0 {
			return fmt.Errorf("%s; the bridge: %s", state(db), b.Log())
		}
		return nil
	})
	w.end()
	awaitCaughtUp(t, db)
	close(done)
	readers.Wait()
	wantNothingPending(t, db)
	awaitCleared(t, db)

	table := map[string]string{}
	for _, record := range pgtest.Column[string](db, `select to_jsonb(i)::text from item i`) {
		var r row
		if err := json.Unmarshal([]byte(record), &r); err != nil {
			t.Fatal(err)
		}
		table[fmt.Sprint(r.ID)] = record
	}
	t.Logf("%d transactions, %d rows, backfills: %s", w.n.Load(), len(table), state(db))
	all[1].from, all[2].from = 0, 0
	for _, r := range all {
		r.check(t, table)
	}
	// All that was asked for.
	had := map[string]bool{}
	for _, m := range all[6].messages {
		had[m.Key] = true
	}
	for key, record := range table {
		var r row
		if err := json.Unmarshal([]byte(record), &r); err != nil {
			t.Fatal(err)
		}
		if r.ID >= rows/2 && !had[key] {
			t.Errorf("row: %s is missing", record)
			break
		}
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// awaitCaughtUp waits until the log has all that is committed, and consumers have had it.
func awaitCaughtUp(t *testing.T, db *pgtest.DB) {
	t.Helper()
	awaitLogged(t, db)
	wantNothingPending(t, db)
}

// awaitLogged waits until the log has all that is committed.
func awaitLogged(t *testing.T, db *pgtest.DB) {
	t.Helper()
	db.Exec(`create table mark (id int primary key)`)
	db.Exec(`select sequin.create_stream('mark', '{mark}')`)
	db.Exec(`insert into mark values (1)`)
	pgtest.Eventually(t, time.Minute, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.messages where stream = 'mark')`) {
			return fmt.Errorf("the log has not come to the end")
		}
		return nil
	})
}
