package backfill

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// message is what the tests look at of one.
type message struct {
	AckID  int64
	Seq    int64
	Action string
	Table  string
	Key    string
	Record string
}

// errTakenBack is of messages that were no longer the worker's to acknowledge.
var errTakenBack = errors.New("they were taken back")

// receive gets some messages and acknowledges them.
func receive(ctx context.Context, db *pgtest.DB, consumer string, size int, wait string) ([]message, error) {
	rows, err := db.Pool.Query(ctx, `select ack_id, seq, action, table_name, coalesce(record_pk, ''), coalesce(record::text, '')
		from sequin.receive($1, $2, $3::text::interval)`, consumer, size, wait)
	if err != nil {
		return nil, err
	}
	messages, err := pgx.CollectRows(rows, pgx.RowToStructByPos[message])
	if err != nil || len(messages) == 0 {
		return nil, err
	}
	ids := make([]int64, len(messages))
	for i, m := range messages {
		ids[i] = m.AckID
	}
	var n int
	if err := db.Pool.QueryRow(ctx, `select sequin.ack($1, $2)`, consumer, ids).Scan(&n); err != nil {
		return nil, err
	}
	if n != len(ids) {
		return messages, fmt.Errorf("acknowledged %d of %d: %w", n, len(ids), errTakenBack)
	}
	return messages, nil
}

// drain receives until a consumer has had count messages.
func drain(t *testing.T, db *pgtest.DB, consumer string, count int) []message {
	t.Helper()
	var all []message
	pgtest.Eventually(t, time.Minute, func() error {
		got, err := receive(t.Context(), db, consumer, 1000, "200 ms")
		if err != nil {
			t.Fatal(err)
		}
		if all = append(all, got...); len(all) < count {
			return fmt.Errorf("%s: %d messages, want %d: %s", consumer, len(all), count, state(db))
		}
		return nil
	})
	if len(all) > count {
		t.Fatalf("%s: %d messages, want %d", consumer, len(all), count)
	}
	return all
}

// drainSome receives what there is.
func drainSome(t *testing.T, db *pgtest.DB, consumer string) []message {
	t.Helper()
	got, err := receive(t.Context(), db, consumer, 1000, "1 s")
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func state(db *pgtest.DB) string {
	return pgtest.Value[string](db, `select coalesce(string_agg(b::text, ' '), 'no backfill') from sequin.backfills b`)
}

func keys(messages []message) []string {
	var keys []string
	for _, m := range messages {
		keys = append(keys, m.Key)
	}
	return keys
}

// awaitState waits until a backfill is in a state.
func awaitState(t *testing.T, db *pgtest.DB, id int64, want string) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		if got := pgtest.Value[string](db, `select state from sequin.backfills where id = $1`, id); got != want {
			return fmt.Errorf("%s, want %s: %s", got, want, state(db))
		}
		return nil
	})
}

