package capture

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"

	"sequin/bridge/wal"
)

// Live is what a backfill has to know of the capture beside it. It is good as long as the claim that it came with.
type Live struct {
	s *session

	position atomic.Uint64 // what commits before it has been read
	wanted   atomic.Uint64 // somebody waits for that to come so far
	changed  atomic.Int64  // when a transaction was last read, in nanoseconds
	asking   time.Time     // the server was asked for a word, for that

	mu     sync.Mutex
	cuts   []cut         // that are not reached yet
	after  int32         // the segment after the last one that was
	inTx   bool          // a transaction is being read
	in     int32         // the segment that its rows go to
	recent []transaction // the last ones that were read, in a ring
	next   int
	marks  []mark // in order: see isLater

	names   map[uint32]string  // of relations, as the stream has them
	renamed map[uint32]renamed // of those that the catalog has another name for
}

// cut is where the log goes on in another segment.
type cut struct {
	lsn     pglogrepl.LSN
	segment int32
}

// transaction is one that was read, and the segment that its rows are in.
type transaction struct {
	xid     uint32
	segment int32
}

const (
	recentCount = 1 << 18
	nudgeEvery  = 20 * time.Millisecond
	busyTime    = 200 * time.Millisecond
)

// open takes up the cuts that the log has not come to yet.
func (l *Live) open(ctx context.Context, s *session) error {
	l.s = s
	rows, err := s.home.Query(ctx, `select lsn, segment from sequin.bridge_cuts($1)`, s.sourceID)
	if err != nil {
		return fmt.Errorf("read cuts: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var text string
		var c cut
		if err := rows.Scan(&text, &c.segment); err != nil {
			return fmt.Errorf("read cuts: %w", err)
		}
		if c.lsn, err = pglogrepl.ParseLSN(text); err != nil {
			return fmt.Errorf("read cuts: %w", err)
		}
		l.cuts = append(l.cuts, c)
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read cuts: %w", err)
	}
	return nil
}

// Cut has the log go on in a segment with the first transaction that commits at lsn or after, and has not begun to be read.
func (l *Live) Cut(lsn pglogrepl.LSN, segment int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cuts = append(l.cuts, cut{lsn, segment})
}

// begin takes note of a transaction: what commits before it has been read. It returns the segment that its rows go to;
// without cuts that is current.
func (l *Live) begin(m *wal.Begin, current int32) (segment int32) {
	segment = l.enter(m, current)
	l.changed.Store(time.Now().UnixNano())
	l.read(m.CommitLSN)
	return segment
}

// enter does so for what a cut and those who wait for it look at.
func (l *Live) enter(m *wal.Begin, current int32) (segment int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.cuts) > 0 && l.cuts[0].lsn <= m.CommitLSN {
		l.after = max(l.after, l.cuts[0].segment)
		l.cuts = l.cuts[1:]
	}
	l.inTx, l.in = true, max(current, l.after)
	t := transaction{m.XID, l.in}
	if len(l.recent) < recentCount {
		l.recent = append(l.recent, t)
		return l.in
	}
	l.recent[l.next] = t
	l.next = (l.next + 1) % recentCount
	return l.in
}

// Recent returns the transactions before a segment that were read last, as far as they are remembered.
func (l *Live) Recent(before int32) []uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var xids []uint32
	for _, t := range l.recent {
		if t.segment < before {
			xids = append(xids, t.xid)
		}
	}
	return xids
}

// hasRead tells whether a transaction is being read, or was one of the last ones.
func (l *Live) hasRead(xid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.recent, func(t transaction) bool { return t.xid == xid })
}

// end takes note that a transaction has been read, up to lsn, and put.
func (l *Live) end(lsn pglogrepl.LSN) {
	l.mu.Lock()
	l.inTx = false
	l.mu.Unlock()
	l.read(lsn)
}

// isBefore tells whether a transaction is being read whose rows go before a segment.
func (l *Live) isBefore(segment int32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inTx && l.in < segment
}

// read takes note that what commits before lsn has been read.
func (l *Live) read(lsn pglogrepl.LSN) {
	if uint64(lsn) > l.position.Load() {
		l.position.Store(uint64(lsn))
	}
}

// isAsking tells whether the server is to be asked how far it is: somebody waits for it to come further.
func (l *Live) isAsking(now time.Time) bool {
	if l.wanted.Load() <= l.position.Load() || now.Sub(l.asking) < nudgeEvery {
		return false
	}
	l.asking = now
	return true
}

// PassedCut waits until everything is in the log, for others to see, that comes before a cut: what committed before its lsn,
// and what was being read when it was made.
func (l *Live) PassedCut(ctx context.Context, lsn pglogrepl.LSN, segment int32) error {
	for l.isBefore(segment) {
		if err := sleep(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return l.Passed(ctx, lsn)
}

// Passed waits until everything that committed before lsn is in the log, for others to see.
func (l *Live) Passed(ctx context.Context, lsn pglogrepl.LSN) error {
	for wait := time.Millisecond; pglogrepl.LSN(l.position.Load()) < lsn; wait = min(2*wait, nudgeEvery) {
		for w := l.wanted.Load(); w < uint64(lsn) && !l.wanted.CompareAndSwap(w, uint64(lsn)); w = l.wanted.Load() {
		}
		// The reader may be waiting for a server that has nothing to say.
		l.s.slot.SetReadDeadline(time.Unix(1, 0))
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
	for end := l.s.queue.Put(); l.s.queue.Seen() < end; {
		if err := sleep(ctx, time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

// IsBusy tells whether there are changes just now.
func (l *Live) IsBusy() bool {
	return l.s.queue.Waiting() > 0 || time.Since(time.Unix(0, l.changed.Load())) < busyTime
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
