package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// runBackfill measures how fast a consumer that starts at the beginning gets its rows into the log, beside one COPY
// piped into another; for how long a snapshot is held meanwhile; and what another consumer's latency is beside it.
func runBackfill(ctx context.Context, b *bench) error {
	rows := b.size(1_000_000)
	s, err := b.source(ctx, "backfill", "create table old (like orders including all)",
		fmt.Sprintf(`insert into old select i, 'customer ' || i %% 1000, (i * 7919 %% 100000) / 100.0, 'pending', repeat('x', 60), now()
			from generate_series(1::bigint, %d) i`, rows),
		"vacuum analyze old", "select sequin.create_stream('old', '{old}')", "select sequin.create_consumer('bench', 'orders')")
	if err != nil {
		return err
	}
	defer s.drop()
	p, err := b.startBridge(ctx, s.url)
	if err != nil {
		return err
	}
	var oldest float64
	err = b.compare(ctx, "backfill", "rows/s",
		side{"beginning", func(ctx context.Context) (float64, error) {
			start := time.Now()
			var age float64
			if err := s.begin(ctx, &age); err != nil {
				return 0, err
			}
			elapsed := time.Since(start).Seconds()
			oldest = max(oldest, age)
			return float64(rows) / elapsed, s.forget(ctx)
		}},
		side{"copy_to_copy", func(ctx context.Context) (float64, error) {
			start := time.Now()
			err := s.copyToCopy(ctx)
			return float64(rows) / time.Since(start).Seconds(), err
		}})
	if err == nil {
		print("backfill.oldest_snapshot", oldest*1000, "ms")
		// What the bulk loads above have left to be written is no backfill's.
		err = execute(ctx, s.url, "checkpoint")
	}
	if err == nil {
		err = b.latencyBeside(ctx, s)
	}
	return errors.Join(err, p.stop())
}

// begin makes a consumer that starts at the beginning of old, and waits until the log has it all. age is for how long a
// snapshot was held, at most.
func (s *source) begin(ctx context.Context, age *float64) error {
	if err := execute(ctx, s.url, "select sequin.create_consumer('beginning', 'old', start_at => 'beginning')"); err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for {
		var isDone bool
		var held float64
		if err := conn.QueryRow(ctx, `
			select (select b.state = 'done' from sequin.backfills b where b.consumer = 'beginning'),
			       coalesce((select max(extract(epoch from clock_timestamp() - a.xact_start))::float8 from pg_stat_activity a
			                 where a.application_name = 'sequin backfill' and a.backend_xmin is not null), 0)`).Scan(&isDone, &held); err != nil {
			return fmt.Errorf("look at the backfill: %w", err)
		}
		*age = max(*age, held)
		if isDone {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// forget drops that consumer, and waits until its history is gone.
func (s *source) forget(ctx context.Context) error {
	if err := execute(ctx, s.url, "select sequin.drop_consumer('beginning', true)"); err != nil {
		return err
	}
	return await(ctx, s.url, "select not exists (select from sequin.log_segment where backfill_id is not null)")
}

// copyToCopy reads old with one COPY, as rows of the log, and pipes them into another that writes a table like it.
func (s *source) copyToCopy(ctx context.Context) error {
	if err := execute(ctx, s.url, "create table copied (like sequin.log including all)"); err != nil {
		return err
	}
	from, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer from.Close(context.WithoutCancel(ctx))
	to, err := pgx.Connect(ctx, s.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer to.Close(context.WithoutCancel(ctx))
	r, w := io.Pipe()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		_, err := from.PgConn().CopyTo(ctx, w, `copy (
			select o.id, now(), -1, hashint8(o.id), (hashint8(o.id) & 63)::int2, 'r'::"char", 'public'::text, 'old'::text, o.id::text,
			       to_jsonb(o), null::jsonb, jsonb_build_object('xid', null, 'backfill', 1, 'commit_lsn', '0/1234567')
			from old o order by o.id) to stdout (format binary)`)
		return errors.Join(err, w.CloseWithError(err))
	})
	group.Go(func() error {
		_, err := to.PgConn().CopyFrom(ctx, r, "copy copied from stdin (format binary)")
		return errors.Join(err, r.CloseWithError(err))
	})
	return errors.Join(group.Wait(), execute(context.WithoutCancel(ctx), s.url, "drop table copied"))
}

// latencyBeside measures the latency of a consumer of orders at 200 transactions a second, in turn beside a backfill of
// another table, again and again, and without one.
func (b *bench) latencyBeside(ctx context.Context, s *source) error {
	const every = 5 * time.Millisecond
	transactions := b.size(2_000)
	p99 := func(ctx context.Context) (float64, error) {
		if err := execute(ctx, s.url, "delete from orders", "select sequin.drop_consumer('bench')", "select sequin.create_consumer('bench', 'orders')"); err != nil {
			return 0, err
		}
		a := newArrivals(transactions)
		group, groupCtx := errgroup.WithContext(ctx)
		group.Go(func() error { return a.await(groupCtx, s.url) })
		group.Go(func() error { return commitEvery(groupCtx, s.url, every, transactions, 1, 1) })
		if err := group.Wait(); err != nil {
			return 0, err
		}
		_, p99, _ := a.quantiles()
		return p99, nil
	}
	return b.compare(ctx, "backfill.live_p99", "ms",
		side{"beside", func(ctx context.Context) (worst float64, err error) {
			err = alongside(ctx, s.url, func(ctx context.Context, _ *pgx.Conn) error {
				var age float64
				if err := s.forget(ctx); err != nil {
					return err
				}
				return s.begin(ctx, &age)
			}, func() error {
				worst, err = p99(ctx)
				return err
			})
			return worst, errors.Join(err, s.forget(ctx))
		}},
		side{"without", p99})
}
