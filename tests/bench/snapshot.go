package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// runSnapshot drains five parts of a backlog, with and without a snapshot held open from the start by somebody else, a
// dump or a report, which keeps dead rows from being removed. Compared is the fifth part.
func runSnapshot(ctx context.Context, b *bench) error {
	url, drop, err := b.database(ctx, "snapshot")
	if err != nil {
		return err
	}
	defer drop()
	log, err := newChangeLog(ctx, url)
	if err != nil {
		return err
	}
	messages := b.size(5 * 30_000)
	if err := log.fill(ctx, "orders", messages, 0); err != nil {
		return err
	}
	load := backlog{workers: 4, batch: 10, messages: messages}
	sequin := func(ctx context.Context) (rate float64, err error) {
		return rate, log.tend(ctx, func() error {
			rates, err := drainParts(ctx, url, consume("bench"), load, 5)
			if err == nil {
				rate = rates[4]
			}
			return err
		})
	}
	reset := func(ctx context.Context) error { return log.consumer(ctx, "bench", "orders", messages) }
	if err := b.compareHeld(ctx, "snapshot.sequin", url, reset, sequin); err != nil {
		return err
	}
	queue := func(ctx context.Context) (float64, error) {
		rates, err := drainParts(ctx, url, queueJob, load, 5)
		if err != nil {
			return 0, err
		}
		return rates[4], nil
	}
	// Once is enough: under the snapshot it takes a minute.
	once := *b
	once.rounds = 1
	return once.compareHeld(ctx, "snapshot.queue", url, func(ctx context.Context) error { return fillQueue(ctx, url, messages) }, queue)
}

// compareHeld compares a rate under a snapshot with the rate without.
func (b *bench) compareHeld(
	ctx context.Context, name, url string, reset func(context.Context) error, rate func(context.Context) (float64, error),
) error {
	return b.compare(ctx, name, "messages/s",
		side{"held", func(ctx context.Context) (float64, error) {
			if err := reset(ctx); err != nil {
				return 0, err
			}
			release, err := holdSnapshot(ctx, url)
			if err != nil {
				return 0, err
			}
			defer release()
			return rate(ctx)
		}},
		side{"free", func(ctx context.Context) (float64, error) {
			if err := reset(ctx); err != nil {
				return 0, err
			}
			return rate(ctx)
		}})
}

// holdSnapshot holds a repeatable read snapshot open until it is released.
func holdSnapshot(ctx context.Context, url string) (release func(), err error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	for _, statement := range []string{"begin isolation level repeatable read", "select count(*) from pg_class"} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			return nil, fmt.Errorf("hold snapshot: %w", err)
		}
	}
	return func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_ = conn.Close(ctx)
	}, nil
}
