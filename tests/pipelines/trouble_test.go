package pipelines

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// beside keeps changing a table of its own, which a pipeline and a consumer read, and returns how many changes that has had, and
// a check that each of them has come.
func beside(db *pgtest.DB) (count func() int, check func()) {
	db.Helper()
	db.Exec(`create table busy (id bigint primary key);
		select sequin.create_pipeline('busy', 'busy', 'busy_events'), sequin.create_stream('busy', '{busy}'), sequin.create_consumer('busy', 'busy')`)
	conn := db.Connect()
	stop, stopped := make(chan struct{}), make(chan struct{})
	var written atomic.Int64
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
			if _, err := conn.Exec(context.Background(), `insert into busy values ($1)`, written.Load()+1); err != nil {
				db.Logf("insert: %v", err)
				return
			}
			written.Add(1)
		}
	}()
	return func() int {
			return pgtest.Value[int](db, `select rows_written from sequin.pipeline_status where name = 'busy'`)
		}, func() {
			close(stop)
			<-stopped
			n := int(written.Load())
			awaitCount(db, "busy_events", n)
			if got := len(pgtest.Column[int64](db, `select seq from sequin.pop('busy', 10000, '10s')`)); got != n {
				db.Errorf("the consumer beside it got %d of %d messages", got, n)
			}
		}
}