// awaitCleared waits until nothing is left of histories.
func awaitCleared(t *testing.T, db *pgtest.DB) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.log_segment where backfill_id is not null`); n > 0 {
			return fmt.Errorf("%d histories are left: %s", n, state(db))
		}
		return nil
	})
}

func wantNothingPending(t *testing.T, db *pgtest.DB) {
	t.Helper()
	pgtest.Eventually(t, 10*time.Second, func() error {
		if left := pgtest.Value[string](db, `select coalesce(string_agg(s::text, ' '), '') from sequin.consumer_status s where pending > 0 or in_flight > 0`); left != "" {
			return fmt.Errorf("left over: %s", left)
		}
		return nil
	})
}

// The rows that exist, in order of the key, and then what is committed.
func TestBeginning(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, note text); insert into item select n, 'old ' || n from generate_series(1, 2500) n`)
	db.Exec(`select sequin.create_stream('s', '{item}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`update item set note = 'before' where id = 7`)
	if got := pgtest.Value[string](db, `select sequin.create_consumer('c', 's', group_by => '{}', start_at => 'beginning')`); got != "created" {
		t.Fatal(got)
	}
	got := drain(t, db, "c", 2500)
	for i, m := range got {
		if m.Key != fmt.Sprint(i+1) || m.Action != "read" || m.Table != "item" {
			t.Fatalf("message %d is %+v", i, m)
		}
	}
	if want := `{"id": 7, "note": "before"}`; got[6].Record != want {
		t.Errorf("got %s, want %s", got[6].Record, want)
	}
	db.Exec(`update item set note = 'after' where id = 3; delete from item where id = 4; insert into item values (9999, 'new')`)
	got = drain(t, db, "c", 3)
	if k := keys(got); !slices.Equal(k, []string{"3", "4", "9999"}) {
		t.Errorf("got %v", k)
	}
	awaitState(t, db, 1, "done")
	awaitCleared(t, db)
	wantNothingPending(t, db)
	db.Exec(`update item set note = 'at last' where id = 5`)
	if got = drain(t, db, "c", 1); got[0].Key != "5" {
		t.Errorf("got %+v", got)
	}
	if n := pgtest.Value[int](db, `select cardinality(routes) from sequin.consumer`); n != 1 {
		t.Errorf("%d routes", n)
	}
	wantNothingPending(t, db)
}

// A running consumer gets the rows again, and another one nothing of it.
func TestBackfill(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, note text); insert into item select n, 'old ' || n from generate_series(1, 1000) n`)
	db.Exec(`select sequin.create_stream('s', '{item}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_consumer('c', 's'), sequin.create_consumer('other', 's'),
		sequin.create_consumer('fed', 's', actions => '{insert,delete}'), sequin.create_consumer('grouped', 's', group_by => '{note}')`)
	db.Exec(`update item set note = 'first' where id <= 5`)
	drain(t, db, "c", 5)
	drain(t, db, "grouped", 5)
	for _, consumer := range []string{"c", "fed", "grouped"} {
		first := pgtest.Value[int64](db, `select sequin.backfill($1)`, consumer)
		got := drain(t, db, consumer, 1000)
		awaitState(t, db, first, "done")
		second := pgtest.Value[int64](db, `select sequin.backfill($1, '901')`, consumer)
		got = append(got, drain(t, db, consumer, 100)...)
		for _, m := range got {
			if m.Action != "read" {
				t.Fatalf("%s got %+v", consumer, m)
			}
		}
		count := map[string]int{}
		for _, m := range got {
			count[m.Key]++
		}
		if len(count) != 1000 || count["900"] != 1 || count["901"] != 2 {
			t.Errorf("%s got %d rows, row 900 %d times, row 901 %d", consumer, len(count), count["900"], count["901"])
		}
		awaitState(t, db, second, "done")
		if got := pgtest.Value[string](db, `select format('%s of %s', rows_done, rows_total) from sequin.backfills where id = $1`, second); got != "100 of 100" {
			t.Errorf("%s: %s", consumer, got)
		}
	}
	// Two at once are done one after the other; of a row that waits twice the older version may be skipped.
	first := pgtest.Value[int64](db, `select sequin.backfill('c')`)
	second := pgtest.Value[int64](db, `select sequin.backfill('c')`)
	awaitState(t, db, first, "done")
	awaitState(t, db, second, "done")
	for seen := map[string]bool{}; len(seen) < 1000; {
		for _, m := range drainSome(t, db, "c") {
			seen[m.Key] = true
		}
	}
	pgtest.Eventually(t, 30*time.Second, func() error {
		if pending := pgtest.Value[int64](db, `select pending from sequin.consumer_status where name = 'c'`); pending > 0 {
			drainSome(t, db, "c")
			return fmt.Errorf("%d pending", pending)
		}
		return nil
	})
	drain(t, db, "other", 5)
	awaitCleared(t, db)
	wantNothingPending(t, db)
	db.Exec(`insert into item values (2000, 'live')`)
	for _, consumer := range []string{"c", "other", "fed", "grouped"} {
		drain(t, db, consumer, 1)
	}
}

