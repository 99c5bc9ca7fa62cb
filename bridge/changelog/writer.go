package changelog

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

const (
	maxBatchBytes = 4 << 20               // a batch of small transactions ends here, even if more have come
	maxBatchTime  = 50 * time.Millisecond // or here

	// A commit that follows another so soon is not waited for until it is on disk: it is seen at once, and not confirmed
	// to the slot before one after it is. Nothing can be built on it and outlive it: what reads it commits later.
	flushEvery = 200 * time.Millisecond

	// While there are many small transactions, batches begin so far apart, unless there is much: one costs as much as fifty
	// rows. And some times as far as the last one took, within limits: on a busy machine that leaves users' own work a
	// twelfth more. Where the last one had fewer than a few rows, the next begins at once.
	batchEvery = 2 * time.Millisecond
	restTimes  = 4
	maxRest    = 20 * time.Millisecond
	fewRows    = 4
	muchBytes  = 64 << 10
)

// Batch is what a commit of the log added.
type Batch struct {
	LastSeq int64
	Routes  []int32
	EndLSN  pglogrepl.LSN
}

// Writer puts a queue's rows into the log. One connection, its own.
type Writer struct {
	conn     *pgconn.PgConn
	queue    *Queue
	sourceID int32
	step     int64 // of the progress row that the next one follows

	// Written is called after each batch, in the writer's goroutine.
	Written func(Batch)
	// HorizonWritten is called when the slot may be confirmed so far.
	HorizonWritten func(pglogrepl.LSN)

	buf       []byte
	spare     []byte // for a chunk to be sorted in
	counts    []routeCount
	keys      []Key
	nextAt    time.Time // when the next batch may begin, where the last one had more than a few rows
	flushedAt time.Time
	unflushed pglogrepl.LSN // end of the last transaction, where its commit was not waited for; 0: it is on disk
}

// NewWriter returns a writer that follows the progress row of this step.
func NewWriter(conn *pgconn.PgConn, queue *Queue, sourceID int32, step int64) *Writer {
	return &Writer{conn: conn, queue: queue, sourceID: sourceID, step: step}
}

// Run writes batches until the queue ends or the context does. A batch that is not whole by then is not written.
func (w *Writer) Run(ctx context.Context) error {
	if err := w.prepare(ctx); err != nil {
		return fmt.Errorf("hold bell: %w", err)
	}
	for {
		var patience time.Duration
		if w.unflushed > 0 {
			patience = max(flushEvery-time.Since(w.flushedAt), time.Millisecond)
		}
		if pause := time.Until(w.nextAt); pause > 0 && w.queue.waiting() < muchBytes {
			time.Sleep(pause)
		}
		chunks, horizon, err := w.queue.take(ctx, patience)
		if errors.Is(err, errNothing) {
			horizon, err = w.unflushed, nil
		}
		if err != nil {
			return err
		}
		if w.unflushed > 0 && len(chunks) == 0 {
			// Any commit that is waited for will do.
			horizon = max(horizon, w.unflushed)
		}
		if horizon > 0 && len(chunks) == 0 {
			if err := w.writeHorizon(ctx, horizon); err != nil {
				return fmt.Errorf("write horizon: %w", err)
			}
			continue
		}
		if len(chunks) == 0 {
			return nil
		}
		for len(chunks) > 0 {
			if chunks, err = w.writeBatch(ctx, chunks); err != nil {
				return fmt.Errorf("write log: %w", err)
			}
		}
	}
}

// ErrCut ends a batch whose transaction will not be finished.
var ErrCut = errors.New("the transaction was cut off")