// Whatever is wrong with an event table holds back its pipeline alone, is said with what mends it, and mended it goes on where it
// stopped.
func TestTrouble(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key);
		create function refuse() returns trigger language plpgsql as $$ begin raise 'not today'; end $$`)
	troubles := []struct{ name, make, code, text, mend string }{
		{"missing", `alter table missing drop column changes`, "42703", `no column "changes"`, ""},
		{"several", `alter table several drop column committed_at, drop column seq, drop column inserted_at`, "42703", `no column "seq"`, ""},
		{"typed", `alter table typed alter record type text`, "42804", `"record"`, ""},
		{"more", `alter table more add column note text not null default ''; alter table more alter note drop default`, "55000", `"note"`, ""},
		{"not_null", `delete from not_null; alter table not_null alter changes set not null`, "55000", `"changes"`, ""},
		{"generated", `alter table generated drop column action; alter table generated add column action text generated always as ('x') stored`, "42804", `"action"`, ""},
		{"unfilled", `alter table unfilled alter inserted_at drop default`, "55000", `"inserted_at"`, ""},
		{"unique_one", `delete from unique_one where id > 1; alter table unique_one add constraint one unique (source_table_name)`, "23505", `"one"`, ""},
		{"checked", `alter table checked add constraint small check (seq < 0) not valid`, "23514", `"small"`, ""},
		{"fires", `create trigger refuse before insert on fires for each row execute function refuse()`, "P0001", "not today", `drop trigger refuse on fires`},
		{"usurped", `alter table usurped rename to old; drop table old; create view usurped as select 1 as a`, "22023", "a view", `drop view usurped`},
		{"dropped", `drop table dropped`, "42P01", "does not exist", ""},
	}
	for _, trouble := range troubles {
		db.Exec(`select sequin.create_pipeline($1, 'item', $1)`, trouble.name)
	}
	pgtest.StartBridge(t, db.URL)
	others, check := beside(db)
	db.Exec(`insert into item select generate_series(1, 10)`)
	for _, trouble := range troubles {
		awaitCount(db, trouble.name, 10)
		db.Exec(trouble.make)
	}
	db.Exec(`insert into item select generate_series(11, 30)`)
	before := others()
	mends := map[string]string{}
	for _, trouble := range troubles {
		mends[trouble.name] = awaitError(db, trouble.name, trouble.code, trouble.text)
		if trouble.name == "usurped" {
			db.Exec(trouble.mend)
			mends[trouble.name] = awaitError(db, trouble.name, "42P01", "does not exist")
		} else if trouble.mend != "" {
			mends[trouble.name] = trouble.mend
		}
	}
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := others() - before; n < 200 {
			return fmt.Errorf("beside pipelines in trouble, %d events", n)
		}
		return nil
	})
	for _, trouble := range troubles {
		mend := mends[trouble.name]
		if _, statement, ok := strings.Cut(mend, ": "); ok && strings.HasPrefix(statement, "alter table") {
			mend, _, _ = strings.Cut(statement, "; It ")
			mend, _, _ = strings.Cut(mend, " It is tried")
		}
		db.Exec(mend)
		if got := pgtest.Value[string](db, `select sequin.resume_pipeline($1)`, trouble.name); got != "resumed" && got != "unchanged" {
			t.Errorf("resume: got %s", got)
		}
	}
	for _, trouble := range troubles {
		want := 30
		switch trouble.name {
		case "unique_one":
			want = 21
		case "usurped", "dropped", "not_null":
			want = 20
		}
		pgtest.Eventually(t, 30*time.Second, func() error {
			got := pgtest.Value[string](db, `select count(*) || ' ' || count(distinct record_pk) from `+trouble.name)
			if got != fmt.Sprintf("%d %[1]d", want) {
				return fmt.Errorf("%s: %s events and rows, want %d: %v", trouble.name, got, want, status(db))
			}
			return nil
		})
		if n := pgtest.Value[int](db, `select count(*) from (select record_pk::int < lag(record_pk::int) over (order by id) as is_back from `+trouble.name+`) s where is_back`); n > 0 {
			t.Errorf("%s: the events are out of order", trouble.name)
		}
	}
	check()
	pgtest.Eventually(t, 10*time.Second, func() error {
		if bad := pgtest.Column[string](db, `select name || ' ' || status || ' ' || detail from sequin.health() where name like 'pipeline%' and status <> 'ok'`); len(bad) > 0 {
			return fmt.Errorf("health() says %v", bad)
		}
		return nil
	})
}

// A column that is retyped while its pipeline waits for the table is not written to as if it were what it was.
func TestRetypedMeanwhile(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); select sequin.create_pipeline('p', 'item', 'events')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1)`)
	awaitCount(db, "events", 1)
	tx, err := db.Connect().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background()) //nolint:errcheck // after the commit it does nothing
	if _, err := tx.Exec(t.Context(), `alter table events alter record type text`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`insert into item values (2)`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from pg_locks where relation = 'events'::regclass and not granted`); n == 0 {
			return fmt.Errorf("nobody waits for the table")
		}
		return nil
	})
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitError(db, "p", "42804", `column "record" of event table public.events is of type text`)
	awaitCount(db, "events", 1)
	db.Exec(`alter table events alter record type jsonb using record::jsonb`)
	awaitCount(db, "events", 2)
}

// A source table is dropped: what there was of it is written, and health() says that there is no more.
func TestDroppedSource(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); select sequin.create_pipeline('p', 'item', 'events')`)
	stop := pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1)`)
	awaitCount(db, "events", 1)
	stop()
	db.Exec(`insert into item values (2); drop table item`)
	pgtest.StartBridge(t, db.URL)
	awaitCount(db, "events", 2)
	if got := pgtest.Value[string](db, `select status || ' ' || hint from sequin.health() where name = 'pipeline p'`); !strings.HasPrefix(got, "error select sequin.drop_pipeline('p');") {
		t.Errorf("health() says %s", got)
	}
	for _, view := range []string{"pipelines", "pipeline_status"} {
		if got := pgtest.Value[string](db, `select state from sequin.`+view); got != "error" {
			t.Errorf("%s says %s", view, got)
		}
	}
	if hint := awaitError(db, "p", "42P01", "table public.item was dropped"); !strings.HasPrefix(hint, "select sequin.drop_pipeline('p');") {
		t.Errorf("the hint is %s", hint)
	}
	db.Exec(`select sequin.pause_pipeline('p')`)
	if got := pgtest.Value[string](db, `select d.state || ' ' || h.status || ' ' || h.detail from sequin.pipeline_status d, sequin.health() h
		where h.name = 'pipeline p'`); !strings.HasPrefix(got, "paused error table public.item was dropped") {
		t.Errorf("paused, it is %s", got)
	}
	db.Exec(`select sequin.drop_pipeline('p')`)
	if n := pgtest.Value[int](db, `select count(*) from events`); n != 2 {
		t.Errorf("%d events", n)
	}
}

// Event tables that somebody has locked, or whose triggers hang, delay nobody else.
func TestHangingTables(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key)`)
	pgtest.StartBridge(t, db.URL)
	const hanging = 12 // more than there are connections
	for i := range hanging {
		db.Exec(`select sequin.create_pipeline($1, 'item', $1)`, fmt.Sprintf("locked_%d", i))
	}
	others, check := beside(db)
	db.Exec(`insert into item values (0)`)
	for i := range hanging {
		awaitCount(db, fmt.Sprintf("locked_%d", i), 1)
	}
	tx, err := db.Connect().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range hanging {
		if _, err := tx.Exec(t.Context(), fmt.Sprintf("lock table locked_%d in exclusive mode", i)); err != nil {
			t.Fatal(err)
		}
	}
	db.Exec(`insert into item select generate_series(1, 100)`)
	awaitError(db, "locked_0", "55P03", "lock")
	awaitError(db, fmt.Sprintf("locked_%d", hanging-1), "55P03", "lock")
	for range 3 {
		before := others()
		began := time.Now()
		pgtest.Eventually(t, 20*time.Second, func() error {
			if others() < before+20 {
				return fmt.Errorf("%d events beside", others()-before)
			}
			return nil
		})
		t.Logf("20 events beside locked tables in %s", time.Since(began))
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range hanging {
		awaitCount(db, fmt.Sprintf("locked_%d", i), 101)
	}
	check()
}

