package e2e

import (
	"fmt"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// largeTransaction writes rows of 20 MB in all, and changes some of them.
const largeTransaction = `
	insert into t select i, repeat('x', 1000) from generate_series(1, 20000) i;
	update t set filling = 'y' where id % 100 = 0 and id > 0`

// wantLarge waits until the log has it, between the rows 0 and -1, once and in order.
func wantLarge(t *testing.T, db *pgtest.DB, b *pgtest.Process) {
	t.Helper()
	pgtest.Eventually(t, 2*time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where record_pk = '-1'`); n != 1 {
			return fmt.Errorf("the log does not have all: %s", b.Log())
		}
		return nil
	})
	const got = `
		select concat_ws(' ', count(*), count(distinct seq), count(distinct record_pk) filter (where action = 'insert'),
		                 count(*) filter (where action = 'update'), bool_and(is_next),
		                 (array_agg(record_pk order by seq))[1], (array_agg(record_pk order by seq desc))[1])
		from (
		  select m.*, coalesce(case when action = 'insert' and record_pk::int > 0 then record_pk::int = 1 or record_pk::int = 1 + lag(record_pk::int) over (order by seq)
		                            when action = 'update' then record_pk::int = 100 or record_pk::int = 100 + lag(record_pk::int) over (order by seq) end, true) as is_next
		  from sequin.messages m where stream = 't') m`
	if got := pgtest.Value[string](db, got); got != "20202 20202 20002 200 t 0 -1" {
		t.Errorf("the log has %s", got)
	}
	// What was a draft is a segment like any other.
	const left = `
		select format('index %s has %s partitions', i.indexrelid::regclass, (select count(*) from pg_inherits h where h.inhparent = i.indexrelid))
		from pg_index i
		where i.indrelid = 'sequin.log'::regclass
		  and (not i.indisvalid or (select count(*) from pg_inherits h where h.inhparent = i.indexrelid) <> (select count(*) from sequin.log_segment))
		union all
		select format('constraint %s', c.conname) from pg_constraint c
		where c.contype = 'c' and c.conrelid in (select h.inhrelid from pg_inherits h where h.inhparent = 'sequin.log'::regclass)`
	if left := pgtest.Column[string](db, left); len(left) > 0 {
		t.Errorf("%q", left)
	}
}

// A transaction that is large goes on in a segment of its own, and is handed out like any other.
func TestDraft(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, filling text); select sequin.create_stream('t', '{t}', mode => 'changes'), sequin.create_consumer('c', 't', group_by => '{}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (0)`)
	db.Exec(largeTransaction)
	db.Exec(`insert into t values (-1)`)
	wantLarge(t, db, b)
	if got := pgtest.Value[string](db, `select concat_ws(' ', count(*), (select count(*) from sequin.log_draft)) from sequin.log_segment`); got != "2 0" {
		t.Errorf("segments and drafts: %s", got)
	}
	var last int64
	for left := 20_202; left > 0; {
		seqs := pgtest.Column[int64](db, `select seq from sequin.pop('c', 10000)`)
		if len(seqs) == 0 {
			t.Fatalf("%d are missing", left)
		}
		for _, seq := range seqs {
			if seq <= last {
				t.Fatalf("%d came after %d", seq, last)
			}
			last = seq
		}
		left -= len(seqs)
	}
	// The next one's, too.
	db.Exec(`update t set filling = repeat('z', 1000)`)
	pgtest.Eventually(t, time.Minute, func() error {
		if n := pgtest.Value[int](db, `select pending from sequin.consumer_status`); n != 20_002 {
			return fmt.Errorf("%d are pending", n)
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select count(*) from sequin.log_segment`); n != 3 {
		t.Errorf("there are %d segments, want 3", n)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// What is cut off at its very end leaves a draft behind, which is dropped once the transaction has come again, whole, and the
// other way.
func TestDraftCutOff(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, filling text); select sequin.create_stream('t', '{t}', mode => 'changes')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (0)`)
	pgtest.Eventually(t, time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n != 1 {
			return fmt.Errorf("%d messages are in the log", n)
		}
		return nil
	})
	// Of which there is a row for each batch, and none where the bridge writes only how far it has got.
	holder := db.Connect()
	if _, err := holder.Exec(t.Context(), `begin; lock table sequin.tally in exclusive mode`); err != nil {
		t.Fatal(err)
	}
	db.Exec(largeTransaction)
	db.Exec(`insert into t values (-1)`)
	const waiting = `
		select count(*) from pg_locks l
		where not l.granted and l.relation = 'sequin.tally'::regclass
		  and exists (select from pg_locks o where o.pid = l.pid and o.relation = 'sequin.log'::regclass and o.mode = 'ShareUpdateExclusiveLock')`
	pgtest.Eventually(t, time.Minute, func() error {
		if pgtest.Value[int](db, waiting) != 1 {
			return fmt.Errorf("the log's writer does not wait: %s", b.Log())
		}
		return nil
	})
	draft := pgtest.Value[int](db, `select id from sequin.log_draft`)
	db.Exec(`select pg_terminate_backend(pid) from pg_locks where not granted and relation = 'sequin.tally'::regclass`)
	if _, err := holder.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	wantLarge(t, db, b)
	if n := pgtest.Value[int](db, `select count(*) from sequin.log_segment`); n != 1 {
		t.Errorf("there are %d segments, want 1", n)
	}
	pgtest.Eventually(t, time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from pg_class where relname = format('log_%s', $1::int)`, draft); n != 0 {
			return fmt.Errorf("the draft is still there: %s", b.Log())
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select count(*) from sequin.log_draft`); n != 0 {
		t.Errorf("there are %d drafts", n)
	}
}
