package sources

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// One bridge captures the database and two others at once, one of them on another server. It finds them by itself.
func TestCapture(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	home, neighbour := pgtest.New(t), pgtest.Empty(t)
	abroad := pgtest.EmptyOn(t, pgtest.NewCluster(t, nil))
	b := pgtest.BridgeProcess(t, home.URL)
	b.AwaitLog("msg=capturing")
	createSource(home, "neighbour", neighbour.URL)
	createSource(home, "abroad", abroad.URL)
	audits := []*pgtest.Audit{
		pgtest.NewAudit(home, seed), pgtest.NewFarAudit(home, neighbour, "neighbour", seed), pgtest.NewFarAudit(home, abroad, "abroad", seed),
	}
	for _, a := range audits {
		a.Start(2, time.Millisecond)
	}
	awaitCommits(t, 100, audits...)
	// Killed, it goes on with each where that was.
	b.Kill()
	b = pgtest.BridgeProcess(t, home.URL)
	awaitCommits(t, 200, audits...)
	for _, a := range audits {
		a.Stop()
	}
	for _, a := range audits {
		a.Check(t, 30*time.Second)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
	if states := pgtest.Column[string](home, `select state from sequin.sources order by name`); fmt.Sprint(states) != "[ok ok ok]" {
		t.Errorf("sources are %v", states)
	}
}

// What is noted of a source that is caught up, and where nothing happens any more, does not grow old.
func TestIdleLag(t *testing.T) {
	t.Parallel()
	home, far := pgtest.New(t), pgtest.EmptyOn(t, pgtest.NewCluster(t, nil))
	createSource(home, "far", far.URL)
	pgtest.StartBridge(t, home.URL)
	awaitHealth(t, home, "source far | ok", "slot sequin_")
	far.Exec(`create table other (id int)`)
	home.Exec(`insert into sequin.source_sample (source_id, current_lsn, confirmed_lsn, restart_lsn)
		select s.id, $1::pg_lsn, p.applied_lsn, p.applied_lsn from sequin.source s
		cross join lateral (select * from sequin.progress p where p.source_id = s.id order by p.step desc limit 1) p where s.name = 'far'`,
		pgtest.Value[string](far, `select pg_current_wal_lsn()::text`))
	pgtest.Eventually(t, 40*time.Second, func() error {
		if lag := pgtest.Value[*float64](home, `select lag_seconds from sequin.source_status where name = 'far'`); lag == nil || *lag != 0 {
			return fmt.Errorf("it lags: %s", pgtest.Value[string](home, `select s::text from sequin.source_status s where name = 'far'`))
		}
		return nil
	})
}

func createSource(home *pgtest.DB, name, conninfo string) {
	home.Helper()
	home.Exec(`select sequin.create_source($1, $2)`, name, conninfo)
}

// awaitCommits waits until each has had so many.
func awaitCommits(t *testing.T, count int64, audits ...*pgtest.Audit) {
	t.Helper()
	pgtest.Eventually(t, 60*time.Second, func() error {
		for _, a := range audits {
			if n := a.Commits.Load(); n < count {
				return fmt.Errorf("%d commits so far", n)
			}
		}
		return nil
	})
}

// health returns what health() says, a line each.
func health(db *pgtest.DB) string {
	db.Helper()
	return strings.Join(pgtest.Column[string](db, `select concat_ws(' | ', name, status, detail, hint) from sequin.health()`), "\n")
}

// awaitHealth waits until health() says all of this.
func awaitHealth(t *testing.T, db *pgtest.DB, wants ...string) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		rows, err := db.Pool.Query(context.Background(), `select 1`)
		if err != nil {
			return err
		}
		rows.Close()
		all := health(db)
		for _, want := range wants {
			if !strings.Contains(all, want) {
				return fmt.Errorf("health() does not say %q:\n%s", want, all)
			}
		}
		return nil
	})
}
