package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A commit is sent as soon as it is on disk, and can be seen only later: with a synchronous standby, when that has answered.
// What a transaction makes of a table, or of its columns, counts for its own changes all the same.
func TestUnseenCommit(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, nil))
	db.Exec(`create table early (id int primary key, z int not null); select sequin.create_stream('early', '{early}'); insert into early values (1, 2)`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	for _, test := range []struct{ table, change, want string }{
		{
			"late", `create domain late_number as int; create table late (b int, a late_number, primary key (a, b));
			select sequin.create_stream('late', '{late}'); insert into late values (1, 2)`, `2,1 {"a": 2, "b": 1}`,
		},
		{
			"early", `create domain early_number as numeric; alter table early drop constraint early_pkey, add primary key (z, id), add n early_number;
			insert into early values (5, 6, 1.5)`, `6,5 {"n": 1.5, "z": 6, "id": 5}`,
		},
		{"partitioned", partitioned(db.Major()), `1 {"id": 1}`},
	} {
		if test.change == "" {
			continue
		}
		release := hold(t, db)
		committed := commitHeld(t, db, test.change)
		// Before 14 the server itself waits, for the lock.
		pgtest.Eventually(t, 30*time.Second, func() error {
			if !strings.Contains(b.Log(), "table=public."+test.table) &&
				!pgtest.Value[bool](db, `select exists (select from pg_stat_activity where backend_type = 'walsender' and wait_event_type = 'Lock')`) {
				return fmt.Errorf("nobody waits: %s", b.Log())
			}
			return nil
		})
		release()
		if err := <-committed; err != nil {
			t.Fatal(err)
		}
		pgtest.Eventually(t, 30*time.Second, func() error {
			got := pgtest.Column[string](db, `select record_pk || ' ' || record from sequin.messages where stream = $1 order by seq desc limit 1`, test.table)
			if len(got) != 1 || got[0] != test.want {
				return fmt.Errorf("of %s there is %q, want %q", test.table, got, test.want)
			}
			return nil
		})
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// A transaction that is at work on a table, and goes on, holds nothing up: not its partition's changes, nor other tables'.
func TestOpenTransactionAtWork(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		t.Skip("PostgreSQL 12 cannot publish a partitioned table")
	}
	db.Exec(`create table p (id int primary key, a text) partition by range (id);
		create table p1 partition of p for values from (0) to (100);
		create table t (id int primary key);
		select sequin.create_stream('p', '{p}'), sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	worker := db.Connect()
	if _, err := worker.Exec(t.Context(), `begin; select txid_current(); analyze p1; analyze p; analyze t`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`insert into p values (1, 'a')`)
	db.Exec(`insert into t values (2)`)
	awaitKeys(t, db, "1", "2")
	if strings.Contains(b.Log(), "msg=\"waiting") {
		t.Errorf("it waited: %s", b.Log())
	}
}

// A transaction that makes a stream of a table which is streamed already, and stays open, keeps capture from nothing: also
// where the table is given another name meanwhile.
func TestOpenTransactionThatMakesAStream(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table t (id int primary key);
		create table other (id int primary key);
		select sequin.create_stream('t', '{t}'), sequin.create_stream('other', '{other}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into t values (1); insert into other values (1)`)
	awaitMessages(t, db, "other", `insert other 1 {"id": 1} -`)
	awaitMessages(t, db, "t", `insert t 1 {"id": 1} -`)
	conn := db.Connect()
	if _, err := conn.Exec(t.Context(), `begin; select sequin.create_stream('t2', '{t}', mode => 'changes')`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`alter table t rename to u`)
	db.Exec(`insert into u values (2)`)
	db.Exec(`insert into other values (2)`)
	awaitMessages(t, db, "other", `insert other 1 {"id": 1} -`, `insert other 2 {"id": 2} -`)
	if _, err := conn.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	awaitMessages(t, db, "t", `insert t 1 {"id": 1} -`, `insert u 2 {"id": 2} -`)
}

// partitioned is a table with a partition, its stream and a row. 12 publishes none.
func partitioned(major int) string {
	if major < 13 {
		return ""
	}
	return `create table partitioned (id int primary key) partition by range (id);
		create table partitioned_1 partition of partitioned for values from (0) to (10);
		select sequin.create_stream('partitioned', '{partitioned}'); insert into partitioned values (1)`
}

// hold has commits wait for a standby that there is not, until they are released.
func hold(t *testing.T, db *pgtest.DB) (release func()) {
	t.Helper()
	release = func() { standbys(t, db, "") }
	t.Cleanup(release)
	standbys(t, db, "nobody")
	pgtest.Eventually(t, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		conn := db.Connect()
		_, err := conn.Exec(ctx, `create table probe (id int); drop table probe`)
		if err == nil {
			return errors.New("a commit does not wait")
		}
		return nil
	})
	return release
}

// standbys sets synchronous_standby_names.
func standbys(t *testing.T, db *pgtest.DB, names string) {
	t.Helper()
	db.Exec(fmt.Sprintf(`alter system set synchronous_standby_names = '%s'`, names))
	db.Exec(`select pg_reload_conf()`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if now := pgtest.Value[string](db, `show synchronous_standby_names`); now != names {
			return fmt.Errorf("synchronous_standby_names is %s", now)
		}
		return nil
	})
}

// commitHeld runs statements in a transaction, whose commit is on disk and waits when it returns. What it came to is sent.
func commitHeld(t *testing.T, db *pgtest.DB, sql string) <-chan error {
	t.Helper()
	conn := db.Connect()
	committed := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), `begin; `+sql+`; commit`)
		committed <- err
	}()
	pgtest.Eventually(t, 30*time.Second, func() error {
		select {
		case err := <-committed:
			return fmt.Errorf("it did not wait: %w", err)
		default:
		}
		if !pgtest.Value[bool](db, `select coalesce(wait_event = 'SyncRep', false) from pg_stat_activity where pid = $1`, conn.PgConn().PID()) {
			return errors.New("it does not wait")
		}
		return nil
	})
	return committed
}
