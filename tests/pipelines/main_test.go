// Package pipelines proves that each change of a table comes into its event log table: once, in order, whatever happens
// to the bridge, the table or its owner.
package pipelines

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// eventsOf returns an event table's events in the order of its ids, a line each.
func eventsOf(db *pgtest.DB, table string) []string {
	db.Helper()
	return pgtest.Column[string](db, `select concat_ws(' ', action, coalesce(record_pk, '-'), coalesce(record::text, '-'), coalesce(changes::text, '-'))
		from `+table+` order by id`)
}

func awaitEvents(db *pgtest.DB, table string, want ...string) {
	db.Helper()
	pgtest.Eventually(db.TB, 20*time.Second, func() error {
		if got := eventsOf(db, table); !reflect.DeepEqual(got, want) {
			return fmt.Errorf("got\n%s\nwant\n%s\n%v", strings.Join(got, "\n"), strings.Join(want, "\n"), status(db))
		}
		return nil
	})
}

// awaitCount waits until a table has so many rows, and has each seq once.
func awaitCount(db *pgtest.DB, table string, want int) {
	db.Helper()
	pgtest.Eventually(db.TB, 30*time.Second, func() error {
		if got := pgtest.Value[int](db, `select count(*) from `+table); got != want {
			return fmt.Errorf("%s has %d rows, want %d: %v", table, got, want, status(db))
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select count(distinct seq) from `+table); n != want {
		db.Errorf("%s has %d seqs in %d rows", table, n, want)
	}
	if n := pgtest.Value[int](db, `select count(*) from (select seq < lag(seq) over (order by id) as is_back from `+table+`) s where is_back`); n > 0 {
		db.Errorf("%s is not in the order of seq", table)
	}
}

func status(db *pgtest.DB) []string {
	db.Helper()
	return pgtest.Column[string](db, `select to_jsonb(p)::text from sequin.pipeline_status p`)
}

// awaitError waits until a pipeline is in error, with a SQLSTATE, and returns its hint.
func awaitError(db *pgtest.DB, pipeline, code, text string) (hint string) {
	db.Helper()
	pgtest.Eventually(db.TB, 20*time.Second, func() error {
		got := pgtest.Column[string](db, `select error_code || ' ' || error from sequin.pipeline_status where name = $1 and state = 'error'`, pipeline)
		if len(got) != 1 || !strings.HasPrefix(got[0], code) || !strings.Contains(got[0], text) {
			return fmt.Errorf("got %v, want %s and %q", got, code, text)
		}
		return nil
	})
	hint = pgtest.Value[string](db, `select error_hint from sequin.pipeline_status where name = $1`, pipeline)
	level := "error"
	if code == "55P03" {
		level = "warning"
	}
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where name = 'pipeline ' || $1 and status = $2 and hint = $3`, pipeline, level, hint); n != 1 {
		db.Errorf("health() does not say so")
	}
	return hint
}
