package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// A second bridge stands by, and takes over from one that is killed, with nothing lost and nothing twice.
func TestStandby(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	audit := pgtest.NewAudit(db, pgtest.Seed(t))
	first := pgtest.BridgeProcess(t, db.URL)
	first.AwaitLog("msg=capturing")
	second := pgtest.BridgeProcess(t, db.URL)
	second.AwaitLog("standing by")
	audit.Start(2, time.Millisecond)
	pgtest.Eventually(t, 10*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.log`); n < 100 {
			return fmt.Errorf("%d changes so far", n)
		}
		return nil
	})
	first.Kill()
	began := time.Now()
	second.AwaitLog("msg=capturing")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the second bridge took over after %s", took)
	}
	audit.Stop()
	audit.Check(t, 30*time.Second)
}

// A bridge that is told to stop confirms what it has written, and exits with 0: the next has nothing to repeat.
func TestStop(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t select generate_series(1, 1000)`)
	awaitLog(t, db, 1000)
	if err := b.Stop(); err != nil {
		t.Fatalf("the bridge ended with %v: %s", err, b.Log())
	}
	confirmed := pgtest.Value[string](db, `select confirmed_flush_lsn::text from pg_replication_slots where database = current_database()`)
	applied := pgtest.Value[string](db, `select applied_lsn::text from sequin.progress order by step desc limit 1`)
	if lsn(t, confirmed) < lsn(t, applied) {
		t.Errorf("the slot is confirmed up to %s, the log has %s", confirmed, applied)
	}
}

// A bridge does not keep a server from being stopped.
func TestServerStop(t *testing.T) {
	t.Parallel()
	c := pgtest.NewCluster(t, nil)
	db := pgtest.NewOn(t, c)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t select generate_series(1, 1000)`)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := c.Stop(ctx, localpg.Fast); err != nil {
		t.Fatalf("%v; the bridge: %s", err, b.Log())
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitLog(t, db, 1000)
}

// What the server writes elsewhere does not pile up: the slot follows, though nothing of it is captured.
func TestSlotFollowsNeighbour(t *testing.T) {
	t.Parallel()
	c := pgtest.NewCluster(t, nil)
	db := pgtest.NewOn(t, c)
	neighbour := pgtest.NewOn(t, c)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	neighbour.Exec(`create table busy as select generate_series(1, 100000) as n`)
	written := pgtest.Value[string](neighbour, `select pg_current_wal_lsn()::text`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		confirmed := pgtest.Value[string](db, `select confirmed_flush_lsn::text from pg_replication_slots where database = current_database()`)
		if lsn(t, confirmed) < lsn(t, written) {
			return fmt.Errorf("the slot is confirmed up to %s of %s", confirmed, written)
		}
		return nil
	})
	// And that is no reason for the next bridge to think that something was lost.
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	b = pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (1)`)
	awaitLog(t, db, 1)
}

// While the log cannot be written, for longer than the server waits for a reader that says nothing, the bridge goes on being
// heard, and confirms nothing that the log has not, however far the server is.
func TestSlowLog(t *testing.T) {
	t.Parallel()
	const patience = 5 * time.Second
	c := pgtest.NewCluster(t, map[string]string{"wal_sender_timeout": fmt.Sprintf("%dms", patience.Milliseconds())})
	db := pgtest.NewOn(t, c)
	neighbour := pgtest.NewOn(t, c)
	db.Exec(`create table t (id int primary key, a text); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	tx, err := db.Connect().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `lock table sequin.log in exclusive mode`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`insert into t values (-1)`)
	first := pgtest.Value[string](db, `select pg_current_wal_insert_lsn()::text`)
	db.Exec(`insert into t select i, repeat('x', 200) from generate_series(1, 100000) i`)
	for began := time.Now(); time.Since(began) < 2*patience; {
		neighbour.Exec(`create table busy as select generate_series(1, 10000) as n; drop table busy`)
		time.Sleep(patience / 10) // being kept from writing for so long is the point
		confirmed := pgtest.Value[string](db, `select confirmed_flush_lsn::text from pg_replication_slots where database = current_database()`)
		if lsn(t, confirmed) >= lsn(t, first) {
			t.Fatalf("the slot is confirmed up to %s, and the log does not have what was committed before %s", confirmed, first)
		}
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitLog(t, db, 100001)
	if n := strings.Count(b.Log(), "msg=capturing"); n != 1 {
		t.Errorf("it was interrupted: %s", b.Log())
	}
}

// A large transaction of which nothing is streamed, through which servers before 15 go without a word, is no reason to give up.
func TestNothingStreamed(t *testing.T) {
	t.Parallel()
	c := pgtest.NewCluster(t, map[string]string{"wal_sender_timeout": "1s"})
	db := pgtest.NewOn(t, c)
	db.Exec(`create table t (id int primary key); create table other (id int primary key, a text); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into other select i, repeat('x', 100) from generate_series(1, 600000) i`)
	db.Exec(`insert into t values (1)`)
	awaitLog(t, db, 1)
	if bad := pgtest.Column[string](db, `select name || ' ' || detail from sequin.health() where status = 'error'`); len(bad) > 0 {
		t.Errorf("health() says %q", bad)
	}
}

// An idle bridge writes next to nothing: less than 64 kB of WAL a minute.
func TestIdle(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it takes a minute")
	}
	c := pgtest.NewCluster(t, map[string]string{"autovacuum": "off"}) // what that writes is not the bridge's
	db := pgtest.NewOn(t, c)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}'); select sequin.create_consumer('c', 't')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (1)`)
	if n := len(pgtest.Column[int64](db, `select seq from sequin.pop('c', 10, '10s')`)); n != 1 {
		t.Fatalf("got %d messages", n)
	}
	db.Exec(`checkpoint`)
	// What the insert has left to do is done soon.
	const span = 30 * time.Second
	for left := 4; ; left-- {
		before := pgtest.Value[string](db, `select pg_current_wal_insert_lsn()::text`)
		time.Sleep(span) // nothing happens is what is waited for
		after := pgtest.Value[string](db, `select pg_current_wal_insert_lsn()::text`)
		perMinute := int64(lsn(t, after)-lsn(t, before)) * int64(time.Minute/span)
		t.Logf("%d bytes of WAL a minute", perMinute)
		if perMinute < 64<<10 {
			return
		}
		if left == 0 {
			t.Fatalf("an idle bridge has the server write %d bytes of WAL a minute", perMinute)
		}
	}
}

