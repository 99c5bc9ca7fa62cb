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

// arrivals is when each row was committed, as the server has it, and when it had arrived, by its id. When its commit
// returned to the writer would not do: others may have the row before that.
type arrivals struct{ committed, arrived []time.Time }

func newArrivals(rows int) arrivals {
	return arrivals{make([]time.Time, rows+1), make([]time.Time, rows+1)}
}

// quantiles returns how long it took, in milliseconds.
func (a arrivals) quantiles() (p50, p99, longest float64) {
	var latencies []float64
	for id := 1; id < len(a.committed); id++ {
		latencies = append(latencies, max(a.arrived[id].Sub(a.committed[id]).Seconds()*1000, 0))
	}
	slices.Sort(latencies)
	n := len(latencies)
	return latencies[n/2], latencies[n*99/100], latencies[n-1]
}

// print prints how long it took.
func (a arrivals) print(name string) (p50, p99 float64) {
	p50, p99, longest := a.quantiles()
	print(name+".p50", p50, "ms")
	print(name+".p99", p99, "ms")
	print(name+".max", longest, "ms")
	return p50, p99
}

// runLatency commits 200 small transactions a second, and measures from each commit until a worker that waits in receive
// has the message.
func runLatency(ctx context.Context, b *bench) error {
	s, err := b.source(ctx, "latency", "select sequin.create_consumer('bench', 'orders')")
	if err != nil {
		return err
	}
	defer s.drop()
	a, err := b.receiveLatency(ctx, s, b.size(3_000), 1, 5*time.Millisecond)
	if err != nil {
		return err
	}
	a.print("latency")
	return nil
}

// runLatencyNative does so at 1,000 a second, and then lets a subscription in a second database have the same: there a
// trigger notes when the row is written, which is shortly before it can be seen.
func runLatencyNative(ctx context.Context, b *bench) error {
	s, native, drop, err := b.sourceBesideNative(ctx, "latency_native", "select sequin.create_consumer('bench', 'orders')")
	if err != nil {
		return err
	}
	defer drop()
	const writers, every = 4, 4 * time.Millisecond
	rows := b.size(60_000)
	ours, err := b.receiveLatency(ctx, s, rows, writers, every)
	if err != nil {
		return err
	}
	if err := execute(ctx, s.url, "truncate orders"); err != nil {
		return err
	}
	theirs, err := native.latency(ctx, rows, writers, every)
	if err != nil {
		return err
	}
	p50, p99 := ours.print("latency_1000.sequin")
	native50, native99 := theirs.print("latency_1000.native")
	print("latency_1000.p50", p50/native50, "x")
	print("latency_1000.p99", p99/native99, "x")
	return nil
}

// receiveLatency has a worker receive what writers commit.
func (b *bench) receiveLatency(ctx context.Context, s *source, rows, writers int, every time.Duration) (arrivals, error) {
	a := newArrivals(rows)
	p, err := b.startBridge(ctx, s.url)
	if err != nil {
		return a, err
	}
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.await(groupCtx, s.url) })
	for w := range writers {
		group.Go(func() error { return commitEvery(groupCtx, s.url, every, rows, 1+w, writers) })
	}
	return a, errors.Join(group.Wait(), p.stop())
}

// latency has the subscription apply what writers commit.
func (n *subscription) latency(ctx context.Context, rows, writers int, every time.Duration) (arrivals, error) {
	a := newArrivals(rows)
	if err := execute(ctx, n.url,
		"create table arrived (id bigint, at timestamptz)",
		`create function note_arrival() returns trigger language plpgsql as $$
		begin insert into public.arrived values (new.id, clock_timestamp()); return null; end $$`,
		"create trigger note_arrival after insert on orders for each row execute function note_arrival()",
		"alter table orders enable always trigger note_arrival",
		"alter subscription bench enable"); err != nil {
		return a, err
	}
	// It is there once the truncate is: what came before is not counted.
	if err := execute(ctx, n.source.url, "insert into orders (id) values (0)"); err != nil {
		return a, err
	}
	if err := await(ctx, n.url, "select exists (select from arrived where id = 0)"); err != nil {
		return a, err
	}
	if err := execute(ctx, n.url, "truncate arrived"); err != nil {
		return a, err
	}
	group, groupCtx := errgroup.WithContext(ctx)
	for w := range writers {
		group.Go(func() error { return commitEvery(groupCtx, n.source.url, every, rows, 1+w, writers) })
	}
	if err := group.Wait(); err != nil {
		return a, err
	}
	if err := await(ctx, n.url, "select count(*) >= $1 from arrived", rows); err != nil {
		return a, err
	}
	return a, errors.Join(
		readTimes(ctx, n.source.url, "select id, pg_xact_commit_timestamp(xmin) from orders where id > 0", a.committed),
		readTimes(ctx, n.url, "select id, at from arrived", a.arrived),
		execute(ctx, n.url, "alter subscription bench disable"))
}

// readTimes reads a time for each id.
func readTimes(ctx context.Context, url, sql string, times []time.Time) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	rows, err := conn.Query(ctx, sql)
	if err != nil {
		return err
	}
	var id int
	var at time.Time
	_, err = pgx.ForEachRow(rows, []any{&id, &at}, func() error {
		times[id] = at
		return nil
	})
	return err
}

// commitEvery inserts a row at each tick: every so manieth, from the first.
func commitEvery(ctx context.Context, url string, every time.Duration, rows, first, step int) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for id := first; id <= rows; id += step {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if _, err := conn.Exec(ctx, "insert into orders (id, customer) values ($1, 'somebody')", id); err != nil {
			return fmt.Errorf("insert row: %w", err)
		}
	}
	return nil
}

// await receives and acknowledges, waiting where there is nothing, until each message has arrived.
func (a arrivals) await(ctx context.Context, url string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for missing := len(a.arrived) - 1; missing > 0; {
		rows, err := conn.Query(ctx, "select ack_id, (record ->> 'id')::int, committed_at from sequin.receive('bench', 100, wait => '10 seconds')")
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		var ackIDs []int64
		var ackID int64
		var id int
		var committed time.Time
		if _, err := pgx.ForEachRow(rows, []any{&ackID, &id, &committed}, func() error {
			a.committed[id], a.arrived[id] = committed, time.Now()
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