// Keys of any ordered type, of one column and of several, with nulls in the sort column, and names that have to be quoted.
func TestKeys(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create type mood as enum ('sad', 'ok', 'happy'); create domain tag as text check (value <> '')`)
	pgtest.StartBridge(t, db.URL)
	// Of the collations that the server has, one that does not sort by bytes, if there is any.
	collation := pgtest.Value[string](db, `select coalesce(
		(select collname from pg_collation where collname in ('en_US', 'en-x-icu', 'en_US.utf8') and collencoding in (-1, pg_char_to_encoding('UTF8')) order by 1 limit 1),
		'POSIX')`)
	const rows = 3000
	for i, test := range []struct{ table, insert, sort, order string }{
		{`(a int, b text collate "C", c numeric, primary key (b, a))`, `select n % 7, chr(65 + n % 50) || n, n / 3.0 from generate_series(1, %d) n`, "", `b, a`},
		{`(a text primary key)`, `select md5(n::text) || 'é''"\' || n from generate_series(1, %d) n`, "", `a`},
		{`(a uuid primary key)`, `select md5(n::text)::uuid from generate_series(1, %d) n`, "", `a`},
		{`(a timestamptz primary key)`, `select timestamptz '2020-01-01' + n * interval '1.000001 s' from generate_series(1, %d) n`, "", `a`},
		{`(a numeric primary key)`, `select case n when 1 then 'NaN' else n / 7.0 - 100 end from generate_series(1, %d) n`, "", `a`},
		{`(a uuid, b timestamptz, primary key (b, a))`, `select md5(n::text)::uuid, timestamptz '2020-01-01' + n %% 7 * interval '1 day' from generate_series(1, %d) n`, "", `b, a`},
		{`(a mood, b bytea, primary key (a, b))`, `select (array['happy', 'sad', 'ok'])[1 + n %% 3]::mood, decode(md5(n::text), 'hex') from generate_series(1, %d) n`, "", `a, b`},
		{`(a numeric, b text, primary key (a, b))`, `select case n %% 5 when 1 then 'NaN' else n %% 5 / 7.0 end, n::text from generate_series(1, %d) n`, "", `a, b`},
		{`(a bytea primary key)`, `select '\x00ff'::bytea || decode(md5(n::text), 'hex') from generate_series(1, %d) n`, "", `a`},
		{`(a text collate "` + collation + `", b date, primary key (a, b))`, `select chr(65 + n %% 26) || chr(97 + n %% 25) || chr(196 + n %% 3), date '2020-01-01' + n from generate_series(1, %d) n`, "", `a, b`},
		{`(a float8, b tag, primary key (a, b))`, `select sqrt(n % 97), 'x' || n from generate_series(1, %d) n`, "", `a, b`},
		{
			`(id int primary key, "Sort ""me" timestamp)`, `select n, case when n %% 3 > 0 then timestamp '2020-01-01' + (n * 7919 %% 1000) * interval '1 s' end from generate_series(1, %d) n`,
			`Sort "me`, `"Sort ""me" nulls last, id`,
		},
		{`(id int primary key, a mood)`, `select n, (array['sad', 'ok', 'happy', null]::mood[])[n %% 4 + 1] from generate_series(1, %d) n`, "a", `a nulls last, id`},
		{`(id int primary key, a text)`, `select n, case when n %% 2 = 0 then 'k' || n %% 10 end from generate_series(1, %d) n`, "a", `a nulls last, id`},
		{`(id int primary key, a bpchar(5))`, `select n, 'k' || n %% 10 from generate_series(1, %d) n`, "a", `a, id`},
	} {
		name := fmt.Sprintf(`Odd "%d" name`, i)
		quoted := `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
		db.Exec(`create table ` + quoted + ` ` + test.table)
		if strings.Contains(test.insert, "%%") {
			db.Exec(`insert into ` + quoted + ` ` + fmt.Sprintf(test.insert, rows))
		} else {
			db.Exec(`insert into ` + quoted + ` ` + strings.Replace(test.insert, "%d", fmt.Sprint(rows), 1))
		}
		stream := fmt.Sprintf("s%d", i)
		db.Exec(`select sequin.create_stream($1, array[$2], sort_column => nullif($3, ''))`, stream, quoted, test.sort)
		db.Exec(`select sequin.create_consumer($1, $1, group_by => '{}', start_at => 'beginning')`, stream)
		got := drain(t, db, stream, rows)
		want := pgtest.Column[string](db, `select to_jsonb(t)::text from `+quoted+` t order by `+test.order)
		for n, m := range got {
			if m.Record != want[n] {
				t.Errorf("%s: message %d is %s, want %s", test.table, n, m.Record, want[n])
				break
			}
		}
	}
}

// start_row is the first value of the sort column to be delivered; nulls are not after any.
func TestRow(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, at timestamptz);
		insert into item select n, case when n % 2 = 0 then timestamptz '2020-01-01' + n * interval '1 day' end from generate_series(1, 100) n`)
	db.Exec(`select sequin.create_stream('s', '{item}', sort_column => 'at')`)
	pgtest.StartBridge(t, db.URL)
	for _, bad := range []string{"soon", "2020-13-01", ""} {
		err := db.Error(`select sequin.create_consumer('bad', 's', start_at => 'row', start_row => $1)`, bad)
		if err.Code != "22023" || !strings.Contains(err.Message, `"at"`) || err.Hint == "" {
			t.Errorf("%q: %v %v", bad, err, err.Hint)
		}
	}
	db.Exec(`select sequin.create_consumer('c', 's', group_by => '{}', start_at => 'row', start_row => '2020-04-01 00:00+00')`)
	got := drain(t, db, "c", 5)
	if k := keys(got); !slices.Equal(k, []string{"92", "94", "96", "98", "100"}) {
		t.Errorf("got %v", k)
	}
	db.Exec(`update item set at = at where id = 1`)
	if k := keys(drain(t, db, "c", 1)); !slices.Equal(k, []string{"1"}) {
		t.Errorf("got %v", k)
	}
	// The same again is the same; another row is not.
	same := `select sequin.create_consumer('c', 's', group_by => '{}', start_at => 'row', start_row => $1, if_not_exists => true)`
	if got := pgtest.Value[string](db, same, "2020-04-01 00:00+00"); got != "unchanged" {
		t.Error(got)
	}
	if err := db.Error(same, "2020-05-01 00:00+00"); err.Code != "42710" {
		t.Error(err)
	}
	// A time is what its writer means by it, whatever the bridge has set.
	conn := db.Connect()
	if _, err := conn.Exec(t.Context(), `set timezone = 'America/New_York'; set datestyle = 'SQL, DMY'; set standard_conforming_strings = off;
		select sequin.create_consumer('d', 's', group_by => '{}', start_at => 'row', start_row => '31/03/2020 20:00')`); err != nil {
		t.Fatal(err)
	}
	if k := keys(drain(t, db, "d", 5)); !slices.Equal(k, []string{"92", "94", "96", "98", "100"}) {
		t.Errorf("got %v", k)
	}
	if _, err := conn.Exec(t.Context(), `select sequin.rewind('d', to_row => '05/04/2020 19:59:59')`); err != nil {
		t.Fatal(err)
	}
	if k := keys(drain(t, db, "d", 3)); !slices.Equal(k, []string{"96", "98", "100"}) {
		t.Errorf("got %v", k)
	}
}

