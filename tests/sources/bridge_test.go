package sources

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A second bridge stands by, and takes over everything from one that is killed, with nothing lost and nothing twice.
func TestStandby(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	home, far := pgtest.New(t), pgtest.Empty(t)
	createSource(home, "far", far.URL)
	first := pgtest.BridgeProcess(t, home.URL)
	audits := []*pgtest.Audit{pgtest.NewFarAudit(home, far, "far", seed), pgtest.NewAudit(home, seed)}
	second := pgtest.BridgeProcess(t, home.URL)
	second.AwaitLog("another bridge serves the source: standing by")
	second.AwaitLog("another bridge is at work: standing by")
	for _, a := range audits {
		a.Start(2, time.Millisecond)
	}
	awaitCommits(t, 50, audits...)
	first.Kill()
	began := time.Now()
	second.AwaitLog("capturing component=capture source=local")
	second.AwaitLog("capturing component=capture source=far")
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the second bridge took over after %s", took)
	} else {
		t.Logf("the second bridge took over after %s", took)
	}
	awaitCommits(t, audits[0].Commits.Load()+50, audits[0])
	for _, a := range audits {
		a.Stop()
	}
	for _, a := range audits {
		a.Check(t, 30*time.Second)
	}
}

// What is captured elsewhere does not depend on the database's own tables: here they cannot be.
func TestLocalRefused(t *testing.T) {
	t.Parallel()
	home := pgtest.NewOn(t, pgtest.NewCluster(t, map[string]string{"wal_level": "replica"}))
	far := pgtest.Empty(t)
	far.Exec(`create table t (id int primary key)`)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	b.AwaitLog("wal_level is replica")
	create(home, "t", "{t}", "")
	home.Exec(`select sequin.create_consumer('c', 't')`)
	awaitStream(t, home, "t", "active")
	far.Exec(`insert into t values (1)`)
	if got := pgtest.Column[string](home, `select record_pk from sequin.pop('c', 10, '20s')`); fmt.Sprint(got) != "[1]" {
		t.Errorf("got %v", got)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// Who holds the source loses it with the connection that says so, and takes it on again.
func TestLeaseLost(t *testing.T) {
	t.Parallel()
	home, far := pgtest.New(t), pgtest.Empty(t)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	audit := pgtest.NewFarAudit(home, far, "far", pgtest.Seed(t))
	audit.Start(2, time.Millisecond)
	for range 3 {
		awaitCommits(t, audit.Commits.Load()+20, audit)
		home.Exec(`select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name = 'sequin source'`)
	}
	b.AwaitLog("lost the connection that the source is held by")
	audit.Stop()
	audit.Check(t, 30*time.Second)
}

// A source that is dropped is cleared away there and here, and its name is free.
func TestDrop(t *testing.T) {
	t.Parallel()
	home, far := pgtest.New(t), pgtest.Empty(t)
	b := pgtest.BridgeProcess(t, home.URL)
	far.Exec(`create table t (id int primary key)`)
	for i := range 2 {
		createSource(home, "far", far.URL)
		create(home, "t", "{t}", "")
		awaitStream(t, home, "t", "active")
		far.Exec(`insert into t values ($1)`, i)
		awaitMessages(t, home, `select record_pk from sequin.messages`, fmt.Sprint(i))
		if e := home.Error(`select sequin.drop_source('far')`); e.Code != "55000" || !strings.Contains(e.Hint, "drop_stream('t')") {
			t.Errorf("got %s: %s (%s)", e.Code, e.Message, e.Hint)
		}
		home.Exec(`select sequin.drop_stream('t')`)
		home.Exec(`select sequin.drop_source('far')`)
	}
	pgtest.Eventually(t, 20*time.Second, func() error {
		for _, query := range []string{
			`select 'slot ' || slot_name from pg_replication_slots where database = current_database()`,
			`select 'publication ' || pubname from pg_publication`,
		} {
			if left := pgtest.Column[string](far, query); len(left) > 0 {
				return fmt.Errorf("there are left on the source: %v", left)
			}
		}
		left := pgtest.Value[int](home, `select (select count(*) from sequin.source where name <> 'local') + (select count(*) from sequin.source_table)
			+ (select count(*) from sequin.log) + (select count(*) from sequin.progress where source_id > 1)
			+ (select count(*) from sequin.log_segment where source_id > 1)`)
		if left > 0 {
			return fmt.Errorf("%d rows are left", left)
		}
		return nil
	})
	if got := pgtest.Value[string](home, `select sequin.drop_source('far', if_exists => true)`); got != "absent" {
		t.Errorf("got %s", got)
	}
	// One that nobody has ever reached is forgotten at once.
	createSource(home, "far", "host=nowhere.invalid")
	awaitHealth(t, home, "source far | error")
	home.Exec(`select sequin.drop_source('far')`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](home, `select count(*) from sequin.source`); n != 1 {
			return fmt.Errorf("%d sources are left", n)
		}
		return nil
	})
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// A source that cannot be reached when it is dropped says what is left there.
func TestDropUnreachable(t *testing.T) {
	t.Parallel()
	home, far := pgtest.New(t), pgtest.Empty(t)
	far.Exec(`create table t (id int primary key)`)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	create(home, "t", "{t}", "")
	awaitStream(t, home, "t", "active")
	home.Exec(`select sequin.drop_stream('t'); select sequin.alter_source('far', 'host=127.0.0.1 port=1')`)
	home.Exec(`select sequin.drop_source('far')`)
	slot := pgtest.Value[string](far, `select slot_name::text from pg_replication_slots where database = current_database()`)
	awaitHealth(t, home, "source far (dropped, 2) | warning | the bridge has not cleared away yet what is on the source: the source cannot be reached: connection refused | "+
		"On the source: select pg_drop_replication_slot('"+slot+"'); drop publication "+slot+";")
	// After a day it is given up.
	home.Exec(`update sequin.source set dropped_at = dropped_at - interval '1 day' where name <> 'local'`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](home, `select count(*) from sequin.source`); n != 1 {
			return fmt.Errorf("%d sources are left", n)
		}
		return nil
	})
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// A server that is not the one that was captured is refused; so is one whose slot or publication was dropped; each goes
// on once the gap is accepted.
func TestGaps(t *testing.T) {
	t.Parallel()
	home, far := pgtest.New(t), pgtest.Empty(t)
	other := pgtest.EmptyOn(t, pgtest.NewCluster(t, nil))
	far.Exec(`create table t (id int primary key)`)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	create(home, "t", "{t}", "")
	awaitStream(t, home, "t", "active")
	far.Exec(`insert into t values (1)`)
	awaitMessages(t, home, `select record_pk from sequin.messages`, "1")

	home.Exec(`select sequin.alter_source('far', $1)`, other.URL)
	mend := "If the address is wrong: select sequin.alter_source('far', conninfo); else: select sequin.accept_gap('far');"
	awaitHealth(t, home, "source far | error | changes after", "this is another server", "gap in source far | error", mend)
	sibling := pgtest.EmptyOn(t, far.Cluster)
	home.Exec(`select sequin.alter_source('far', $1)`, sibling.URL)
	awaitHealth(t, home, "source far | error | changes after", "this is another database (oid ", mend+" goes on")
	if n := pgtest.Value[int](home, `select count(*) from sequin.gap`); n != 1 {
		t.Errorf("%d gaps are on record", n)
	}
	// Put right, nothing is lost, and nothing says so any more.
	home.Exec(`select sequin.alter_source('far', $1)`, far.URL)
	awaitHealth(t, home, "source far | ok")
	if all := health(home); strings.Contains(all, "| error") {
		t.Errorf("health() says: %s", all)
	}

	// Accepted, it is captured: its tables are looked up by their names, whatever their oids.
	home.Exec(`select sequin.alter_source('far', $1)`, other.URL)
	awaitHealth(t, home, "source far | error | changes after")
	other.Exec(`create table before (id int primary key); create table t (id int primary key)`)
	home.Exec(`select sequin.accept_gap('far')`)
	awaitHealth(t, home, "source far | ok")
	awaitStream(t, home, "t", "active")
	other.Exec(`insert into before values (1); insert into t values (10)`)
	awaitMessages(t, home, `select record_pk from sequin.messages order by seq`, "1", "10")
	far = other

	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	far.Exec(`drop publication ` + publication(home))
	far.Exec(`insert into t values (2)`)
	b = pgtest.BridgeProcess(t, home.URL)
	b.AwaitLog("was dropped")
	home.Exec(`select sequin.accept_gap('far')`)
	awaitHealth(t, home, "source far | ok")
	awaitPublished(t, far, "public.t")
	far.Exec(`insert into t values (3)`)
	awaitMessages(t, home, `select record_pk from sequin.messages order by seq`, "1", "10", "3")
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// A gap that was accepted though nothing was lost, of a database that was captured by mistake, says nothing of one that is lost later.
func TestAcceptedInError(t *testing.T) {
	t.Parallel()
	home, far, other := pgtest.New(t), pgtest.Empty(t), pgtest.Empty(t)
	far.Exec(`create table t (id int primary key)`)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	create(home, "t", "{t}", "")
	awaitStream(t, home, "t", "active")
	home.Exec(`select sequin.alter_source('far', $1)`, other.URL)
	awaitHealth(t, home, "gap in source far | error")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	home.Exec(`select sequin.alter_source('far', $1)`, far.URL)
	home.Exec(`select sequin.accept_gap('far')`)
	far.Exec(`select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = current_database()`)
	far.Exec(`insert into t values (1), (2)`)
	b = pgtest.BridgeProcess(t, home.URL)
	awaitHealth(t, home, "source far | error | changes after", "does not exist any more", "gap in source far | error")
	home.Exec(`select sequin.accept_gap('far')`)
	awaitHealth(t, home, "source far | ok")
	awaitStream(t, home, "t", "active")
	far.Exec(`insert into t values (3)`)
	awaitMessages(t, home, `select record_pk from sequin.messages`, "3")
	if n := pgtest.Value[int](home, `select count(*) from sequin.gap where to_lsn > from_lsn and reason like 'slot %'`); n != 1 {
		t.Errorf("the loss is on record %d times", n)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// A copy of the database leaves alone what is the original's on the source.
func TestCopy(t *testing.T) {
	t.Parallel()
	home, far := pgtest.NewOn(t, pgtest.NewCluster(t, nil)), pgtest.Empty(t)
	far.Exec(`create table t (id int primary key)`)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	create(home, "t", "{t}", "")
	awaitStream(t, home, "t", "active")
	far.Exec(`insert into t values (1)`)
	awaitMessages(t, home, `select record_pk from sequin.messages`, "1")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	home.Pool.Reset()
	clone := pgtest.CloneOf(t, home)
	b = pgtest.BridgeProcess(t, clone.URL)
	awaitHealth(t, clone, "source far | error | this database is a copy of the one that captures the source")
	clone.Exec(`select sequin.drop_stream('t'); select sequin.drop_source('far')`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](clone, `select count(*) from sequin.source`); n != 1 {
			return fmt.Errorf("%d sources are left", n)
		}
		return nil
	})
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	far.Exec(`insert into t values (2)`)
	b = pgtest.BridgeProcess(t, home.URL)
	awaitMessages(t, home, `select record_pk from sequin.messages order by seq`, "1", "2")
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// Another major version than the database's own is a source like any other.
func TestOtherMajor(t *testing.T) {
	t.Parallel()
	home := pgtest.New(t)
	major := 12
	if home.Major() == 12 {
		major = 18
	}
	far := pgtest.EmptyOn(t, pgtest.NewClusterOf(t, major, nil))
	if far.Major() == home.Major() {
		t.Fatalf("both are %d", major)
	}
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	audit := pgtest.NewFarAudit(home, far, "far", pgtest.Seed(t))
	audit.Start(2, time.Millisecond)
	awaitCommits(t, 100, audit)
	audit.Stop()
	audit.Check(t, 30*time.Second)
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}
