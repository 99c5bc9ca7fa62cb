// Package drivers proves that Sequin can be used from other languages as they are: each script here does what a worker
// does, through its driver or ORM, and fails where something is not as it says.
package drivers

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// setup makes what the scripts work with: orders, a consumer of them, and a table to write to.
func setup(t *testing.T) *pgtest.DB {
	t.Helper()
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table orders (id int primary key, amount numeric not null);
		create table shipments (order_id int primary key, amount numeric not null);
		select sequin.create_stream('orders', '{orders}');
		select sequin.create_consumer('mailer', 'orders')`)
	pgtest.StartBridge(t, db.URL)
	return db
}

func run(t *testing.T, db *pgtest.DB, cmd *exec.Cmd) {
	t.Helper()
	cmd.Env = append(append(os.Environ(), cmd.Env...), "DATABASE_URL="+db.URL)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	if n := pgtest.Value[int](db, `select count(*) from shipments`); n == 0 {
		t.Error("it has written nothing")
	}
	if n := pgtest.Value[int](db, `select count(*) from sequin.deliveries`); n != 0 {
		t.Errorf("it has left %d deliveries", n)
	}
}

func TestPsycopg(t *testing.T) {
	path := pgtest.Python(t, "psycopg")
	db := setup(t)
	run(t, db, exec.Command(path, "worker_psycopg.py"))
}

func TestSQLAlchemy(t *testing.T) {
	path := pgtest.Python(t, "sqlalchemy", "psycopg2")
	db := setup(t)
	run(t, db, exec.Command(path, "worker_sqlalchemy.py"))
}

func TestKnex(t *testing.T) {
	modules := nodeModules(t)
	db := setup(t)
	cmd := exec.Command("node", "worker_knex.js")
	cmd.Env = []string{"NODE_PATH=" + modules}
	run(t, db, cmd)
}

// nodeModules installs knex and its driver, once, and returns where they are.
func nodeModules(t *testing.T) string {
	t.Helper()
	for _, program := range []string{"node", "npm"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed", program)
		}
	}
	dir, err := filepath.Abs("../../.cache/drivers")
	if err != nil {
		t.Fatal(err)
	}
	modules := filepath.Join(dir, "node_modules")
	if _, err := os.Stat(filepath.Join(modules, "knex")); err == nil {
		return modules
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("npm", "install", "--no-audit", "--no-fund", "--prefix", dir, "knex@3.1.0", "pg@8.16.3").CombinedOutput()
	if err != nil {
		t.Skipf("npm cannot install knex: %v\n%s", err, out)
	}
	return modules
}
