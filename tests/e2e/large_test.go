package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A row of many megabytes, and an update of it with the old row beside the new one, is captured in memory of a few times its
// size: 100 MB in less than 600 MB.
func TestLargeRow(t *testing.T) {
	t.Parallel()
	megabytes := 8
	if pgtest.Rounds(t, 0) > 0 {
		megabytes = 100
	}
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, n int, big text, doc jsonb); alter table t alter big set storage external;
		alter table t replica identity full; select sequin.create_stream('t', '{t}', mode => 'changes')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t select 1, 0, repeat(md5('a'), $1 * 32768)`, megabytes)
	db.Exec(`update t set n = 1`)
	db.Exec(`update t set big = repeat(md5('b'), $1 * 32768)`, megabytes)
	db.Exec(`insert into t values (2)`)
	pgtest.Eventually(t, 5*time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where record_pk = '2'`); n != 1 {
			return fmt.Errorf("capture has not come so far")
		}
		return nil
	})
	got := pgtest.Column[string](db, `select concat_ws(' ', action, length(record ->> 'big'), md5(record ->> 'big'), length(changes ->> 'big'), metadata -> 'unchanged')
		from sequin.messages where record_pk = '1' order by seq`)
	sum := pgtest.Column[string](db, `select md5(repeat(md5(x), $1 * 32768)) from unnest('{a,b}'::text[]) x`, megabytes)
	size := megabytes << 20
	want := []string{
		fmt.Sprintf("insert %d %s", size, sum[0]), fmt.Sprintf("update %d %s", size, sum[0]), fmt.Sprintf("update %d %s %d", size, sum[1], size),
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %q, want %q", got, want)
	}
	peak := residentKB(t, b.Cmd.Process.Pid)
	t.Logf("%d MB, at most %d kB resident", megabytes, peak)
	if peak > (100+5*megabytes)<<10 {
		t.Errorf("the bridge took %d kB", peak)
	}
}

// What jsonb has no room for is left out of its row, and named; nothing else is held up by it. With a row of more than a
// gigabyte, old and new, the server fails: that transaction is named, and capture goes on after it when that is accepted.
func TestRowTooLarge(t *testing.T) {
	t.Parallel()
	if pgtest.Rounds(t, 0) == 0 {
		t.Skip("it takes gigabytes: SEQUIN_ROUNDS=1")
	}
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key, n int, big text, more text, list int[]); alter table t alter big set storage external, alter more set storage external;
		alter table t replica identity full; select sequin.create_stream('t', '{t}', mode => 'changes')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t (id, big, more) values (1, repeat('x', 150 << 20), repeat('y', 160 << 20))`)
	db.Exec(`insert into t (id, list) select 2, array_agg(i % 10) from generate_series(1, 9000000) i`)
	db.Exec(`insert into t (id, n) values (3, 3)`)
	pgtest.Eventually(t, 5*time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n != 3 {
			return fmt.Errorf("%d messages are in the log: %s", n, b.Log())
		}
		return nil
	})
	if got := pgtest.Column[string](db, `select concat_ws(' ', record_pk, metadata -> 'omitted', length(record ->> 'big'), record ? 'more', record ->> 'n',
		jsonb_typeof(record -> 'list')) from sequin.messages order by seq`); fmt.Sprint(got) != fmt.Sprint([]string{
		`1 ["more"] 157286400 f null`, `2 t string`, `3 t 3 null`,
	}) {
		t.Errorf("got %q", got)
	}
	db.Exec(`update t set big = repeat('z', 300 << 20), more = repeat('z', 300 << 20) where id = 1`)
	db.Exec(`update t set big = repeat('w', 300 << 20), more = repeat('w', 300 << 20) where id = 1`)
	db.Exec(`insert into t (id) values (4)`)
	pgtest.Eventually(t, 5*time.Minute, func() error {
		if !strings.Contains(b.Log(), "the server cannot send transaction") {
			return fmt.Errorf("it does not say so: %s", b.Log())
		}
		return nil
	})
	awaitHealth(t, db, "error source local the server cannot send transaction", "replica identity full sends both")
	for range 2 {
		db.Exec(`select sequin.accept_gap('local')`)
		pgtest.Eventually(t, 5*time.Minute, func() error {
			open := pgtest.Value[int](db, `select count(*) from sequin.gap where accepted_at is null`)
			last := pgtest.Value[int](db, `select count(*) from sequin.messages where record_pk = '4'`)
			if open == 0 && last == 0 {
				return fmt.Errorf("it does not go on: %s", b.Log())
			}
			return nil
		})
	}
	pgtest.Eventually(t, time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where record_pk = '4'`); n != 1 {
			return fmt.Errorf("it does not go on: %s", b.Log())
		}
		return nil
	})
}
