package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/bridge/localpg"
)

// runPipeline lets the bridge catch up with the same work as PostgreSQL's own subscription, with a pipeline and two
// consumers on the table, and measures what pgbench has left while its tables are captured, with a pipeline on each and
// without, and while a subscription takes them.
func runPipeline(ctx context.Context, b *bench) error {
	if err := b.runPipelineCapture(ctx); err != nil {
		return err
	}
	pgbench, err := findPgbench()
	if err != nil {
		fmt.Printf("# pipeline.pgbench is left out: %v\n", err)
		return nil
	}
	for _, by := range []struct{ name, statement, isUpToDate string }{
		{"pipeline.pgbench", "select sequin.create_pipeline('%s', '%[1]s', '%[1]s_events')", `
			select coalesce((select sum((record ->> 'delta')::bigint) from pgbench_history_events), 0) = coalesce((select sum(delta) from pgbench_history), 0)`},
		{"pipeline.pgbench_log", "select sequin.create_stream('%s', '{%[1]s}')", `
			select (select count(*) from pgbench_history) = coalesce((
			  select t.total from sequin.tally t join sequin.source_table c on c.id = t.route_id and c.table_name = 'pgbench_history'
			  order by t.seq desc limit 1), 0)`},
	} {
		if err := b.runPgbench(ctx, pgbench, by.name, by.statement, by.isUpToDate); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) runPipelineCapture(ctx context.Context) error {
	s, native, drop, err := b.sourceBesideNative(ctx, "pipeline",
		"select sequin.create_consumer('one', 'orders'), sequin.create_consumer('two', 'orders')",
		"select sequin.create_pipeline('orders', 'orders', 'orders_events')")
	if err != nil {
		return err
	}
	defer drop()
	for _, work := range b.backlogs() {
		// Up to the last row in the log; and, apart, up to the last event.
		for _, upto := range []struct {
			name  string
			await func(context.Context) error
		}{{"pipeline.capture." + work.name, s.awaitLog}, {"pipeline.events." + work.name, s.awaitEvent}} {
			if err := b.compareOn(ctx, upto.name, "rows/s",
				func(ctx context.Context) error { return s.write(ctx, work.rows, work.isOne) },
				side{"sequin", func(ctx context.Context) (float64, error) {
					p, err := b.startBridge(ctx, s.url)
					if err != nil {
						return 0, err
					}
					start := time.Now()
					err = upto.await(ctx)
					elapsed := time.Since(start).Seconds()
					return float64(work.rows) / elapsed, errors.Join(err, s.awaitEvent(ctx), p.stop())
				}},
				side{"native", func(ctx context.Context) (float64, error) { return native.rate(ctx, work.rows) }}); err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitEvent waits until the event table has everything.
func (s *source) awaitEvent(ctx context.Context) error {
	return await(ctx, s.url, `select coalesce((select e.record_pk from orders_events e order by e.id desc limit 1) = $1, false)`, fmt.Sprint(s.lastID))
}

// findPgbench returns the path of pgbench: beside the server's programs, or wherever there is one.
func findPgbench() (string, error) {
	binaries, err := localpg.Find(0)
	if err == nil {
		if path, err := exec.LookPath(filepath.Join(binaries.Dir, "pgbench")); err == nil {
			return path, nil
		}
	}
	path, err := exec.LookPath("pgbench")
	if err != nil {
		return "", fmt.Errorf("find pgbench: %w", err)
	}
	return path, nil
}

var pgbenchTables = []string{"pgbench_accounts", "pgbench_branches", "pgbench_tellers", "pgbench_history"}

// runPgbench measures pgbench's own rate: with a bridge, where a statement was run for each of its tables, and with a
// subscription that takes them. isUpToDate asks whether the bridge has come to the end.
func (b *bench) runPgbench(ctx context.Context, pgbench, name, statement, isUpToDate string) error {
	scale := max(int(10*b.scale), 1)
	fill := func(url string) error {
		conn, err := pgx.ParseConfig(url)
		if err != nil {
			return err
		}
		out, err := pgbenchCommand(ctx, pgbench, conn, "--initialize", "--quiet", fmt.Sprintf("--scale=%d", scale)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("pgbench: %w: %s", err, out)
		}
		return execute(ctx, url, "alter table pgbench_history replica identity full")
	}
	captured, dropCaptured, err := b.database(ctx, "pgbench_captured")
	if err != nil {
		return err
	}
	defer dropCaptured()
	subscribed, dropSubscribed, err := b.database(ctx, "pgbench_subscribed")
	if err != nil {
		return err
	}
	defer dropSubscribed()
	if err := errors.Join(fill(captured), fill(subscribed)); err != nil {
		return err
	}
	for _, table := range pgbenchTables {
		if err := execute(ctx, captured, fmt.Sprintf(statement, table)); err != nil {
			return err
		}
	}
	if err := execute(ctx, subscribed, "create publication bench_pgbench for table pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history",
		"select pg_create_logical_replication_slot('bench_pgbench', 'pgoutput')"); err != nil {
		return err
	}
	subscriber, dropSubscriber, err := b.database(ctx, "pgbench_subscriber")
	if err != nil {
		return err
	}
	defer dropSubscriber()
	config, err := pgx.ParseConfig(subscribed)
	if err != nil {
		return err
	}
	if err := fill(subscriber); err != nil {
		return err
	}
	if err := execute(ctx, subscriber, fmt.Sprintf(`
		create subscription bench_pgbench connection 'host=%s port=%d user=%s dbname=%s' publication bench_pgbench
		with (create_slot = false, slot_name = 'bench_pgbench', enabled = false, copy_data = false)`,
		config.Host, config.Port, config.User, config.Database)); err != nil {
		return err
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		_ = execute(ctx, subscriber, "alter subscription bench_pgbench disable", "alter subscription bench_pgbench set (slot_name = none)",
			"drop subscription bench_pgbench")
	}()

	seconds := max(int(20*b.scale), 3)
	return b.compare(ctx, name, "transactions/s",
		side{"sequin", func(ctx context.Context) (float64, error) {
			p, err := b.startBridge(ctx, captured)
			if err != nil {
				return 0, err
			}
			upToDate := func() error { return await(ctx, captured, isUpToDate) }
			if err := upToDate(); err != nil {
				return 0, errors.Join(err, p.stop())
			}
			rate, err := tps(ctx, pgbench, captured, seconds)
			return rate, errors.Join(err, upToDate(), p.stop())
		}},
		side{"native", func(ctx context.Context) (float64, error) {
			const active = "select active = $1 from pg_replication_slots where slot_name = 'bench_pgbench'"
			const applied = "select confirmed_flush_lsn >= $1::text::pg_lsn from pg_replication_slots where slot_name = 'bench_pgbench'"
			if err := execute(ctx, subscriber, "alter subscription bench_pgbench enable"); err != nil {
				return 0, err
			}
			upToDate := func() error {
				lsn, err := value[string](ctx, subscribed, "select pg_current_wal_flush_lsn()::text")
				if err != nil {
					return err
				}
				return await(ctx, subscribed, applied, lsn)
			}
			if err := errors.Join(await(ctx, subscribed, active, true), upToDate()); err != nil {
				return 0, err
			}
			rate, err := tps(ctx, pgbench, subscribed, seconds)
			return rate, errors.Join(err, upToDate(), execute(ctx, subscriber, "alter subscription bench_pgbench disable"),
				await(ctx, subscribed, active, false))
		}})
}

func pgbenchCommand(ctx context.Context, pgbench string, config *pgx.ConnConfig, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, pgbench, append(args, "--host", config.Host, "--port", fmt.Sprint(config.Port), "--username", config.User, config.Database)...)
	cmd.Env = append(cmd.Environ(), "PGPASSWORD="+config.Password)
	return cmd
}

var tpsPattern = regexp.MustCompile(`tps = ([0-9.]+)`)

// tps runs pgbench's TPC-B with 8 clients, and returns its rate.
func tps(ctx context.Context, pgbench, url string, seconds int) (float64, error) {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return 0, err
	}
	out, err := pgbenchCommand(ctx, pgbench, config, "--client=8", "--jobs=2", "--no-vacuum", fmt.Sprintf("--time=%d", seconds)).CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("pgbench: %w: %s", err, out)
	}
	m := tpsPattern.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("pgbench says no rate: %s", out)
	}
	return strconv.ParseFloat(string(m[1]), 64)
}