// Start-up refuses what would be a loss that nobody sees, says so, and goes on when it is accepted.
func TestSlotDropped(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (1)`)
	awaitLog(t, db, 1)
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	dropSlot(t, db)
	db.Exec(`insert into t values (2)`)
	b = pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("does not exist any more")
	pgtest.Eventually(t, 10*time.Second, func() error {
		all := strings.Join(pgtest.Column[string](db, `select status || ' ' || name || ' ' || detail || ' ' || coalesce(hint, '') from sequin.health()`), "\n")
		for _, want := range []string{"error source local", "error gap in source local", "sequin.accept_gap('local')"} {
			if !strings.Contains(all, want) {
				return fmt.Errorf("health() does not say %q:\n%s", want, all)
			}
		}
		return nil
	})
	db.Exec(`select sequin.accept_gap('local')`)
	b.AwaitLog("going on after a gap")
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (3)`)
	awaitLog(t, db, 2)
	if got := pgtest.Column[string](db, `select record_pk from sequin.messages order by seq`); fmt.Sprint(got) != "[1 3]" {
		t.Errorf("the log has %v", got)
	}
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status = 'error'`); n != 0 {
		t.Errorf("%d errors are left in health()", n)
	}
}

func TestSlotMadeAnew(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (1)`)
	awaitLog(t, db, 1)
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	name := pgtest.Value[string](db, `select slot_name::text from pg_replication_slots where database = current_database()`)
	dropSlot(t, db)
	db.Exec(`insert into t values (2)`)
	db.Exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, name)
	b = pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("it was made anew, or moved by another")
}

// A bridge without a schema, or with another's, says which to bring up.
func TestSchemaMissing(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	b := pgtest.BridgeProcess(t, db.URL)
	if err := b.Exited(10 * time.Second); err == nil || !strings.Contains(b.Log(), "run sequin migrate") {
		t.Errorf("it ended with %v: %s", err, b.Log())
	}
}

// dropSlot drops the slot, once the bridge that has ended has let go of it.
func dropSlot(t *testing.T, db *pgtest.DB) {
	t.Helper()
	pgtest.Eventually(t, 10*time.Second, func() error {
		tag, err := db.Pool.Exec(context.Background(), `select pg_drop_replication_slot(slot_name) from pg_replication_slots
			where database = current_database() and not active`)
		if err == nil && tag.RowsAffected() != 1 {
			err = fmt.Errorf("%d slots were dropped", tag.RowsAffected())
		}
		return err
	})
}

func awaitLog(t *testing.T, db *pgtest.DB, count int) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		var n int
		err := db.Pool.QueryRow(context.Background(), `select count(*) from sequin.log`).Scan(&n)
		if err == nil && n != count {
			err = fmt.Errorf("the log has %d changes, not %d", n, count)
		}
		return err
	})
}

func lsn(t *testing.T, text string) pglogrepl.LSN {
	t.Helper()
	n, err := pglogrepl.ParseLSN(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
