package pipelines

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A table that only a pipeline has, and that is out of the publication for a while, is missed as a stream's is: what was
// lost is a gap, and it is captured again from when it is back, whoever puts it there.
func TestUnpublished(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]struct{ out, back, gap string }{
		"taken out and put back": {
			`alter publication sequin drop table orders`, `alter publication sequin add table orders`,
			`table public.orders was out of publication "sequin"`,
		},
		"dropped with the publication": {
			`drop publication sequin`, `select sequin.accept_gap('local')`,
			`publication "sequin" was dropped`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.New(t)
			db.Exec(`create table orders (id int primary key); alter table orders replica identity full;
				select sequin.create_pipeline('history', 'orders', 'orders_events')`)
			pgtest.StartBridge(t, db.URL)
			db.Exec(`insert into orders values (1)`)
			awaitCount(db, "orders_events", 1)
			awaitGap := func() {
				t.Helper()
				pgtest.Eventually(t, 30*time.Second, func() error {
					got := pgtest.Column[string](db, `select reason from sequin.gap`)
					if len(got) != 1 || !strings.HasPrefix(got[0], lose.gap) {
						return fmt.Errorf("the gaps are %q", got)
					}
					return nil
				})
			}
			db.Exec(lose.out)
			db.Exec(`insert into orders values (2)`)
			if lose.out == `drop publication sequin` {
				awaitGap()
			} else {
				pgtest.Eventually(t, 30*time.Second, func() error {
					if pgtest.Value[int](db, `select count(*) from sequin.source_table where unpublished_lsn is not null`) != 1 {
						return fmt.Errorf("it is not missed")
					}
					return nil
				})
			}
			db.Exec(lose.back)
			awaitGap()
			pgtest.Eventually(t, 30*time.Second, func() error {
				if pgtest.Value[int](db, `select count(*) from sequin.source_table t join pg_publication_rel r on r.oid = t.publication_rel_oid`) != 1 {
					return fmt.Errorf("it is not published")
				}
				// A slot that is made anew begins after the publication is back.
				if pgtest.Value[int](db, `select count(*) from sequin.gap where to_lsn is not null`) != 1 {
					return fmt.Errorf("the gap has no end")
				}
				return nil
			})
			db.Exec(`insert into orders values (3)`)
			pgtest.Eventually(t, 30*time.Second, func() error {
				if got := pgtest.Column[string](db, `select record_pk from orders_events order by id`); fmt.Sprint(got) != "[1 3]" {
					return fmt.Errorf("the events are of %v", got)
				}
				return nil
			})
		})
	}
}
