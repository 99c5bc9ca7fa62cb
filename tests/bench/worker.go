package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// job is what a worker does again and again: receive some messages, and, where ack is given, acknowledge all of them,
// each a statement of its own in a transaction of its own.
type job struct {
	receive string // of the batch size; the first column returned names the delivery
	ack     string // of an array of those names; "" where receiving is all
}

var queueJob = job{queueReceive, queueAck}

// consume is the job of a consumer's worker.
func consume(consumer string) job {
	return job{
		fmt.Sprintf("select * from sequin.receive('%s', $1)", consumer),
		fmt.Sprintf("select sequin.ack('%s', $1)", consumer),
	}
}

// pop is the same in one, where the work is in the same database.
func pop(consumer string) job {
	return job{receive: fmt.Sprintf("select * from sequin.pop('%s', $1)", consumer)}
}

// backlog is how much of a job there is to do.
type backlog struct {
	workers  int
	batch    int
	messages int
	limit    time.Duration // 0: until all is done
}

// drain lets workers take a backlog until it is done, it is empty, or the time is up, and returns the messages done a
// second. Connections are made, and statements prepared, before the clock starts.
func drain(ctx context.Context, url string, j job, b backlog) (float64, error) {
	rates, err := drainParts(ctx, url, j, b, 1)
	if err != nil {
		return 0, err
	}
	return rates[0], nil
}

// drainParts is drain, of which each of so many equal parts has its rate.
func drainParts(ctx context.Context, url string, j job, b backlog, parts int) ([]float64, error) {
	conns := make([]*pgx.Conn, b.workers)
	for i := range conns {
		conn, err := pgx.Connect(ctx, url)
		if err != nil {
			return nil, fmt.Errorf("connect: %w", err)
		}
		defer conn.Close(context.WithoutCancel(ctx))
		conns[i] = conn
		// A batch each, not counted: plans and caches are what a worker that has been up for a while has.
		if _, err := j.once(ctx, conn, b.batch); err != nil {
			return nil, err
		}
	}
	var rates []float64
	for range parts {
		rate, err := drainOnce(ctx, conns, j, b, b.messages/parts)
		if err != nil {
			return nil, err
		}
		rates = append(rates, rate)
	}
	return rates, nil
}

func drainOnce(ctx context.Context, conns []*pgx.Conn, j job, b backlog, messages int) (float64, error) {
	var done atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for _, conn := range conns {
		group.Go(func() error {
			misses := 0
			for done.Load() < int64(messages) && (b.limit == 0 || time.Since(start) < b.limit) && misses < 50 {
				n, err := j.once(ctx, conn, b.batch)
				if err != nil {
					return err
				}
				misses++
				if n > 0 {
					misses = 0
				}
				done.Add(int64(n))
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return 0, err
	}
	return float64(done.Load()) / time.Since(start).Seconds(), nil
}

// once does the job once. Returns how many messages it was.
func (j job) once(ctx context.Context, conn *pgx.Conn, batch int) (int, error) {
	ids, err := j.take(ctx, conn, batch)
	if err != nil || len(ids) == 0 || j.ack == "" {
		return len(ids), err
	}
	return len(ids), j.settle(ctx, conn, ids)
}

// take receives a batch, and reads all of it. Returns what names its deliveries.
func (j job) take(ctx context.Context, conn *pgx.Conn, batch int) ([]int64, error) {
	rows, err := conn.Query(ctx, j.receive, batch)
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	ids := make([]int64, 0, batch)
	for rows.Next() {
		ids = append(ids, int64(binary.BigEndian.Uint64(rows.RawValues()[0])))
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	return ids, nil
}

// settle acknowledges deliveries, each of which must count.
func (j job) settle(ctx context.Context, conn *pgx.Conn, ids []int64) error {
	var settled int
	if err := conn.QueryRow(ctx, j.ack, ids).Scan(&settled); err != nil {
		return fmt.Errorf("ack: %w", err)
	}
	if settled != len(ids) {
		return fmt.Errorf("ack: %d of %d messages counted", settled, len(ids))
	}
	return nil
}
