package e2e

import (
	"fmt"
	"maps"
	"os"
	process "os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// A primary that crashes, and a standby that takes its place. From 17 on the slot is there, and nothing is lost or repeated.
// Before, it is not: that is a gap, named, and gone on from when it is accepted.
func TestFailover(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it takes a primary and a standby")
	}
	primary := pgtest.NewCluster(t, map[string]string{"hot_standby_feedback": "on"})
	db := pgtest.NewOn(t, primary)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}'); select sequin.create_consumer('c', 't')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (1)`)
	awaitKeys(t, db, "1")
	hasFailover := db.Major() >= 17
	if hasFailover && !pgtest.Value[bool](db, `select failover from pg_replication_slots where database = current_database()`) {
		t.Fatal("the slot is not taken along to standbys")
	}
	settings := map[string]string{}
	if hasFailover {
		settings["sync_replication_slots"] = "on"
	}
	standby := startReplica(t, db, primary, settings)
	replica := pgtest.Attach(t, standby, db.Name)
	if hasFailover {
		// The server sends nothing that the standby does not have; and where that is away, health() says what is waited for.
		db.Exec(`alter system set synchronized_standby_slots = 'standby'`)
		db.Exec(`select pg_reload_conf()`)
	}
	db.Exec(`insert into t values (2)`)
	awaitKeys(t, db, "1", "2")
	if hasFailover {
		next := 3
		pgtest.Eventually(t, 60*time.Second, func() error {
			db.Exec(`insert into t values ($1)`, next)
			next++
			time.Sleep(100 * time.Millisecond) // it is synchronized now and then
			if n := pgtest.Value[int](replica, `select count(*) from pg_replication_slots where synced and not temporary and invalidation_reason is null`); n != 1 {
				return fmt.Errorf("the slot is not on the standby")
			}
			return nil
		})
	}
	pgtest.Eventually(t, 30*time.Second, func() error {
		rows := pgtest.Value[int](db, `select count(*) from t`)
		if n := pgtest.Value[int](replica, `select count(*) from sequin.messages`); n != rows {
			return fmt.Errorf("the standby has %d messages of %d rows", n, rows)
		}
		return nil
	})
	before := pgtest.Column[string](db, `select record_pk from sequin.messages order by seq`)
	if err := primary.Stop(t.Context(), localpg.Immediate); err != nil {
		t.Fatal(err)
	}
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if !pgtest.Value[bool](replica, `select pg_promote(true, 60)`) {
		t.Fatal("the standby was not promoted")
	}
	replica.Exec(`insert into t values (1000)`)
	b = pgtest.BridgeProcess(t, replica.URL)
	if !hasFailover {
		b.AwaitLog("a failover has left it behind")
		awaitHealth(t, replica, "error gap in source local", "select sequin.accept_gap('local');")
		replica.Exec(`select sequin.accept_gap('local')`)
		b.AwaitLog("msg=capturing")
		replica.Exec(`insert into t values (1001)`)
		awaitKeys(t, replica, append(before, "1001")...)
		return
	}
	b.AwaitLog("the server was promoted, and has all that was captured")
	b.AwaitLog("msg=capturing")
	replica.Exec(`insert into t values (1001)`)
	awaitKeys(t, replica, append(before, "1000", "1001")...)
	if n := pgtest.Value[int](replica, `select count(*) from sequin.gap`); n != 0 {
		t.Errorf("%d gaps were recorded", n)
	}
	// What is captured and was never committed here, as far as this server knows: a log that was ahead of the standby.
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	replica.Exec(`update sequin.source set timeline = 1`)
	b = pgtest.BridgeProcess(t, replica.URL)
	b.AwaitLog("the server was promoted at ")
	b.AwaitLog("what the log has after that was never committed here")
	// A standby that is named, and away, holds everything back: health() says so.
	replica.Exec(`alter system set synchronized_standby_slots = 'standby'`)
	replica.Exec(`select pg_reload_conf()`)
	awaitHealth(t, replica, "nothing is sent to the bridge: standby slot standby, named in synchronized_standby_slots, does not exist")
}

// startReplica starts a hot standby of a server, which it stops and starts to be copied.
func startReplica(t *testing.T, db *pgtest.DB, primary *localpg.Cluster, settings map[string]string) *localpg.Cluster {
	t.Helper()
	db.Exec(`select pg_create_physical_replication_slot('standby', true)`)
	if err := primary.Stop(t.Context(), localpg.Fast); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	copyCluster(t, primary, dir)
	if err := primary.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{
		"primary_conninfo":     fmt.Sprintf("host=127.0.0.1 port=%d user=%s dbname=postgres", primary.Port(), localpg.User),
		"primary_slot_name":    "standby",
		"hot_standby_feedback": "on",
		"max_connections":      "300", "max_wal_senders": "50", "max_replication_slots": "50",
	}
	maps.Copy(all, settings)
	standby, err := localpg.Start(t.Context(), localpg.Config{Binaries: primary.Binaries(), Dir: dir, Settings: all, Log: pgtest.Discard()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = standby.Stop(t.Context(), localpg.Immediate) })
	return standby
}

// copyCluster copies a stopped server's directory, for a standby.
func copyCluster(t *testing.T, from *localpg.Cluster, dir string) {
	t.Helper()
	if out, err := process.Command("cp", "-a", filepath.Join(from.Dir(), "data"), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// A base backup takes no slots along.
	slots, err := filepath.Glob(filepath.Join(dir, "data", "pg_replslot", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range slots {
		if err := os.RemoveAll(s); err != nil {
			t.Fatal(err)
		}
	}
	// It is its owner's, as the directory has to be.
	if out, err := process.Command("chown", "--reference", filepath.Join(dir, "data"), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	signal := filepath.Join(dir, "data", "standby.signal")
	if err := os.WriteFile(signal, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "data", "postmaster.pid")); err == nil {
		t.Fatal("the server that is copied is running")
	}
}

// A standby is no place for a bridge: it says where to go.
func TestStandbyRefused(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it takes a primary and a standby")
	}
	primary := pgtest.NewCluster(t, nil)
	db := pgtest.NewOn(t, primary)
	if err := primary.Stop(t.Context(), localpg.Fast); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	copyCluster(t, primary, dir)
	standby, err := localpg.Start(t.Context(), localpg.Config{
		Binaries: primary.Binaries(), Dir: dir, Log: pgtest.Discard(),
		Settings: map[string]string{"max_connections": "300", "max_wal_senders": "50", "max_replication_slots": "50"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = standby.Stop(t.Context(), localpg.Immediate) })
	b := pgtest.BridgeProcess(t, standby.URL(db.Name))
	b.AwaitLog("the server is a standby, where the log cannot be written")
	if !strings.Contains(b.Log(), "Give the bridge the address of the primary.") {
		t.Errorf("it says %s", b.Log())
	}
}