// writeBatch writes one batch: from these chunks on, up to the end of a transaction at which the queue has no more for
// now, or the batch is large enough, or the log goes on in another segment. Where it does so in the middle of a transaction,
// that one is a draft, which is made a part of the log at the end. It returns the chunks that it left.
func (w *Writer) writeBatch(ctx context.Context, chunks []chunk) (rest []chunk, err error) {
	beganAt := time.Now()
	segment, isDraft := chunks[0].segment, false
	w.counts, w.keys = w.counts[:0], w.keys[:0]
	w.buf = appendCopy(w.buf[:0], "begin; ", segment)
	queries, bytes := 2, 0
	var last chunk
batch:
	for {
		for len(chunks) > 0 && (chunks[0].segment == segment || bytes > 0 && last.endLSN == 0) {
			c := chunks[0]
			chunks = chunks[1:]
			if c.segment != segment {
				segment, isDraft = c.segment, true
				w.buf = appendCopy(append(w.buf, copyEnd...), "", segment)
				queries++
			}
			c.sort(&w.spare)
			// Small chunks go out with what is around them.
			if bytes += len(c.buf); len(w.buf)+len(c.buf) <= 64<<10 {
				w.buf = append(w.buf, c.message()...)
			} else {
				if err := w.send(w.buf); err != nil {
					return nil, err
				}
				w.buf = w.buf[:0]
				if err := w.send(c.message()); err != nil {
					return nil, err
				}
			}
			for _, n := range c.counts {
				w.counts = addCount(w.counts, n.route, n.count)
			}
			w.keys = append(w.keys, c.keys...)
			w.queue.drop(&c)
			last = c
			if last.endLSN > 0 && (isDraft || bytes >= maxBatchBytes || time.Since(beganAt) >= maxBatchTime) {
				break batch
			}
		}
		if last.endLSN > 0 && (len(chunks) > 0 || w.queue.waiting() == 0) {
			break
		}
		if last.endLSN == 0 && len(chunks) == 0 && len(w.buf) > 0 {
			if err := w.send(w.buf); err != nil {
				return nil, err
			}
			w.buf = w.buf[:0]
		}
		more, horizon, err := w.queue.take(ctx, 0)
		if err != nil {
			return nil, err
		}
		if horizon == 0 && len(more) == 0 && last.endLSN == 0 {
			return nil, ErrCut
		}
		chunks = append(chunks, more...)
	}
	w.buf = append(w.buf, copyEnd...)
	if isDraft {
		w.buf = appendQuery(w.buf, fmt.Sprintf("select sequin.bridge_attach_draft(%d, %d)", w.sourceID, segment))
		queries++
	}
	for _, k := range w.keys {
		w.buf = appendExecute(w.buf, noteKey, strconv.Itoa(int(k.Route)), strconv.FormatUint(uint64(k.RelationOID), 10), array(k.Key), array(k.Columns))
	}
	isFlush := time.Since(w.flushedAt) >= flushEvery
	w.buf = w.appendCommit(w.buf, last, isFlush)
	if err := w.send(w.buf); err != nil {
		return nil, err
	}
	if err := w.answers(ctx, queries); err != nil {
		return nil, err
	}
	w.step++
	w.unflushed = last.endLSN
	w.queue.setSeen(last.endLSN)
	if isFlush {
		w.flushed()
	}
	batch := Batch{LastSeq: last.lastSeq, EndLSN: last.endLSN}
	var rows int64
	for _, n := range w.counts {
		batch.Routes = append(batch.Routes, n.route)
		rows += n.count
	}
	w.nextAt = time.Time{}
	if rows >= fewRows {
		w.nextAt = beganAt.Add(max(batchEvery, min(restTimes*time.Since(beganAt), maxRest)))
	}
	w.Written(batch)
	return chunks, nil
}

// The statements that end a batch, prepared: of what a small one costs the server, their text would be a sixth.
const (
	commitBatch   = "commit_batch"
	commitHorizon = "commit_horizon"
	noteKey       = "note_key"
	commit        = "commit"
	ring          = "ring"
)

// prepare prepares them, and holds the bell of the step that is the last one so far.
func (w *Writer) prepare(ctx context.Context) error {
	b := w.buf[:0]
	for _, s := range []pgproto3.Parse{
		{Name: commitBatch, Query: `select sequin.bridge_commit($1, $2, $3, $4, $5, $6), sequin.bridge_hold_bell($1, $2 + 1),
			pg_catalog.set_config('synchronous_commit', $7, true)`},
		{Name: commitHorizon, Query: `select sequin.bridge_horizon($1, $2, $3), sequin.bridge_hold_bell($1, $2 + 1)`},
		{Name: noteKey, Query: `select sequin.bridge_key($1, $2, $3, $4)`},
		{Name: commit, Query: `commit`},
		{Name: ring, Query: `select sequin.bridge_ring($1, $2)`},
	} {
		b, _ = s.Encode(b)
	}
	b, _ = (&pgproto3.Sync{}).Encode(b)
	w.buf = appendQuery(b, fmt.Sprintf("select sequin.bridge_hold_bell(%d, %d)", w.sourceID, w.step))
	if err := w.send(w.buf); err != nil {
		return err
	}
	return w.answers(ctx, 2)
}

