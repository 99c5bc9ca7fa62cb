// Package doctor proves what sequin doctor says of databases that are ready, and of ones that are not.
package doctor

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/bridge/doctor"
	"sequin/bridge/schema"
	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func examine(t *testing.T, url string) map[string]doctor.Finding {
	t.Helper()
	findings, err := doctor.Examine(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]doctor.Finding{}
	for _, f := range findings {
		if f.Status != doctor.OK && f.Mend == "" {
			t.Errorf("%s: %s, and no word of what to do", f.Name, f.Detail)
		}
		all[f.Name] = f
	}
	return all
}

func expect(t *testing.T, all map[string]doctor.Finding, name string, status doctor.Status, mend string) {
	t.Helper()
	if f := all[name]; f.Status != status || !strings.Contains(f.Mend, mend) {
		t.Errorf("%s: got %+v, want %s and %q", name, f, status, mend)
	}
}

func TestReady(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	expect(t, examine(t, db.URL), "schema", doctor.Warning, "sequin migrate")
	if err := schema.Up(t.Context(), db.URL, pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
	expect(t, examine(t, db.URL), "slot", doctor.OK, "")
	pgtest.StartBridge(t, db.URL)
	for name, f := range examine(t, db.URL) {
		if f.Status != doctor.OK && name != "server version" && name != "open transactions" {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

func TestRole(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	role := "plain_" + db.Name
	db.Exec(`create role ` + role + ` login`)
	db.Cleanup(func() { db.Exec(`drop owned by ` + role + ` cascade; drop role ` + role) })
	all := examine(t, db.URLAs(role))
	expect(t, all, "right to install", doctor.Error, "grant create on database")
	expect(t, all, "replication", doctor.Error, "replication")
	// What it says is what mends it.
	mend, _, _ := strings.Cut(all["replication"].Mend, ";")
	db.Exec(all["right to install"].Mend + mend)
	all = examine(t, db.URLAs(role))
	expect(t, all, "right to install", doctor.OK, "")
	expect(t, all, "replication", doctor.OK, "")
}

// What stands in the way of an installation is found before it.
func TestForeignNames(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	db.Exec(`create publication sequin`)
	expect(t, examine(t, db.URL), "schema", doctor.Error, "Rename")
	db.Exec(`drop publication sequin; create schema sequin create table mine (a int)`)
	expect(t, examine(t, db.URL), "schema", doctor.Error, "Rename")
}

// A role that may see nothing of the schema hears that, and what else there is to say.
func TestStranger(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	role := "stranger_" + db.Name
	db.Exec(`create role ` + role + ` login; create table t (id int primary key)`)
	db.Cleanup(func() { db.Exec(`drop owned by ` + role + `; drop role ` + role) })
	db.Exec(`select sequin.create_stream('t', '{t}'); alter table t drop constraint t_pkey; select sequin.create_consumer('c', 't')`)
	for _, grant := range []string{"", `select sequin.grant_consume('c', '` + role + `')`, `select sequin.grant_configure('` + role + `')`} {
		db.Exec(grant)
		all := examine(t, db.URLAs(role))
		expect(t, all, "schema", doctor.Error, `grant "`)
		expect(t, all, "right to install", doctor.Warning, "owner")
		expect(t, all, "slot", doctor.OK, "")
		expect(t, all, "replica identity", doctor.Error, "alter table")
	}
	_, mend, _ := strings.Cut(examine(t, db.URLAs(role))["schema"].Mend, "or: ")
	db.Exec(mend)
	expect(t, examine(t, db.URLAs(role)), "schema", doctor.OK, "")
}

func TestServer(t *testing.T) {
	t.Parallel()
	c := pgtest.NewCluster(t, map[string]string{"wal_level": "replica", "max_replication_slots": "1", "max_wal_senders": "2"})
	db := pgtest.NewOn(t, c)
	db.Exec(`select pg_create_physical_replication_slot('another')`)
	all := examine(t, db.URL)
	expect(t, all, "wal_level", doctor.Error, "alter system set wal_level = 'logical'")
	expect(t, all, "replication slots", doctor.Error, "max_replication_slots")
}

func TestOtherSources(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`select sequin.create_source('far', 'host=127.0.0.1 port=1')`)
	expect(t, examine(t, db.URL), "source far", doctor.Warning, "sequin bridge")
	pgtest.StartBridge(t, db.URL)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if f := examine(t, db.URL)["source far"]; f.Status != doctor.Error {
			return fmt.Errorf("got %+v", f)
		}
		return nil
	})
}

// A source that was captured, and is not any more, as no bridge runs.
func TestSourceWithoutBridge(t *testing.T) {
	t.Parallel()
	db, far := pgtest.New(t), pgtest.Empty(t)
	db.Exec(`select sequin.create_source('far', $1)`, far.URL)
	stop := pgtest.StartBridge(t, db.URL)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if f := examine(t, db.URL)["source far"]; f.Status != doctor.OK {
			return fmt.Errorf("got %+v", f)
		}
		return nil
	})
	stop()
	expect(t, examine(t, db.URL), "source far", doctor.Warning, "sequin bridge")
}

func TestTables(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}'); alter table t drop constraint t_pkey`)
	expect(t, examine(t, db.URL), "replica identity", doctor.Error, "alter table public.t add primary key")
	db.Exec(`select pg_create_physical_replication_slot('sequin_' || oid) from pg_database where datname = current_database()`)
	db.Cleanup(func() {
		db.Exec(`select pg_drop_replication_slot('sequin_' || oid) from pg_database where datname = current_database()`)
	})
	expect(t, examine(t, db.URL), "slot", doctor.Error, "pg_drop_replication_slot")
}
