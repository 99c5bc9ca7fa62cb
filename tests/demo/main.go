// Command demo tells the story of Sequin on a server of its own, which is gone afterwards: every statement with its
// result, as psql would print it. It ends with an error where a result is not what the story says.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"sequin/bridge/dev"
	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run tells the story, on the PostgreSQL that the tests use, or else one that is downloaded.
func run(ctx context.Context, out io.Writer) error {
	binaries, err := pgtest.Find()
	if err == nil {
		err = os.Setenv(fmt.Sprint("SEQUIN_PG_", binaries.Major), binaries.Dir)
	}
	if err != nil && !errors.Is(err, localpg.ErrNotFound) {
		return err
	}
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
			Major:   binaries.Major,
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
