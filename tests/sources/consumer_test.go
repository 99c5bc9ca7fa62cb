package sources

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A consumer gets every change that was committed on the source after it was made, and none from before, however far the
// bridge is behind.
func TestStart(t *testing.T) {
	t.Parallel()
	home, far := pgtest.New(t), pgtest.Empty(t)
	far.Exec(`create table t (id int primary key); create table quiet (id int primary key)`)
	createSource(home, "far", far.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	create(home, "t", "{t,quiet}", "")
	create(home, "quiet", "{quiet}", "")
	awaitStream(t, home, "t", "active")
	awaitStream(t, home, "quiet", "active")
	far.Exec(`insert into t values (1)`)
	awaitMessages(t, home, `select record_pk from sequin.messages where stream = 't'`, "1")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	far.Exec(`insert into t values (2)`)
	home.Exec(`select sequin.create_consumer('before', 't')`)
	home.Exec(`select sequin.create_consumer('total', 't', group_by => '{}')`)
	home.Exec(`select sequin.create_consumer('grouped', 't', group_by => '{id}')`)
	home.Exec(`select sequin.create_consumer('quiet', 'quiet')`)
	for i := range 50 {
		far.Exec(`insert into t values ($1)`, 3+i)
	}
	if state := pgtest.Value[string](home, `select state from sequin.consumers where name = 'before'`); state != "starting" {
		t.Errorf("the consumer is %s", state)
	}
	b = pgtest.BridgeProcess(t, home.URL)
	for _, consumer := range []string{"before", "total", "grouped"} {
		var got []int
		pgtest.Eventually(t, 30*time.Second, func() error {
			got = append(got, pgtest.Column[int](home, `select record_pk::int from sequin.pop($1, 100, '1s') order by seq`, consumer)...)
			if len(got) < 50 {
				return fmt.Errorf("%s got %d messages", consumer, len(got))
			}
			return nil
		})
		if consumer != "total" {
			slices.Sort(got) // rows are groups of their own
		}
		if len(got) != 50 || got[0] != 3 || got[49] != 52 || !slices.IsSorted(got) {
			t.Errorf("%s got %d messages: %v", consumer, len(got), got)
		}
	}
	// One of a table at rest has begun all the same: it does not hold the log for itself.
	pgtest.Eventually(t, 20*time.Second, func() error {
		if state := pgtest.Value[string](home, `select state from sequin.consumers where name = 'quiet'`); state != "active" {
			return fmt.Errorf("the consumer is %s", state)
		}
		return nil
	})
	far.Exec(`insert into quiet values (1)`)
	if got := pgtest.Column[string](home, `select record_pk from sequin.pop('quiet', 10, '20s')`); fmt.Sprint(got) != "[1]" {
		t.Errorf("got %v", got)
	}
	// Its figures are of the source's own log, or none.
	pgtest.Eventually(t, 30*time.Second, func() error {
		lag := pgtest.Value[*int64](home, `select lag_bytes from sequin.consumer_status where name = 'before'`)
		if lag == nil || *lag < 0 || *lag > 1<<20 {
			return fmt.Errorf("lag_bytes is %v", lag)
		}
		return nil
	})
	for _, row := range pgtest.Column[string](home, `select concat_ws(' ', name, state, lag_bytes, retained_bytes) from sequin.source_status`) {
		t.Log(row)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// A consumer may be made before the bridge has found the table.
func TestStartBeforeTable(t *testing.T) {
	home, far := pair(t)
	create(home, "later", "{later}", "")
	home.Exec(`select sequin.create_consumer('c', 'later')`)
	awaitStream(t, home, "later", "error")
	far.Exec(`create table later (id int primary key)`)
	awaitStream(t, home, "later", "active")
	far.Exec(`insert into later values (1)`)
	if got := pgtest.Column[string](home, `select record_pk from sequin.pop('c', 10, '20s')`); fmt.Sprint(got) != "[1]" {
		t.Errorf("got %v", got)
	}
}
