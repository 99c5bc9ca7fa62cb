// Package usecases proves what the README says that a stream of changes is good for: its programs, as they are there, and
// its SQL.
package usecases

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// products is a table under change, with a stream of it.
func products(t *testing.T) *pgtest.DB {
	t.Helper()
	db := pgtest.New(t)
	db.Exec(`
		create table products (id bigint primary key, name text not null, price numeric(10, 2) not null);
		insert into products select i, 'product ' || i, i from generate_series(1, 500) i;
		select sequin.create_stream('products', '{products}')`)
	pgtest.StartBridge(t, db.URL)
	return db
}

// change changes products, a little at a time: inserts, updates, deletes, and keys.
func change(db *pgtest.DB, round int) {
	db.Helper()
	db.Exec(`insert into products select 1000 * ($1::bigint + 1) + i, 'new ' || i, i from generate_series(1, 50) i`, round)
	db.Exec(`update products set price = price + 1, name = name || '*' where id % 7 = $1 % 7`, round)
	db.Exec(`delete from products where id % 11 = $1 % 11`, round)
	db.Exec(`update products set id = id + 500000 where id < 500000 and id % 13 = $1 % 13`, round)
}

// inREADME fails the test unless the README has a program as it is run here.
func inREADME(t *testing.T, file string) {
	t.Helper()
	program, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), strings.TrimSpace(string(program))) {
		t.Errorf("the README does not have %s as it is", file)
	}
}

// program is one of the README's, running.
type program struct {
	cmd *exec.Cmd
	out strings.Builder
}

func start(t *testing.T, python, file string, env ...string) *program {
	t.Helper()
	p := &program{cmd: exec.Command(python, file)}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// redis starts a server of the test's own, on a port that is free, and returns its URL and how to ask it.
func redis(t *testing.T) (string, func(args ...string) string) {
	t.Helper()
	for _, name := range []string{"redis-server", "redis-cli"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("there is no %s", name)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := fmt.Sprint(l.Addr().(*net.TCPAddr).Port)
	_ = l.Close()
	server := exec.Command("redis-server", "--bind", "127.0.0.1", "--port", port, "--save", "", "--dir", t.TempDir())
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	})
	ask := func(args ...string) string {
		out, _ := exec.Command("redis-cli", append([]string{"-p", port}, args...)...).Output()
		return strings.TrimSpace(string(out))
	}
	pgtest.Eventually(t, 10*time.Second, func() error {
		if ask("ping") != "PONG" {
			return fmt.Errorf("redis does not answer")
		}
		return nil
	})
	return "redis://127.0.0.1:" + port, ask
}

// A cache that has every row as it is, from the first on, whatever happens to its worker.
func TestCache(t *testing.T) {
	t.Parallel()
	path := pgtest.Python(t, "psycopg", "redis")
	url, ask := redis(t)
	inREADME(t, "cache_redis.py")
	db := products(t)
	db.Exec(`select sequin.create_consumer('cache', 'products', start_at => 'beginning', ack_wait => '1 second', backoff => '0')`)
	worker := start(t, path, "cache_redis.py", "DATABASE_URL="+db.URL, "REDIS_URL="+url)
	for round := range 5 {
		change(db, round)
		worker.kill()
		worker = start(t, path, "cache_redis.py", "DATABASE_URL="+db.URL, "REDIS_URL="+url)
	}
	count := pgtest.Value[string](db, `select count(*)::text from products`)
	pgtest.Eventually(t, 60*time.Second, func() error {
		if n := ask("dbsize"); n != count {
			return fmt.Errorf("the cache has %s rows, the table %s: %s", n, count, worker.out.String())
		}
		for _, id := range pgtest.Column[string](db, `select id::text from products order by md5(id::text) limit 20`) {
			// Equal as numbers, and not as they are written: the program's language has floats.
			got := ask("get", "product:"+id)
			if !pgtest.Value[bool](db, `select nullif($1, '')::jsonb is not distinct from to_jsonb(p) from products p where id = $2::bigint`, got, id) {
				return fmt.Errorf("product %s: the cache has %s", id, got)
			}
		}
		return nil
	})
}

// A table in another database, kept by somebody who only reads.
func TestCopy(t *testing.T) {
	t.Parallel()
	path := pgtest.Python(t, "psycopg")
	inREADME(t, "copy_table.py")
	db, target := products(t), pgtest.Empty(t)
	target.Exec(`
		create table products (id bigint primary key, name text not null, price numeric(10, 2) not null);
		create table sync_state as select null::text as cursor`)
	env := []string{"DATABASE_URL=" + db.URL, "TARGET_URL=" + target.URL}
	worker := start(t, path, "copy_table.py", env...)
	for round := range 5 {
		change(db, round)
		worker.kill()
		worker = start(t, path, "copy_table.py", env...)
	}
	sum := func(d *pgtest.DB) string {
		return pgtest.Value[string](d, `select count(*) || ' ' || coalesce(md5(string_agg(p::text, ' ' order by id)), '') from products p`)
	}
	want := sum(db)
	pgtest.Eventually(t, 60*time.Second, func() error {
		if got := sum(target); got != want {
			return fmt.Errorf("the copy is %s, the table %s: %s", got, want, worker.out.String())
		}
		return nil
	})
}

// statements returns a file's, which are the README's too.
func statements(t *testing.T, file string) string {
	t.Helper()
	inREADME(t, file)
	text, err := os.ReadFile(filepath.Clean(file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A search index: another table, kept in the transaction that takes the messages.
func TestSearch(t *testing.T) {
	t.Parallel()
	db := products(t)
	db.Exec(statements(t, "search_setup.sql"))
	step := statements(t, "search_step.sql")
	change(db, 3)
	conn := db.Connect()
	pgtest.Eventually(t, 60*time.Second, func() error {
		if _, err := conn.Exec(context.Background(), step); err != nil {
			t.Fatal(err)
		}
		var got, want string
		err := conn.QueryRow(context.Background(), `
			select (select coalesce(string_agg(id::text, ',' order by id), '') from product_search where words @@ to_tsquery('simple', 'product')),
			       (select coalesce(string_agg(id::text, ',' order by id), '') from products where to_tsvector('simple', name) @@ to_tsquery('simple', 'product'))`).
			Scan(&got, &want)
		if err != nil {
			t.Fatal(err)
		}
		if got != want {
			return fmt.Errorf("the index finds %s, the table has %s", got, want)
		}
		return nil
	})
}

// Everybody who has a consumer has every message.
func TestFanOut(t *testing.T) {
	t.Parallel()
	db := products(t)
	for _, name := range []string{"mails", "metrics"} {
		db.Exec(`select sequin.create_consumer($1, 'products', actions => '{insert}')`, name)
	}
	db.Exec(`insert into products values (1000001, 'x', 1), (1000002, 'y', 2)`)
	for _, name := range []string{"mails", "metrics"} {
		var keys []string
		pgtest.Eventually(t, 30*time.Second, func() error {
			rows, err := db.Pool.Query(context.Background(), `select record_pk from sequin.pop($1, 10, wait => '1s')`, name)
			if err != nil {
				t.Fatal(err)
			}
			more, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil {
				t.Fatal(err)
			}
			if keys = append(keys, more...); len(keys) != 2 {
				return fmt.Errorf("%s has got %v", name, keys)
			}
			return nil
		})
	}
}
