package sources

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// fill makes a table of a thousand rows on the source, and a stream of it.
func fill(t *testing.T, home, far *pgtest.DB) {
	t.Helper()
	far.Exec(`create table item (id int primary key, rank int, note text); insert into item select n, 1001 - n, 'old' from generate_series(1, 1000) n`)
	create(home, "item", "{item}", ", sort_column => 'rank'")
}

// await waits until a consumer has had so many messages, as columns says, and returns them in order.
func await(t *testing.T, home *pgtest.DB, consumer, column string, count int) []string {
	t.Helper()
	var got []string
	pgtest.Eventually(t, 60*time.Second, func() error {
		got = append(got, pgtest.Column[string](home, `select (`+column+`)::text from sequin.pop($1, 1000, '200 ms') order by seq`, consumer)...)
		if len(got) < count {
			return fmt.Errorf("%s has had %d messages of %d: %s", consumer, len(got), count, pgtest.Value[string](home,
				`select coalesce(string_agg(b::text, ' '), 'no backfill') from sequin.backfills b`))
		}
		return nil
	})
	if len(got) > count {
		t.Fatalf("%s has had %d messages, and not %d", consumer, len(got), count)
	}
	return got
}

// Consumers of another source's tables begin with the rows that are there, in order, and then get what follows: each row's
// newest version, once.
func TestBeginning(t *testing.T) {
	home, far := pair(t)
	fill(t, home, far)
	// As soon as there is a stream, whether its tables have been found or not.
	home.Exec(`select sequin.create_consumer('all', 'item', group_by => '{}', start_at => 'beginning')`)
	home.Exec(`select sequin.create_consumer('some', 'item', group_by => '{}', start_at => 'row', start_row => '901')`)
	home.Exec(`select sequin.create_consumer('odd', 'item', start_at => 'beginning', filter => $$ (coalesce(new, old)->>'id')::int % 2 = 1 $$,
		transform => $$ coalesce(new->'rank', 'null') $$)`)
	got := await(t, home, "all", "record->'rank'", 1000)
	for i, rank := range got {
		if rank != fmt.Sprint(i+1) {
			t.Fatalf("message %d is of rank %s", i, rank)
		}
	}
	if got := await(t, home, "some", "record->'rank'", 100); got[0] != "901" || got[99] != "1000" {
		t.Errorf("got %s to %s", got[0], got[99])
	}
	await(t, home, "odd", "record", 500)
	far.Exec(`update item set note = 'new' where id = 7; delete from item where id = 9`)
	if got := await(t, home, "all", "action || ' ' || record_pk", 2); fmt.Sprint(got) != "[update 7 delete 9]" {
		t.Errorf("got %v", got)
	}
	if got := await(t, home, "odd", "action || ' ' || record_pk", 2); strings.Join(got, " ") != "update 7 delete 9" && strings.Join(got, " ") != "delete 9 update 7" {
		t.Errorf("got %v", got)
	}
	if got := pgtest.Column[string](home, `select concat_ws(' ', consumer, state, rows_done, rows_total) from sequin.backfills order by id`); fmt.Sprint(got) !=
		"[all done 1000 1000 some done 100 100 odd done 1000 1000]" {
		t.Errorf("got %v", got)
	}
}