// Event tables whose triggers do not come to an end: each holds back its own pipeline, which says so, and writes on when they do.
func TestHangingTriggers(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key);
		create table hang (id int primary key);
		create function hang() returns trigger language plpgsql as $$
		begin
		  while exists (select from public.hang) loop
		    perform pg_sleep(0.1);
		  end loop;
		  return new;
		end $$`)
	pgtest.StartBridge(t, db.URL)
	const hanging = 12 // more than there are connections
	for i := range hanging {
		db.Exec(`select sequin.create_pipeline($1, 'item', $1)`, fmt.Sprintf("hangs_%d", i))
		db.Exec(fmt.Sprintf(`create trigger hang before insert on hangs_%d for each row execute function hang()`, i))
	}
	others, check := beside(db)
	db.Exec(`insert into item values (0)`)
	for i := range hanging {
		awaitCount(db, fmt.Sprintf("hangs_%d", i), 1)
	}
	db.Exec(`insert into hang values (1)`)
	db.Exec(`insert into item select generate_series(1, 100)`)
	for _, i := range []int{0, hanging - 1} {
		if hint := awaitError(db, fmt.Sprintf("hangs_%d", i), "57014", "statement timeout"); !strings.Contains(hint, "look at the table's triggers") {
			t.Errorf("got %s", hint)
		}
	}
	for range 3 {
		before := others()
		began := time.Now()
		pgtest.Eventually(t, 20*time.Second, func() error {
			if others() < before+20 {
				return fmt.Errorf("%d events beside", others()-before)
			}
			return nil
		})
		t.Logf("20 events beside hanging triggers in %s", time.Since(began))
	}
	db.Exec(`delete from hang`)
	for i := range hanging {
		awaitCount(db, fmt.Sprintf("hangs_%d", i), 101)
	}
	check()
}

// What passes by itself is not a pipeline's error, unless it does not pass.
func TestTroubleThatPasses(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key);
		create sequence calls;
		create function refuse() returns trigger language plpgsql as $$
		begin
		  if tg_argv[1] = 'ever' or nextval('public.calls') < 3 then
		    raise 'not now' using errcode = tg_argv[0];
		  end if;
		  return new;
		end $$`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	for pipeline, args := range map[string]string{"passes": "'40001', 'twice'", "conflict": "'40001', 'ever'", "deadlock": "'40P01', 'ever'", "shutdown": "'57P01', 'ever'"} {
		db.Exec(`select sequin.create_pipeline($1, 'item', $1)`, pipeline)
		db.Exec(fmt.Sprintf(`create trigger refuse before insert on %s for each row execute function refuse(%s)`, pipeline, args))
	}
	db.Exec(`insert into item values (1)`)
	awaitCount(db, "passes", 1)
	for pipeline, code := range map[string]string{"conflict": "40001", "deadlock": "40P01", "shutdown": "57P01"} {
		awaitError(db, pipeline, code, "not now")
		b.AwaitLog(`msg="a pipeline does not go on: trying again" component=upkeep pipeline=` + pipeline)
		db.Exec(`drop trigger refuse on ` + pipeline + `; select sequin.resume_pipeline('` + pipeline + `')`)
		awaitCount(db, pipeline, 1)
		awaitStatus(db, pipeline, "active 0 1")
	}
	b.AwaitLog(`msg="write for a pipeline: trying again" component=upkeep pipeline=shutdown`)
	if log := b.Log(); strings.Contains(log, "pipeline=passes") {
		t.Errorf("the bridge says %s", log)
	}
}

