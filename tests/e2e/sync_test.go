package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// synced is a row of sync.
type synced struct {
	Cursor          string
	Seq             int64
	Action, Schema  string
	Table           string
	PK              *string
	Record, Changes map[string]any
	CommittedAt     *time.Time
}

// syncCall reads a page.
func syncCall(ctx context.Context, conn *pgx.Conn, stream string, cursor *string, batch int, wait string) ([]synced, error) {
	rows, err := conn.Query(ctx, `select cursor, seq, action, table_schema, table_name, record_pk, record, changes, committed_at
		from sequin.sync($1, $2, $3, $4::text::interval)`, stream, cursor, batch, wait)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[synced])
}

// syncer is a client of sync: what it has read, folded.
type syncer struct {
	t      testing.TB
	stream string
	cursor *string
	rows   map[string]map[string]any // by table and record_pk
	seq    int64
	reads  int
	isLive bool
	newest map[string]float64 // the highest step of each
}

func newSyncer(t testing.TB, stream string) *syncer {
	return &syncer{t: t, stream: stream, rows: map[string]map[string]any{}, newest: map[string]float64{}}
}

func (s *syncer) clone() *syncer {
	c := *s
	c.rows, c.newest = map[string]map[string]any{}, map[string]float64{}
	for k, v := range s.rows {
		c.rows[k] = v
	}
	for k, v := range s.newest {
		c.newest[k] = v
	}
	return &c
}

// page reads a page and folds it. How many rows.
func (s *syncer) page(conn *pgx.Conn, batch int, wait string) int {
	s.t.Helper()
	got, err := syncCall(context.Background(), conn, s.stream, s.cursor, batch, wait)
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.SerializationFailure {
		return 1 // there is more, only not yet
	}
	if err != nil {
		s.t.Fatalf("sync: %v", err)
	}
	for _, m := range got {
		s.fold(m)
	}
	return len(got)
}

func (s *syncer) fold(m synced) {
	s.t.Helper()
	switch {
	case m.Seq < s.seq || s.isLive && m.Seq == s.seq:
		s.t.Fatalf("seq %d came after %d", m.Seq, s.seq)
	case m.Action == "read" && s.isLive:
		s.t.Fatalf("a row of the table came after the log")
	case m.Action == "read":
		s.reads++
	default:
		s.isLive = true
	}
	s.seq, s.cursor = m.Seq, &m.Cursor
	if m.Action == "truncate" {
		for k := range s.rows {
			if strings.HasPrefix(k, m.Table+" ") {
				delete(s.rows, k)
			}
		}
		return
	}
	key := m.Table + " " + *m.PK
	if step, ok := m.Record["step"].(float64); ok && m.Action != "delete" {
		if step < s.newest[key] {
			s.t.Fatalf("step %v of %s came after %v: %+v", step, key, s.newest[key], m)
		}
		s.newest[key] = step
	}
	if m.Action == "delete" {
		delete(s.rows, key)
	} else {
		s.rows[key] = m.Record
	}
}

// wantTable checks that what was read is what is in these tables.
func (s *syncer) wantTable(db *pgtest.DB, tables map[string]string) {
	s.t.Helper()
	count := 0
	for table, key := range tables {
		rows, err := db.Pool.Query(context.Background(), fmt.Sprintf(`select %s, to_jsonb(t) from %s t`, key, table))
		if err != nil {
			s.t.Fatal(err)
		}
		var pk string
		var record map[string]any
		_, err = pgx.ForEachRow(rows, []any{&pk, &record}, func() error {
			count++
			got, ok := s.rows[strings.Trim(table, `"`)+" "+pk]
			if !ok {
				return fmt.Errorf("row %s of %s is missing", pk, table)
			}
			if fmt.Sprint(got) != fmt.Sprint(record) {
				return fmt.Errorf("row %s of %s is %v, want %v", pk, table, got, record)
			}
			record = nil
			return nil
		})
		if err != nil {
			s.t.Error(err)
		}
	}
	if count != len(s.rows) {
		s.t.Errorf("%d rows were read, %d are there", len(s.rows), count)
	}
}

// Two clients read a table that moves, from its first row to its end; one of them starts again half way, from a cursor
// that it had before. Both have the table at rest.
func TestSync(t *testing.T) {
	seed := pgtest.Seed(t)
	for round := range pgtest.Rounds(t, 1) {
		seed := seed + uint64(round)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { testSync(t, seed) })
	}
}

