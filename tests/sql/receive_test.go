package sql

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// A batch has the next messages, in order, each once; what is not acknowledged is not handed out again.
func TestReceiveInOrder(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(inserts(1, 2, 3, 1, 2, 1, 4, 5)...)

	first := f.receive(`'c', 3`)
	if len(first) != 3 {
		t.Fatalf("got %d messages, want 3", len(first))
	}
	second := f.receive(`'c', 100`)
	wantAscending(t, append(first, second...))
	// Groups that are out hold back what follows in them.
	third := f.receive(`'c', 100`)
	wantSeqs(t, third)
	f.call("ack", ids(append(first, second...)), int64(len(first)+len(second)))
	rest := f.receive(`'c', 100`)
	wantSeqsInAnyOrder(t, append(append(first, second...), rest...), all...)
	f.call("ack", ids(rest), int64(len(rest)))
	f.wantClean()
}

// Within a batch the messages of a group are in order; the next of a group come when it is acknowledged, in order.
func TestReceiveGroupGoesOn(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(inserts(7, 7, 7, 7, 7)...)
	one := f.receive(`'c', 2`)
	wantSeqs(t, one, all[0], all[1])
	wantSeqs(t, f.receive(`'c', 2`))
	f.call("ack", ids(one[:1]), 1)
	wantSeqs(t, f.receive(`'c', 2`)) // its second is still out
	f.call("ack", ids(one[1:]), 1)
	wantSeqs(t, f.receive(`'c', 10`), all[2:]...)
}

func TestReceiveArguments(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.write(inserts(upto(20)...)...)
	for _, args := range []string{
		`'c', 0`, `'c', -1`, `'c', 10001`, `'c', null`, `'c', wait => '-1 s'`, `'c', wait => '61 s'`, `'c', wait => null`,
		`'c', ack_wait => '0'`, `'c', ack_wait => '-1 s'`,
	} {
		if err := f.Error(`select * from sequin.receive(` + args + `)`); err.Code != pgerrcode.InvalidParameterValue || err.Hint == "" {
			t.Errorf("receive(%s): %s %s, hint %q", args, err.Code, err.Message, err.Hint)
		}
		if strings.Contains(args, "ack_wait") {
			continue
		}
		if err := f.Error(`select * from sequin.pop(` + args + `)`); err.Code != pgerrcode.InvalidParameterValue || err.Hint == "" {
			t.Errorf("pop(%s): %s %s, hint %q", args, err.Code, err.Message, err.Hint)
		}
	}
	if got := f.receive(`'c', 10000`); len(got) != 20 {
		t.Errorf("receive('c', 10000) gives %d messages, want 20", len(got))
	}
}

// Arguments that a caller may leave out, name, or bind without a type.
func TestReceiveCalls(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.write(inserts(upto(60)...)...)
	for _, args := range []string{
		``, `'c'`, `'c', 1`, `consumer => 'c', batch_size => 1, wait => '10 ms', ack_wait => '1 minute'`, `null`, `null, 1`,
		`'c', '1', '0', null`, `'c', wait => interval '0'`,
	} {
		if got := f.receive(args); len(got) != 1 {
			t.Errorf("receive(%s) gives %d messages, want 1", args, len(got))
		}
		if strings.Contains(args, "ack_wait") || strings.Contains(args, "'0', null") {
			continue
		}
		if got := f.pop(args); len(got) != 1 {
			t.Errorf("pop(%s) gives %d messages, want 1", args, len(got))
		}
	}

	// In every protocol there is: what the driver knows of the types, and what it does not.
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec, pgx.QueryExecModeSimpleProtocol,
	} {
		ctx := context.Background()
		var id int64
		if err := f.Pool.QueryRow(ctx, `select ack_id from sequin.receive($1, $2)`, mode, "c", 1).Scan(&id); err != nil {
			t.Fatalf("receive in mode %v: %v", mode, err)
		}
		for _, call := range []string{"extend", "nack", "ack"} {
			var n int64
			if err := f.Pool.QueryRow(ctx, `select sequin.`+call+`($1, $2)`, mode, "c", []int64{id}).Scan(&n); err != nil {
				t.Fatalf("%s in mode %v: %v", call, mode, err)
			}
			if want := int64(1); call == "ack" && n != 0 || call != "ack" && n != want { // nacked already
				t.Errorf("%s in mode %v counted %d", call, mode, n)
			}
		}
	}
	// Untyped literals are never ambiguous.
	f.Exec(`select sequin.ack('c', '{}'), sequin.nack('c', '{1,2}', null, null), sequin.extend('c', '{}', '1 minute')`)
}

