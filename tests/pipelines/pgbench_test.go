package pipelines

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// findPgbench returns a pgbench: the server's own, or that of another major version, which does as well.
func findPgbench(t *testing.T) string {
	t.Helper()
	dirs := []string{pgtest.Binaries(t).Dir}
	if b, err := localpg.Find(0); err == nil {
		dirs = append(dirs, b.Dir)
	}
	for _, dir := range dirs {
		if path, err := exec.LookPath(filepath.Join(dir, "pgbench")); err == nil {
			return path
		}
	}
	path, err := exec.LookPath("pgbench")
	if err != nil {
		t.Skip("there is no pgbench here")
	}
	return path
}

// pgbench's own TPC-B, with a pipeline on each of its tables and the bridge killed all the while: the events are what the tables
// have become.
//
// SEQUIN_ROUNDS asks for the long form: scale 10, and so many rounds of five seconds, each of which ends with a kill.
func TestPgbench(t *testing.T) {
	t.Parallel()
	pgbench := findPgbench(t)
	rounds, scale, every := pgtest.Rounds(t, 5), 1, time.Second
	if os.Getenv("SEQUIN_ROUNDS") != "" {
		scale, every = 10, 5*time.Second
	}
	c := pgtest.NewCluster(t, nil)
	db := pgtest.NewOn(t, c)
	u, err := url.Parse(db.URL)
	if err != nil {
		t.Fatal(err)
	}
	command := func(args ...string) *exec.Cmd {
		return exec.Command(pgbench, append(args, "--host", u.Hostname(), "--port", u.Port(), "--username", u.User.Username(), db.Name)...)
	}
	if out, err := command("--initialize", "--quiet", fmt.Sprintf("--scale=%d", scale)).CombinedOutput(); err != nil {
		t.Fatalf("pgbench: %v: %s", err, out)
	}
	for _, table := range []string{"accounts", "branches", "tellers", "history"} {
		db.Exec(fmt.Sprintf(`alter table pgbench_%s replica identity full`, table))
		db.Exec(fmt.Sprintf(`select sequin.create_pipeline('%s', 'pgbench_%[1]s', '%[1]s_events')`, table))
	}
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	done := make(chan error, 1)
	run := command("--client=8", "--jobs=2", "--no-vacuum", fmt.Sprintf("--time=%d", int((time.Duration(rounds)*every).Seconds())))
	go func() {
		out, err := run.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("pgbench: %w: %s", err, out)
		}
		done <- err
	}()
	kills := 0
	for isRunning := true; isRunning; {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			isRunning = false
		case <-time.After(every):
			b.Kill()
			b = pgtest.BridgeProcess(t, db.URL)
			kills++
		}
	}
	transactions := pgtest.Value[int](db, `select count(*) from pgbench_history`)
	pgtest.Eventually(t, 2*time.Minute, func() error {
		if got := pgtest.Value[string](db, `select string_agg(name || ' ' || rows_written || ' ' || pending, ', ' order by name) from sequin.pipeline_status`); got !=
			fmt.Sprintf("accounts %d 0, branches %[1]d 0, history %[1]d 0, tellers %[1]d 0", transactions) {
			return fmt.Errorf("got %s, and there are %d transactions", got, transactions)
		}
		return nil
	})
	t.Logf("%d transactions, the bridge killed %d times", transactions, kills)
	for _, check := range []struct{ name, sql string }{
		{"history's events are its rows", `select (select count(*) from history_events) = count(*) from pgbench_history`},
		{"history's deltas are the balance", `select (select sum((record ->> 'delta')::bigint) from history_events) = sum(bbalance) from pgbench_branches`},
		{
			"account by account, the events' deltas are its balance",
			`select not exists (
			   select from pgbench_accounts a
			   full join (
			     select (record ->> 'aid')::int as aid, sum((record ->> 'abalance')::bigint - coalesce(changes ->> 'abalance', record ->> 'abalance')::bigint) as delta
			     from accounts_events where action = 'update' group by 1) e using (aid)
			   where coalesce(e.delta, 0) <> a.abalance or a.aid is null)`,
		},
		{
			"teller by teller",
			`select not exists (
			   select from pgbench_tellers a
			   full join (
			     select (record ->> 'tid')::int as tid, sum((record ->> 'tbalance')::bigint - coalesce(changes ->> 'tbalance', record ->> 'tbalance')::bigint) as delta
			     from tellers_events where action = 'update' group by 1) e using (tid)
			   where coalesce(e.delta, 0) <> a.tbalance or a.tid is null)`,
		},
		{
			"each event of a branch goes on from the one before",
			`select bool_and(coalesce(changes ->> 'bbalance', record ->> 'bbalance') = before)
			 from (select changes, record, lag(record ->> 'bbalance', 1, '0') over (partition by record_pk order by id) as before from branches_events) e`,
		},
		{
			"nothing is there twice, or out of order",
			`select bool_and(is_next) from (
			   select seq > lag(seq, 1, 0::bigint) over (partition by source_table_oid order by id) as is_next
			   from (table history_events union all table accounts_events union all table tellers_events union all table branches_events) e) s`,
		},
	} {
		if !pgtest.Value[bool](db, check.sql) {
			t.Errorf("not so: %s", check.name)
		}
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}