// A backfill, and a rewind to a row, read the source's table again; a rewind to a seq or a time the log.
func TestGoingBack(t *testing.T) {
	home, far := pair(t)
	fill(t, home, far)
	far.Exec(`create table bare (id int); alter table bare replica identity full`)
	create(home, "bare", "{bare}", "")
	home.Exec(`select sequin.create_consumer('c', 'item', group_by => '{}')`)
	awaitStream(t, home, "item", "active")
	awaitStream(t, home, "bare", "active")
	far.Exec(`insert into item values (2001, 2001, 'one'); insert into item values (2002, 2002, 'two')`)
	await(t, home, "c", "record_pk", 2)

	seq := pgtest.Value[int64](home, `select seq from sequin.messages where stream = 'item' and record_pk = '2002' order by seq limit 1`)
	home.Exec(`select sequin.rewind('c', to_seq => $1)`, seq)
	if got := await(t, home, "c", "action || ' ' || record_pk", 1); fmt.Sprint(got) != "[insert 2002]" {
		t.Errorf("got %v", got)
	}
	home.Exec(`select sequin.rewind('c', to_time => (select min(committed_at) from sequin.messages where stream = 'item'))`)
	await(t, home, "c", "action || ' ' || record_pk", 2)

	id := pgtest.Value[int64](home, `select sequin.backfill('c', from_row => '991', filter => $$ new->>'id' <> '5' and table_name = 'item' $$)`)
	if got := await(t, home, "c", "action || ' ' || record_pk", 11); got[0] != "read 10" || got[4] != "read 6" || got[5] != "read 4" || got[10] != "read 2002" {
		t.Errorf("got %v", got)
	}
	awaitBackfill(t, home, id, "done")
	home.Exec(`select sequin.rewind('c', to_row => '2001')`)
	if got := await(t, home, "c", "action || ' ' || record_pk", 2); fmt.Sprint(got) != "[read 2001 read 2002]" {
		t.Errorf("got %v", got)
	}
	// What only the source can tell ends the backfill, with the reason; nothing else.
	for sql, want := range map[string]string{
		`select sequin.backfill('c', from_row => 'x')`:                                                                "failed: invalid input syntax for type integer",
		`select sequin.backfill('c', filter => $$ 1 / (new->>'rank')::int > 0 or 1 / ((new->>'id')::int - 5) > 0 $$)`: "failed: division by zero",
	} {
		id := pgtest.Value[int64](home, sql)
		awaitBackfill(t, home, id, want)
	}
	home.Exec(`select sequin.create_consumer('bare', 'bare')`)
	if e := home.Error(`select sequin.backfill('bare')`); e.Code != "55000" || !strings.Contains(e.Message, "no primary key") {
		t.Errorf("got %s: %s", e.Code, e.Message)
	}
	if e := home.Error(`select sequin.backfill('c', filter => 'new.rank > 1')`); e.Code != "42703" || !strings.Contains(e.Hint, `(new->>'amount')::numeric > 100`) {
		t.Errorf("got %s: %s", e.Code, e.Message)
	}
	far.Exec(`insert into item values (3000, 3000, 'last')`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		for _, key := range pgtest.Column[string](home, `select record_pk from sequin.pop('c', 1000, '1 s')`) {
			if key == "3000" {
				return nil
			}
		}
		return fmt.Errorf("the last has not come")
	})
	home.Exec(`select sequin.drop_consumer('c'); select sequin.drop_consumer('bare'); select sequin.drop_stream('item'); select sequin.drop_stream('bare')`)
	home.Exec(`select sequin.drop_source('far')`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](home, `select count(*) from sequin.source`); n != 1 {
			return fmt.Errorf("%d sources are left", n)
		}
		return nil
	})
	if n := pgtest.Value[int](home, `select (select count(*) from sequin.side_route) + (select count(*) from sequin.source_table)`); n != 0 {
		t.Errorf("%d rows are left", n)
	}
}

func awaitBackfill(t *testing.T, home *pgtest.DB, id int64, want string) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		if got := pgtest.Value[string](home, `select concat_ws(': ', state, error) from sequin.backfills where id = $1`, id); !strings.HasPrefix(got, want) {
			return fmt.Errorf("backfill %d is %s, and not %s", id, got, want)
		}
		return nil
	})
}

