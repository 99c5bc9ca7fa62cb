package sql

import (
	"testing"

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
