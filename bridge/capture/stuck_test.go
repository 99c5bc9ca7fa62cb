package capture

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	begin  = "B\x00\x00\x00\x01\x02\x03\x04\x05\x00\x02\xc1\x00\x00\x00\x00\x00\x00\x00\x02\xf6"
	commit = "C\x00\x00\x00\x00\x01\x02\x03\x04\x05\x00\x00\x00\x01\x02\x03\x04\x35\x00\x02\xc1\x00\x00\x00\x00\x00"
)

// A transaction that the server failed at is passed over on the way to it, and never lost when the server gets past it.
func TestNotStuck(t *testing.T) {
	t.Parallel()
	c := New(Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	r := &reader{session: &session{}, isStuck: c.isStuck}
	r.inTx, r.begin.CommitLSN, r.isFromServer = true, 0x102030405, true
	for range enough - 1 {
		c.failedAt(r, &pgconn.PgError{Code: "22P03", Message: "invalid internal value for enum"})
	}
	if !c.isStuck(0x102030405) || c.isStuck(0x102030406) {
		t.Fatalf("stuck at %s", c.stuck.commitLSN)
	}
	if err := r.message(context.Background(), []byte(begin)); err != nil || !r.isSkip {
		t.Fatalf("it is not passed over: %v", err)
	}
	err := r.message(context.Background(), []byte(commit))
	if !errors.Is(err, errNotStuck) {
		t.Fatalf("got %v", err)
	}
	c.failedAt(r, err)
	if c.isStuck(0x102030405) {
		t.Error("it is passed over still")
	}
}

// What does not come of the data is no reason to leave a transaction out.
func TestNoReasonToSkip(t *testing.T) {
	t.Parallel()
	for _, code := range []string{"57P01", "53100", "53200", "55006", "42704", "58030", "08006"} {
		c := New(Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
		r := &reader{session: &session{}, isStuck: c.isStuck, inTx: true, isFromServer: true}
		for range 10 {
			c.failedAt(r, &pgconn.PgError{Code: code})
		}
		if c.stuck.count > 0 {
			t.Errorf("%s counts", code)
		}
	}
}

func TestSwitchPoint(t *testing.T) {
	t.Parallel()
	history := "1\t0/5000000\tno recovery target specified\n\n2\t1/A0\tbefore 2026-01-01\n"
	for timeline, want := range map[int32]pglogrepl.LSN{1: 0x5000000, 2: 0x1000000A0, 3: 0} {
		if got := switchPoint(history, timeline); got != want {
			t.Errorf("timeline %d was left at %s, want %s", timeline, got, want)
		}
	}
}
