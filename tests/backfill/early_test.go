package backfill

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// Consumers that begin at the beginning are taken back at once, while their history waits, is cut, opens and is read, and
// their workers wait for the first message: they have the history, and nothing is left.
func TestRewindWhileItBegins(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	for round := range pgtest.Rounds(t, 1) {
		rewindWhileItBegins(t, seed+uint64(round))
		if t.Failed() {
			t.Fatalf("seed %d", seed+uint64(round))
		}
	}
}

func rewindWhileItBegins(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	db := pgtest.New(t)
	w := startWriters(db, seed, 2, 1000, 20*time.Millisecond, "on")
	db.Exec(`select sequin.create_stream('s', '{item}')`)
	stop := pgtest.StartBridge(t, db.URL)
	tellBooks(t, db)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n < 20 {
			return fmt.Errorf("%d changes are captured", n)
		}
		return nil
	})
	all := make([]*reader, 8)
	asked := make([]string, len(all))
	var readers sync.WaitGroup
	done := make(chan struct{})
	for i := range all {
		r := &reader{name: fmt.Sprintf("c%d", i)}
		all[i] = r
		options := []string{"", ", group_by => '{}'", ", group_by => '{id}'"}[random.IntN(3)]
		db.Exec(`select sequin.create_consumer('` + r.name + `', 's', start_at => 'beginning'` + options + `)`)
		readers.Go(func() {
			err := r.read(db, done)
			if errors.Is(err, errTakenBack) { // by the rewind, of which there is one
				err = r.read(db, done)
			}
			if err != nil {
				t.Error(err)
			}
		})
		time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond) // any moment may be the one
		target := []string{
			`to_seq => (select min(seq) from sequin.messages)`, `to_seq => (select max(seq) from sequin.messages)`,
			`to_time => (select min(committed_at) from sequin.messages)`, `to_time => clock_timestamp()`,
		}[random.IntN(4)]
		asked[i] = options + " " + target
		db.Exec(`select sequin.rewind('` + r.name + `', ` + target + `)`)
	}
	w.end()
	awaitLogged(t, db)
	pgtest.Eventually(t, 2*time.Minute, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.backfills where state <> 'done'`); n > 0 {
			return fmt.Errorf("%s", state(db))
		}
		left := pgtest.Value[string](db, `select coalesce(string_agg(s::text, ' '), '') from sequin.consumer_status s where pending > 0 or in_flight > 0 or state <> 'active'`)
		if left != "" {
			return fmt.Errorf("left over: %s of %q", left, asked)
		}
		return nil
	})
	close(done)
	readers.Wait()
	keys := pgtest.Column[string](db, `select i.id::text from item i`)
	for i, r := range all {
		had := map[string]bool{}
		for _, m := range r.messages {
			had[m.Key] = true
		}
		for _, key := range keys {
			if !had[key] {
				t.Errorf("%s%s: row %s did not come", r.name, asked[i], key)
				break
			}
		}
	}
	stop()
}

// tellBooks has a test that fails tell its books.
func tellBooks(t *testing.T, db *pgtest.DB) {
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(books(db))
		}
	})
}

// books is what pending is made up of, for each consumer that has some.
func books(db *pgtest.DB) string {
	return strings.Join(pgtest.Column[string](db, `
		with c as (
			select c.* from sequin.consumer c
			where c.name in (select s.name from sequin.consumer_status s where s.pending > 0 or s.in_flight > 0)
		)
		select c::text from c
		union all select l::text from c cross join lateral (
			select distinct on (l.lane) l.* from sequin.lane l where l.consumer_id = c.id order by l.lane, l.prev desc) l
		union all select f::text from c cross join lateral (
			select f.* from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1) f
		union all select g::text from sequin.held_group g join c on c.id = g.consumer_id
		union all select d::text from sequin.delivery d join c on c.id = d.consumer_id
		union all select b::text from sequin.backfill b join c on c.id = b.consumer_id
		union all select t::text from sequin.tally t
		union all select concat_ws(' ', 'log', s.id, l.route_id, count(l.seq), min(l.seq), max(l.seq))
			from sequin.log_segment s left join sequin.log l on l.seq >> 32 = s.id group by s.id, l.route_id`), "\n")
}