func TestReceiveDefaultConsumer(t *testing.T) {
	f := setup(t, "rows")
	if err := f.Error(`select * from sequin.receive()`); err.Code != pgerrcode.UndefinedObject || err.Hint == "" {
		t.Errorf("without a consumer: %s %s, hint %q", err.Code, err.Message, err.Hint)
	}
	f.consumer("c")
	f.write(inserts(1, 2)...)
	if got := append(f.receive(``), f.pop(``)...); len(got) != 2 {
		t.Errorf("with one consumer: %d messages, want 2", len(got))
	}
	f.consumer("d")
	for _, call := range []string{"receive()", "pop()"} {
		if err := f.Error(`select * from sequin.` + call); err.Code != pgerrcode.InvalidParameterValue || !strings.Contains(err.Hint, "c, d") {
			t.Errorf("%s with two consumers: %s %s, hint %q", call, err.Code, err.Message, err.Hint)
		}
	}
	if err := f.Error(`select * from sequin.receive('e')`); err.Code != pgerrcode.UndefinedObject || !strings.Contains(err.Hint, `"c"`) {
		t.Errorf("an unknown consumer: %s %s, hint %q", err.Code, err.Message, err.Hint)
	}
}

// What receive and pop return: names, order and types, as documented.
func TestReceiveColumns(t *testing.T) {
	f := setup(t, "changes")
	want := "ack_id bigint, seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb, changes jsonb, " +
		"committed_at timestamp with time zone, deliver_count integer, metadata jsonb"
	for function, want := range map[string]string{
		"receive": "TABLE(" + want + ")", "pop": "TABLE(" + strings.TrimPrefix(want, "ack_id bigint, ") + ")",
		"ack": "bigint", "nack": "bigint", "extend": "bigint", "redrive": "bigint",
		"create_consumer": "text", "alter_consumer": "text", "drop_consumer": "text", "pause_consumer": "text", "resume_consumer": "text",
	} {
		if got := pgtest.Value[string](f.DB, `select pg_get_function_result(('sequin.' || $1)::regproc)`, function); got != want {
			t.Errorf("%s returns %s, want %s", function, got, want)
		}
	}
	f.consumer("c")
	f.write(row{action: "u", key: 1, note: "b", changes: `{"note": "a"}`})
	got := pgtest.Value[string](f.DB, `select concat_ws('|', action, table_schema, table_name, record_pk, record, changes, deliver_count, metadata ->> 'xid',
		committed_at between now() - interval '1 minute' and now()) from sequin.receive()`)
	if want := `update|public|item|1|{"id": 1, "grp": 0, "note": "b"}|{"note": "a"}|1|1|t`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// Public functions: one signature a name, and nothing returned that an ORM stumbles over.
func TestSignatures(t *testing.T) {
	f := setup(t, "rows")
	for _, twice := range pgtest.Column[string](f.DB, `
		select proname from pg_proc where pronamespace = 'sequin'::regnamespace group by proname having count(*) > 1`) {
		t.Errorf("%s has more than one signature", twice)
	}
	for _, bad := range pgtest.Column[string](f.DB, `
		select p.proname || ' returns ' || t.typname
		from pg_proc p
		cross join lateral unnest(coalesce(
		  (select array_agg(a.type) from unnest(p.proallargtypes, p.proargmodes) a(type, mode) where a.mode in ('t', 'o', 'b')), array[p.prorettype])) r(type)
		join pg_type t on t.oid = r.type
		where p.pronamespace = 'sequin'::regnamespace and p.proname not like '\_%' and p.proname not like 'bridge\_%'
		  and t.typname not in ('int8', 'int4', 'text', 'bool', 'jsonb', 'timestamptz')`) {
		t.Errorf("%s", bad)
	}
	for _, unpinned := range pgtest.Column[string](f.DB, `
		select p.proname from pg_proc p where p.pronamespace = 'sequin'::regnamespace and p.prosecdef
		  and not exists (select from unnest(p.proconfig) c(line) where c.line like 'search_path=%')`) {
		t.Errorf("%s runs as its owner and does not pin search_path", unpinned)
	}
}

func TestReceivePaused(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.write(inserts(upto(4)...)...)
	out := f.receive(`'c', 2`)
	for want, call := range map[string]string{"paused": `select sequin.pause_consumer('c')`} {
		if got := pgtest.Value[string](f.DB, call); got != want {
			t.Errorf("%s gives %s", call, got)
		}
	}
	if got := pgtest.Value[string](f.DB, `select sequin.pause_consumer('c')`); got != "unchanged" {
		t.Errorf("a second pause gives %s", got)
	}
	wantSeqs(t, f.receive(`'c', 10`))
	wantSeqs(t, f.pop(`'c', 10, '20 ms'`))
	f.call("ack", ids(out), 2) // what is out may be acknowledged
	if got := pgtest.Value[string](f.DB, `select sequin.resume_consumer('c')`); got != "resumed" {
		t.Errorf("resume gives %s", got)
	}
	if got := f.receive(`'c', 10`); len(got) != 2 {
		t.Errorf("after it %d messages, want 2", len(got))
	}
}

// A long poll returns as soon as something commits; a pause that ends meanwhile counts as well.
func TestReceiveWait(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.write(inserts(1)...)
	if got := f.pop(`'c', 10`); len(got) != 1 {
		t.Fatalf("got %d messages, want 1", len(got))
	}
	began := time.Now()
	wantSeqs(t, f.receive(`'c', 10, '200 ms'`))
	if waited := time.Since(began); waited < 200*time.Millisecond {
		t.Errorf("waited %s for nothing, want 200ms", waited)
	}

	for i, call := range []string{"receive", "pop"} {
		got := make(chan int, 1)
		conn := f.Connect()
		go func() {
			var n int
			if err := conn.QueryRow(context.Background(), `select count(*) from sequin.`+call+`('c', 10, '20 s')`).Scan(&n); err != nil {
				t.Errorf("%s: %v", call, err)
			}
			got <- n
		}()
		pgtest.Eventually(t, 10*time.Second, func() error {
			if pgtest.Value[int](f.DB, `select count(*) from pg_stat_activity where pid = $1 and wait_event = 'PgSleep'`, conn.PgConn().PID()) == 0 {
				return fmt.Errorf("it does not wait")
			}
			return nil
		})
		began := time.Now()
		f.write(inserts(10*i, 10*i+1)...)
		select {
		case n := <-got:
			if n != 2 {
				t.Errorf("%s waited for %d messages, want 2", call, n)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s does not see what commits", call)
		}
		if late := time.Since(began); late > 5*time.Second {
			t.Errorf("%s saw it %s late", call, late)
		}
	}
	// Its lease began when it was found.
	if left := pgtest.Value[float64](f.DB, `select min(extract(epoch from expires_at - clock_timestamp()))::float8 from sequin.deliveries`); left < 25 {
		t.Errorf("a lease of 30 s has %v s left", left)
	}
}

// Waiting is refused where it cannot work, and writing where it is not allowed.
func TestReceiveIsolation(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.write(inserts(upto(5)...)...)
	out := f.receive(`'c', 1`)
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		tx, err := f.Connect().BeginTx(context.Background(), pgx.TxOptions{IsoLevel: level})
		if err != nil {
			t.Fatal(err)
		}
		for _, call := range []string{"receive", "pop"} {
			if _, err := tx.Exec(context.Background(), `savepoint a`); err != nil {
				t.Fatal(err)
			}
			_, err = tx.Exec(context.Background(), `select * from sequin.`+call+`('c', 1, wait => '1 s')`)
			if e := pgError(t, err); e.Code != pgerrcode.ObjectNotInPrerequisiteState || e.Hint == "" {
				t.Errorf("%s that waits in %s: %s %s, hint %q", call, level, e.Code, e.Message, e.Hint)
			}
			if _, err := tx.Exec(context.Background(), `rollback to a`); err != nil {
				t.Fatal(err)
			}
			if got := f.messages(tx, `select 0::bigint, seq, action, table_name, record_pk, '', null, deliver_count from sequin.`+call+`('c')`); len(got) != 1 {
				t.Errorf("%s in %s gives %d messages, want 1", call, level, len(got))
			}
		}
		if err := tx.Rollback(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	for _, call := range []string{
		`select * from sequin.receive('c')`, `select * from sequin.pop('c')`, fmt.Sprintf(`select sequin.ack('c', '{%d}')`, out[0].AckID),
		fmt.Sprintf(`select sequin.nack('c', '{%d}')`, out[0].AckID), fmt.Sprintf(`select sequin.extend('c', '{%d}')`, out[0].AckID), `select sequin.redrive('c')`,
	} {
		tx, err := f.Connect().BeginTx(context.Background(), pgx.TxOptions{AccessMode: pgx.ReadOnly})
		if err != nil {
			t.Fatal(err)
		}
		_, err = tx.Exec(context.Background(), call)
		if e := pgError(t, err); e.Code != pgerrcode.ReadOnlySQLTransaction || !strings.Contains(e.Hint, "primary") {
			t.Errorf("%s, read only: %s %s, hint %q", call, e.Code, e.Message, e.Hint)
		}
		_ = tx.Rollback(context.Background())
	}
	f.call("ack", ids(out), 1)
}

// The lease of a batch may be its own.
func TestReceiveAckWait(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	f.write(inserts(upto(3)...)...)
	f.receive(`'c', 1`)
	f.receive(`'c', 1, ack_wait => '1 hour'`)
	f.receive(`'c', 1, ack_wait => '5 minutes'`)
	got := pgtest.Column[int](f.DB, `select round(extract(epoch from expires_at - delivered_at))::int from sequin.deliveries order by expires_at`)
	if fmt.Sprint(got) != "[30 300 3600]" {
		t.Errorf("leases of %v seconds, want 30, 300 and 3600", got)
	}
}

// A large batch, and what is left of it after parts of it were acknowledged in every which way.
func TestReceiveLarge(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "max_ack_pending => 100000")
	all := f.write(inserts(upto(10000)...)...)
	got := f.receive(`'c', 10000`)
	wantSeqsInAnyOrder(t, got, all...)
	var even, odd []int64
	for i, m := range got {
		if i%2 == 0 {
			even = append(even, m.AckID)
		} else {
			odd = append(odd, m.AckID)
		}
	}
	f.call("ack", even, 5000)
	f.call("ack", append(odd, even...), 5000)
	f.wantClean()
}