// A table that inherits from another is one of its own: its rows are in no stream of the other's, and its owner's updates
// need no replica identity for it.
func TestInherited(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table base (id int primary key, n int); create table heir () inherits (base); create table own (primary key (id)) inherits (base);
		insert into base values (1, 0), (2, 0); insert into heir values (11, 0); insert into own values (21, 0)`)
	config, err := pgx.ParseConfig(db.URL)
	if err != nil {
		t.Fatal(err)
	}
	var warned []string
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { warned = append(warned, n.Message) }
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), `select sequin.create_stream('own', '{own}'), sequin.create_stream('base', '{base}')`); err != nil {
		t.Fatal(err)
	}
	if all := strings.Join(warned, "; "); !strings.Contains(all, "without the rows of public.heir") || !strings.Contains(all, "without the rows of public.own") {
		t.Errorf("warned of %s", all)
	}
	db.Exec(`select sequin.create_consumer('base', 'base', start_at => 'beginning', group_by => '{}'),
		sequin.create_consumer('own', 'own', start_at => 'beginning', group_by => '{}')`)
	pgtest.StartBridge(t, db.URL)
	if k := keys(drain(t, db, "base", 2)); !slices.Equal(k, []string{"1", "2"}) {
		t.Errorf("base begins with %v", k)
	}
	if k := keys(drain(t, db, "own", 1)); !slices.Equal(k, []string{"21"}) {
		t.Errorf("own begins with %v", k)
	}
	if n := pgtest.Value[int](db, `select count(*) from sequin.sync('base')`); n != 2 {
		t.Errorf("sync begins with %d rows", n)
	}
	db.Exec(`update base set n = 1; delete from heir; insert into base values (3, 1)`)
	if k := keys(drain(t, db, "base", 3)); !slices.Equal(k, []string{"1", "2", "3"}) {
		t.Errorf("base goes on with %v", k)
	}
	if k := keys(drain(t, db, "own", 1)); !slices.Equal(k, []string{"21"}) {
		t.Errorf("own goes on with %v", k)
	}
	if n := pgtest.Value[int](db, `select sequin.republish('base', 'select * from base')`); n != 3 {
		t.Errorf("%d messages are republished", n)
	}
	// What is no longer streamed takes nothing of its heirs' with it.
	db.Exec(`select sequin.drop_consumer('base'), sequin.drop_stream('base')`)
	db.Exec(`insert into own values (22, 1)`)
	if k := keys(drain(t, db, "own", 1)); !slices.Equal(k, []string{"22"}) {
		t.Errorf("own ends with %v", k)
	}
}

// A table without rows, a partitioned one, and several in one stream.
func TestTables(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 13 {
		t.Skip("cannot publish a partitioned table")
	}
	db.Exec(`create table none (id int primary key); create table one (id int primary key, n int);
		create table parted (id int, region text, primary key (region, id)) partition by list (region);
		create table east partition of parted for values in ('east');
		create table west (region text, id int not null, primary key (region, id));
		alter table west alter region set not null;
		alter table parted attach partition west for values in ('west');
		create table times (at timestamptz, id uuid, primary key (at, id)) partition by range (at);
		create table times1 partition of times for values from ('2020-01-01') to ('2020-02-01');
		create table times2 (id uuid not null, note text, at timestamptz not null); alter table times2 drop column note;
		alter table times attach partition times2 for values from ('2020-02-01') to ('2021-01-01');
		insert into times select timestamptz '2020-01-01' + n % 60 * interval '1 day', md5(n::text)::uuid from generate_series(1, 3000) n;
		insert into one select n, 0 from generate_series(1, 50) n;
		insert into parted select n, case when n % 2 = 0 then 'east' else 'west' end from generate_series(1, 3000) n`)
	db.Exec(`select sequin.create_stream('s', '{none, one, parted}'), sequin.create_stream('none', '{none}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_consumer('c', 's', group_by => '{}', start_at => 'beginning'), sequin.create_consumer('none', 'none', start_at => 'beginning')`)
	got := drain(t, db, "c", 3050)
	want := pgtest.Column[string](db, `select r from (
		select 1 as t, '' as region, id, 'one ' || id as r from one union all
		select 2, region, id, 'parted ' || region || ',' || id from parted) a order by t, region, id`)
	for i, m := range got {
		if m.Table+" "+m.Key != want[i] {
			t.Fatalf("message %d is %+v, want %s", i, m, want[i])
		}
	}
	if want := `{"id": 2, "region": "east"}`; got[50].Record != want {
		t.Errorf("got %s, want %s", got[50].Record, want)
	}
	db.Exec(`select sequin.create_stream('times', '{times}'), sequin.create_consumer('times', 'times', group_by => '{}', start_at => 'beginning')`)
	rows := pgtest.Column[string](db, `select to_jsonb(t)::text from times t order by at, id`)
	for i, m := range drain(t, db, "times", len(rows)) {
		if m.Record != rows[i] {
			t.Fatalf("times: message %d is %s, want %s", i, m.Record, rows[i])
		}
	}
	db.Exec(`insert into none values (1); update parted set region = 'west' where id = 2`)
	if k := keys(drain(t, db, "none", 1)); !slices.Equal(k, []string{"1"}) {
		t.Error(k)
	}
	drain(t, db, "c", 3)
	awaitCleared(t, db)
	wantNothingPending(t, db)
}

// Cancelled, its consumer goes on with what is live; what was written stays. Dropped, with its stream, it goes at once.
func TestCancel(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, note text); insert into item select n, repeat('x', 500) from generate_series(1, 60000) n`)
	db.Exec(`select sequin.create_stream('s', '{item}'), sequin.create_stream('doomed', '{item}')`)
	db.Exec(`select sequin.create_consumer('early', 's', start_at => 'beginning')`)
	if !pgtest.Value[bool](db, `select sequin.cancel_backfill(1)`) || pgtest.Value[bool](db, `select sequin.cancel_backfill(1)`) {
		t.Error("a backfill that waits is cancelled once")
	}
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (0, 'live')`)
	if k := keys(drain(t, db, "early", 1)); !slices.Equal(k, []string{"0"}) {
		t.Error(k)
	}
	db.Exec(`select sequin.create_consumer('c', 's', start_at => 'beginning'), sequin.create_consumer('gone', 'doomed', start_at => 'beginning')`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if pgtest.Value[int](db, `select count(*) from sequin.backfills where rows_done > 0`) < 2 {
			return fmt.Errorf("not begun: %s", state(db))
		}
		return nil
	})
	began := time.Now()
	db.Exec(`select sequin.drop_consumer('gone'), sequin.drop_stream('doomed')`)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("drop_consumer took %s", took)
	}
	db.Exec(`select sequin.cancel_backfill(2)`)
	done := pgtest.Value[int](db, `select rows_done from sequin.backfills where id = 2`)
	drain(t, db, "c", done)
	db.Exec(`insert into item values (-1, 'live')`)
	for _, consumer := range []string{"c", "early"} {
		if k := keys(drain(t, db, consumer, 1)); !slices.Equal(k, []string{"-1"}) {
			t.Errorf("%s: %v", consumer, k)
		}
	}
	awaitCleared(t, db)
	wantNothingPending(t, db)
	if n := pgtest.Value[int](db, `select count(*) from sequin.side_route r where not exists (select from sequin.consumer c where c.id = r.consumer_id)`); n > 0 {
		t.Errorf("%d side routes are left", n)
	}
}

