package main

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// The usual queue table, as pgmq and many of its kind have it: what is read is hidden for a while, and what is done
// is deleted.
const (
	queueTable = `
		drop table if exists queue;
		create table queue (
		  msg_id      bigint generated always as identity primary key,
		  read_ct     int not null default 0,
		  enqueued_at timestamptz not null default now(),
		  vt          timestamptz not null default now(),
		  message     jsonb
		);
		create index on queue (vt)`
	queueReceive = `
		with next as (
		  select msg_id from queue where vt <= clock_timestamp() order by msg_id limit $1 for update skip locked
		)
		update queue q set vt = clock_timestamp() + interval '30 seconds', read_ct = q.read_ct + 1
		from next where q.msg_id = next.msg_id
		returning q.msg_id, q.read_ct, q.enqueued_at, q.vt, q.message`
	queueAck = `with done as (delete from queue where msg_id = any ($1) returning 1) select count(*) from done`
)

// fillQueue makes the queue table anew, and fills it with what a worker gets from receive for the first messages of the
// log, in one jsonb.
func fillQueue(ctx context.Context, url string, messages int) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, queueTable); err != nil {
		return fmt.Errorf("create queue: %w", err)
	}
	if _, err := conn.Exec(ctx, `
		insert into queue (message)
		select jsonb_build_object('action', sequin._action(l.action), 'table_schema', l.table_schema, 'table_name', l.table_name,
		         'record_pk', l.record_pk, 'record', l.record, 'committed_at', l.committed_at, 'metadata', l.metadata)
		from sequin.log l order by l.seq limit $1`, messages); err != nil {
		return fmt.Errorf("fill queue: %w", err)
	}
	if _, err := conn.Exec(ctx, "vacuum analyze queue"); err != nil {
		return fmt.Errorf("vacuum queue: %w", err)
	}
	return nil
}
