package sql

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// A transaction that has received before sees what is in a segment that was made since, and does not pass it by.
func TestNewSegment(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c")
	first := f.write(inserts(1, 2, 3)...)
	tx, err := f.Connect().Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	wantSeqsInAnyOrder(t, f.receiveIn(tx, `'c', 2`), first[:2]...)
	f.lastSeq = pgtest.Value[int64](f.DB, `select sequin._open_segment(1)::bigint << 32`)
	second := f.write(inserts(11, 12, 13, 14)...)
	wantSeqsInAnyOrder(t, f.receiveIn(tx, `'c', 10`), append(first[2:], second...)...)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A large transaction gets no segment of its own where the log has another after the one it is in, which may be a
// backfill's; nor where there are many; nor while somebody opens one; nor before what is left of one is gone.
func TestNoDraft(t *testing.T) {
	f := setup(t, "rows")
	const draft = `select sequin.bridge_draft(1, (select min(id) from sequin.log_segment), '0/1')`
	if pgtest.Value[*int](f.DB, draft) == nil {
		t.Fatal("there is none to begin with")
	}
	if id := pgtest.Value[*int](f.DB, draft); id != nil {
		t.Errorf("got %d beside the first", *id)
	}
	drop := func() { f.Exec(`select sequin._drop_drafts(1, '0/2')`) }
	f.Exec(`select sequin._drop_drafts(1, '0/1')`)
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.log_draft`); n != 1 {
		t.Errorf("there are %d drafts of a transaction that the log does not have", n)
	}
	drop()
	tx := f.begin(pgx.ReadCommitted)
	f.execIn(tx, `lock table sequin.log_segment in row exclusive mode`)
	if id := pgtest.Value[*int](f.DB, draft); id != nil {
		t.Errorf("got %d beside somebody who opens one", *id)
	}
	f.end(tx.Rollback)
	f.Exec(`select sequin._open_segment(1)`)
	if id := pgtest.Value[*int](f.DB, draft); id != nil {
		t.Errorf("got %d, and the log goes on before it", *id)
	}
	const last = `select sequin.bridge_draft(1, (select max(id) from sequin.log_segment), '0/1')`
	for n := 2; pgtest.Value[*int](f.DB, last) != nil; n++ {
		if n > 20 {
			t.Fatal("there is no end of them")
		}
		drop()
		f.Exec(`select sequin._open_segment(1)`)
	}
	if left := pgtest.Column[string](f.DB, `select relname from pg_class where relkind = 'r' and relname ~ '^log_\d+$' and not relispartition`); len(left) > 0 {
		t.Errorf("left are %q", left)
	}
}
