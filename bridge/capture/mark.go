package capture

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"sequin/bridge/wal"
)

// mark is a moment of the source: what its snapshot sees has committed before after, and what it does not, after before.
type mark struct {
	before, after pglogrepl.LSN
	xmin, xmax    uint64
	open          []uint64
}

// takeMark puts this moment among those that transactions are told apart by.
func (l *Live) takeMark(ctx context.Context, conn *pgx.Conn) error {
	var m mark
	var before, after, snapshot string
	err := conn.QueryRow(ctx, `select pg_catalog.pg_current_wal_insert_lsn()::text`).Scan(&before)
	if err == nil {
		err = conn.QueryRow(ctx, `select pg_catalog.txid_current_snapshot()::text, pg_catalog.pg_current_wal_insert_lsn()::text`).Scan(&snapshot, &after)
	}
	if err == nil {
		m.before, err = pglogrepl.ParseLSN(before)
	}
	if err == nil {
		m.after, err = pglogrepl.ParseLSN(after)
	}
	if err == nil {
		err = m.parse(snapshot)
	}
	if err != nil {
		return fmt.Errorf("look where the server is: %w", err)
	}
	position := pglogrepl.LSN(l.position.Load())
	l.mu.Lock()
	defer l.mu.Unlock()
	// Of those that have been passed, the last one says all.
	for len(l.marks) > 1 && l.marks[1].after <= position {
		l.marks = l.marks[1:]
	}
	l.marks = append(l.marks, m)
	return nil
}

// parse reads a snapshot: xmin:xmax:open,open.
func (m *mark) parse(snapshot string) (err error) {
	parts := strings.SplitN(snapshot, ":", 3)
	if len(parts) != 3 {
		return fmt.Errorf("snapshot %q: %w", snapshot, wal.ErrMalformed)
	}
	if m.xmin, err = strconv.ParseUint(parts[0], 10, 64); err != nil {
		return err
	}
	if m.xmax, err = strconv.ParseUint(parts[1], 10, 64); err != nil {
		return err
	}
	for text := range strings.SplitSeq(parts[2], ",") {
		if text == "" {
			continue
		}
		xid, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return err
		}
		m.open = append(m.open, xid)
	}
	return nil
}

// sees tells whether a transaction that has committed by now had done so.
func (m *mark) sees(xid uint32) bool {
	full := m.xmax + uint64(int64(int32(xid-uint32(m.xmax))))
	return full < m.xmin || full < m.xmax && !slices.Contains(m.open, full)
}

// isLater tells whether a transaction that can be seen, and has had a table for itself, committed after one that is being read
// and wrote to that table. Where no mark is between them their numbers tell: of a savepoint's, or of one that had begun before it
// waited for the table, they may not.
func (l *Live) isLater(xid uint32, than *wal.Begin) bool {
	if xid == than.XID || l.hasRead(xid) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.marks {
		switch sees := m.sees(xid); {
		case m.after <= than.CommitLSN && sees:
			return false
		case m.before >= than.CommitLSN:
			return !sees || int32(xid-than.XID) > 0
		}
	}
	return int32(xid-than.XID) > 0
}
