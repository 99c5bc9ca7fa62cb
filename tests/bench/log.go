package main

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// changeLog fills the change log of a database directly, as the bridge would: rows with a COPY's columns, and
// sequin.bridge_commit in the same transaction. Where delivery is measured and not capture, this is a thousand times
// less work to set up, and the rows are the same.
type changeLog struct {
	url string
}

// newChangeLog makes a table orders with a stream over it, and takes the log over from whatever bridge there was.
func newChangeLog(ctx context.Context, url string) (*changeLog, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, `
		set client_min_messages = error;
		create table orders (id bigint primary key, customer text, amount numeric, status text, note text, created_at timestamptz);
		create table quiet (like orders including all);
		select sequin.create_stream('orders', '{orders}');
		select sequin.create_stream('quiet', '{quiet}');
		select sequin.bridge_claim(1, 'bench', 'bench', 1, 1, '0/1')`); err != nil {
		return nil, fmt.Errorf("create stream: %w", err)
	}
	return &changeLog{url: url}, nil
}

// fill adds messages to the log, each an insert of a row of about 200 bytes, in batches as of one bridge's commit.
// groups is how many rows they are of; 0: a row each.
func (l *changeLog) fill(ctx context.Context, table string, messages, groups int) error {
	conn, err := pgx.Connect(ctx, l.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(ctx)
	for done := 0; done < messages; {
		n := min(messages-done, 100_000)
		if _, err := conn.Exec(ctx, `
			with head as (
			  select p.step, p.last_seq from sequin.progress p where p.source_id = 1 order by p.step desc limit 1
			), route as (
			  select t.id from sequin.source_table t where t.table_name = $1
			), change as (
			  select i, h.last_seq + i as seq, case when $4 > 0 then (i * 7919) % $4 else $3 + i end as id
			  from head h, generate_series(1, $2::bigint) i
			), written as (
			  insert into sequin.log (
			    seq, committed_at, route_id, group_hash, lane, action, table_schema, table_name, record_pk, record, changes, metadata)
			  select c.seq, clock_timestamp(), r.id, hashtext(r.id || '.' || c.id), hashtext(r.id || '.' || c.id) & 63,
			         'i', 'public', $1, c.id::text,
			         jsonb_build_object('id', c.id, 'customer', 'customer ' || c.i % 1000, 'amount', (c.i * 7919 % 100000) / 100.0,
			           'status', 'pending', 'note', repeat('x', 60), 'created_at', now()),
			         null, jsonb_build_object('commit_lsn', pg_current_wal_insert_lsn()::text, 'xid', 5)
			  from change c, route r
			)
			select sequin.bridge_commit(1, h.step, pg_current_wal_insert_lsn()::text, h.last_seq + $2, array[r.id], array[$2::bigint])
			from head h, route r`, table, n, done, groups); err != nil {
			return fmt.Errorf("fill log: %w", err)
		}
		done += n
	}
	if _, err := conn.Exec(ctx, "vacuum analyze sequin.log"); err != nil {
		return fmt.Errorf("vacuum log: %w", err)
	}
	return nil
}

// consumer makes a consumer that starts at the beginning of the log, as it would have had it been made before.
func (l *changeLog) consumer(ctx context.Context, name, stream string) error {
	conn, err := pgx.Connect(ctx, l.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, `
		select sequin.drop_consumer($1, if_exists => true)`, name); err != nil {
		return fmt.Errorf("drop consumer: %w", err)
	}
	if _, err := conn.Exec(ctx, `select sequin.create_consumer($1, $2)`, name, stream); err != nil {
		return fmt.Errorf("create consumer: %w", err)
	}
	if _, err := conn.Exec(ctx, `
		with started as (
		  update sequin.consumer c set start_seq = 0, start_total = 0 where c.name = $1 returning c.id, c.lane_count
		), lanes as (
		  insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq)
		  select s.id, l, 0, nextval('sequin.turn'), 0, 0 from started s, generate_series(0, s.lane_count - 1) l
		)
		insert into sequin.floor (consumer_id, step, seq, busy) select s.id, 1, 0, '{}' from started s`, name); err != nil {
		return fmt.Errorf("start consumer: %w", err)
	}
	return nil
}
