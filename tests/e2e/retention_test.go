package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"sequin/tests/pgtest"
)

// The log goes on in new segments, and the old ones are dropped when nobody needs them any more: not before.
func TestRetention(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table t (id int primary key, note text);
		select sequin.create_stream('t', '{t}');
		select sequin.create_consumer('quick', 't');
		select sequin.create_consumer('slow', 't');
		select sequin.create_consumer('chosen', 't', group_by => '{note}');
		create table still (id int primary key, note text);
		select sequin.create_stream('still', '{still}');
		select sequin.create_consumer('still', 'still');
		select sequin.create_consumer('still_chosen', 'still', filter => 'true');
		select sequin.create_consumer('still_whole', 'still', group_by => '{}');
		select sequin.create_pipeline('still', 'still', 'still_events');
		select sequin.set_retention('0 seconds')`)
	pgtest.StartBridge(t, db.URL)
	segments := func() int { return pgtest.Value[int](db, `select count(*) from sequin.log_segment`) }
	last := 0
	insert := func() {
		last++
		db.Exec(`insert into t values ($1, 'n')`, last)
	}
	// Where nothing happens any more, the log is not kept for it.
	db.Exec(`insert into still values (1)`)
	for _, consumer := range []string{"still", "still_chosen", "still_whole"} {
		pgtest.Eventually(t, 10*time.Second, func() error {
			if len(pgtest.Column[int64](db, `select seq from sequin.pop($1)`, consumer)) == 0 {
				return fmt.Errorf("%s has nothing", consumer)
			}
			return nil
		})
	}
	seen := map[string]int{}
	pop := func(consumer string) {
		seen[consumer] += len(pgtest.Column[int64](db, `select seq from sequin.pop($1, 100)`, consumer))
	}
	pgtest.Eventually(t, time.Minute, func() error {
		insert()
		pop("quick")
		pop("chosen")
		if n := segments(); n < 4 {
			return fmt.Errorf("%d segments of the log", n)
		}
		return nil
	})
	if oldest := pgtest.Value[int](db, `select min(id) from sequin.log_segment`); oldest != 0 {
		t.Errorf("the oldest segment is %d, and a consumer has yet to read it all", oldest)
	}
	pgtest.Eventually(t, time.Minute, func() error {
		for _, consumer := range []string{"quick", "slow", "chosen"} {
			pop(consumer)
		}
		if n := segments(); n > 2 {
			return fmt.Errorf("%d segments of the log, and everything was read", n)
		}
		return nil
	})
	insert()
	pgtest.Eventually(t, 10*time.Second, func() error {
		for _, consumer := range []string{"quick", "slow", "chosen"} {
			pop(consumer)
			if seen[consumer] != last {
				return fmt.Errorf("%s got %d of %d messages", consumer, seen[consumer], last)
			}
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select count(*) from sequin.gap`); n != 0 {
		t.Errorf("%d gaps", n)
	}
}

// A limit of size cuts that short: who has lost messages has that on record, sees it in health(), and goes on after it.
func TestRetentionLimit(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table t (id int primary key, note text);
		select sequin.create_stream('t', '{t}');
		select sequin.create_consumer('slow', 't');
		select sequin.set_retention('0 seconds', 16777216)`)
	pgtest.StartBridge(t, db.URL)
	last := 0
	pgtest.Eventually(t, 2*time.Minute, func() error {
		db.Exec(`insert into t select i, repeat(md5(i::text), 20) from generate_series($1::int + 1, $1::int + 200) i`, last)
		last += 200
		if n := pgtest.Value[int](db, `select count(*) from sequin.gap g join sequin.consumer c on c.id = g.consumer_id where c.name = 'slow'`); n == 0 {
			return fmt.Errorf("no gap after %d messages", last)
		}
		return nil
	})
	if hint := pgtest.Column[string](db, `select hint from sequin.health() where status = 'error'`); hint[0] != `select sequin.accept_gap('local', 'slow');` {
		t.Errorf("health() says %s", hint)
	}
	// With room again, nothing more is lost.
	db.Exec(`select sequin.set_retention('0 seconds')`)
	db.Exec(`insert into t values (0, 'the last one')`)
	received := map[string]int64{}
	pgtest.Eventually(t, time.Minute, func() error {
		for _, m := range pgtest.Column[string](db, `select seq || ' ' || record_pk from sequin.pop('slow', 10000)`) {
			var seq int64
			var pk string
			if _, err := fmt.Sscan(m, &seq, &pk); err != nil {
				return err
			}
			received[pk] = seq
		}
		pending := pgtest.Value[int](db, `select pending from sequin.consumer_status where name = 'slow'`)
		if received["0"] == 0 || pending > 0 {
			return fmt.Errorf("%d messages, and %d pending", len(received), pending)
		}
		return nil
	})
	lost := pgtest.Value[int64](db, `select max(to_seq) from sequin.gap`)
	for pk, seq := range received {
		if seq <= lost {
			t.Errorf("message %s has seq %d, in a gap that ends at %d", pk, seq, lost)
		}
	}
	// The end of the log is there in one piece.
	for i := last; i > last-len(received)+1; i-- {
		if received[fmt.Sprint(i)] == 0 {
			t.Fatalf("message %d of %d is missing, and %d were received", i, last, len(received))
		}
	}
	db.Exec(`select sequin.accept_gap('local', 'slow')`)
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status = 'error'`); n != 0 {
		t.Errorf("%d errors are left in health()", n)
	}
}

// However many wait, at any moment, the log is let go of.
func TestRetentionBesideWaiting(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table t (id int primary key);
		create table quiet (id int primary key);
		select sequin.create_stream('t', '{t}');
		select sequin.create_stream('quiet', '{quiet}');
		select sequin.create_consumer('c', 't');
		select sequin.create_consumer('quiet', 'quiet');
		insert into quiet values (1);
		select sequin.set_retention('0 seconds')`)
	pgtest.StartBridge(t, db.URL)
	var waiting errgroup.Group
	ctx, end := context.WithCancel(t.Context())
	for range 3 {
		conn := db.Connect()
		waiting.Go(func() error {
			for {
				if _, err := conn.Exec(ctx, `select sequin.ack('quiet', array(select ack_id from sequin.receive('quiet', 10, '2 seconds')))`); err != nil {
					return err
				}
			}
		})
	}
	conn := db.Connect()
	waiting.Go(func() error {
		var cursor *string
		for {
			if err := conn.QueryRow(ctx, `select coalesce(max(cursor), $1) from sequin.sync('quiet', $1, wait => '2 seconds')`, cursor).Scan(&cursor); err != nil {
				return err
			}
		}
	})
	id := 0
	pgtest.Eventually(t, time.Minute, func() error {
		id++
		db.Exec(`insert into t values ($1)`, id)
		db.Exec(`select sequin.pop('c', 100)`)
		if oldest := pgtest.Value[int](db, `select min(id) from sequin.log_segment`); oldest < 4 {
			return fmt.Errorf("the oldest segment is %d: nothing is dropped", oldest)
		}
		return nil
	})
	if ctx.Err() != nil {
		t.Error("the waiting ended")
	}
	end()
	if err := waiting.Wait(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