// One that fails at once does not wait for those whose triggers hang.
func TestFailsBesideHangingTriggers(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); create table hang (id int); create table fail (id int);
		create function hang() returns trigger language plpgsql as $$
		begin
		  while exists (select from public.hang) loop
		    perform pg_sleep(0.1);
		  end loop;
		  return new;
		end $$;
		create function fail() returns trigger language plpgsql as $$
		begin
		  if exists (select from public.fail) then
		    raise 'not now';
		  end if;
		  return new;
		end $$;
		select sequin.create_pipeline('fails', 'item', 'fails');
		create trigger fail before insert on fails for each row execute function fail()`)
	pgtest.StartBridge(t, db.URL)
	const hanging = 8 // more than there are connections apart
	for i := range hanging {
		db.Exec(`select sequin.create_pipeline($1, 'item', $1)`, fmt.Sprintf("hangs_%d", i))
		db.Exec(fmt.Sprintf(`create trigger hang before insert on hangs_%d for each row execute function hang()`, i))
	}
	db.Exec(`insert into hang values (1); insert into item values (1)`)
	awaitCount(db, "fails", 1)
	for i := range hanging {
		awaitError(db, fmt.Sprintf("hangs_%d", i), "57014", "statement timeout") // and goes on apart
	}
	db.Exec(`insert into fail values (1); insert into item values (2)`)
	awaitError(db, "fails", "P0001", "not now")
	db.Exec(`delete from fail; select sequin.resume_pipeline('fails')`)
	awaitCount(db, "fails", 2)
	if n := pgtest.Value[int](db, `select count(*) from hangs_0`); n > 0 {
		t.Errorf("it went on when the others did")
	}
	db.Exec(`delete from hang`)
	for i := range hanging {
		awaitCount(db, fmt.Sprintf("hangs_%d", i), 2)
	}
}

// What an event table's trigger leaves in the session is no other pipeline's: settings, temporary tables, locks.
func TestTriggerLeavesSettings(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key);
		create function leave() returns trigger language plpgsql as $$
		begin
		  perform set_config('default_transaction_read_only', 'on', false), pg_advisory_lock_shared(7);
		  create temporary table if not exists mine ();
		  return new;
		end $$;
		create function meet() returns trigger language plpgsql as $$
		begin
		  if to_regclass('pg_temp.mine') is not null or current_setting('idle_session_timeout', true) <> '0' or exists (select from pg_locks where pid = pg_backend_pid() and objid = 7 and locktype = 'advisory') then
		    raise 'it is still there';
		  end if;
		  return new;
		end $$`)
	if db.Major() >= 14 {
		db.Exec(fmt.Sprintf(`alter database %s set idle_session_timeout = '1h'`, db.Name)) // what the bridge says itself stays
	}
	pipelines := map[string]string{"leaves": "leave", "meets": "meet", "meets_too": "meet"}
	for pipeline, function := range pipelines {
		db.Exec(`select sequin.create_pipeline($1, 'item', $1)`, pipeline)
		db.Exec(fmt.Sprintf(`create trigger event before insert on %s for each row execute function %s()`, pipeline, function))
	}
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	for i := range 10 {
		db.Exec(`insert into item values ($1)`, i)
		for pipeline := range pipelines {
			awaitCount(db, pipeline, i+1)
		}
	}
	if log := b.Log(); strings.Contains(log, "level=WARN") {
		t.Errorf("the bridge says %s", log)
	}
}

// One that fails with its first change is as far behind as it is.
func TestTroubleFromTheStart(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table orders (id int primary key); select sequin.create_pipeline('history', 'orders', 'events');
		alter table events add check (record_pk <> '1')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into orders values (1), (2), (3)`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		var state string
		var pending int
		var isBehind bool
		if err := db.Pool.QueryRow(t.Context(), `select state, pending, lag_seconds > 0 and oldest_pending_at is not null
			from sequin.pipeline_status`).Scan(&state, &pending, &isBehind); err != nil {
			t.Fatal(err)
		}
		if state != "error" || pending != 3 || !isBehind {
			return fmt.Errorf("state %s, %d pending, behind: %t", state, pending, isBehind)
		}
		return nil
	})
}

// The bridge's log names a pipeline as its owner does.
func TestNamesInTheLog(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key);
		select sequin.create_pipeline('brief', 'item', 'brief', retention => '1 second'), sequin.create_pipeline('failing', 'item', 'failing');
		alter table failing add check (record_pk <> '1')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into item values (1)`)
	b.AwaitLog(`msg="a pipeline does not go on: trying again" component=upkeep pipeline=failing err=`)
	b.AwaitLog(`msg="dropped old partitions of an event table" component=upkeep pipeline=brief count=`)
}
