package backfill

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// A transaction that is being read when the log is cut goes before the cut, and its end may be long in coming. It is
// waited for: what a consumer had not read before the history, it would never read.
func TestTransactionAtTheCut(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, n int); insert into item select n, 0 from generate_series(1, 1000) n;
		create table bulk (id int primary key);
		select sequin.create_stream('s', '{item}'), sequin.create_stream('bulk', '{bulk}');
		select sequin.create_consumer('c', 's')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`update item set n = 1 where id = 1`)
	drain(t, db, "c", 1)

	tellBooks(t, db)
	release := holdCut(t, db, func() { db.Exec(`select sequin.backfill('c')`) })
	db.Exec(`with d as (delete from item where id between 501 and 600) insert into bulk select n from generate_series(1, 400000) n`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from pg_stat_activity where query like 'begin; copy sequin.log_%' and state = 'active')`) {
			return errors.New("the transaction is not read")
		}
		return nil
	})
	release()

	r := &reader{name: "c"}
	done := make(chan struct{})
	var reading sync.WaitGroup
	reading.Go(func() {
		if err := r.read(db, done); err != nil {
			t.Error(err)
		}
	})
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.backfills where state <> 'done'`); n > 0 {
			return fmt.Errorf("%s", state(db))
		}
		if !pgtest.Value[bool](db, `select count(*) = 400000 from sequin.messages where stream = 'bulk'`) {
			return errors.New("the log has not come to the end")
		}
		if n := pgtest.Value[int](db, `select pending from sequin.consumer_status where name = 'c'`); n > 0 {
			return fmt.Errorf("%d messages are pending", n)
		}
		return nil
	})
	close(done)
	reading.Wait()
	var deleted []string
	for _, m := range r.messages {
		if m.Action == "delete" {
			deleted = append(deleted, m.Key)
		}
	}
	slices.Sort(deleted)
	if len(slices.Compact(deleted)) != 100 || len(r.messages) < 1000 {
		t.Errorf("of %d messages %d are the deletes of rows that the consumer had, want 100", len(r.messages), len(deleted))
	}
}

// holdCut asks for a backfill, waits until it has begun, and keeps the log from being cut for it until it is released:
// its place was read by then. Two connections hold the lock that a new segment waits for in turn, each waiting in line
// behind the bridge before the other lets go: the bridge gets it once a turn, whatever for.
func holdCut(t *testing.T, db *pgtest.DB, ask func()) (release func()) {
	t.Helper()
	holder, next := db.Connect(), db.Connect()
	run := func(conn *pgx.Conn, sql string) {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
	lock := func(conn *pgx.Conn) { run(conn, `begin; lock table sequin.log_segment in row exclusive mode`) }
	await := func(what, lock string, args ...any) {
		pgtest.Eventually(t, 30*time.Second, func() error {
			if !pgtest.Value[bool](db, `select exists (select from pg_locks where relation = 'sequin.log_segment'::regclass and `+lock+`)`, args...) {
				return errors.New(what)
			}
			return nil
		})
	}
	lock(holder)
	ask()
	for range 100 {
		await("the bridge asks for no segment", `mode = 'ShareRowExclusiveLock' and not granted`)
		if pgtest.Value[bool](db, `select exists (select from sequin.backfills where state = 'running')`) {
			return func() { run(holder, `commit`) }
		}
		var locking sync.WaitGroup
		locking.Go(func() { lock(next) })
		await("the next holder of the lock is not in line", `mode = 'RowExclusiveLock' and pid = $1`, next.PgConn().PID())
		run(holder, `commit`)
		locking.Wait()
		holder, next = next, holder
	}
	t.Fatal("the backfill did not begin while its lock was waited for")
	return nil
}
