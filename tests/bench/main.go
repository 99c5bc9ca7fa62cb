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
	{"delivery", "receive + ack a message, beside the usual queue table: each a round trip and a transaction", runDelivery},
	{"snapshot", "the same under a repeatable read snapshot held open: the fifth part of a backlog at batch 10", runSnapshot},
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
	scale := flags.Float64("scale", 1, "of the sizes: below 1 for a quick look, whose ratios say less")
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
