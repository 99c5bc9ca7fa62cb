package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"sequin/bridge/localpg"
	"sequin/bridge/schema"
)

// DB is a test's database.
type DB struct {
	testing.TB
	Cluster *localpg.Cluster
	Name    string
	URL     string
	Pool    *pgxpool.Pool
}

var databases atomic.Int64

const template = "sequin_template"

// New returns a database with the schema in it. It is dropped when the test ends.
func New(t testing.TB) *DB {
	t.Helper()
	c := Cluster(t)
	shared.Lock()
	defer shared.Unlock()
	if shared.template == "" {
		admin(t, c, "create database "+template)
		if err := schema.Up(t.Context(), c.URL(template), Discard()); err != nil {
			t.Fatal(err)
		}
		shared.template = template
	}
	return create(t, c, " template "+template)
}

// Empty returns a database without the schema.
func Empty(t testing.TB) *DB {
	t.Helper()
	return create(t, Cluster(t), "")
}

// EmptyIn returns one that is made with these options.
func EmptyIn(t testing.TB, options string) *DB {
	t.Helper()
	return create(t, Cluster(t), " "+options)
}

// EmptyOn returns a database without the schema, on a cluster of the test's own.
func EmptyOn(t testing.TB, c *localpg.Cluster) *DB {
	t.Helper()
	return create(t, c, "")
}

// CloneOf returns a copy of a database that nobody is connected to.
func CloneOf(t testing.TB, db *DB) *DB {
	t.Helper()
	return create(t, db.Cluster, " template "+db.Name)
}

// NewOn returns a database with the schema in it, on a cluster of the test's own.
func NewOn(t testing.TB, c *localpg.Cluster) *DB {
	t.Helper()
	db := create(t, c, "")
	if err := schema.Up(t.Context(), db.URL, Discard()); err != nil {
		t.Fatal(err)
	}
	return db
}

// CopyOf returns a copy of a database, which nobody may be in.
func CopyOf(t testing.TB, original *DB) *DB {
	t.Helper()
	original.Pool.Reset()
	return create(t, original.Cluster, " template "+original.Name)
}

// NewIn returns a database with the schema in it, on the server that tests share, made with these options.
func NewIn(t testing.TB, options string) *DB {
	t.Helper()
	db := create(t, Cluster(t), " template template0 "+options)
	if err := schema.Up(t.Context(), db.URL, Discard()); err != nil {
		t.Fatal(err)
	}
	return db
}

// Attach returns a database that is there already, on a server of the test's own.
func Attach(t testing.TB, c *localpg.Cluster, name string) *DB {
	t.Helper()
	db := &DB{TB: t, Cluster: c, Name: name, URL: c.URL(name)}
	db.Pool = newPool(t, db.URL)
	t.Cleanup(db.Pool.Close)
	return db
}

// newPool returns a pool that looks at each connection before it lends it: tests stop servers, also faster than the
// second that a pool takes a connection to be whole for.
func newPool(t testing.TB, url string) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	config.MaxConns = 16
	config.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return true }
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

// Discard returns a log that nobody reads.
func Discard() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func create(t testing.TB, c *localpg.Cluster, options string) *DB {
	t.Helper()
	db := &DB{TB: t, Cluster: c, Name: fmt.Sprintf("test_%d", databases.Add(1))}
	db.URL = c.URL(db.Name)
	admin(t, c, "create database "+db.Name+options)
	db.Pool = newPool(t, db.URL)
	t.Cleanup(db.drop)
	return db
}

// drop drops the database and its slots, if its server is still there.
func (db *DB) drop() {
	db.Pool.Close()
	select {
	case <-db.Cluster.Exited():
		return
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience*time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, db.Cluster.URL("postgres"))
	if err != nil {
		return // the test has stopped it
	}
	defer conn.Close(ctx)
	for {
		_, err = conn.Exec(ctx, `select pg_terminate_backend(a.pid) from pg_stat_activity a where a.datname = $1`, db.Name)
		if err == nil {
			_, err = conn.Exec(ctx, `select pg_drop_replication_slot(s.slot_name) from pg_replication_slots s where s.database = $1 and not s.active`, db.Name)
		}
		if err == nil {
			_, err = conn.Exec(ctx, "drop database if exists "+db.Name)
		}
		if err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		db.Errorf("drop database: %v", err)
	}
}

func admin(t testing.TB, c *localpg.Cluster, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// URLAs returns the database's address for another role.
func (db *DB) URLAs(role string) string {
	u, err := url.Parse(db.URL)
	if err != nil {
		db.Fatal(err)
	}
	u.User = url.User(role)
	return u.String()
}

// Connect returns a connection of its own, closed when the test ends.
func (db *DB) Connect() *pgx.Conn {
	db.Helper()
	return db.ConnectAs(localpg.User)
}

// ConnectAs returns a connection of another role's, closed when the test ends.
func (db *DB) ConnectAs(role string) *pgx.Conn {
	db.Helper()
	conn, err := pgx.Connect(context.Background(), db.URLAs(role))
	if err != nil {
		db.Fatal(err)
	}
	db.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// Exec runs a statement, which must succeed.
func (db *DB) Exec(sql string, args ...any) int64 {
	db.Helper()
	tag, err := db.Pool.Exec(context.Background(), sql, args...)
	if err != nil {
		db.Fatalf("%s: %v", sql, err)
	}
	return tag.RowsAffected()
}

// Error runs a statement, which must fail, and returns the server's error.
func (db *DB) Error(sql string, args ...any) *pgconn.PgError {
	db.Helper()
	_, err := db.Pool.Exec(context.Background(), sql, args...)
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		db.Fatalf("%s: got %v, want an error of the server's", sql, err)
	}
	return pgErr
}

// Value returns the one value of a query.
func Value[T any](db *DB, sql string, args ...any) T {
	db.Helper()
	var v T
	if err := db.Pool.QueryRow(context.Background(), sql, args...).Scan(&v); err != nil {
		db.Fatalf("%s: %v", sql, err)
	}
	return v
}

// Column returns the values of a query of one column.
func Column[T any](db *DB, sql string, args ...any) []T {
	db.Helper()
	rows, err := db.Pool.Query(context.Background(), sql, args...)
	if err != nil {
		db.Fatalf("%s: %v", sql, err)
	}
	values, err := pgx.CollectRows(rows, pgx.RowTo[T])
	if err != nil {
		db.Fatalf("%s: %v", sql, err)
	}
	return values
}

// Major returns the major version of the server.
func (db *DB) Major() int {
	db.Helper()
	return Value[int](db, `select current_setting('server_version_num')::int / 10000`)
}

const patience = 4

// Eventually asks again and again until check returns nil, and fails the test if that takes far longer than it should: a machine
// that is busy with something else is not what is tested.
func Eventually(t testing.TB, within time.Duration, check func() error) {
	t.Helper()
	within *= patience
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", within, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
