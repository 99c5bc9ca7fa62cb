package main

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// runGroups measures a backlog of few groups, whose order must be kept, beside one where each message is a group.
func runGroups(ctx context.Context, b *bench) error {
	messages := b.size(100_000)
	rate := func(name string, groups int) (side, func(), error) {
		url, drop, err := b.database(ctx, "groups_"+name)
		if err != nil {
			return side{}, nil, err
		}
		log, err := newChangeLog(ctx, url)
		if err == nil {
			err = log.fill(ctx, "orders", messages, groups)
		}
		if err != nil {
			drop()
			return side{}, nil, err
		}
		return side{name, func(ctx context.Context) (rate float64, err error) {
			// Each change is a message here: of a row's versions nothing is skipped.
			if err := log.consumer(ctx, "bench", "changes", messages); err != nil {
				return 0, err
			}
			return rate, log.tend(ctx, func() error {
				rate, err = drain(ctx, url, consume("bench"), backlog{workers: 8, batch: 10, messages: messages})
				return err
			})
		}}, drop, nil
	}
	hot, dropHot, err := rate("hot", 20)
	if err != nil {
		return err
	}
	defer dropHot()
	own, dropOwn, err := rate("own", 0)
	if err != nil {
		return err
	}
	defer dropOwn()
	return b.compare(ctx, "groups.hot_20", "messages/s", hot, own)
}

// runHanging lets a worker receive and say nothing more, and counts how many of the other groups others get within a
// second.
func runHanging(ctx context.Context, b *bench) error {
	url, drop, err := b.database(ctx, "hanging")
	if err != nil {
		return err
	}
	defer drop()
	log, err := newChangeLog(ctx, url)
	if err != nil {
		return err
	}
	const groups = 1000
	if err := log.fill(ctx, "orders", groups, 0); err != nil {
		return err
	}
	for _, at := range []struct {
		name  string
		batch int
	}{{"hanging.delivery", 1}, {"hanging.batch_of_10", 10}} {
		var shares []float64
		for range b.rounds {
			if err := log.consumer(ctx, "bench", "orders", groups); err != nil {
				return err
			}
			share, err := othersOf(ctx, url, groups, at.batch)
			if err != nil {
				return err
			}
			shares = append(shares, share)
		}
		print(at.name+".others_within_1s", median(shares), "%")
	}
	return nil
}

// othersOf returns which percentage of the groups that do not hang are delivered within a second, to 4 workers.
func othersOf(ctx context.Context, url string, groups, hanging int) (float64, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// It is received, and never acknowledged: its ack_wait is 30 seconds.
	hung, err := consume("bench").take(ctx, conn, hanging)
	if err != nil {
		return 0, err
	}
	var done [4]int
	group, ctx := errgroup.WithContext(ctx)
	for i := range done {
		group.Go(func() error {
			conn, err := pgx.Connect(ctx, url)
			if err != nil {
				return err
			}
			defer conn.Close(context.WithoutCancel(ctx))
			for start := time.Now(); time.Since(start) < time.Second; {
				n, err := consume("bench").once(ctx, conn, 10)
				if err != nil {
					return err
				}
				done[i] += n
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return 0, err
	}
	return 100 * float64(done[0]+done[1]+done[2]+done[3]) / float64(groups-len(hung)), nil
}