// While rows are written on the source, a consumer that begins with those there are ends up with the table as it is, and no
// row comes older than it came before.
func TestBeginningBesideWriters(t *testing.T) {
	home, far := pair(t)
	far.Exec(`create table item (id int primary key, version int not null); insert into item select n, 0 from generate_series(1, 20000) n`)
	create(home, "item", "{item}", "")
	awaitStream(t, home, "item", "active")
	stop, done := make(chan struct{}), make(chan error, 1)
	conn := far.Connect()
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			_, err := conn.Exec(t.Context(), `update item set version = version + 1 where id in (
				select 1 + (random() * 21000)::int from generate_series(1, 20))`)
			if err == nil {
				_, err = conn.Exec(t.Context(), `insert into item values ($1, 0) on conflict do nothing`, 20001+n)
			}
			if err == nil && n%3 == 0 {
				_, err = conn.Exec(t.Context(), `delete from item where id = (random() * 21000)::int`)
			}
			if err != nil {
				done <- err
				return
			}
		}
	}()
	home.Exec(`select sequin.create_consumer('c', 'item', start_at => 'beginning')`)
	versions := map[int]int{}
	take := func() int {
		rows := pgtest.Column[[]int](home, `select array[record_pk::int, case when action = 'delete' then -1 else (record->>'version')::int end]
			from sequin.pop('c', 5000, '200 ms') order by seq`)
		for _, r := range rows {
			if before, ok := versions[r[0]]; ok && r[1] >= 0 && r[1] < before {
				t.Fatalf("row %d comes as version %d after %d", r[0], r[1], before)
			}
			versions[r[0]] = r[1]
		}
		return len(rows)
	}
	pgtest.Eventually(t, 60*time.Second, func() error {
		take()
		if state := pgtest.Value[string](home, `select state from sequin.backfills`); state != "done" {
			return fmt.Errorf("the backfill is %s", state)
		}
		return nil
	})
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	pgtest.Eventually(t, 60*time.Second, func() error {
		for take() > 0 {
		}
		want := map[int]int{}
		for _, r := range pgtest.Column[[]int](far, `select array[id, version] from item`) {
			want[r[0]] = r[1]
		}
		live := 0
		for id, version := range versions {
			if version < 0 {
				if _, ok := want[id]; ok {
					return fmt.Errorf("row %d came as deleted last, and is there", id)
				}
				continue
			}
			live++
			if v, ok := want[id]; !ok || v != version {
				return fmt.Errorf("row %d came as version %d last, and is %d", id, version, v)
			}
		}
		if live != len(want) {
			return fmt.Errorf("%d rows came of %d", live, len(want))
		}
		return nil
	})
}

// A source that goes away in the middle of a history, and a bridge that is killed there: it goes on where it was.
func TestBeginningStopped(t *testing.T) {
	t.Parallel()
	home, c := pgtest.New(t), pgtest.NewCluster(t, nil)
	far := pgtest.EmptyOn(t, c)
	const count = 60_000
	far.Exec(`create table item (id int primary key, note text)`)
	far.Exec(`insert into item select n, repeat('x', 300) from generate_series(1, $1::int) n`, count)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	create(home, "item", "{item}", "")
	awaitStream(t, home, "item", "active")
	home.Exec(`select sequin.create_consumer('c', 'item', group_by => '{}', start_at => 'beginning')`)
	isRunning := func() error {
		if n := pgtest.Value[int64](home, `select coalesce(max(rows_done), 0) from sequin.backfills where state = 'running'`); n == 0 {
			return fmt.Errorf("nothing is read yet")
		}
		return nil
	}
	pgtest.Eventually(t, 30*time.Second, isRunning)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := c.Stop(ctx, localpg.Fast); err != nil {
		t.Fatal(err)
	}
	awaitHealth(t, home, "source far | error | the source cannot be reached: connection refused")
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.Kill()
	first := b.Log()
	b = pgtest.BridgeProcess(t, home.URL)
	got := await(t, home, "c", "record_pk", count)
	for i, key := range got {
		if key != fmt.Sprint(i+1) {
			t.Fatalf("message %d is of row %s", i+1, key)
		}
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
	if log := first + b.Log(); strings.Contains(log, "127.0.0.1") || strings.Contains(log, far.URL) {
		t.Errorf("what the source is reached by is in the log: %s", log)
	}
}
