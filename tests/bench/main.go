// Command bench measures Sequin beside what it is measured against: the usual queue table, PostgreSQL's own logical
// replication, or itself without the load in question. Each figure is taken in turn with its baseline, in the same
// run, and printed as a line
//
//	name value unit
//
// where a ratio's unit is x. Lines that begin with # say what machine it was, and what the figures are of.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
)

// A benchmark prints the figures of one claim.
type benchmark struct {
	name string
	what string // one line, printed above its figures
	run  func(context.Context, *bench) error
}

// benchmarks run in this order.
var benchmarks = []benchmark{
	{"delivery", "receive and ack, beside the usual queue table: two round trips and two transactions a batch, on both sides", runDelivery},
	{"snapshot", "the same at batch 10, with a repeatable read snapshot held open elsewhere: the fifth part of a backlog", runSnapshot},
	{"groups", "20 hot groups, beside a group a message: 8 workers, batch 10", runGroups},
	{"hanging", "1,000 groups, one delivery of which hangs: how many other groups are delivered within a second", runHanging},
	{"depth", "far behind, beside a little behind: 4 workers, batch 100", runDepth},
	{"quiet", "a receive from a quiet table beside a busy one, and beside as much work on a table that is not streamed", runQuiet},
	{"isolation", "a consumer's rate beside one in trouble, and beside one that is well", runIsolation},
	{"capture", "source commits to log rows, beside PostgreSQL's own logical replication into a second database", runCapture},
	{"pipeline", "capture with a pipeline and two consumers on the table, and pgbench's own rate with pipelines on its tables and with streams alone, beside PostgreSQL's own logical replication of the same", runPipeline},
	{"consumers", "capture with ten consumers on the stream, beside one", runConsumers},
	{"filter", "a feed whose filter or transform is evaluated, beside one that takes every message as it is", runFilter},
	{"latency", "from a commit to the message's arrival at a waiting worker, at 200 transactions a second", runLatency},
	{"latency_native", "the same at 1,000 transactions a second, beside PostgreSQL's own logical replication", runLatencyNative},
	{"backfill", "a consumer that starts at the beginning of 1,000,000 rows: into the log, beside one COPY piped into another, and live latency beside it", runBackfill},
	{"memory", "the bridge's memory while it captures one transaction of 1,000,000 rows", runMemory},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	only := flags.String("run", "", "only benchmarks whose name matches this `regexp`")
	rounds := flags.Int("rounds", 5, "how often each figure and its baseline are taken in turn")
	scale := flags.Float64("scale", 1, "of the sizes: below 1 for a quick look, that says less")
	url := flags.String("url", "", "a superuser's URL on a server to use; default: a server of its own")
	if err := flags.Parse(args); err != nil {
		return err
	}
	wanted, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("read -run: %w", err)
	}
	b, err := newBench(ctx, *url, *rounds, *scale)
	if err != nil {
		return err
	}
	defer b.close()
	if err := b.header(ctx); err != nil {
		return err
	}
	for _, m := range benchmarks {
		if !wanted.MatchString(m.name) {
			continue
		}
		fmt.Printf("# %s: %s\n", m.name, m.what)
		if err := m.run(ctx, b); err != nil {
			return fmt.Errorf("measure %s: %w", m.name, err)
		}
	}
	return nil
}
