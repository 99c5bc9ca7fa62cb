package e2e

import (
	"fmt"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// How old what is not confirmed is: while the log cannot be written, and while no bridge is there.
func TestSourceLag(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, map[string]string{"fsync": "off"}))
	db.Exec(`create table t (id int primary key, filling text default repeat('x', 100)); select sequin.create_stream('t', '{t}');
		create table other (id int); insert into other values (0)`)
	await := func(what string) {
		t.Helper()
		pgtest.Eventually(t, time.Minute, func() error {
			if !pgtest.Value[bool](db, `select coalesce(`+what+`, false) from sequin.source_status`) {
				return fmt.Errorf("not %s: %s", what, pgtest.Value[string](db, `select s::text from sequin.source_status s`))
			}
			return nil
		})
	}
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t select generate_series(1, 1000)`)
	await(`lag_seconds = 0`)
	// Nothing else happens: a little that is not streamed, and was noted, does not grow old.
	await(`lag_bytes < 8192`)
	db.Exec(`insert into other values (1)`)
	db.Exec(`insert into sequin.source_sample (source_id, current_lsn, confirmed_lsn, restart_lsn)
		select s.id, pg_current_wal_lsn(), r.confirmed_flush_lsn, r.restart_lsn
		from sequin.source s join pg_replication_slots r on r.slot_name = s.slot_name`)
	noted := time.Now()
	await(`lag_seconds = 0`)
	if d := time.Since(noted); d > 45*time.Second {
		t.Errorf("it was on its way for %s", d) // until there was enough to write about
	}

	holder := db.Connect()
	if _, err := holder.Exec(t.Context(), `begin; lock table sequin.progress in exclusive mode`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`insert into t select generate_series(1001, 2000)`)
	await(`lag_seconds > 3`)
	if _, err := holder.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	await(`lag_seconds = 0`)

	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	db.Exec(`insert into t values (0)`)
	await(`state = 'no bridge' and lag_bytes > 0 and lag_seconds > 1`)
}
