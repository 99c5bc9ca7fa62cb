package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// runIsolation measures a consumer beside another that is in trouble, and beside the same one while that is well.
func runIsolation(ctx context.Context, b *bench) error {
	url, drop, err := b.database(ctx, "isolation")
	if err != nil {
		return err
	}
	defer drop()
	log, err := newChangeLog(ctx, url)
	if err != nil {
		return err
	}
	messages := b.size(200_000)
	if err := log.fill(ctx, "orders", messages, 0); err != nil {
		return err
	}
	beside := func(name string, neighbour func(context.Context, *pgx.Conn) error) side {
		return side{name, func(ctx context.Context) (rate float64, err error) {
			for _, consumer := range []string{"bench", "neighbour"} {
				if err := log.consumer(ctx, consumer, "orders", messages); err != nil {
					return 0, err
				}
			}
			return rate, log.tend(ctx, func() error {
				return alongside(ctx, url, neighbour, func() error {
					rate, err = drain(ctx, url, consume("bench"),
						backlog{workers: 2, batch: 10, messages: messages, limit: time.Duration(3 * b.scale * float64(time.Second))})
					return err
				})
			})
		}}
	}
	working := func(ctx context.Context, conn *pgx.Conn) error {
		_, err := consume("neighbour").once(ctx, conn, 10)
		return err
	}
	failing := func(ctx context.Context, conn *pgx.Conn) error {
		ids, err := consume("neighbour").take(ctx, conn, 10)
		if err != nil {
			return err
		}
		_, err = conn.Exec(ctx, "select sequin.nack('neighbour', $1, error => 'no such host')", ids)
		return err
	}
	hanging := func(ctx context.Context, conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, "begin"); err != nil {
			return err
		}
		if _, err := consume("neighbour").take(ctx, conn, 100); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}
	idle := func(ctx context.Context, _ *pgx.Conn) error {
		<-ctx.Done()
		return ctx.Err()
	}
	if err := b.compare(ctx, "isolation.hanging_worker", "messages/s", beside("hanging", hanging), beside("idle", idle)); err != nil {
		return err
	}
	if err := b.compare(ctx, "isolation.failing_messages", "messages/s", beside("failing", failing), beside("working", working)); err != nil {
		return err
	}
	return b.isolateDropped(ctx)
}

// alongside lets a neighbour do what it does, again and again, while a function runs.
func alongside(ctx context.Context, url string, neighbour func(context.Context, *pgx.Conn) error, do func() error) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	neighbourCtx, cancel := context.WithCancel(ctx)
	stopped := make(chan error, 1)
	go func() {
		defer conn.Close(context.WithoutCancel(ctx))
		for {
			if err := neighbour(neighbourCtx, conn); err != nil {
				if neighbourCtx.Err() != nil {
					err = nil
				}
				stopped <- err
				return
			}
		}
	}()
	err = do()
	cancel()
	return errors.Join(err, <-stopped)
}

// isolateDropped measures a consumer from the bridge's start to its last ack, where another stream's table was dropped
// while it had changes to be captured and a consumer behind, and where that goes on.
func (b *bench) isolateDropped(ctx context.Context) error {
	rows := b.size(100_000)
	with := func(name, trouble string) (*source, side, error) {
		s, err := b.source(ctx, "isolation_"+name, "create table other (like orders including all)",
			"select sequin.create_stream('other', '{other}')", "select sequin.create_consumer('neighbour', 'other')",
			"select sequin.create_consumer('bench', 'orders')")
		if err == nil {
			err = execute(ctx, s.url, "insert into other select i from generate_series(1, 1000) i", trouble)
		}
		return s, side{name, func(ctx context.Context) (float64, error) {
			p, err := b.startBridge(ctx, s.url)
			if err != nil {
				return 0, err
			}
			start := time.Now()
			err = s.awaitLog(ctx)
			if err == nil {
				_, err = drain(ctx, s.url, consume("bench"), backlog{workers: 2, batch: 100, messages: rows - 200})
			}
			elapsed := time.Since(start).Seconds()
			return float64(rows) / elapsed, errors.Join(err, p.stop())
		}}, err
	}
	dropped, sideDropped, err := with("dropped", "drop table other")
	if err != nil {
		return err
	}
	defer dropped.drop()
	there, sideThere, err := with("there", "select 1")
	if err != nil {
		return err
	}
	defer there.drop()
	return b.compareOn(ctx, "isolation.dropped_table", "messages/s", func(ctx context.Context) error {
		return errors.Join(dropped.write(ctx, rows, true), there.write(ctx, rows, true))
	}, sideDropped, sideThere)
}
