package sql

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// fixture is a database with a table, item, a stream of it, s, and a log that the test writes.
type fixture struct {
	*pgtest.DB
	step, lastSeq int64
	route         int32 // of item
	routes        map[string]int32
}

// querier is a pool, a connection or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// setup makes a fixture whose stream has a mode.
func setup(t *testing.T, mode string) *fixture {
	t.Helper()
	t.Parallel()
	f := &fixture{DB: pgtest.New(t), routes: map[string]int32{}}
	f.Exec(`create table item (id int primary key, grp int, note text); alter table item replica identity full`)
	f.Exec(`create table other (id int primary key, grp int, note text); alter table other replica identity full`)
	f.Exec(`select sequin.create_stream('s', '{item}', mode => $1)`, mode)
	f.route = f.routeOf("item")
	err := f.Pool.QueryRow(t.Context(), `select step, last_seq from sequin.bridge_claim(1, 'none', 's', 1, 1, '0/1')`).Scan(&f.step, &f.lastSeq)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fixture) routeOf(table string) int32 {
	f.Helper()
	return pgtest.Value[int32](f.DB, `select id from sequin.source_table where relation_oid = $1::regclass`, table)
}

// consumer makes one of the stream s, with options as they are written in a call.
func (f *fixture) consumer(name string, options ...string) {
	f.Helper()
	f.Exec(fmt.Sprintf(`select sequin.create_consumer(%s)`, strings.Join(append([]string{"'" + name + "'", "'s'"}, options...), ", ")))
}

// row is one of the log.
type row struct {
	action  string // i u d t x
	key     int
	grp     int
	note    string
	table   string // default: item
	changes string
	record  string // default: of key, grp and note
	hash    int32  // default: of table and key
}

// inserts returns an insert each of these keys.
func inserts(keys ...int) []row {
	rows := make([]row, len(keys))
	for i, key := range keys {
		rows[i] = row{action: "i", key: key, note: fmt.Sprint(i)}
	}
	return rows
}

// upto returns 1 to n.
func upto(n int) []int {
	keys := make([]int, n)
	for i := range keys {
		keys[i] = i + 1
	}
	return keys
}

// write commits rows to the log, in one transaction of the source that commits now, and brings feeds up. It returns
// their seqs.
func (f *fixture) write(rows ...row) []int64 {
	f.Helper()
	return f.writeAt(pgtest.Value[string](f.DB, `select pg_current_wal_insert_lsn()::text`), rows...)
}

