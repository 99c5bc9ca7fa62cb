package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// runCapture lets the bridge, and a subscription in a second database, catch up with the same work, each from a slot of
// its own. The clock runs from when the slot is read until the last row is committed on the other side.
func runCapture(ctx context.Context, b *bench) error {
	s, native, drop, err := b.sourceBesideNative(ctx, "capture")
	if err != nil {
		return err
	}
	defer drop()
	for _, work := range b.backlogs() {
		if err := b.compareOn(ctx, "capture."+work.name, "rows/s",
			func(ctx context.Context) error { return s.write(ctx, work.rows, work.isOne) },
			side{"sequin", func(ctx context.Context) (float64, error) { return b.captureRate(ctx, s, work.rows) }},
			side{"native", func(ctx context.Context) (float64, error) { return native.rate(ctx, work.rows) }}); err != nil {
			return err
		}
	}
	return nil
}

// backlogs are what there is to catch up with.
func (b *bench) backlogs() []struct {
	name  string
	rows  int
	isOne bool // in one transaction
} {
	return []struct {
		name  string
		rows  int
		isOne bool
	}{{"one_transaction", b.size(500_000), true}, {"one_row_transactions", b.size(100_000), false}}
}

// sourceBesideNative makes a source, and a subscription to its table with a slot of its own. It returns how to drop both.
func (b *bench) sourceBesideNative(ctx context.Context, name string, statements ...string) (*source, *subscription, func(), error) {
	s, err := b.source(ctx, name, append([]string{
		"create publication bench for table orders", "select pg_create_logical_replication_slot('bench_native', 'pgoutput')",
	}, statements...)...)
	if err != nil {
		return nil, nil, nil, err
	}
	native, drop, err := b.subscription(ctx, s)
	if err != nil {
		s.drop()
		return nil, nil, nil, err
	}
	return s, native, func() {
		drop()
		s.drop()
	}, nil
}

// subscription is PostgreSQL's own: it applies the source's table to a second database of the same server.
type subscription struct {
	source *source
	url    string
}

func (b *bench) subscription(ctx context.Context, s *source) (*subscription, func(), error) {
	config, err := pgx.ParseConfig(s.url)
	if err != nil {
		return nil, nil, err
	}
	url, drop, err := b.database(ctx, "subscriber")
	if err != nil {
		return nil, nil, err
	}
	conninfo := fmt.Sprintf("host=%s port=%d user=%s dbname=%s", config.Host, config.Port, config.User, config.Database)
	if err := execute(ctx, url, ordersTable, fmt.Sprintf(`
		create subscription bench connection '%s' publication bench
		with (create_slot = false, slot_name = 'bench_native', enabled = false, copy_data = false)`, conninfo)); err != nil {
		drop()
		return nil, nil, err
	}
	return &subscription{s, url}, func() {
		ctx := context.WithoutCancel(ctx)
		if err := execute(ctx, url, "alter subscription bench disable", "alter subscription bench set (slot_name = none)",
			"drop subscription bench"); err == nil {
			drop()
		}
	}, nil
}

// rate enables the subscription, and returns how many of the rows written since it last was it applies a second.
func (n *subscription) rate(ctx context.Context, rows int) (float64, error) {
	if err := execute(ctx, n.url, "alter subscription bench enable"); err != nil {
		return 0, err
	}
	const active = "select active = $1 from pg_replication_slots where slot_name = 'bench_native'"
	if err := await(ctx, n.source.url, active, true); err != nil {
		return 0, err
	}
	start := time.Now()
	err := await(ctx, n.url, "select exists (select from orders where id = $1)", n.source.lastID)
	elapsed := time.Since(start).Seconds()
	return float64(rows) / elapsed, errors.Join(err,
		execute(ctx, n.url, "alter subscription bench disable"),
		await(ctx, n.source.url, active, false))
}

// runConsumers lets the bridge catch up with the same work, with one consumer on the stream and with ten.
func runConsumers(ctx context.Context, b *bench) error {
	rows := b.size(200_000)
	with := func(name string, consumers int) (*source, side, error) {
		var statements []string
		for i := range consumers {
			statements = append(statements, fmt.Sprintf("select sequin.create_consumer('consumer_%d', 'orders')", i))
		}
		s, err := b.source(ctx, "consumers_"+name, statements...)
		return s, side{name, func(ctx context.Context) (float64, error) { return b.captureRate(ctx, s, rows) }}, err
	}
	one, sideOne, err := with("one", 1)
	if err != nil {
		return err
	}
	defer one.drop()
	ten, sideTen, err := with("ten", 10)
	if err != nil {
		return err
	}
	defer ten.drop()
	return b.compareOn(ctx, "consumers.ten", "rows/s", func(ctx context.Context) error {
		return errors.Join(one.write(ctx, rows, true), ten.write(ctx, rows, true))
	}, sideTen, sideOne)
}