// appendCommit appends what ends a batch whose last chunk is this.
func (w *Writer) appendCommit(b []byte, last chunk, isFlush bool) []byte {
	routes, counts := []byte{'{'}, []byte{'{'}
	for i, n := range w.counts {
		if i > 0 {
			routes, counts = append(routes, ','), append(counts, ',')
		}
		routes = strconv.AppendInt(routes, int64(n.route), 10)
		counts = strconv.AppendInt(counts, n.count, 10)
	}
	synchronous := "off"
	if isFlush {
		synchronous = "on"
	}
	return w.appendStep(b, commitBatch, last.endLSN.String(), strconv.FormatInt(last.lastSeq, 10),
		string(append(routes, '}')), string(append(counts, '}')), synchronous)
}

// appendStep appends a statement that writes the step after this one, with its arguments after the source and the step, what
// commits it, and what wakes those that wait for it.
func (w *Writer) appendStep(b []byte, statement string, arguments ...string) []byte {
	step := []string{strconv.Itoa(int(w.sourceID)), strconv.FormatInt(w.step, 10)}
	b = appendExecute(b, statement, append(step, arguments...)...)
	b = appendExecute(b, commit)
	b = appendExecute(b, ring, step...)
	b, _ = (&pgproto3.Sync{}).Encode(b)
	return b
}

// array returns an array of text as the server reads it.
func array(values []string) string {
	var quoted []string
	for _, v := range values {
		quoted = append(quoted, `"`+strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(v)+`"`)
	}
	return "{" + strings.Join(quoted, ",") + "}"
}

// appendExecute appends what executes a prepared statement, with arguments as text.
func appendExecute(b []byte, statement string, arguments ...string) []byte {
	bind := pgproto3.Bind{PreparedStatement: statement}
	for _, a := range arguments {
		bind.Parameters = append(bind.Parameters, []byte(a))
	}
	b, _ = bind.Encode(b)
	b, _ = (&pgproto3.Execute{}).Encode(b)
	return b
}

func (w *Writer) writeHorizon(ctx context.Context, lsn pglogrepl.LSN) error {
	w.buf = w.appendStep(appendQuery(w.buf[:0], "begin"), commitHorizon, lsn.String())
	if err := w.send(w.buf); err != nil {
		return err
	}
	if err := w.answers(ctx, 2); err != nil {
		return err
	}
	w.step++
	if w.unflushed > 0 {
		w.flushed()
	}
	w.HorizonWritten(lsn)
	return nil
}

// flushed takes note that the log is on disk as far as it is written.
func (w *Writer) flushed() {
	w.queue.setWritten(w.unflushed)
	w.unflushed, w.flushedAt = 0, time.Now()
}

// appendCopy appends what begins a COPY into a segment.
func appendCopy(b []byte, before string, segment int32) []byte {
	b = appendQuery(b, before+"copy sequin.log_"+strconv.Itoa(int(segment))+" ("+copyColumns+") from stdin (format binary)")
	b = append(b, 'd', 0, 0, 0, 4+19)
	return append(b, "PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00"...)
}

// copyEnd ends one.
const copyEnd = "d\x00\x00\x00\x06\xff\xffc\x00\x00\x00\x04"

// appendQuery appends a Query message.
func appendQuery(b []byte, sql string) []byte {
	n := 4 + len(sql) + 1
	b = append(b, 'Q', byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
	b = append(b, sql...)
	return append(b, 0)
}

// send sends messages as they are.
func (w *Writer) send(messages []byte) error {
	return w.conn.Frontend().SendUnbufferedEncodedCopyData(messages)
}

// answers reads up to the ends of this many queries, or series of statements. The first error is what went wrong; the others
// follow from it.
func (w *Writer) answers(ctx context.Context, queries int) error {
	var first error
	for queries > 0 {
		m, err := w.conn.ReceiveMessage(ctx)
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *pgproto3.ErrorResponse:
			if first == nil {
				first = pgconn.ErrorResponseToPgError(m)
			}
		case *pgproto3.ReadyForQuery:
			queries--
		}
	}
	return first
}
