package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/bridge/slot"
	"sequin/tests/pgtest"
)

// Where a server takes whoever replicates for a synchronous standby, each commit would wait for the bridge, and the bridge's
// for itself. It leaves, and says why; and comes back when the standbys are named.
func TestTakenForStandby(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, map[string]string{"synchronous_commit": "local"}))
	t.Cleanup(func() { standbys(t, db, "") })
	db.Exec(`create table item (id int primary key); select sequin.create_stream('s', '{item}')`)

	conn := db.Connect()
	for names, want := range map[string]bool{
		"*": true, "ANY 1 (*)": true, `2 (a, "*")`: true, `"Sequin Bridge"`: true, "first 1 (s1, s2)": false, "a*b": false, "": false,
	} {
		standbys(t, db, strings.ReplaceAll(names, "a*b", `"a*b"`))
		state, err := slot.Look(t.Context(), conn, "none")
		if err != nil {
			t.Fatal(err)
		}
		if state.IsAwaited != want {
			t.Errorf("%s: taken for a standby: %v", names, state.IsAwaited)
		}
	}

	const reason = "takes the bridge for a standby"
	standbys(t, db, "*")
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog(reason)
	for round := range 2 {
		standbys(t, db, "")
		pgtest.Eventually(t, 30*time.Second, func() error {
			if n := strings.Count(b.Log(), "msg=capturing"); n != round+1 {
				return fmt.Errorf("it has begun %d times: %s", n, b.Log())
			}
			return nil
		})
		db.Exec(`insert into item values ($1)`, round)
		pgtest.Eventually(t, 30*time.Second, func() error {
			if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n != round+1 {
				return fmt.Errorf("%d are captured", n)
			}
			return nil
		})
		if round > 0 {
			break
		}
		standbys(t, db, "*")
		pgtest.Eventually(t, 30*time.Second, func() error {
			if n := strings.Count(b.Log(), reason); n < 2 {
				return fmt.Errorf("it stays: %s", b.Log())
			}
			return nil
		})
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}
