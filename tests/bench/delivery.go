package main

import (
	"context"
	"fmt"
	"time"
)

// runDelivery measures receiving and acknowledging at each number of workers and size of batch, and pop at one.
func runDelivery(ctx context.Context, b *bench) error {
	url, drop, err := b.database(ctx, "delivery")
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
	measure := func(name string, j job, load backlog) error {
		load.messages = messages
		return b.compare(ctx, name, "messages/s",
			side{"sequin", func(ctx context.Context) (rate float64, err error) {
				if err := log.consumer(ctx, "bench", "orders", messages); err != nil {
					return 0, err
				}
				return rate, log.tend(ctx, func() error {
					rate, err = drain(ctx, url, j, load)
					return err
				})
			}},
			side{"queue", func(ctx context.Context) (float64, error) {
				if err := fillQueue(ctx, url, messages); err != nil {
					return 0, err
				}
				return drain(ctx, url, queueJob, load)
			}})
	}
	for _, at := range []struct{ workers, batch int }{{1, 1}, {8, 1}, {8, 10}, {1, 100}, {4, 100}, {1, 1000}, {4, 1000}} {
		load := backlog{workers: at.workers, batch: at.batch}
		if at.batch == 1 {
			load.limit = 3 * time.Second // a backlog is drained whole; but not one by one
		}
		name := fmt.Sprintf("receive_ack.workers_%d.batch_%d", at.workers, at.batch)
		if err := measure(name, consume("bench"), load); err != nil {
			return err
		}
	}
	return measure("pop.workers_1.batch_1000", pop("bench"), backlog{workers: 1, batch: 1000})
}
