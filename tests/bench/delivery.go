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
	limit := time.Duration(2 * b.scale * float64(time.Second))
	for _, at := range []struct{ workers, batch int }{{1, 1}, {8, 1}, {8, 10}, {1, 100}, {4, 100}, {4, 1000}, {1, 1000}} {
		name := fmt.Sprintf("receive_ack_%d_workers_batch_%d", at.workers, at.batch)
		if _, err := b.compare(ctx, name, "messages/s",
			side{"sequin", func(ctx context.Context) (float64, error) {
				if err := log.consumer(ctx, "bench", "orders"); err != nil {
					return 0, err
				}
				return drain(ctx, url, sequinJob, at.workers, at.batch, messages, limit)
			}},
			side{"queue", func(ctx context.Context) (float64, error) {
				if err := fillQueue(ctx, url, messages); err != nil {
					return 0, err
				}
				return drain(ctx, url, queueJob, at.workers, at.batch, messages, limit)
			}}); err != nil {
			return err
		}
	}
	_, err = b.compare(ctx, "pop_1_worker_batch_1000", "messages/s",
		side{"sequin", func(ctx context.Context) (float64, error) {
			if err := log.consumer(ctx, "bench", "orders"); err != nil {
				return 0, err
			}
			return drain(ctx, url, job{receive: "select * from sequin.pop('bench', $1)"}, 1, 1000, messages, limit)
		}},
		side{"queue", func(ctx context.Context) (float64, error) {
			if err := fillQueue(ctx, url, messages); err != nil {
				return 0, err
			}
			return drain(ctx, url, queueJob, 1, 1000, messages, limit)
		}})
	return err
}
