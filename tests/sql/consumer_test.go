package sql

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"

	"sequin/tests/pgtest"
)

// start_at 'now': what commits after the call, and nothing before it, however far the bridge is behind; of a transaction
// that is open at the time, all of it; and what commits between the call and its own commit, too.
func TestStartNow(t *testing.T) {
	t.Parallel()
	f := &fixture{DB: pgtest.New(t)}
	f.Exec(`create table item (id int primary key, grp int, note text); select sequin.create_stream('s', '{item}', mode => 'changes')`)
	create := func(name, options string) string {
		return fmt.Sprintf(`select sequin.create_consumer('%s', 's'%s)`, name, options)
	}
	ctx := context.Background()
	f.Exec(create("first", `, group_by => '{}'`)) // no bridge has ever run
	stop := pgtest.StartBridge(t, f.URL)
	f.Exec(`insert into item values (1, 1, 'heard by first')`)
	wantBrief(t, f.take("first", 1), "insert item 1 heard by first")
	stop()

	f.Exec(`insert into item select i, 1, 'before' from generate_series(2, 500) i`)
	open, err := f.Connect().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	f.execIn(open, `insert into item values (1001, 1, 'open')`)
	f.Exec(create("total", `, group_by => '{}'`))
	f.Exec(create("key", ``))
	f.Exec(create("feed", `, group_by => '{grp}'`))
	making, err := f.Connect().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	f.execIn(making, create("late", `, group_by => '{}'`))
	f.Exec(`insert into item values (1002, 1, 'after')`)
	if err := making.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	f.execIn(open, `insert into item values (1003, 1, 'open')`)
	if err := open.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	pgtest.StartBridge(t, f.URL)
	want := []string{"insert item 1002 after", "insert item 1001 open", "insert item 1003 open"}
	for _, consumer := range []string{"total", "feed", "late"} {
		wantBrief(t, f.take(consumer, 3), want...)
	}
	f.take("key", 3)
	f.take("first", 502)
}

// A consumer that exists already is left alone if it is the same, and is an error if it is not, or unless asked.
func TestConsumerIfNotExists(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, grp int);
		select sequin.create_stream('s', '{item}'); select sequin.create_stream('r', '{item}')`)
	call := func(sql string) string { return pgtest.Value[string](db, `select sequin.create_consumer(`+sql+`)`) }
	same := `'c', 's', actions => '{delete,insert}', group_by => '{grp}', ack_wait => '60 s', max_deliver => 3, if_not_exists => true`
	for i, want := range []string{"created", "unchanged"} {
		if got := call(same); got != want {
			t.Errorf("call %d gives %s, want %s", i+1, got, want)
		}
	}
	if got := call(strings.ReplaceAll(strings.ReplaceAll(same, "60 s", "1 minute"), "delete,insert", "insert,delete,insert")); got != "unchanged" {
		t.Errorf("the same in other words gives %s", got)
	}
	for _, other := range []string{
		strings.ReplaceAll(same, ", if_not_exists => true", ""), strings.ReplaceAll(same, "'s'", "'r'"), strings.ReplaceAll(same, "{grp}", "{}"),
		strings.ReplaceAll(same, "{delete,insert}", "{delete}"), strings.ReplaceAll(same, "60 s", "61 s"), strings.ReplaceAll(same, "=> 3", "=> 4"),
		same + `, max_ack_pending => 5`, same + `, backoff => '2 s'`, same + `, max_backoff => '1 hour'`,
	} {
		if err := db.Error(`select sequin.create_consumer(` + other + `)`); err.Code != pgerrcode.DuplicateObject ||
			!strings.Contains(err.Message, `"c"`) || err.Hint == "" {
			t.Errorf("create_consumer(%s): %s %s, hint %q", other, err.Code, err.Message, err.Hint)
		}
	}
	if n := pgtest.Value[int](db, `select count(*) from sequin.consumers`); n != 1 {
		t.Errorf("%d consumers, want 1", n)
	}
}

// group_by: by key, by columns of whatever table, and all as one; each the order and the concurrency that it promises.
func TestGroupBy(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item, other}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('key', 's'), sequin.create_consumer('grp', 's', group_by => '{grp}'), sequin.create_consumer('one', 's', group_by => '{}'),
		sequin.create_consumer('two', 's', group_by => '{grp, note}')`)
	f.Exec(`insert into item values (1, 1, 'a'), (2, 1, 'b'), (3, 2, 'a')`)
	f.Exec(`insert into other values (1, 1, 'a'), (2, 2, 'a'), (3, null, null), (4, null, null)`)
	f.Exec(`update item set note = 'a' where id = 1`)
	f.awaitLog()
	// The first message of each group is out: how many others may go beside it is how many groups there are.
	for consumer, groups := range map[string]int{"key": 7, "grp": 3, "one": 1, "two": 4} {
		var got []message
		pgtest.Eventually(t, 10*time.Second, func() error {
			for {
				more := f.receive(`'` + consumer + `', 1, ack_wait => '1 hour'`)
				if got = append(got, more...); len(more) == 0 {
					return wantAtLeast(len(got), groups)
				}
			}
		})
		if len(got) != groups {
			t.Errorf("consumer %s hands out %d messages side by side, want %d: %q", consumer, len(got), groups, brief(got))
		}
	}
}

