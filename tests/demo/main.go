// Command demo tells the story of Sequin on a server of its own, which is gone afterwards: every statement with its
// result, as psql would print it. It ends with an error where a result is not what the story says.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"sequin/bridge/dev"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	major := flag.Int("postgres", 0, "`major` version; default: the newest that is installed")
	flag.Parse()
	if err := run(ctx, os.Stdout, *major); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run tells the story, on a major version of PostgreSQL.
func run(ctx context.Context, out io.Writer, major int) error {
	dir, err := os.MkdirTemp("", "sequin-demo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var log bytes.Buffer // shown only if something goes wrong
	ready := make(chan dev.Server, 1)
	done := make(chan error, 1)
	serverCtx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		done <- dev.Run(serverCtx, dev.Config{
			Dir:     dir,
			Major:   major,
			Version: "demo",
			Log:     slog.New(slog.NewTextHandler(&log, nil)),
			Ready:   func(s dev.Server) { ready <- s },
		})
	}()
	select {
	case err = <-done:
		if err == nil {
			err = ctx.Err()
		}
	case server := <-ready:
		err = tell(ctx, out, server)
		stop()
		err = errors.Join(err, <-done)
	}
	if err != nil {
		return fmt.Errorf("%w\n%s", err, &log)
	}
	return nil
}
