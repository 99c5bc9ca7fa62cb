package sql

import (
	"fmt"
	"testing"

	"sequin/tests/pgtest"
)

// Capture reads a transaction at its commit record: the log may have it while others do not see it yet, as where it waits
// for a synchronous standby. A sync does not begin then, and loses nothing.
func TestSyncBeforeItIsVisible(t *testing.T) {
	f := setup(t, "rows")
	f.Exec(`insert into item values (1, 0, 'old'), (2, 0, 'old')`)
	f.write(inserts(3)...)
	tx := f.begin("")
	var xid int64
	if err := tx.QueryRow(t.Context(), `update item set note = 'new' where id = 1 returning txid_current() & 4294967295`).Scan(&xid); err != nil {
		t.Fatal(err)
	}
	all := f.write(row{action: "u", key: 1, note: "new"})
	f.Exec(`update sequin.log set metadata = metadata || jsonb_build_object('xid', $2::bigint) where seq = $1`, all[0], xid)
	if e := f.Error(`select * from sequin.sync('s')`); e.Code != "40001" || e.Hint == "" {
		t.Errorf("%s %s", e.Code, e.Message)
	}
	f.end(tx.Commit)
	got := pgtest.Column[string](f.DB, `select format('%s %s %s', action, record_pk, record ->> 'note') from sequin.sync('s')`)
	if fmt.Sprint(got) != `[read 1 new read 2 old]` {
		t.Errorf("got %q", got)
	}
}