// Anybody may take an advisory lock: one who has those of the next bells neither stops capture nor a receive that waits.
func TestBellIsTaken(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}'), sequin.create_consumer('c', 's')`)
	f.Exec(`insert into item values (1, 1, 'a')`)
	f.take("c", 1)
	other := f.Connect()
	if _, err := other.Exec(t.Context(), `select pg_advisory_lock(sequin._bell(1, p.step + n))
		from (select max(step) as step from sequin.progress) p, generate_series(1, 100) n`); err != nil {
		t.Fatal(err)
	}
	for id := 2; id < 12; id++ {
		answered := make(chan string, 1)
		go func() {
			var key string
			if err := f.Pool.QueryRow(context.Background(), `select record_pk from sequin.pop('c', 10, '30 s')`).Scan(&key); err != nil {
				key = err.Error()
			}
			answered <- key
		}()
		f.Exec(`insert into item values ($1, 1, 'a')`, id)
		if got := <-answered; got != fmt.Sprint(id) {
			t.Fatalf("pop gives %s, want %d", got, id)
		}
	}
}

// A long poll waits for the bell that the bridge holds, and is answered as soon as something commits in a table.
func TestWaitForCommit(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}'), sequin.create_consumer('c', 's'), sequin.create_consumer('g', 's', group_by => '{grp}')`)
	f.Exec(`insert into item values (1, 1, 'a')`)
	for i, consumer := range []string{"c", "g"} {
		f.take(consumer, 1+i) // what there is, so that it has to wait
		answered := make(chan time.Duration, 1)
		conn := f.Connect()
		began := time.Now()
		go func() {
			var key string
			if err := conn.QueryRow(context.Background(), `select record_pk from sequin.receive($1, 10, '30 s')`, consumer).Scan(&key); err != nil || key != "2" {
				t.Errorf("receive gives %q, %v", key, err)
			}
			answered <- time.Since(began)
		}()
		pgtest.Eventually(t, 10*time.Second, func() error {
			if pgtest.Value[int](f.DB, `select count(*) from pg_stat_activity where pid = $1 and wait_event = 'advisory'`, conn.PgConn().PID()) == 0 {
				return fmt.Errorf("it does not wait")
			}
			return nil
		})
		f.Exec(`insert into item values (2, 2, 'b') on conflict (id) do update set note = 'c'`)
		select {
		case <-answered:
		case <-time.After(15 * time.Second):
			t.Fatalf("receive('%s') does not see what commits while it waits", consumer)
		}
	}
}
