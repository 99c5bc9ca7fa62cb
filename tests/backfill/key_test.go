package backfill

import (
	"context"
	"fmt"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A key that becomes another one while its table's rows are being read: each row comes, in whatever order.
func TestKeyAltered(t *testing.T) {
	const rows = 30_000
	for name, alter := range map[string]string{
		"longer":    `drop constraint item_pkey, add primary key (id, other)`,
		"retyped":   `alter id type int using id::int`,
		"moved":     `drop constraint item_pkey, add primary key (other)`,
		"collation": `alter id type text collate "und-x-icu"`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.New(t)
			db.Exec(`create table item (id text collate "C" primary key, other int not null, pad text)`)
			db.Exec(`insert into item select n, $1 - n, repeat('x', 1500) from generate_series(1, $1) n`, rows)
			db.Exec(`select sequin.create_stream('s', '{item}')`)
			stop := pgtest.StartBridge(t, db.URL)
			db.Exec(`select sequin.create_consumer('c', 's', start_at => 'beginning')`)
			tx, err := db.Connect().Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback(context.WithoutCancel(t.Context())) //nolint:errcheck // after the commit it does nothing
			pgtest.Eventually(t, 30*time.Second, func() error {
				if pgtest.Value[int64](db, `select coalesce(max(rows_done), 0) from sequin.backfills`) == 0 {
					return fmt.Errorf("no row has been read")
				}
				return nil
			})
			// A bridge that goes on where another one has ended has the place from the log, and not from its memory.
			if name == "longer" {
				stop()
			}
			if _, err := tx.Exec(t.Context(), `alter table item `+alter); err != nil {
				t.Fatal(err)
			}
			var done int64
			if err := tx.QueryRow(t.Context(), `select rows_done from sequin.backfills where state = 'running'`).Scan(&done); err != nil || done >= rows {
				t.Fatalf("%d rows had been read: %v", done, err)
			}
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if name == "longer" {
				pgtest.StartBridge(t, db.URL)
			}
			awaitState(t, db, 1, "done")
			seen := map[string]bool{}
			pgtest.Eventually(t, time.Minute, func() error {
				for _, id := range pgtest.Column[string](db, `select record ->> 'id' from sequin.pop('c', 5000)`) {
					seen[id] = true
				}
				if len(seen) < rows {
					return fmt.Errorf("%d rows of %d have come", len(seen), rows)
				}
				return nil
			})
		})
	}
}
