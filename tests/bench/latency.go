package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// runLatency commits 200 small transactions a second, and measures from when each commit has returned until a worker
// that waits in receive has the message.
func runLatency(ctx context.Context, b *bench) error {
	s, err := b.source(ctx, "latency", "select sequin.create_consumer('bench', 'orders')")
	if err != nil {
		return err
	}
	defer s.drop()
	p, err := b.startBridge(ctx, s.url)
	if err != nil {
		return err
	}
	const every = 5 * time.Millisecond
	transactions := b.size(3_000)
	committed := make([]time.Time, transactions+1)
	arrived := make([]time.Time, transactions+1)
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return awaitMessages(groupCtx, s.url, arrived) })
	group.Go(func() error { return commitEvery(groupCtx, s.url, every, committed) })
	if err := errors.Join(group.Wait(), p.stop()); err != nil {
		return err
	}
	var latencies []float64
	for id := 1; id <= transactions; id++ {
		latencies = append(latencies, max(arrived[id].Sub(committed[id]).Seconds()*1000, 0))
	}
	slices.Sort(latencies)
	print("latency.p50", latencies[len(latencies)/2], "ms")
	print("latency.p99", latencies[len(latencies)*99/100], "ms")
	print("latency.max", latencies[len(latencies)-1], "ms")
	return nil
}

// commitEvery inserts a row at each tick, and notes when its commit has returned.
func commitEvery(ctx context.Context, url string, every time.Duration, committed []time.Time) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for id := 1; id < len(committed); id++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if _, err := conn.Exec(ctx, "insert into orders (id, customer) values ($1, 'somebody')", id); err != nil {
			return fmt.Errorf("insert row: %w", err)
		}
		committed[id] = time.Now()
	}
	return nil
}

// awaitMessages receives and acknowledges, waiting where there is nothing, until each message has arrived.
func awaitMessages(ctx context.Context, url string, arrived []time.Time) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for missing := len(arrived) - 1; missing > 0; {
		rows, err := conn.Query(ctx, "select ack_id, (record ->> 'id')::int from sequin.receive('bench', 100, wait => '10 seconds')")
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		var ackIDs []int64
		var ackID int64
		var id int
		if _, err := pgx.ForEachRow(rows, []any{&ackID, &id}, func() error {
			arrived[id] = time.Now()
			ackIDs = append(ackIDs, ackID)
			return nil
		}); err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		if len(ackIDs) == 0 {
			return fmt.Errorf("receive: %d messages are missing", missing)
		}
		if _, err := conn.Exec(ctx, "select sequin.ack('bench', $1)", ackIDs); err != nil {
			return fmt.Errorf("ack: %w", err)
		}
		missing -= len(ackIDs)
	}
	return nil
}

// runMemory reads from Linux how much memory the bridge had at most.
func runMemory(ctx context.Context, b *bench) error {
	s, err := b.source(ctx, "memory")
	if err != nil {
		return err
	}
	defer s.drop()
	if err := s.write(ctx, b.size(1_000_000), true); err != nil {
		return err
	}
	p, err := b.startBridge(ctx, s.url)
	if err != nil {
		return err
	}
	if err := s.awaitLog(ctx); err != nil {
		return errors.Join(err, p.stop())
	}
	peak := procLine(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid), "VmHWM", "")
	if err := p.stop(); err != nil {
		return err
	}
	var kilobytes float64
	if _, err := fmt.Sscanf(strings.TrimSpace(peak), "%f kB", &kilobytes); err != nil {
		fmt.Fprintln(os.Stderr, "bench: this system does not tell a process's memory")
		return nil
	}
	print("memory.bridge_resident", kilobytes/1024, "MB")
	return nil
}
