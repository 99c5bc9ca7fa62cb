package sql

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// What was passed by of held groups is not read to tell how far behind a consumer is.
func TestStandingReadsLittle(t *testing.T) {
	for name, options := range map[string]string{"key": "ack_wait => '30s'", "feed": "filter => 'new.id > 0'"} {
		t.Run(name, func(t *testing.T) {
			const count = 500
			f := setup(t, "changes")
			f.consumer("c", options)
			f.backOff(count)
			for range 20 {
				f.write(inserts(upto(2 * count)...)...)
			}
			for got := f.receive(`'c', 10000`); len(got) > 0; got = f.receive(`'c', 10000`) {
				f.call("ack", ids(got), int64(len(got)))
			}
			log := f.segments()
			f.reads(f.Connect(), "consumer_status", count, func(tx pgx.Tx) {
				var pending, oldest int64
				if err := tx.QueryRow(t.Context(), `select pending, oldest_unacked_seq from sequin.consumer_status`).Scan(&pending, &oldest); err != nil {
					t.Fatal(err)
				}
				if pending != 21*count || oldest != 1 {
					t.Errorf("%d are pending, and the oldest is %d", pending, oldest)
				}
			}, append(log, "feed")...)
			f.reads(f.Connect(), "deliveries", count, func(tx pgx.Tx) {
				var n int
				if err := tx.QueryRow(t.Context(), `select count(*) from sequin.deliveries`).Scan(&n); err != nil {
					t.Fatal(err)
				}
				if n != count {
					t.Errorf("%d are on their way back", n)
				}
			}, append(log, "feed")...)
		})
	}
}

// A stream of this database's tables is active from the start, and until the last of them is dropped.
func TestStreamState(t *testing.T) {
	f := setup(t, "rows")
	f.Exec(`select sequin.create_stream('both', '{item,other}')`)
	states := func(want string) {
		t.Helper()
		if got := pgtest.Value[string](f.DB, `select string_agg(name || ' ' || state, ', ' order by name) from sequin.streams`); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	states("both active, s active")
	f.Exec(`drop table item`)
	states("both active, s error")
}

// What a consumer loses to the log's limit is not pending any more, and was not delivered.
func TestLostIsNotDelivered(t *testing.T) {
	for name, options := range map[string]string{"key": "ack_wait => '30s'", "total": "group_by => '{}'", "feed": "filter => 'new.id > 0'"} {
		t.Run(name, func(t *testing.T) {
			const count, lost = 200, 150
			f := setup(t, "changes")
			f.consumer("c", options)
			seqs := f.write(inserts(upto(count)...)...)
			f.tend()
			f.Exec(`select sequin.bridge_sample()`)
			got := f.pop(`'c', 10`)
			left := count - lost
			for _, m := range got {
				if m.Seq > seqs[lost-1] {
					left--
				}
			}
			f.Exec(`select sequin._skip(c, $1, 'a limit') from sequin.consumer c`, seqs[lost-1])
			standing := func(pending, delivered int) {
				t.Helper()
				if got, want := pgtest.Value[string](f.DB, `select pending || ' ' || handed_out
					from sequin.consumer c cross join sequin._standing(c)`), fmt.Sprintf("%d %d", pending, delivered); got != want {
					t.Errorf("got %s pending and handed out, want %s", got, want)
				}
				if n := pgtest.Value[int](f.DB, `select deliveries_per_minute from sequin.consumer_status`); (n > 0) != (delivered > 0) || n > 60*delivered {
					t.Errorf("%d deliveries per minute, and there were %d", n, delivered)
				}
			}
			delivered := len(got)
			standing(left, delivered)
			f.write(inserts(upto(20)...)...)
			standing(left+20, delivered)
			pgtest.Eventually(t, 10*time.Second, func() error {
				delivered += len(f.pop(`'c', 1000`))
				return want(delivered, len(got)+left+20)
			})
			standing(0, delivered)
			f.wantClean()
			if n := pgtest.Value[int](f.DB, `select count(*) from sequin.gap where consumer_id is not null`); n != 1 {
				t.Errorf("%d gaps", n)
			}
		})
	}
}

// Nor is it left out of the record where it was not even sorted yet.
func TestLostUnsorted(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "filter => $$new.note <> 'x'$$")
	f.write(inserts(upto(10)...)...)
	f.tend()
	f.pop(`'c', 100`)
	f.Exec(`alter table item drop column note`)
	seqs := f.write(inserts(upto(10)...)...)
	f.Exec(`select sequin._skip(c, $1, 'a limit') from sequin.consumer c`, seqs[5])
	if got := pgtest.Value[string](f.DB, `select (select count(*) from sequin.gap where consumer_id is not null and to_seq = $1) || ' ' || pending
		from sequin.consumer_status`, seqs[5]); got != "1 4" {
		t.Errorf("got %s gaps and pending", got)
	}
}

// Who is behind is told whether the log is kept for it.
func TestBehindIsSaid(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	f.Exec(`select sequin.create_pipeline('p', 'item', 'events')`)
	f.write(inserts(1)...)
	f.tend()
	for limit, text := range map[string]string{"null": "and the log is kept for it.", "16777216": "and set_retention's max_bytes may cut the log before it gets there."} {
		f.Exec(`select sequin.set_retention('0', ` + limit + `)`)
		if n := pgtest.Value[int](f.DB, `select count(*) from sequin.health() where name in ('consumer c', 'pipeline p') and status = 'warning'
			and hint like 'It is % behind, ' || $1`, text); n != 2 {
			t.Errorf("with max_bytes %s: %q", limit, pgtest.Column[string](f.DB, `select concat_ws(' ', name, status, detail, hint) from sequin.health()`))
		}
	}
}

// What is handed out before the first sample, or after a rest, is counted as what comes later is.
func TestDeliveriesPerMinute(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "group_by => '{}'")
	rate := func() int { return pgtest.Value[int](f.DB, `select deliveries_per_minute from sequin.consumer_status`) }
	if n := rate(); n != 0 {
		t.Errorf("%d deliveries per minute, and there was none", n)
	}
	f.write(inserts(upto(50)...)...)
	f.tend()
	if got := len(f.pop(`'c', 100`)); got != 50 {
		t.Fatalf("got %d messages", got)
	}
	for range 2 {
		if n := rate(); n < 50 {
			t.Errorf("%d deliveries per minute, and there were 50", n)
		}
		f.Exec(`select sequin.bridge_sample()`)
	}
	f.Exec(`update sequin.consumer_sample set sampled_at = sampled_at - interval '1 hour'; update sequin.consumer set created_at = created_at - interval '2 hours'`)
	if n := rate(); n != 0 {
		t.Errorf("%d deliveries per minute at rest", n)
	}
	f.write(inserts(upto(60)...)...)
	f.pop(`'c', 100`)
	for range 2 {
		if n := rate(); n != 60 {
			t.Errorf("%d deliveries per minute, and there were 60", n)
		}
		f.Exec(`select sequin.bridge_sample()`)
	}
}