// writeAt does so for a transaction of the source that committed at an LSN.
func (f *fixture) writeAt(lsn string, rows ...row) []int64 {
	f.Helper()
	ctx := context.Background()
	tx, err := f.Pool.Begin(ctx)
	if err != nil {
		f.Fatal(err)
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after the commit it does nothing
	var seqs []int64
	counts := map[int32]int64{}
	for _, r := range rows {
		f.lastSeq++
		seqs = append(seqs, f.lastSeq)
		route, table := f.route, "item"
		if r.table != "" && r.table != table {
			route, table = f.routes[r.table], r.table
			if route == 0 {
				route = f.routeOf(r.table)
				f.routes[r.table] = route
			}
		}
		counts[route]++
		key, record := any(fmt.Sprint(r.key)), any(fmt.Sprintf(`{"id": %d, "grp": %d, "note": "%s"}`, r.key, r.grp, r.note))
		if r.record != "" {
			record = r.record
		}
		if r.action == "t" {
			key, record = nil, nil
		}
		if r.hash == 0 {
			h := fnv.New32a()
			fmt.Fprint(h, route, key)
			r.hash = int32(h.Sum32())
		}
		var changes any
		if r.changes != "" {
			changes = r.changes
		}
		if _, err := tx.Exec(ctx, `
			insert into sequin.log (seq, committed_at, route_id, group_hash, lane, action, table_schema, table_name, record_pk, record, changes, metadata)
			values ($1, clock_timestamp(), $2, $3, $3 & 63, $4::text::"char", 'public', $5, $6, $7, $8, jsonb_build_object('commit_lsn', $9::text, 'xid', 1))`,
			f.lastSeq, route, r.hash, r.action, table, key, record, changes, lsn); err != nil {
			f.Fatal(err)
		}
	}
	var routes []int32
	var totals []int64
	for route, n := range counts {
		routes, totals = append(routes, route), append(totals, n)
	}
	if err := tx.QueryRow(ctx, `select sequin.bridge_commit(1, $1, pg_current_wal_insert_lsn()::text, $2, $3, $4)`, f.step, f.lastSeq, routes, totals).
		Scan(&f.step); err != nil {
		f.Fatal(err)
	}
	if err := tx.Commit(ctx); err != nil {
		f.Fatal(err)
	}
	f.Exec(`select sequin.bridge_feed(c.consumer_id, 100000) from sequin.bridge_consumers() c where c.has_feed`)
	return seqs
}

// tend does what the bridge does every second.
func (f *fixture) tend() {
	f.Helper()
	f.Exec(`select sequin.bridge_tend(c.consumer_id) from sequin.bridge_consumers() c`)
}

// trim does what the bridge does every two seconds, twice: what was replaced before the first is gone after the second.
func (f *fixture) trim() {
	f.Helper()
	f.Exec(`select sequin.bridge_trim(c.consumer_id, sequin.bridge_trim(c.consumer_id, null)) from sequin.bridge_consumers() c`)
}

// message is a row of receive, or of pop.
type message struct {
	AckID        int64
	Seq          int64
	Action       string
	Table        string
	Key          string
	Note         string
	Changes      *string
	DeliverCount int
}

// receive calls receive with these arguments.
func (f *fixture) receive(args string) []message {
	f.Helper()
	return f.receiveIn(f.Pool, args)
}

func (f *fixture) receiveIn(q querier, args string) []message {
	f.Helper()
	return f.messages(q, `select ack_id, seq, action, table_name, coalesce(record_pk, ''), coalesce(record ->> 'note', ''), changes::text, deliver_count
		from sequin.receive(`+args+`)`)
}

// pop calls pop with these arguments.
func (f *fixture) pop(args string) []message {
	f.Helper()
	return f.popIn(f.Pool, args)
}

func (f *fixture) popIn(q querier, args string) []message {
	f.Helper()
	return f.messages(q, `select 0::bigint, seq, action, table_name, coalesce(record_pk, ''), coalesce(record ->> 'note', ''), changes::text, deliver_count
		from sequin.pop(`+args+`)`)
}

func (f *fixture) messages(q querier, sql string) []message {
	f.Helper()
	rows, err := q.Query(context.Background(), sql)
	if err != nil {
		f.Fatal(err)
	}
	messages, err := pgx.CollectRows(rows, pgx.RowToStructByPos[message])
	if err != nil {
		f.Fatalf("%s: %v", sql, err)
	}
	return messages
}

// call calls ack, nack or extend of the consumer c, with further arguments, and checks how many it counts.
func (f *fixture) call(name string, ids []int64, want int64, args ...string) {
	f.Helper()
	f.callIn(f.Pool, name, ids, want, args...)
}

func (f *fixture) callIn(q querier, name string, ids []int64, want int64, args ...string) {
	f.Helper()
	var got int64
	sql := fmt.Sprintf(`select sequin.%s(%s)`, name, strings.Join(append([]string{"'c'", "$1"}, args...), ", "))
	if err := q.QueryRow(context.Background(), sql, ids).Scan(&got); err != nil {
		f.Fatalf("%s: %v", sql, err)
	}
	if got != want {
		f.Fatalf("%s of %v returned %d, want %d", sql, ids, got, want)
	}
}

func ids(messages []message) []int64 {
	var ids []int64
	for _, m := range messages {
		ids = append(ids, m.AckID)
	}
	return ids
}

func seqs(messages []message) []int64 {
	var seqs []int64
	for _, m := range messages {
		seqs = append(seqs, m.Seq)
	}
	return seqs
}

// wantSeqs checks which messages these are, in this order.
func wantSeqs(t testing.TB, got []message, want ...int64) {
	t.Helper()
	if s := seqs(got); !reflect.DeepEqual(s, want) && (len(s) > 0 || len(want) > 0) {
		t.Fatalf("got %d messages %v, want %d: %v", len(s), s[:min(len(s), 50)], len(want), want[:min(len(want), 50)])
	}
}

// wantSeqsInAnyOrder checks which messages these are.
func wantSeqsInAnyOrder(t testing.TB, got []message, want ...int64) {
	t.Helper()
	got = slices.SortedFunc(slices.Values(got), func(a, b message) int { return int(a.Seq - b.Seq) })
	wantSeqs(t, got, slices.Sorted(slices.Values(want))...)
}

// wantAscending checks that the messages of each key are in order.
func wantAscending(t testing.TB, got []message) {
	t.Helper()
	last := map[string]int64{}
	for _, m := range got {
		if m.Seq <= last[m.Key] {
			t.Fatalf("message %d of %s came after %d", m.Seq, m.Key, last[m.Key])
		}
		last[m.Key] = m.Seq
	}
}

// eventually receives until it gets something.
func (f *fixture) eventually(args string) []message {
	f.Helper()
	var got []message
	pgtest.Eventually(f.TB, 10*time.Second, func() error {
		if got = f.receive(args); len(got) == 0 {
			return fmt.Errorf("receive(%s) gives nothing", args)
		}
		return nil
	})
	return got
}

// wantClean checks that nothing is left of a consumer that has had everything: no lease, no tracked message, no held
// group, no permit.
func (f *fixture) wantClean() {
	f.Helper()
	f.tend()
	left := pgtest.Value[string](f.DB, `
		select concat_ws('; ',
		  (select string_agg(format('%s pending, %s in flight', pending, in_flight), ', ') from sequin.consumer_status where pending > 0 or in_flight > 0),
		  (select format('%s tracked', count(*)) from sequin.delivery having count(*) > 0),
		  (select format('%s held', count(*)) from sequin.held_group having count(*) > 0),
		  (select string_agg(l::text, ' ') from (select distinct on (consumer_id, lane) * from sequin.lane order by consumer_id, lane, prev desc) l
		   where lease is not null or out_count <> 0 or tracked <> 0 or fresh <> 0 or held <> 0 or held_back <> 0 or permits is not null))`)
	if left != "" {
		f.Fatalf("left over: %s", left)
	}
}

// pgError returns the server's error that this must be.
func pgError(t testing.TB, err error) *pgconn.PgError {
	t.Helper()
	var e *pgconn.PgError
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want an error of the server's", err)
	}
	return e
}

func want(got, want int) error {
	if got != want {
		return fmt.Errorf("got %d, want %d", got, want)
	}
	return nil
}

// backOff writes a message each of so many keys, and has all of them back off for an hour.
func (f *fixture) backOff(count int) {
	f.Helper()
	f.write(inserts(upto(count)...)...)
	var got []message
	pgtest.Eventually(f.TB, 30*time.Second, func() error {
		got = append(got, f.receive(`'c', 1000`)...)
		return want(len(got), count)
	})
	f.call("nack", ids(got), int64(count), "delay => '1 hour'")
}

// segments are the tables that the log is in.
func (f *fixture) segments() []string {
	f.Helper()
	return pgtest.Column[string](f.DB, `select relname::text from pg_class where oid in (select inhrelid from pg_inherits where inhparent = 'sequin.log'::regclass)`)
}