// What cannot be read makes a backfill fail, with the reason, and nothing else: its consumer goes on.
func TestFailed(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, rank int); insert into item select n, n from generate_series(1, 100) n;
		create table dropped (id int primary key); create table loose (n int); alter table loose replica identity full`)
	db.Exec(`select sequin.create_stream('s', '{item}', sort_column => 'rank'), sequin.create_stream('dropped', '{dropped}'), sequin.create_stream('loose', '{loose}')`)
	if err := db.Error(`select sequin.create_consumer('loose', 'loose', start_at => 'beginning')`); err.Code != "55000" || !strings.Contains(err.Hint, "primary key") {
		t.Errorf("%v: %s", err, err.Hint)
	}
	db.Exec(`select sequin.create_consumer('c', 's', start_at => 'beginning'), sequin.create_consumer('d', 'dropped', start_at => 'beginning')`)
	db.Exec(`alter table item drop column rank; drop table dropped`)
	pgtest.StartBridge(t, db.URL)
	awaitState(t, db, 1, "failed")
	awaitState(t, db, 2, "failed")
	for name, want := range map[string]string{"backfill 1": "rank", "backfill 2": "dropped"} {
		if got := pgtest.Value[string](db, `select detail || ' ' || hint from sequin.health() where name = $1 and status = 'error'`, name); !strings.Contains(got, want) {
			t.Errorf("%s: %s", name, got)
		}
	}
	db.Exec(`insert into item values (1000)`)
	if k := keys(drain(t, db, "c", 1)); !slices.Equal(k, []string{"1000"}) {
		t.Error(k)
	}
	for _, call := range []string{`backfill('c')`, `rewind('c', to_row => '1')`, `backfill('d')`, `rewind('d', to_row => '1')`} {
		if err := db.Error(`select sequin.` + call); err.Code != "55000" || err.Hint == "" {
			t.Errorf("%s: %v: %s", call, err, err.Hint)
		}
	}
	if !pgtest.Value[bool](db, `select sequin.cancel_backfill(1)`) || pgtest.Value[bool](db, `select exists (select from sequin.health() where name = 'backfill 1')`) {
		t.Error("a failed backfill that was cancelled is an error still")
	}
}

// A failed backfill is an error until one has delivered what it did not: a narrower one has not.
func TestFailedUntilDone(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); insert into item select n from generate_series(1, 10) n;
		select sequin.create_stream('s', '{item}'); select sequin.create_consumer('c', 's')`)
	pgtest.StartBridge(t, db.URL)
	for _, step := range []struct {
		call, state string
		isError     bool
	}{
		{`select sequin.backfill('c', filter => '1 / (new.id - 5) > -100')`, "failed", true},
		{`select sequin.backfill('c', filter => 'new.id = 1')`, "done", true},
		{`select sequin.backfill('c', from_row => '9')`, "done", true},
		{`select sequin.backfill('c')`, "done", false},
	} {
		id := pgtest.Value[int64](db, step.call)
		awaitState(t, db, id, step.state)
		if got := pgtest.Value[bool](db, `select exists (select from sequin.health() where name = 'backfill 1')`); got != step.isError {
			t.Errorf("%s: an error: %t", step.call, got)
		}
	}
}

