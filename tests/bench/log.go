package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// changeLog fills the change log of a database directly, as the bridge would: the rows of its COPY, and
// sequin.bridge_commit in the same transaction. Where delivery is measured and not capture, the rows are the same, and
// no bridge takes its share of the machine from the other side.
type changeLog struct {
	url string
}

// newChangeLog makes the tables orders and quiet with a stream over each, and one of every change of orders, and takes
// the log over as a bridge does.
func newChangeLog(ctx context.Context, url string) (*changeLog, error) {
	return &changeLog{url: url}, execute(ctx, url,
		`create table orders (id bigint primary key, customer text, amount numeric, status text, note text, created_at timestamptz)`,
		`create table quiet (like orders including all)`,
		`select sequin.create_stream('orders', '{orders}')`,
		`select sequin.create_stream('changes', '{orders}', mode => 'changes')`,
		`select sequin.create_stream('quiet', '{quiet}')`,
		`select sequin.bridge_claim(1, 'bench', 'bench', 1, 1, '0/1')`)
}

// fill adds messages to the log, each an insert of a row of about 200 bytes, in batches as of one commit of a bridge's.
// groups is how many rows they are of; 0: a row each.
func (l *changeLog) fill(ctx context.Context, table string, messages, groups int) error {
	conn, err := pgx.Connect(ctx, l.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for done := 0; done < messages; {
		n := min(messages-done, 100_000)
		if err := l.add(ctx, conn, table, n, groups); err != nil {
			return err
		}
		done += n
	}
	if _, err := conn.Exec(ctx, "vacuum analyze sequin.log"); err != nil {
		return fmt.Errorf("vacuum log: %w", err)
	}
	return nil
}

// What a row of the log has of c, the i-th row with this id.
const (
	logRecord = `jsonb_build_object('id', c.id, 'customer', 'customer ' || c.i % 1000, 'amount', (c.i * 7919 % 100000) / 100.0,
		'status', 'pending', 'note', repeat('x', 60), 'created_at', now())`
	logMetadata = `jsonb_build_object('commit_lsn', pg_current_wal_insert_lsn()::text, 'xid', 5)`
)

// add adds messages to the log in one transaction. As in a bridge's chunks, each of some 800 rows, a lane's are together.
func (l *changeLog) add(ctx context.Context, conn *pgx.Conn, table string, messages, groups int) error {
	if _, err := conn.Exec(ctx, `
		with head as (
		  select p.step, p.last_seq from sequin.progress p where p.source_id = 1 order by p.step desc limit 1
		), route as (
		  select t.id from sequin.source_table t where t.table_name = $1
		), change as (
		  select i, h.last_seq + i as seq, case when $3 > 0 then i * 7919 % $3 else h.last_seq + i end as id
		  from head h, generate_series(1, $2::bigint) i
		), written as (
		  insert into sequin.log (
		    seq, committed_at, route_id, group_hash, lane, action, table_schema, table_name, record_pk, record, changes, metadata)
		  select c.seq, clock_timestamp(), r.id, hashtext(r.id || '.' || c.id), hashtext(r.id || '.' || c.id) & 63,
		         'i', 'public', $1, c.id::text,
		         `+logRecord+`, null, `+logMetadata+`
		  from change c, route r
		  order by c.i / 800, 5, c.i
		)
		select sequin.bridge_commit(1, h.step, pg_current_wal_insert_lsn()::text, h.last_seq + $2, array[r.id], array[$2::bigint])
		from head h, route r`, table, messages, groups); err != nil {
		return fmt.Errorf("fill log: %w", err)
	}
	return nil
}

// consumer makes a consumer anew that starts so many messages behind the log's head, as it would have had it been made
// then.
func (l *changeLog) consumer(ctx context.Context, name, stream string, behind int) error {
	conn, err := pgx.Connect(ctx, l.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, statement := range []string{
		`select sequin.drop_consumer($1, if_exists => true), $2, $3::int`,
		`select sequin.create_consumer($1, $2), $3::int`,
		`with head as (
		   select greatest(p.last_seq - $3, 0) as seq, $2 as stream
		   from sequin.progress p where p.source_id = 1 order by p.step desc limit 1
		 ), started as (
		   update sequin.consumer c set start_seq = h.seq, start_total = sequin._total(c.routes[1], h.seq)
		   from head h where c.name = $1
		   returning c.id, c.lane_count, h.seq
		 ), lanes as (
		   insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq)
		   select s.id, l, 0, nextval('sequin.turn'), s.seq, s.seq from started s, generate_series(0, s.lane_count - 1) l
		 )
		 insert into sequin.floor (consumer_id, step, seq, busy) select s.id, 1, s.seq, '{}' from started s`,
	} {
		if _, err := conn.Exec(ctx, statement, name, stream, behind); err != nil {
			return fmt.Errorf("make consumer: %w", err)
		}
	}
	return nil
}

// tend does for the consumers, while a function runs, what a bridge's upkeep does: it looks at them every second, and
// removes their replaced rows every two.
func (l *changeLog) tend(ctx context.Context, do func() error) error {
	conn, err := pgx.Connect(ctx, l.url)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		bounds := map[int32][]int64{}
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-stop:
				stopped <- nil
				return
			case <-tick.C:
			}
			if err := tendOnce(ctx, conn, bounds, i%2 == 1); err != nil {
				stopped <- err
				return
			}
		}
	}()
	err = do()
	close(stop)
	if tendErr := <-stopped; err == nil {
		err = tendErr
	}
	return err
}

func tendOnce(ctx context.Context, conn *pgx.Conn, bounds map[int32][]int64, isTrim bool) error {
	rows, err := conn.Query(ctx, "select consumer_id from sequin.bridge_consumers()")
	if err != nil {
		return fmt.Errorf("list consumers: %w", err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		return fmt.Errorf("list consumers: %w", err)
	}
	for _, id := range ids {
		if _, err := conn.Exec(ctx, "select sequin.bridge_tend($1)", id); err != nil {
			return fmt.Errorf("tend consumer: %w", err)
		}
		if !isTrim {
			continue
		}
		var next []int64
		if err := conn.QueryRow(ctx, "select sequin.bridge_trim($1, $2)", id, bounds[id]).Scan(&next); err != nil {
			return fmt.Errorf("trim consumer: %w", err)
		}
		bounds[id] = next
	}
	return nil
}
