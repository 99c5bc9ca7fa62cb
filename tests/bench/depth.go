package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// runDepth measures a consumer that is 5,000,000 messages behind, beside one that is 50,000 behind.
func runDepth(ctx context.Context, b *bench) error {
	url, drop, err := b.database(ctx, "depth")
	if err != nil {
		return err
	}
	defer drop()
	log, err := newChangeLog(ctx, url)
	if err != nil {
		return err
	}
	deep, shallow := b.size(5_000_000), b.size(50_000)
	if err := log.fill(ctx, "orders", deep, 0); err != nil {
		return err
	}
	at := func(name string, behind int) side {
		return side{name, func(ctx context.Context) (rate float64, err error) {
			if err := log.consumer(ctx, "bench", "orders", behind); err != nil {
				return 0, err
			}
			return rate, log.tend(ctx, func() error {
				rate, err = drain(ctx, url, consume("bench"), backlog{workers: 4, batch: 100, messages: shallow})
				return err
			})
		}}
	}
	return b.compare(ctx, fmt.Sprintf("depth.%d_behind", deep), "messages/s", at("deep", deep), at("shallow", shallow))
}

// runQuiet measures how long a receive from a quiet table takes, where a busy table has 5,000 changes between each two
// of its messages, 1,000,000 in all, and where it has none.
func runQuiet(ctx context.Context, b *bench) error {
	const messages = 200
	times := map[string][]float64{}
	for _, at := range []struct {
		name string
		busy int
	}{{"beside_busy", b.size(1_000_000) / messages}, {"alone", 0}} {
		url, drop, err := b.database(ctx, "quiet_"+at.name)
		if err != nil {
			return err
		}
		defer drop()
		log, err := newChangeLog(ctx, url)
		if err != nil {
			return err
		}
		if err := log.consumer(ctx, "bench", "quiet", 0); err != nil {
			return err
		}
		err = log.tend(ctx, func() error {
			times[at.name], err = quietTimes(ctx, log, messages, at.busy)
			return err
		})
		if err != nil {
			return err
		}
	}
	print("quiet.receive", median(times["beside_busy"])/median(times["alone"]), "x")
	print("quiet.receive.beside_busy", median(times["beside_busy"]), "ms")
	print("quiet.receive.alone", median(times["alone"]), "ms")
	return nil
}

// quietTimes returns how many milliseconds each receive took.
func quietTimes(ctx context.Context, log *changeLog, messages, busy int) ([]float64, error) {
	conn, err := pgx.Connect(ctx, log.url)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var times []float64
	for range messages {
		if busy > 0 {
			if err := log.add(ctx, conn, "orders", busy, 0); err != nil {
				return nil, err
			}
		}
		if err := log.add(ctx, conn, "quiet", 1, 0); err != nil {
			return nil, err
		}
		start := time.Now()
		ids, err := consume("bench").take(ctx, conn, 1)
		if err != nil {
			return nil, err
		}
		times = append(times, time.Since(start).Seconds()*1000)
		if len(ids) != 1 {
			return nil, errors.New("receive: the quiet table's message is not there")
		}
		if err := consume("bench").settle(ctx, conn, ids); err != nil {
			return nil, err
		}
	}
	return times, nil
}
