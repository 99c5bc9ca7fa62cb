package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// newSegment has the log go on in a new segment, as each history does.
func newSegment(t *testing.T, db *pgtest.DB) {
	t.Helper()
	id := pgtest.Value[int](db, `select coalesce(max(id), 0) from sequin.log_segment`)
	name := fmt.Sprintf("segment_%d", id)
	db.Exec(`select sequin.create_consumer('` + name + `', 's', start_at => 'beginning')`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.backfills where consumer = $1 and state = 'done')`, name) {
			return fmt.Errorf("the history is not read")
		}
		return nil
	})
	db.Exec(`select sequin.drop_consumer('` + name + `')`)
}

// awaitChanges waits until the log has so many changes.
func awaitChanges(t *testing.T, db *pgtest.DB, count int) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n != count {
			return fmt.Errorf("%d changes, want %d", n, count)
		}
		return nil
	})
}

// A transaction that has used the log before it went on in a new segment loses nothing that is there.
func TestSegmentMadeMeanwhile(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, n int);
		select sequin.create_stream('s', '{item}', mode => 'changes');
		select sequin.create_consumer('grouped', 's', group_by => '{id}');
		select sequin.create_consumer('plain', 's', ack_wait => '1 hour');
		select sequin.create_consumer('other', 's', ack_wait => '1 hour')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1, 1)`)
	awaitChanges(t, db, 1)

	t.Run("rewind of a consumer with a feed", func(t *testing.T) {
		tx := begin(t, db)
		rewind := `select sequin.rewind('grouped', to_seq => (select min(seq) from sequin.messages))`
		exec(t, tx, rewind)
		newSegment(t, db)
		db.Exec(`update item set n = 2`)
		awaitChanges(t, db, 2)
		exec(t, tx, rewind)
		exec(t, tx, `commit`)
		pgtest.Eventually(t, 30*time.Second, func() error {
			if n := pgtest.Value[int](db, `select pending from sequin.consumer_status where name = 'grouped'`); n != 2 {
				return fmt.Errorf("%d messages are pending, want 2", n)
			}
			return nil
		})
		if got := pgtest.Column[string](db, `select seq::text from sequin.pop('grouped', 10)`); len(got) != 2 {
			t.Errorf("the consumer got %d messages, want 2", len(got))
		}
	})

	t.Run("what is held back behind a message", func(t *testing.T) {
		// Each has the messages that there are come back in a while, and so their group held.
		for _, consumer := range []string{"plain", "other"} {
			db.Exec(`select sequin.nack('` + consumer + `', array(select ack_id from sequin.receive('` + consumer + `', 10)), delay => '3 seconds')`)
		}
		tx := begin(t, db)
		settle := func(consumer string) {
			t.Helper()
			exec(t, tx, `select sequin.ack($1, array(select ack_id from sequin.receive($1, 10, wait => '30 seconds')))`, consumer)
			exec(t, tx, `select * from sequin.receive($1, 10)`, consumer)
		}
		settle("other")
		newSegment(t, db)
		db.Exec(`update item set n = 3`)
		awaitChanges(t, db, 3)
		db.Exec(`select sequin.nack('plain', array(select ack_id from sequin.receive('plain', 10)), delay => '3 seconds')`)
		settle("plain")
		exec(t, tx, `commit`)
		last := pgtest.Value[int64](db, `select max(seq) from sequin.messages`)
		var had []int64
		pgtest.Eventually(t, 10*time.Second, func() error {
			had = append(had, pgtest.Column[int64](db, `select seq from sequin.deliveries where consumer = 'plain' and state = 'out'`)...)
			db.Exec(`select sequin.ack('plain', array(select ack_id from sequin.deliveries where consumer = 'plain' and state = 'out'))`)
			had = append(had, pgtest.Column[int64](db, `select seq from sequin.pop('plain', 10)`)...)
			if !slices.Contains(had, last) {
				return fmt.Errorf("%d did not come, only %d: %s", last, had, pgtest.Value[string](db, `select s::text from sequin.consumer_status s where name = 'plain'`))
			}
			return nil
		})
	})
}

func begin(t *testing.T, db *pgtest.DB) *pgx.Conn {
	t.Helper()
	conn := db.Connect()
	exec(t, conn, `begin`)
	return conn
}
