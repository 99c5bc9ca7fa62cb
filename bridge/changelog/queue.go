package changelog

import (
	"context"
	"encoding/binary"
	"errors"
	"runtime/debug"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
)

const (
	chunkSize = 256 << 10 // a transaction larger than this is handed over in pieces
	maxQueued = 16 << 20  // bytes that wait for the writer before the reader does
)

// chunk is some rows of the log as a message of COPY, and, at the end of a transaction, its position.
type chunk struct {
	buf     []byte // 'd', length, rows
	segment int32
	counts  []routeCount
	keys    []Key // that are another from here on

	endLSN  pglogrepl.LSN // 0: the transaction goes on
	lastSeq int64
}

type routeCount struct {
	route int32
	count int64
}

const chunkHeader = 5

// buffers are those that were written, for the next chunks: as many as the queue may hold.
var buffers = make(chan []byte, maxQueued/chunkSize)

func newChunk(segment int32) chunk {
	var buf []byte
	select {
	case buf = <-buffers:
	default:
		buf = make([]byte, 0, chunkSize+chunkSize/4)
	}
	return chunk{buf: append(buf[:0], 'd', 0, 0, 0, 0), segment: segment}
}

// free gives a chunk's buffer back, unless a huge row made it huge.
func (c *chunk) free() {
	if cap(c.buf) <= 2*chunkSize {
		select {
		case buffers <- c.buf:
		default:
		}
	}
	c.buf = nil
}

// isHuge tells whether a row made the chunk so large that another like it is not to be made before this one is gone.
func (c *chunk) isHuge() bool { return len(c.buf) > hugeRow }

// hugeRow is from where on a row's memory is returned at once: the collector would let as much again come together first.
const hugeRow = 8 << 20

// add counts a row.
func (c *chunk) add(route int32) { c.counts = addCount(c.counts, route, 1) }

func addCount(counts []routeCount, route int32, n int64) []routeCount {
	for i := len(counts) - 1; i >= 0; i-- {
		if counts[i].route == route {
			counts[i].count += n
			return counts
		}
	}
	return append(counts, routeCount{route, n})
}

// message returns the chunk as a CopyData message.
func (c *chunk) message() []byte {
	binary.BigEndian.PutUint32(c.buf[1:], uint32(len(c.buf)-1))
	return c.buf
}

// Queue holds rows between the reader of the slot, which puts, and the writer of the log, which takes.
type Queue struct {
	mu      sync.Mutex
	chunks  []chunk
	bytes   int
	huge    int           // bytes of huge rows that the writer has taken, and not written yet
	endLSN  pglogrepl.LSN // of the last transaction that was put whole
	written pglogrepl.LSN // of the last transaction that is in the log, and on disk
	seen    pglogrepl.LSN // of the last transaction that is in the log, for others to see
	last    pglogrepl.LSN // endLSN, but while a transaction is put in pieces
	horizon pglogrepl.LSN // see Writer.Horizon: what was asked for
	ended   bool

	wake chan struct{} // there is something to take
	room chan struct{} // there is room again
}

// NewQueue returns a queue for what follows a position.
func NewQueue(applied pglogrepl.LSN) *Queue {
	return &Queue{endLSN: applied, written: applied, seen: applied, last: applied, wake: make(chan struct{}, 1), room: make(chan struct{}, 1)}
}

// Commit puts the rest of a transaction, which ends here.
func (q *Queue) Commit(e *Encoder, endLSN pglogrepl.LSN) {
	c := e.rows
	e.rows = chunk{}
	if len(c.buf) == chunkHeader && len(c.counts) == 0 && !q.isOpen() {
		c.free() // nothing of it is streamed: it leaves no trace
		return
	}
	c.endLSN, c.lastSeq = endLSN, e.seq
	c.keys, e.keys = e.keys, nil
	q.mu.Lock()
	q.endLSN, q.last = endLSN, endLSN
	if last := len(q.chunks) - 1; last >= 0 && q.chunks[last].segment == c.segment && len(q.chunks[last].buf)+len(c.buf) <= chunkSize {
		// Small transactions share a chunk.
		q.chunks[last].buf = append(q.chunks[last].buf, c.buf[chunkHeader:]...)
		for _, n := range c.counts {
			q.chunks[last].counts = addCount(q.chunks[last].counts, n.route, n.count)
		}
		q.chunks[last].endLSN, q.chunks[last].lastSeq = c.endLSN, c.lastSeq
		q.chunks[last].keys = append(q.chunks[last].keys, c.keys...)
		q.bytes += len(c.buf)
		q.mu.Unlock()
		c.free()
	} else {
		q.chunks = append(q.chunks, c)
		q.bytes += len(c.buf)
		q.mu.Unlock()
	}
	signal(q.wake)
}

