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

// A cursor among rows whose key has become another one since is refused: what comes after it is not what came after it then.
func TestSyncKeyAltered(t *testing.T) {
	for name, alter := range map[string]string{
		"longer":    `drop constraint kept_pkey, add primary key (id, other)`,
		"retyped":   `alter id type int using id::int`,
		"date":      `alter id type date using date '2000-01-01' + id::int`,
		"moved":     `drop constraint kept_pkey, add primary key (other)`,
		"collation": `alter id type text collate "POSIX"`,
		"":          `add more int`,
	} {
		t.Run(name, func(t *testing.T) {
			f := bridged(t)
			f.Exec(`create table kept (id text collate "C" primary key, other int not null); insert into kept select n, 20 - n from generate_series(1, 12) n`)
			f.Exec(`select sequin.create_stream('kept', '{kept}')`)
			cursor := pgtest.Value[string](f.DB, `select (array_agg(cursor))[3] from sequin.sync('kept', null, 3)`)
			f.Exec(`alter table kept ` + alter)
			if name == "" {
				if n := pgtest.Value[int](f.DB, `select count(*) from sequin.sync('kept', $1)`, cursor); n != 9 {
					t.Errorf("%d rows come after the third", n)
				}
				return
			}
			if e := f.Error(`select * from sequin.sync('kept', $1)`, cursor); e.Code != "55000" || e.Hint == "" {
				t.Errorf("%s %s, hint %q", e.Code, e.Message, e.Hint)
			}
		})
	}
}
