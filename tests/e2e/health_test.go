package e2e

import (
	"fmt"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// What is about to lose changes, or makes users' own statements fail, is in health() with the statement that mends it.
func TestCaptureHealth(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); create table u (id int primary key); create table p (id int primary key) partition by range (id);
		select sequin.create_stream('t', '{t}'), sequin.create_stream('u', '{u}')`)
	writer := db.Connect()
	if _, err := writer.Exec(t.Context(), `begin; insert into t values (-1)`); err != nil {
		t.Fatal(err)
	}
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("creating the slot waits for transactions that were open before it")
	awaitHealth(t, db, "error source local creating the slot waits for transactions that were open before it: process ", "It goes on by itself")
	if _, err := writer.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	b.AwaitLog("msg=capturing")
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status <> 'ok'`); n != 0 {
		t.Errorf("not well: %q", pgtest.Column[string](db, `select concat_ws(' ', status, name, detail) from sequin.health() where status <> 'ok'`))
	}
	db.Exec(`alter table t drop constraint t_pkey`)
	awaitHealth(t, db, "error table public.t the table has no primary key or replica identity any more: its updates and deletes fail",
		"alter table public.t add primary key")
	// A table that belongs to another is captured as before, until that one is published.
	db.Exec(`alter table t replica identity full; create table below partition of p for values from (0) to (100) partition by range (id);
		alter table below attach partition u for values from (0) to (100)`)
	if got := pgtest.Column[string](db, `select detail from sequin.health() where name like 'table%'`); len(got) > 0 {
		t.Errorf("health() says %q", got)
	}
	db.Exec(`insert into u values (1)`)
	awaitMessages(t, db, "u", `insert u 1 {"id": 1} -`)
	db.Exec(`alter table u replica identity nothing`)
	awaitHealth(t, db, "error table public.u the table has no primary key or replica identity any more: its updates and deletes fail")
	db.Exec(`alter table u replica identity default`)
	if db.Major() >= 13 {
		db.Exec(`select sequin.create_stream('p', '{p}')`)
		db.Exec(`insert into u values (2)`)
		awaitMessages(t, db, "p", `insert p 2 {"id": 2} -`)
		awaitHealth(t, db, "error table public.u the table is a partition of public.p now: its changes come under that table Stream public.p instead.")
	}
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	db.Exec(`drop publication sequin`)
	awaitHealth(t, db, `error publication sequin publication "sequin" was dropped: changes since are lost`)
}

// A transaction that stays open has the server keep WAL that has been read long ago: capture goes on, and health() names who
// it is. When it ends, the WAL goes.
func TestRestartHeldBack(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, map[string]string{"fsync": "off", "wal_init_zero": "off"}))
	db.Exec(`create table t (id int generated always as identity primary key); create table other (id int)`)
	db.Exec(`select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	holder := db.Connect()
	if _, err := holder.Exec(t.Context(), `begin; insert into other values (1)`); err != nil {
		t.Fatal(err)
	}
	const segments = 70 // of 16 MB: more than 1 GB
	for range segments {
		db.Exec(`insert into t default values`)
		db.Exec(`select pg_switch_wal()`)
	}
	pgtest.Eventually(t, time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n != segments {
			return fmt.Errorf("%d of %d are captured", n, segments)
		}
		return nil
	})
	slot := pgtest.Value[string](db, `select slot_name from pg_replication_slots`)
	awaitHealth(t, db, "warning slot "+slot+" restart ", fmt.Sprintf("End the oldest: process %d (database %s)", holder.PgConn().PID(), db.Name))
	const status = `select lag_bytes < 100000000 and retained_bytes > 1000000000 from sequin.source_status`
	if !pgtest.Value[bool](db, status) {
		t.Errorf("source_status says %s", pgtest.Value[string](db, `select s::text from sequin.source_status s`))
	}

	if _, err := holder.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	pgtest.Eventually(t, time.Minute, func() error {
		// With what is running, which is how a slot learns that nothing is.
		db.Exec(`checkpoint`)
		if left := pgtest.Column[string](db, `select concat_ws(' ', status, name, detail) from sequin.health() where status <> 'ok'`); len(left) > 0 {
			return fmt.Errorf("not well: %q", left)
		}
		return nil
	})
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

func TestNeededMinor(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if got := pgtest.Value[string](db, `select string_agg(sequin._needed_minor(m)::text, ',' order by m) from generate_series(12, 18) m`); got != "0,21,18,14,10,6,0" {
		t.Errorf("got %s: sequin doctor has the same", got)
	}
}
