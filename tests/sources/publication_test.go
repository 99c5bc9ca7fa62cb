package sources

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// A publication that keeps some of a table's changes back on the source is named for as long as it does, with the statement that
// mends it; once it is mended, what was lost is a gap.
func TestPublicationAltered(t *testing.T) {
	for name, altered := range map[string]struct {
		since                   int
		alter, detail, mend, of string
	}{
		"kinds":     {12, `alter publication %s set (publish = 'insert')`, "publishes some kinds of changes only", `alter publication %s set (publish = 'insert, update, delete, truncate');`, "published in part"},
		"root":      {13, `alter publication %s set (publish_via_partition_root = false)`, "publishes partitions under their own names", `alter publication %s set (publish_via_partition_root = true);`, "published in part"},
		"generated": {18, `alter publication %s set (publish_generated_columns = none)`, "publishes no generated columns", `alter publication %s set (publish_generated_columns = stored);`, "published in part"},
		"rows":      {15, `alter publication %s set table t where (id < 0)`, "has a row filter or a column list", `alter publication %[1]s drop table only public.t; alter publication %[1]s add table only public.t;`, "out of publication"},
		"columns":   {15, `alter publication %[1]s drop table t; alter publication %[1]s add table t (id)`, "has a row filter or a column list", `alter publication %[1]s drop table only public.t; alter publication %[1]s add table only public.t;`, "out of publication"},
	} {
		t.Run(name, func(t *testing.T) {
			home, far := pair(t)
			if far.Major() < altered.since {
				t.Skip("this server does not know of it")
			}
			partitions := ``
			if far.Major() >= 13 {
				partitions = ` partition by range (id); create table t1 partition of t for values from (0) to (100)`
			}
			far.Exec(`create table t (id int primary key, a text, d int generated always as (id) stored)` + partitions)
			create(home, "t", "{t}", "")
			awaitStream(t, home, "t", "active")
			far.Exec(`insert into t values (1)`)
			awaitMessages(t, home, `select record_pk from sequin.messages`, "1")
			mend := fmt.Sprintf(altered.mend, publication(home))
			far.Exec(fmt.Sprintf(altered.alter, publication(home)))
			awaitStream(t, home, "t", "error: publication "+publication(home)+" on the source "+altered.detail)
			awaitHealth(t, home, "stream t | error | table t of source far: publication", altered.detail, "On the source: "+mend)
			far.Exec(`update t set a = 'lost'`)
			far.Exec(mend)
			awaitStream(t, home, "t", "active")
			awaitHealth(t, home, "gap in source far | error | lost changes from", "table public.t was "+altered.of, "source far | ok")
			far.Exec(`insert into t values (2)`)
			awaitMessages(t, home, `select record_pk from sequin.messages order by seq desc limit 1`, "2")
		})
	}
}

// A publication of the source that is altered and put back, or renamed and renamed back, before anybody looks is a gap. 12 to 17 end
// the stream at a change that was made while there was no publication of the name.
func TestPublicationPutBack(t *testing.T) {
	t.Parallel()
	for name, altered := range map[string]struct {
		away, back   string
		isUnreadable bool
	}{
		"altered": {`alter publication %s set (publish = 'insert')`, `alter publication %s set (publish = 'insert, update, delete, truncate')`, false},
		"renamed": {`alter publication %s rename to x`, `alter publication x rename to %s`, true},
	} {
		for _, isRunning := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, bridge running %t", name, isRunning), func(t *testing.T) {
				t.Parallel()
				home, far := pgtest.New(t), pgtest.Empty(t)
				createSource(home, "far", far.URL)
				b := pgtest.BridgeProcess(t, home.URL)
				far.Exec(`create table t (id int primary key, a text)`)
				create(home, "t", "{t}", ", mode => 'changes'")
				awaitStream(t, home, "t", "active")
				far.Exec(`insert into t values (1)`)
				awaitMessages(t, home, `select record_pk from sequin.messages`, "1")
				if !isRunning {
					if err := b.Stop(); err != nil {
						t.Fatal(err)
					}
				}
				name := publication(home)
				conn := far.Connect()
				for _, statement := range []string{
					fmt.Sprintf(altered.away, name), `update t set a = 'lost'`, `delete from t`, fmt.Sprintf(altered.back, name), `insert into t values (2)`,
				} {
					if _, err := conn.Exec(t.Context(), statement); err != nil {
						t.Fatal(err)
					}
				}
				if !isRunning {
					b = pgtest.BridgeProcess(t, home.URL)
				}
				want := []string{"1", "2", "3"}
				if altered.isUnreadable && far.Major() < 18 {
					want = []string{"1", "3"}
					awaitHealth(t, home, "source far | error | changes after", "when changes were made that the server has still to send",
						"select sequin.accept_gap('far');")
				} else {
					awaitHealth(t, home, "gap in source far | error", "was altered or renamed, and put back")
				}
				home.Exec(`select sequin.accept_gap('far')`)
				awaitHealth(t, home, "source far | ok")
				awaitPublished(t, far, "public.t")
				awaitStream(t, home, "t", "active")
				far.Exec(`insert into t values (3)`)
				awaitMessages(t, home, `select record_pk from sequin.messages order by seq`, want...)
				pgtest.Eventually(t, 20*time.Second, func() error {
					if all := health(home); strings.Contains(all, " | error | ") {
						return fmt.Errorf("health() says %s", all)
					}
					return nil
				})
				if n := pgtest.Value[int](home, `select count(*) from sequin.gap where to_lsn is null or to_lsn <= from_lsn`); n != 0 {
					t.Errorf("%d gaps are empty, or have no end", n)
				}
				if err := b.Stop(); err != nil {
					t.Errorf("the bridge ended with %v: %s", err, b.Log())
				}
			})
		}
	}
}