func testSync(t *testing.T, seed uint64) {
	t.Parallel()
	count := 100_000
	if os.Getenv("SEQUIN_ROUNDS") != "" {
		count = 1_000_000
	}
	random := rand.New(rand.NewPCG(seed, 0))
	sort := []string{"null", "'at'"}[random.IntN(2)]
	mode := []string{"rows", "changes"}[random.IntN(2)]
	t.Logf("seed %d: mode %s, sort_column %s", seed, mode, sort)
	db := pgtest.New(t)
	db.Exec(`create table moving (id int primary key, step int not null, at int, note text); create index on moving (at, id)`)
	db.Exec(`insert into moving select n, 0, nullif(n * 7919 % 1000, 0), repeat('x', n % 50) from generate_series(1, $1::int) n`, count)
	db.Exec(`analyze moving`)
	if mode == "changes" {
		db.Exec(`alter table moving replica identity full`)
	}
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_stream('s', '{moving}', mode => $1, sort_column => `+sort+`)`, mode)

	// Each writer has rows of its own, and numbers its transactions.
	const writers = 4
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var running sync.WaitGroup
	for w := range writers {
		random := rand.New(rand.NewPCG(seed, uint64(w+1)))
		conn := db.Connect()
		running.Go(func() {
			for step := 1; ctx.Err() == nil; step++ {
				if err := moveRows(conn, random, count, writers, w, step); err != nil {
					t.Errorf("writer: %v", err)
					return
				}
				time.Sleep(time.Duration(random.Int64N(int64(4 * time.Millisecond)))) // so many a second
			}
		})
	}
	var readers sync.WaitGroup
	done := make(chan struct{})
	var clients [2]*syncer
	for i := range clients {
		random := rand.New(rand.NewPCG(seed, uint64(100+i)))
		clients[i] = newSyncer(t, "s")
		readers.Go(func() {
			conn := db.Connect()
			s := clients[i]
			var kept *syncer
			for isLast := false; ; {
				select {
				case <-done:
					isLast = true
				default:
				}
				if s.page(conn, 1+random.IntN(4000), "100 ms") == 0 && isLast {
					break
				}
				if i == 1 && kept == nil && s.reads > count/3 {
					kept = s.clone()
				} else if i == 1 && kept != nil && s.reads > count/2 && s != kept {
					s, conn = kept, db.Connect()
					clients[i] = s
				}
				if i == 0 && s.isLive && ctx.Err() == nil {
					cancel() // it has been all over the table
				}
			}
		})
	}
	running.Wait()
	awaitRow(t, db, "moving", -1)
	close(done)
	readers.Wait()
	for i, s := range clients {
		t.Logf("client %d: %d rows of the table, up to seq %d", i, s.reads, s.seq)
		if s.reads < count/2 {
			t.Errorf("client %d read %d rows of the table only", i, s.reads)
		}
		s.wantTable(db, map[string]string{"moving": "id::text"})
	}
}

// awaitRow inserts a row, and waits until it is in the log.
func awaitRow(t *testing.T, db *pgtest.DB, table string, id int) {
	t.Helper()
	db.Exec(fmt.Sprintf(`insert into %s values (%d, 0)`, table, id))
	pgtest.Eventually(t, 60*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.messages where stream = 's' and record_pk = $1)`, fmt.Sprint(id)) {
			return fmt.Errorf("the last row is not in the log")
		}
		return nil
	})
}

// moveRows is a transaction of a writer.
func moveRows(conn *pgx.Conn, random *rand.Rand, count, writers, writer, step int) error {
	ctx := context.Background()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after the commit it does nothing
	key := func() int { return random.IntN(count*11/10/writers)*writers + writer }
	for range 1 + random.IntN(5) {
		id := key()
		switch random.IntN(10) {
		case 0, 1:
			_, err = tx.Exec(ctx, `delete from moving where id = $1`, id)
		case 2:
			_, err = tx.Exec(ctx, `update moving set id = $2, step = $3 where id = $1 and not exists (select from moving where id = $2)`, id, key(), step)
		case 3:
			_, err = tx.Exec(ctx, fmt.Sprintf(`savepoint s; delete from moving where id = %d; rollback to s`, id))
		case 4:
			_, err = tx.Exec(ctx, fmt.Sprintf(`savepoint s; update moving set step = %d, at = null where id = %d; release s`, step, id))
		default:
			_, err = tx.Exec(ctx, `insert into moving values ($1, $2, $3, $4) on conflict (id) do update set step = excluded.step, at = excluded.at`,
				id, step, random.IntN(1000), "y")
		}
		if err != nil {
			return err
		}
	}
	if random.IntN(20) == 0 {
		return tx.Rollback(ctx)
	}
	return tx.Commit(ctx)
}
