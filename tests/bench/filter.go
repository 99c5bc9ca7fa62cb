package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// A table of 20 columns, and an insert of a row of it in the log for each of so many.
const (
	wideTable = `
		create table wide (
		  id bigint primary key, i1 int, i2 int, i3 bigint, n1 numeric, n2 numeric, t1 text, t2 text, t3 text, t4 text, b1 boolean, b2 boolean,
		  at1 timestamptz, at2 timestamptz, d date, f1 float8, f2 float8, u uuid, j jsonb, ints int[])`
	fillWide = `
		with row as (
		  select i, to_jsonb(w) as record
		  from generate_series(1, $1::bigint) i
		  cross join lateral (
		    select i as id, i % 100 as i1, 2 as i2, 3 as i3, i / 100.0 as n1, 30.25 as n2, 'customer ' || i % 1000 as t1, repeat('x', 40) as t2, 'y' as t3,
		           'z' as t4, true as b1, false as b2, now() as at1, now() as at2, current_date as d, 1.5 as f1, 2.5 as f2,
		           md5(i::text)::uuid as u, '{"k": 1, "l": [1, 2, 3]}'::jsonb as j, '{1,2,3}'::int[] as ints) w
		), written as (
		  insert into sequin.log (
		    seq, committed_at, route_id, group_hash, lane, action, table_schema, table_name, record_pk, record, changes, metadata)
		  select r.i, clock_timestamp(), t.id, hashtext(r.i::text), hashtext(r.i::text) & 63, 'i', 'public', 'wide', r.i::text, r.record, null,
		         '{"commit_lsn": "0/1", "xid": 5}'
		  from row r, sequin.source_table t
		)
		select sequin.bridge_commit(1, p.step, pg_current_wal_insert_lsn()::text, $1, array[1], array[$1::bigint])
		from (select p.step from sequin.progress p order by p.step desc limit 1) p`
)

// choices are what is measured: each beside a consumer whose feed takes every message as it is.
var choices = []struct{ name, orders, wide string }{
	{"rare", `filter => 'new.id % 1000 = 0'`, `filter => 'new.id % 1000 = 0'`},
	{
		"typed", `filter => 'new.amount >= 0 and new.status = ''pending'' and new.customer like ''customer%'''`,
		`filter => 'new.n1 >= 0 and new.t1 like ''customer%'' and new.at1 > ''2020-01-01'' and new.b1 and (new.j ->> ''k'')::int = 1'`,
	},
	{
		"transform", `transform => 'jsonb_build_object(''id'', new.id, ''total'', new.amount * 2)'`,
		`transform => 'jsonb_build_object(''id'', new.id, ''total'', new.n1 + new.n2)'`,
	},
}

// runFilter measures how fast messages get into a consumer's feed, that are in the log of a wide table; and how fast
// source commits get there through a bridge.
func runFilter(ctx context.Context, b *bench) error {
	url, drop, err := b.database(ctx, "filter")
	if err != nil {
		return err
	}
	defer drop()
	rows := b.size(100_000)
	if err := execute(ctx, url, wideTable, `select sequin.create_stream('wide', '{wide}')`,
		`select sequin.bridge_claim(1, 'bench', 'bench', 1, 1, '0/1')`); err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, fillWide, rows); err != nil {
		return fmt.Errorf("fill log: %w", err)
	}
	if _, err := conn.Exec(ctx, "vacuum analyze sequin.log"); err != nil {
		return fmt.Errorf("vacuum log: %w", err)
	}
	for _, c := range choices {
		if err := b.compare(ctx, "filter.wide."+c.name, "rows/s",
			side{c.name, func(ctx context.Context) (float64, error) { return feedRate(ctx, conn, rows, c.wide) }},
			side{"all", func(ctx context.Context) (float64, error) { return feedRate(ctx, conn, rows, takesAll) }}); err != nil {
			return err
		}
	}
	for _, c := range choices {
		if err := b.compareCapture(ctx, c.name, c.orders); err != nil {
			return err
		}
	}
	return nil
}

// takesAll are the options of a consumer that has a feed, and every insert in it.
const takesAll = `actions => '{insert,update}'`

// feedRate makes a consumer that starts at the log's beginning, and returns how many rows a second its feed gets through.
func feedRate(ctx context.Context, conn *pgx.Conn, rows int, options string) (float64, error) {
	var id int32
	for _, statement := range []string{
		`truncate sequin.feed`,
		`select sequin.create_consumer('bench', 'wide', ` + options + `)`,
		`update sequin.consumer set start_seq = 0, start_total = 0`,
		`insert into sequin.feed_progress (feed_id, step, seq, lanes, total) select feed_id, 1, 0, 0, 0 from sequin.consumer`,
	} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			return 0, fmt.Errorf("make consumer: %w", err)
		}
	}
	if err := conn.QueryRow(ctx, "select id from sequin.consumer").Scan(&id); err != nil {
		return 0, fmt.Errorf("find consumer: %w", err)
	}
	const batch = 10_000
	start := time.Now()
	for looked := int64(batch); looked == batch; {
		if err := conn.QueryRow(ctx, "select sequin.bridge_feed($1, $2)", id, batch).Scan(&looked); err != nil {
			return 0, fmt.Errorf("feed: %w", err)
		}
	}
	elapsed := time.Since(start).Seconds()
	if _, err := conn.Exec(ctx, "select sequin.drop_consumer('bench')"); err != nil {
		return 0, fmt.Errorf("drop consumer: %w", err)
	}
	return float64(rows) / elapsed, nil
}

// compareCapture measures from the bridge's start until everything is in a consumer's feed.
func (b *bench) compareCapture(ctx context.Context, name, options string) error {
	rows := b.size(100_000)
	with := func(name, options string) (*source, side, error) {
		s, err := b.source(ctx, "filter_"+name, "select sequin.create_consumer('bench', 'orders', "+options+")")
		return s, side{name, func(ctx context.Context) (float64, error) {
			p, err := b.startBridge(ctx, s.url)
			if err != nil {
				return 0, err
			}
			start := time.Now()
			if err = s.awaitLog(ctx); err == nil {
				err = await(ctx, s.url, `select (select max(p.seq) from sequin.feed_progress p) >= (select max(p.last_seq) from sequin.progress p)`)
			}
			elapsed := time.Since(start).Seconds()
			return float64(rows) / elapsed, errors.Join(err, p.stop())
		}}, err
	}
	ours, sideOurs, err := with(name, options)
	if err != nil {
		return err
	}
	defer ours.drop()
	all, sideAll, err := with("all", takesAll)
	if err != nil {
		return err
	}
	defer all.drop()
	return b.compareOn(ctx, "filter.capture."+name, "rows/s", func(ctx context.Context) error {
		return errors.Join(ours.write(ctx, rows, true), all.write(ctx, rows, true))
	}, sideOurs, sideAll)
}
