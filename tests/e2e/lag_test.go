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
	db.Exec(`create table t (id int primary key, filling text default repeat('x', 100)); select sequin.create_stream('t', '{t}')`)
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