// Spill puts what there is of an open transaction, once that is worth it.
func (q *Queue) Spill(e *Encoder) {
	if len(e.rows.buf) < chunkSize {
		return
	}
	c := e.rows
	e.rows = newChunk(c.segment)
	e.spilled += len(c.buf)
	q.mu.Lock()
	q.chunks = append(q.chunks, c)
	q.bytes += len(c.buf)
	q.endLSN = 0
	q.mu.Unlock()
	signal(q.wake)
}

// isOpen tells whether a part of an unfinished transaction has been put.
func (q *Queue) isOpen() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.endLSN == 0
}

// Full returns a channel that is closed, or receives, when there may be room; nil where there is.
func (q *Queue) Full() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bytes+q.huge < maxQueued {
		return nil
	}
	return q.room
}

// drop frees a chunk that was written.
func (q *Queue) drop(c *chunk) {
	n := len(c.buf)
	isHuge := c.isHuge()
	c.free()
	if !isHuge {
		return
	}
	debug.FreeOSMemory()
	q.mu.Lock()
	q.huge -= n
	q.mu.Unlock()
	signal(q.room)
}

// Written returns the end of the last transaction that is in the log, on disk, and whether that is all that was put.
func (q *Queue) Written() (lsn pglogrepl.LSN, isAll bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.written, q.written == q.endLSN
}

// AskHorizon has the writer put it on record that the slot may be confirmed up to lsn.
func (q *Queue) AskHorizon(lsn pglogrepl.LSN) {
	q.mu.Lock()
	q.horizon = lsn
	q.mu.Unlock()
	signal(q.wake)
}

// End says that nothing more is put: the writer ends once everything is written.
func (q *Queue) End() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	signal(q.wake)
}

// errNothing is returned where nothing came in time.
var errNothing = errors.New("nothing to write")

// take returns all that is there, or what was asked besides. It waits for either, so long (0: without end); with neither,
// the queue has ended.
func (q *Queue) take(ctx context.Context, patience time.Duration) (chunks []chunk, horizon pglogrepl.LSN, err error) {
	var timeout <-chan time.Time
	if patience > 0 {
		timeout = time.After(patience)
	}
	for {
		q.mu.Lock()
		chunks, q.chunks = q.chunks, nil
		horizon, q.horizon = q.horizon, 0
		q.bytes = 0
		for i := range chunks {
			if chunks[i].isHuge() {
				q.huge += len(chunks[i].buf)
			}
		}
		ended := q.ended
		q.mu.Unlock()
		if len(chunks) > 0 {
			signal(q.room)
		}
		if len(chunks) > 0 || horizon > 0 || ended {
			return chunks, horizon, nil
		}
		select {
		case <-ctx.Done():
			return nil, 0, context.Cause(ctx)
		case <-timeout:
			return nil, 0, errNothing
		case <-q.wake:
		}
	}
}

// waiting returns how many bytes there are to take.
func (q *Queue) waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bytes
}

// Put returns the end of the last transaction that was put whole.
func (q *Queue) Put() pglogrepl.LSN {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.last
}

// Seen returns the end of the last transaction that is in the log, though perhaps not on disk.
func (q *Queue) Seen() pglogrepl.LSN {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.seen
}

// Waiting returns how many bytes wait for the writer.
func (q *Queue) Waiting() int { return q.waiting() }

func (q *Queue) setSeen(lsn pglogrepl.LSN) {
	q.mu.Lock()
	q.seen = lsn
	q.mu.Unlock()
}

func (q *Queue) setWritten(lsn pglogrepl.LSN) {
	q.mu.Lock()
	q.written = lsn
	q.mu.Unlock()
}

// signal wakes the one that waits, or will.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
