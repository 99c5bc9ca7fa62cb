package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/bridge/localpg"
	"sequin/bridge/schema"
)

// bench is what the benchmarks share: a server, and how much to measure.
type bench struct {
	url    string // of a superuser, on the server's own database
	rounds int
	scale  float64
	log    *slog.Logger

	sequin  string           // the program, once it is built
	cluster *localpg.Cluster // of the run's own
	dir     string
}

// newBench uses the server at a URL, or, without one, starts a server for the run.
func newBench(ctx context.Context, url string, rounds int, scale float64) (*bench, error) {
	b := &bench{url: url, rounds: max(rounds, 1), scale: scale, log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	if url != "" {
		return b, nil
	}
	binaries, err := localpg.Find(0)
	if err != nil {
		return nil, err
	}
	if b.dir, err = os.MkdirTemp("", "sequin-bench"); err != nil {
		return nil, err
	}
	b.cluster, err = localpg.Start(ctx, localpg.Config{Binaries: binaries, Dir: b.dir, Log: b.log, Settings: map[string]string{
		"autovacuum_naptime":     "10s", // as busy as it is on a server with tables of its own
		"max_connections":        "200",
		"max_wal_size":           "4GB",
		"shared_buffers":         "1GB",
		"track_commit_timestamp": "on", // what latency is measured from
	}})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(b.dir))
	}
	b.url = b.cluster.URL("postgres")
	return b, nil
}

// close stops the server that was started for the run, and removes what the run has made.
func (b *bench) close() {
	var err error
	if b.sequin != "" {
		err = os.RemoveAll(filepath.Dir(b.sequin))
	}
	if b.cluster != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = errors.Join(err, b.cluster.Stop(ctx, localpg.Immediate), os.RemoveAll(b.dir))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

// size scales a number of messages.
func (b *bench) size(messages int) int { return max(int(float64(messages)*b.scale), 1000) }

// header says what the figures were taken on.
func (b *bench) header(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, b.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(ctx)
	settings := map[string]string{}
	for _, name := range []string{"server_version", "fsync", "synchronous_commit", "shared_buffers", "wal_level", "autovacuum"} {
		var value string
		if err := conn.QueryRow(ctx, "select current_setting($1)", name).Scan(&value); err != nil {
			return fmt.Errorf("read setting %s: %w", name, err)
		}
		settings[name] = value
	}
	if settings["fsync"] != "on" {
		return fmt.Errorf("the server's fsync is %s: figures without it say nothing", settings["fsync"])
	}
	flush, err := flushTime(ctx, conn)
	if err != nil {
		return err
	}
	fmt.Printf("# %s/%s, %d cores, %s, %s of memory, PostgreSQL %s, client and server on one machine\n",
		runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), processor(), memory(), settings["server_version"])
	fmt.Printf("# fsync %s, synchronous_commit %s, shared_buffers %s, wal_level %s, autovacuum %s; a commit takes %s\n",
		settings["fsync"], settings["synchronous_commit"], settings["shared_buffers"], settings["wal_level"],
		settings["autovacuum"], flush.Round(time.Microsecond))
	fmt.Printf("# %d rounds in turn; rates are medians, ratios the median of each round's, scale %g\n", b.rounds, b.scale)
	return nil
}

// flushTime is the median time of a smallest commit, round trip included.
func flushTime(ctx context.Context, conn *pgx.Conn) (time.Duration, error) {
	if _, err := conn.Exec(ctx, "create table if not exists bench_flush (n int)"); err != nil {
		return 0, fmt.Errorf("create table: %w", err)
	}
	var times []time.Duration
	for range 101 {
		start := time.Now()
		if _, err := conn.Exec(ctx, "insert into bench_flush values (1)"); err != nil {
			return 0, fmt.Errorf("insert row: %w", err)
		}
		times = append(times, time.Since(start))
	}
	if _, err := conn.Exec(ctx, "drop table bench_flush"); err != nil {
		return 0, fmt.Errorf("drop table: %w", err)
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

// processor and memory are what Linux says of itself; elsewhere they are not known.
func processor() string { return procLine("/proc/cpuinfo", "model name", "unknown processor") }
func memory() string    { return procLine("/proc/meminfo", "MemTotal", "unknown amount") }

func procLine(path, key, unknown string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return unknown
	}
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return unknown
}

// database makes a database for one benchmark, with the schema in it, and returns its URL and how to drop it.
func (b *bench) database(ctx context.Context, name string) (string, func(), error) {
	name = "bench_" + name
	if err := execute(ctx, b.url, "drop database if exists "+name, "create database "+name); err != nil {
		return "", nil, fmt.Errorf("create database: %w", err)
	}
	config, err := pgx.ParseConfig(b.url)
	if err != nil {
		return "", nil, fmt.Errorf("parse URL: %w", err)
	}
	url := fmt.Sprintf("host=%s port=%d user=%s password='%s' dbname=%s sslmode=disable",
		config.Host, config.Port, config.User, config.Password, name)
	drop := func() {
		// A slot is its database's, and goes with it: once nobody reads it any more.
		ctx := context.WithoutCancel(ctx)
		if err := errors.Join(
			await(ctx, b.url, "select not exists (select from pg_replication_slots where database = $1 and active)", name),
			execute(ctx, b.url, "drop database if exists "+name)); err != nil {
			fmt.Fprintln(os.Stderr, "bench: drop database:", err)
		}
	}
	if err := schema.Up(ctx, url, b.log); err != nil {
		drop()
		return "", nil, err
	}
	return url, drop, nil
}