// A backfill begins though there is always some worker in the middle of a transaction.
func TestBeginsBesideWorkers(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); insert into item select n from generate_series(1, 10) n;
		select sequin.create_stream('s', '{item}'); select sequin.create_consumer('c', 's')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item select n from generate_series(11, 2000) n`)
	awaitState(t, db, pgtest.Value[int64](db, `select sequin.backfill('c', filter => 'false')`), "done") // it has begun
	var workers sync.WaitGroup
	done := make(chan struct{})
	for range 3 {
		conn := db.Connect()
		workers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if _, err := conn.Exec(context.Background(), `begin; select count(*) from sequin.pop('c'); select pg_sleep(0.4); commit`); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	id := pgtest.Value[int64](db, `select sequin.backfill('c', filter => 'false')`)
	awaitState(t, db, id, "done")
	close(done)
	workers.Wait()
}

// A table that is altered while it is read: rows are as the table is when they are read, and none is missing, though all
// of them seem to have been written by the one who altered it.
func TestAltered(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, n int, note text); insert into item select n, n, repeat('x', 300) from generate_series(1, 50000) n`)
	db.Exec(`select sequin.create_stream('s', '{item}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_consumer('c', 's', start_at => 'beginning')`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if pgtest.Value[int64](db, `select rows_done from sequin.backfills`) == 0 {
			return fmt.Errorf("not begun")
		}
		return nil
	})
	db.Exec(`alter table item alter n type bigint, add extra text default 'new'`)
	db.Exec(`alter table item rename to thing`)
	got := drain(t, db, "c", 50000)
	var without, with int
	for _, m := range got {
		if strings.Contains(m.Record, `"extra": "new"`) {
			with++
		} else {
			without++
		}
	}
	t.Logf("%d rows without the column, %d with it", without, with)
	awaitState(t, db, 1, "done")
	wantNothingPending(t, db)
}

// A value that is too large to be repeated in the WAL is in the history of a row that was changed meanwhile.
func TestLargeValue(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, n int, big text); alter table item alter big set storage external;
		insert into item select n, 0, repeat('x', 10000) from generate_series(1, 50) n`)
	db.Exec(`select sequin.create_stream('s', '{item}')`)
	pgtest.StartBridge(t, db.URL)
	// A transaction that is open before the cut, and commits after it.
	tx, err := db.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background()) //nolint:errcheck // after the commit it does nothing
	if _, err := tx.Exec(t.Context(), `update item set n = 1 where id = 1`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`select sequin.create_consumer('c', 's', start_at => 'beginning')`)
	drain(t, db, "c", 50)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	drain(t, db, "c", 1)
	wantNothingPending(t, db)
}
