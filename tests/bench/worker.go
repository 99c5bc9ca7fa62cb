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

var (
	queueJob  = job{queueReceive, queueAck}
	sequinJob = job{"select * from sequin.receive('bench', $1)", "select sequin.ack('bench', $1)"}
)

// drain lets workers take a backlog until they have done so many messages, it is empty, or the time is up, and
// returns the messages done a second. Connections are made, and statements prepared, before the clock starts.
func drain(ctx context.Context, url string, j job, workers, batch, messages int, limit time.Duration) (float64, error) {
	conns := make([]*pgx.Conn, workers)
	for i := range conns {
		conn, err := pgx.Connect(ctx, url)
		if err != nil {
			return 0, fmt.Errorf("connect: %w", err)
		}
		defer conn.Close(ctx)
		conns[i] = conn
		// A batch each, not counted: plans and caches are what a worker that has been up for a while has.
		if _, err := j.once(ctx, conn, batch); err != nil {
			return 0, err
		}
	}
	var done atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for _, conn := range conns {
		group.Go(func() error {
			misses := 0
			for done.Load() < int64(messages) && time.Since(start) < limit && misses < 50 {
				n, err := j.once(ctx, conn, batch)
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
	rows, err := conn.Query(ctx, j.receive, batch)
	if err != nil {
		return 0, fmt.Errorf("receive: %w", err)
	}
	ids := make([]int64, 0, batch)
	for rows.Next() {
		ids = append(ids, int64(binary.BigEndian.Uint64(rows.RawValues()[0])))
	}
	if err := rows.Err(); err != nil {
		return 0, fmt.Errorf("receive: %w", err)
	}
	if len(ids) == 0 || j.ack == "" {
		return len(ids), nil
	}
	var acked int
	if err := conn.QueryRow(ctx, j.ack, ids).Scan(&acked); err != nil {
		return 0, fmt.Errorf("ack: %w", err)
	}
	if acked != len(ids) {
		return 0, fmt.Errorf("ack: %d of %d messages counted", acked, len(ids))
	}
	return acked, nil
}
