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
// of its messages, 1,000,000 in all, and where as many rows are written to a table that is not streamed: a receive on a
// server that has just been at work takes twice as long as on one that has slept, whatever the work was.
func runQuiet(ctx context.Context, b *bench) error {
	const messages = 200
	times := map[string][]float64{}
	for _, at := range []struct {
		name  string
		write func(context.Context, *changeLog, *pgx.Conn, int) error
	}{{"beside_busy", writeBusy}, {"beside_other_work", writeElsewhere}} {
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
			times[at.name], err = quietTimes(ctx, log, messages, func(conn *pgx.Conn) error {
				return at.write(ctx, log, conn, b.size(1_000_000)/messages)
			})
			return err
		})
		if err != nil {
			return err
		}
	}
	print("quiet.receive", median(times["beside_busy"])/median(times["beside_other_work"]), "x")
	print("quiet.receive.beside_busy", median(times["beside_busy"]), "ms")
	print("quiet.receive.beside_other_work", median(times["beside_other_work"]), "ms")
	return nil
}

func writeBusy(ctx context.Context, log *changeLog, conn *pgx.Conn, rows int) error {
	return log.add(ctx, conn, "orders", rows, 0)
}

func writeElsewhere(ctx context.Context, _ *changeLog, conn *pgx.Conn, rows int) error {
	if _, err := conn.Exec(ctx, `create table if not exists elsewhere (like sequin.log including all)`); err != nil {
		return fmt.Errorf("create a table beside the log: %w", err)
	}
	if _, err := conn.Exec(ctx, `
		insert into elsewhere (seq, committed_at, route_id, group_hash, lane, action, table_schema, table_name, record_pk, record, metadata)
		select c.id, clock_timestamp(), 0, hashtext(c.id::text), hashtext(c.id::text) & 63, 'i', 'public', 'orders', c.id::text,
		       `+logRecord+`, `+logMetadata+`
		from (
		  select i, m.last + i as id
		  from (select coalesce(max(seq), 0) as last from elsewhere) m, generate_series(1, $1::bigint) i) c
		order by c.i / 800, 5, c.i`, rows); err != nil {
		return fmt.Errorf("write beside the log: %w", err)
	}
	return nil
}

// quietTimes returns how many milliseconds each receive took, after others have written.
func quietTimes(ctx context.Context, log *changeLog, messages int, write func(*pgx.Conn) error) ([]float64, error) {
	conn, err := pgx.Connect(ctx, log.url)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// A worker is not who writes the log: what its session keeps ready is not driven out by that.
	writer, err := pgx.Connect(ctx, log.url)
	if err != nil {
		return nil, err
	}
	defer writer.Close(context.WithoutCancel(ctx))
	var times []float64
	for range messages {
		if err := write(writer); err != nil {
			return nil, err
		}
		if err := log.add(ctx, writer, "quiet", 1, 0); err != nil {
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
