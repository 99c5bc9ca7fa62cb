package pipelines

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// With a retention the event table is partitioned; old partitions go, what is within it stays, and each event finds a place
// however late it comes.
func TestRetention(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key)`)
	db.Exec(`select sequin.create_pipeline('brief', 'item', 'brief', retention => '8 seconds')`)
	db.Exec(`select sequin.create_pipeline('long', 'item', 'long', retention => '30 days')`)
	db.Exec(`select sequin.create_pipeline('good', 'item', 'for_good')`)
	pgtest.StartBridge(t, db.URL)
	// Events are dropped a partition at a time, and only old ones.
	last, dropped := 0, 0
	pgtest.Eventually(t, time.Minute, func() error {
		last++
		db.Exec(`insert into item values ($1)`, last)
		oldest := pgtest.Value[int](db, `select coalesce(min(record_pk::int), 1) from brief`)
		dropped = oldest - 1
		missing := func() int {
			return pgtest.Value[int](db, `select count(*) from for_good g
				where g.committed_at > now() - interval '7 seconds' and g.seq <= (select last_seq from sequin.pipeline_status where name = 'brief')
				  and not exists (select from brief b where b.seq = g.seq)`)
		}
		// A partition that is made after a query was planned, and before it runs, is not in it: asked again, it is.
		if missing() > 0 {
			if n := missing(); n > 0 {
				t.Fatalf("%d events within the retention are gone", n)
			}
		}
		if dropped < 10 {
			return fmt.Errorf("%d events are dropped", dropped)
		}
		return nil
	})
	db.Exec(`select sequin.pause_pipeline('brief')`)
	awaitCount(db, "for_good", last)
	awaitCount(db, "long", last)
	if n := pgtest.Value[int](db, `select count(*) from brief where committed_at < now() - interval '20 seconds'`); n > 0 {
		t.Errorf("%d old events are still there", n)
	}
	// While it is paused old partitions go all the same, until there is none.
	pgtest.Eventually(t, time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from pg_inherits where inhparent = 'brief'::regclass`); n > 0 {
			return fmt.Errorf("%d partitions are left", n)
		}
		return nil
	})
	// What comes after long finds its place: late as it is.
	db.Exec(`insert into item values (0)`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := db.Exec(`update sequin.log set committed_at = committed_at - interval '3 days' where record_pk = '0' and committed_at > now() - interval '1 day'`); n == 0 {
			return fmt.Errorf("the log has it not yet")
		}
		return nil
	})
	db.Exec(`select sequin.resume_pipeline('brief')`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if got := pgtest.Value[string](db, `select concat_ws(' ', state, pending, error) from sequin.pipeline_status where name = 'brief'`); got != "active 0" {
			return fmt.Errorf("got %s", got)
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where name like 'pipeline %' and status <> 'ok'`); n > 0 {
		t.Error("health() is not well")
	}
	// The width is a part of the retention; the next partition is there before it is needed.
	if !pgtest.Value[bool](db, `select bool_and(to_at - from_at = interval '1 day') and max(from_at) > now() from sequin._partitions('long'::regclass)`) {
		t.Error("partitions are not of a day, or none is ahead")
	}
	// No longer dropped, by word; and not where there is nothing to drop.
	if got := pgtest.Value[string](db, `select sequin.alter_pipeline('long', retention => '0')`); got != "altered" {
		t.Errorf("got %s", got)
	}
	if got := pgtest.Value[string](db, `select coalesce(retention::text, 'for good') from sequin.pipelines where name = 'long'`); got != "for good" {
		t.Errorf("got %s", got)
	}
	db.Exec(`select sequin.alter_pipeline('long', retention => '1 hour')`)
	if e := db.Error(`select sequin.alter_pipeline('good', retention => '1 day')`); e.Code != "55000" || e.Hint == "" {
		t.Errorf("got %s: %s (%s)", e.Code, e.Message, e.Hint)
	}
}

// A table of the user's own, partitioned in the user's own way, and a reader who is in the way of dropping.
func TestRetentionOfOwnTable(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key)`)
	db.Exec(`set client_min_messages = warning;
		create schema model; select sequin.create_pipeline('model', 'item', 'model.events', retention => '1 hour');
		create table own (like model.events including defaults including identity) partition by range (committed_at);
		create table own_old partition of own for values from (minvalue) to ('2020-01-01');
		create table own_now partition of own for values from ('2020-01-01') to ('2021-01-01')`)
	db.Exec(`insert into own (seq, source_database_id, source_table_oid, source_table_schema, source_table_name, action, committed_at)
		values (-1, md5('')::uuid, 0, '', '', 'insert', '2019-01-01'), (-1, md5('')::uuid, 0, '', '', 'insert', '2020-06-01')`)
	reader, err := db.Connect().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := reader.QueryRow(t.Context(), `select count(*) from own`).Scan(&n); err != nil || n != 2 {
		t.Fatal(n, err)
	}
	db.Exec(`select sequin.create_pipeline('p', 'item', 'own', retention => '1 hour')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1)`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from own where seq > 0`); n != 1 {
			return fmt.Errorf("%d events beside a reader: %v", n, status(db))
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select count(*) from own`); n != 3 {
		t.Errorf("%d events", n)
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from own`); n != 1 {
			return fmt.Errorf("%d events: %v", n, status(db))
		}
		return nil
	})
	// What cannot be dropped is said, and holds nothing else back.
	db.Exec(`create table own_2021 partition of own for values from ('2021-01-01') to ('2022-01-01'); create view needs as select * from own_2021`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if got := pgtest.Column[string](db, `select detail from sequin.health() where name = 'pipeline p' and status = 'warning'`); len(got) != 1 {
			return fmt.Errorf("health() says %v", got)
		}
		return nil
	})
	db.Exec(`insert into item values (2)`)
	awaitCount(db, "own", 2)
	db.Exec(`drop view needs`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if got := pgtest.Column[string](db, `select detail from sequin.health() where name = 'pipeline p' and status = 'ok'`); len(got) != 1 {
			return fmt.Errorf("health() is not well")
		}
		return nil
	})
}

// A limit of the log's size takes from a pipeline what it had not come to: that is on record, and it goes on after it.
func TestLogLimit(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, note text);
		select sequin.create_pipeline('slow', 'item', 'events');
		select sequin.set_retention('0 seconds', 16777216)`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (0)`)
	awaitCount(db, "events", 1)
	db.Exec(`select sequin.pause_pipeline('slow')`)
	last := 0
	pgtest.Eventually(t, 2*time.Minute, func() error {
		if n := pgtest.Value[int](db, `select coalesce(max(total), 0) from sequin.tally`); n < last {
			return fmt.Errorf("the log has %d of %d changes", n, last)
		}
		db.Exec(`insert into item select i, repeat(md5(i::text), 20) from generate_series($1::int + 1, $1::int + 500) i`, last)
		last += 500
		if n := pgtest.Value[int](db, `select count(*) from sequin.gap g where pipeline_id is not null`); n == 0 {
			return fmt.Errorf("no gap after %d changes", last)
		}
		return nil
	})
	if hint := pgtest.Column[string](db, `select hint from sequin.health() where status = 'error'`); hint[0] != `select sequin.accept_gap('local', pipeline => 'slow');` {
		t.Errorf("health() says %s", hint)
	}
	db.Exec(`select sequin.set_retention('0 seconds'), sequin.resume_pipeline('slow')`)
	db.Exec(`insert into item values (-1)`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from events where record_pk = '-1'`); n != 1 {
			return fmt.Errorf("the last event is not there: %v", status(db))
		}
		return nil
	})
	// What there is after the hole is there in one piece.
	if !pgtest.Value[bool](db, `select count(*) = max(record_pk::int) - min(record_pk::int) + 1 and max(record_pk::int) = $1
		from events where seq > (select max(to_seq) from sequin.gap) and record_pk <> '-1'`, last) {
		t.Error("events after the gap are missing")
	}
	if n := pgtest.Value[int](db, `select count(*) from events where seq <= (select max(to_seq) from sequin.gap)`); n != 1 {
		t.Errorf("%d events are before the end of the gap", n)
	}
	if n := pgtest.Value[int](db, `select sequin.accept_gap('local')`); n != 0 {
		t.Errorf("%d gaps of the source are accepted, and it has none", n)
	}
	if n := pgtest.Value[int](db, `select sequin.accept_gap(pipeline => 'slow')`); n == 0 {
		t.Error("no gap of the pipeline is accepted")
	}
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status = 'error'`); n != 0 {
		t.Errorf("%d errors are left in health()", n)
	}
}

// A pipeline that has written nothing yet, as it is paused or fails from the first event on, loses no less to the limit than another.
func TestLogLimitBeforeTheStart(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	pgtest.StartBridge(t, db.URL)()
	db.Exec(`create table item (id int primary key, note text);
		select sequin.set_retention('0 seconds', 16777216);
		begin;
		select sequin.create_pipeline('paused', 'item', 'paused'), sequin.pause_pipeline('paused');
		select sequin.create_pipeline('failing', 'item', 'failing', filter => '1 / (new.id - 1) >= 0');
		commit;
		insert into item values (1)`)
	pgtest.StartBridge(t, db.URL)
	awaitError(db, "failing", "22023", "division by zero")
	last := 1
	pgtest.Eventually(t, 2*time.Minute, func() error {
		if n := pgtest.Value[int](db, `select coalesce(max(total), 0) from sequin.tally`); n < last {
			return fmt.Errorf("the log has %d of %d changes", n, last)
		}
		db.Exec(`insert into item select i, repeat(md5(i::text), 20) from generate_series($1::int + 1, $1::int + 500) i`, last)
		last += 500
		if pgtest.Value[bool](db, `select min(id) = 0 from sequin.log_segment`) {
			return fmt.Errorf("nothing is dropped after %d changes", last)
		}
		return nil
	})
	for _, name := range []string{"paused", "failing"} {
		if got := pgtest.Column[string](db, `select hint from sequin.health() where name = 'gap in pipeline ' || $1 and status = 'error'`, name); len(got) == 0 ||
			got[0] != fmt.Sprintf("select sequin.accept_gap('local', pipeline => '%s');", name) {
			t.Errorf("%s: health() says %v", name, got)
		}
	}
	db.Exec(`select sequin.set_retention('0 seconds'), sequin.resume_pipeline('paused'), sequin.alter_pipeline('failing', filter => '')`)
	for _, name := range []string{"paused", "failing"} {
		pgtest.Eventually(t, 30*time.Second, func() error {
			if n := pgtest.Value[int](db, `select count(*) from `+name+` where record_pk::int = $1`, last); n != 1 {
				return fmt.Errorf("%s: the last event is not there: %v", name, status(db))
			}
			return nil
		})
		// Each change is an event, or in a gap.
		if n := pgtest.Value[int](db, `select count(*) + (select sum(to_seq - from_seq + 1)
			from sequin.gap g join sequin.pipeline p on p.id = g.pipeline_id where p.name = $1) from `+name, name); n < last {
			t.Errorf("%s: of %d changes, %d are events or in a gap", name, last, n)
		}
		if !pgtest.Value[bool](db, `select count(*) = $2::int - min(record_pk::int) + 1 and min(seq) > (select max(to_seq) from sequin.gap g
			join sequin.pipeline p on p.id = g.pipeline_id where p.name = $1) from `+name, name, last) {
			t.Errorf("%s: events after the gap are missing", name)
		}
		if got := pgtest.Value[string](db, `select state || ' ' || pending from sequin.pipeline_status where name = $1`, name); got != "active 0" {
			t.Errorf("%s: it is %s", name, got)
		}
	}
}

// Events that are kept for good have partitions made for them still.
func TestRetentionTakenAway(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id serial primary key);
		select sequin.create_pipeline('p', 'item', 'events', retention => '2 seconds');
		select sequin.create_pipeline('beside', 'item', 'events')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item default values; select sequin.alter_pipeline('p', retention => '0')`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		db.Exec(`insert into item default values`)
		if span := pgtest.Value[float64](db, `select coalesce(extract(epoch from max(committed_at) - min(committed_at)), 0)::float8 from events`); span < 4 {
			return fmt.Errorf("events of %v s have come: %v", span, status(db))
		}
		return nil
	})
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select (select count(*) from events) - 2 * (select count(*) from item)`); n != 0 {
			return fmt.Errorf("%d events too many: %v", n, status(db))
		}
		return nil
	})
}

// A retention that is given back, or shortened, is kept to with what came meanwhile, and with what comes: partitions that were
// made for longer end earlier.
func TestRetentionGivenBack(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id serial primary key);
		select sequin.create_pipeline('p', 'item', 'events', retention => '8 seconds');
		select sequin.create_pipeline('long', 'item', 'long', retention => '1000 days')`)
	pgtest.StartBridge(t, db.URL)
	partitions := func(table string) string {
		t.Helper()
		return pgtest.Value[string](db, `select coalesce(string_agg(from_at || ' to ' || to_at, ', ' order by from_at), 'none') from sequin._partitions($1::regclass)`, table)
	}
	// The next one is made ahead.
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin._partitions('long'::regclass)`); n != 2 {
			return fmt.Errorf("%d partitions", n)
		}
		return nil
	})
	db.Exec(`insert into item default values; select sequin.alter_pipeline('p', retention => '0')`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		db.Exec(`insert into item default values`)
		if n := pgtest.Value[int](db, `select count(*) from sequin._partitions('events'::regclass) where to_at > now() + interval '5 seconds'`); n != 1 {
			return fmt.Errorf("there is no long partition: %s", partitions("events"))
		}
		return nil
	})
	if !pgtest.Value[bool](db, `select bool_and(to_at - from_at <= interval '1 day') from sequin._partitions('events'::regclass)`) {
		t.Errorf("a partition is longer than a day: %s", partitions("events"))
	}
	// Not at the cost of who reads.
	reader, err := db.Connect().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := reader.Exec(t.Context(), `select from events`); err != nil {
		t.Fatal(err)
	}
	before := partitions("events")
	if e := db.Error(`select sequin.alter_pipeline('p', retention => '4 seconds')`); e.Code != "55P03" || !strings.Contains(e.Message, "public.events") || e.Hint == "" {
		t.Errorf("got %s: %s (%s)", e.Code, e.Message, e.Hint)
	}
	if after := partitions("events"); after != before {
		t.Errorf("refused, it changed %s to %s", before, after)
	}
	if err := reader.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	count := pgtest.Value[int](db, `select count(*) from item`)
	awaitCount(db, "long", count)
	db.Exec(`select sequin.alter_pipeline('p', retention => '4 seconds')`)
	db.Exec(`insert into item default values; select sequin.alter_pipeline('long', retention => '1 hour')`)
	awaitCount(db, "long", count+1)
	if got := pgtest.Value[bool](db, `select bool_and(to_at - greatest(from_at, now()) <= interval '5 minutes') from sequin._partitions('long'::regclass)`); !got {
		t.Errorf("shortened, the partitions are %s", partitions("long"))
	}
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from events`); n != 0 {
			return fmt.Errorf("%d old events are there: %s: %v", n, partitions("events"), status(db))
		}
		return nil
	})
	// And it goes on.
	db.Exec(`insert into item default values`)
	awaitCount(db, "long", count+2)
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where name like 'pipeline %' and status <> 'ok'`); n > 0 {
		t.Error("health() is not well")
	}
}

// What is written at once may be in several partitions, and have none for some of it: those that are there are of another
// width, or of the user's own.
func TestPartitionsBetween(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id serial primary key); create table plain (id int primary key);
		select sequin.create_pipeline('plain', 'plain', 'plain_events');
		create table events (like plain_events including defaults including identity) partition by range (committed_at);
		select sequin.create_pipeline('p', 'item', 'events'), sequin.pause_pipeline('p')`)
	pgtest.StartBridge(t, db.URL)
	// Of each second, the first half has a partition.
	const rows = 6
	for range rows {
		db.Exec(`insert into item default values`)
		at := pgtest.Value[time.Time](db, `select clock_timestamp()`)
		pgtest.Eventually(t, 10*time.Second, func() error {
			if now := pgtest.Value[time.Time](db, `select clock_timestamp()`); now.Sub(at) < 500*time.Millisecond {
				return fmt.Errorf("it is %s", now)
			}
			return nil
		})
	}
	db.Exec(`do $$ declare v_at timestamptz; begin
		for v_at in select generate_series(date_trunc('second', now()) - interval '10 seconds', now() + interval '10 seconds', interval '1 second') loop
			execute format('create table events_%s partition of events for values from (%L) to (%L)', extract(epoch from v_at)::bigint, v_at, v_at + interval '0.5 seconds');
		end loop; end $$`)
	db.Exec(`select sequin.resume_pipeline('p')`)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from events`); n != rows {
			return fmt.Errorf("there are %d events: %v", n, status(db))
		}
		return nil
	})
}
