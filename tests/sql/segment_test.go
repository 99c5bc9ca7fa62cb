package sql

import (
	"testing"

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
