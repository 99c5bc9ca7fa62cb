package changelog

import (
	"encoding/binary"
	"fmt"
	"runtime/debug"
	"slices"
	"strconv"

	"github.com/jackc/pglogrepl"

	"sequin/bridge/wal"
)

// copyColumns are the log's, in the order that Encoder writes them.
const copyColumns = "seq, committed_at, route_id, group_hash, lane, action, table_schema, table_name, record_pk, record, changes, metadata"

const copyColumnCount = 12

// laneCount is how many lanes groups are hashed to: sequin.log.lane is group_hash modulo it.
const laneCount = 64

// Encoder makes changes rows of the log. It gives out seq.
type Encoder struct {
	rows     chunk // of the open transaction, as far as the queue does not have them yet
	spilled  int   // bytes of it that the queue has
	isPlaced bool  // see Place
	seq      int64 // the last one given out
	segment  int32

	keys        []Key // see Describe; of transactions that left no trace, too
	committedAt int64
	metadata    []byte // of the open transaction: {"xid": …, "commit_lsn": …, without its end
	scratch     []byte
	spare       []byte // for a chunk to be sorted in
}

// NewEncoder returns an Encoder that goes on after lastSeq, in a segment of the log.
func NewEncoder(lastSeq int64, segment int32) *Encoder {
	e := &Encoder{seq: lastSeq}
	e.enter(segment)
	return e
}

// enter goes on in another segment.
func (e *Encoder) enter(segment int32) {
	e.segment = segment
	e.seq = max(e.seq, int64(segment)<<32)
}

// largeBytes are so many rows of a transaction that there may be many more.
const largeBytes = 8 << 20

// Segment returns the segment that rows go to.
func (e *Encoder) Segment() int32 { return e.segment }

// IsLarge tells that the open transaction has become large, and nobody has said yet where it goes on. What it has so far is
// with the queue.
func (e *Encoder) IsLarge() bool { return e.spilled >= largeBytes && !e.isPlaced }

// Place has the open transaction go on in a draft of this segment; nil: where it is.
func (e *Encoder) Place(draft *int32) {
	e.isPlaced = true
	if draft != nil {
		e.enter(*draft)
		e.rows.segment = *draft
	}
}

// Key is what names a table's rows, beside all the columns that it has.
type Key struct {
	Route       int32
	RelationOID uint32
	Key         []string
	Columns     []string
}

// Describe puts it on record, once the log has come so far, what names a table's rows.
func (e *Encoder) Describe(k Key) { e.keys = append(e.keys, k) }

// Begin opens a transaction. Its rows go to this segment of the log, or to the one that the last ones went to.
func (e *Encoder) Begin(b *wal.Begin, segment int32) {
	if segment > e.segment {
		e.enter(segment)
	}
	e.rows, e.spilled, e.isPlaced = newChunk(e.segment), 0, false
	e.committedAt = b.CommitTime
	m := append(e.metadata[:0], `{"xid":`...)
	m = strconv.AppendUint(m, uint64(b.XID), 10)
	m = append(m, `,"commit_lsn":"`...)
	m = appendLSN(m, b.CommitLSN)
	e.metadata = append(m, '"')
}

// Insert appends an insert's row.
func (e *Encoder) Insert(t *Table, m *wal.Insert) error {
	if !t.fits(m.New) {
		return errShape(t, len(m.New))
	}
	e.reserve(m.New)
	omitted := t.omit(m.New)
	e.open(t, 'i', m.New, nil)
	e.record(t, m.New, nil, omitted)
	e.null()
	e.close(t, m.New, nil, omitted, nil)
	return nil
}

// Update appends an update's row; where it gave its row another key, the end of the old one before it.
func (e *Encoder) Update(t *Table, m *wal.Update) error {
	if !t.fits(m.New) || m.OldKind != 0 && !t.fits(m.Old) {
		return errShape(t, len(m.New))
	}
	e.reserve(m.New, m.Old)
	if t.isKeyChanged(m) {
		e.end(t, 'x', m.OldKind, m.Old)
	}
	row := m.New
	if len(m.Old) > 0 && textSize(m.New, m.Old) > surelyFits {
		row = slices.Clone(m.New)
		for i := range row {
			row[i] = value(i, m.New, m.Old)
		}
	}
	omitted, omittedOld := t.omit(row), t.omit(m.Old)
	e.open(t, 'u', m.New, m.Old)
	e.record(t, m.New, m.Old, omitted)
	if m.OldKind == 0 {
		e.null()
	} else {
		at := e.openJSON()
		e.rows.buf = t.appendChanges(e.rows.buf, m, omittedOld)
		e.closeField(at)
		isKeyOnly := t.isOldKeyOnly(m)
		omittedOld = slices.DeleteFunc(omittedOld, func(i int) bool { return !t.changed(m, i, isKeyOnly) })
	}
	e.close(t, m.New, m.Old, omitted, omittedOld)
	return nil
}

// Delete appends a delete's row.
func (e *Encoder) Delete(t *Table, m *wal.Delete) error {
	if !t.fits(m.Old) {
		return errShape(t, len(m.Old))
	}
	e.end(t, 'd', m.OldKind, m.Old)
	return nil
}

// Truncate appends a truncate's row.
func (e *Encoder) Truncate(t *Table) {
	e.open(t, 't', nil, nil)
	e.null()
	e.null()
	e.close(t, nil, nil, nil, nil)
}

// Seq returns the last seq given out.
func (e *Encoder) Seq() int64 { return e.seq }

func errShape(t *Table, count int) error {
	return fmt.Errorf("table %s has %d columns, and its row %d: %w", t.Name(), len(t.columns), count, wal.ErrMalformed)
}

// end appends the end of a row: a delete, or an update's old key.
func (e *Encoder) end(t *Table, action, oldKind byte, old wal.Tuple) {
	e.reserve(old)
	omitted := t.omit(old)
	e.open(t, action, old, nil)
	if t.isKeyOnly(oldKind, old) {
		at := e.openJSON()
		e.rows.buf = t.appendOldKey(e.rows.buf, old)
		e.closeField(at)
	} else {
		e.record(t, old, nil, omitted)
	}
	e.null()
	e.close(t, nil, nil, omitted, nil)
}

// open appends a row's fields up to its record.
func (e *Encoder) open(t *Table, action byte, tuple, old wal.Tuple) {
	e.seq++
	key, hasKey := e.scratch[:0], false
	if tuple != nil {
		key, hasKey = t.appendKey(key, tuple, old)
	}
	e.scratch = key
	hash := groupHash(t.group, key, hasKey)

	b := binary.BigEndian.AppendUint16(e.rows.buf, copyColumnCount)
	b = binary.BigEndian.AppendUint32(b, 8)
	b = binary.BigEndian.AppendUint64(b, uint64(e.seq))
	b = binary.BigEndian.AppendUint32(b, 8)
	b = binary.BigEndian.AppendUint64(b, uint64(e.committedAt))
	b = binary.BigEndian.AppendUint32(b, 4)
	b = binary.BigEndian.AppendUint32(b, uint32(t.Route))
	b = binary.BigEndian.AppendUint32(b, 4)
	b = binary.BigEndian.AppendUint32(b, hash)
	b = binary.BigEndian.AppendUint32(b, 2)
	b = binary.BigEndian.AppendUint16(b, uint16(hash%laneCount))
	b = binary.BigEndian.AppendUint32(b, 1)
	e.rows.buf = append(b, action)
	e.field(t.schema, false)
	e.field(t.name, false)
	if hasKey {
		e.field(key, false)
	} else {
		e.null()
	}
}

// reserve makes room for a large row at once: it is not to be copied from one buffer to the next.
func (e *Encoder) reserve(tuples ...wal.Tuple) {
	if n := textSize(tuples...); n > chunkSize {
		if n > hugeRow {
			debug.FreeOSMemory() // of the message before
		}
		e.rows.buf = slices.Grow(e.rows.buf, n+n/8)
	}
}

// close appends a row's metadata. omitted is what was left out of its record, and of its changes.
func (e *Encoder) close(t *Table, tuple, old wal.Tuple, omitted, omittedOld []int) {
	at := e.openJSON()
	b := append(e.rows.buf, e.metadata...)
	if tuple != nil {
		if names := t.appendUnchanged(e.scratch[:0], tuple, old); len(names) > 0 {
			b = append(b, `,"unchanged":`...)
			b = append(b, names...)
		}
	}
	if len(omitted) > 0 || len(omittedOld) > 0 {
		b = append(b, `,"omitted":`...)
		b = t.appendOmitted(b, omitted, omittedOld)
	}
	e.rows.buf = append(b, '}')
	e.closeField(at)
	e.rows.add(t.Route)
}

func (e *Encoder) record(t *Table, tuple, old wal.Tuple, omitted []int) {
	at := e.openJSON()
	e.rows.buf = t.appendRecord(e.rows.buf, tuple, old, omitted)
	e.closeField(at)
}

func (e *Encoder) null() { e.rows.buf = append(e.rows.buf, 0xff, 0xff, 0xff, 0xff) }

func (e *Encoder) field(value []byte, isJSON bool) {
	n := len(value)
	if isJSON {
		n++
	}
	b := binary.BigEndian.AppendUint32(e.rows.buf, uint32(n))
	if isJSON {
		b = append(b, jsonbVersion)
	}
	e.rows.buf = append(b, value...)
}

const jsonbVersion = 1 // of jsonb's binary format

// openJSON begins a jsonb field, whose length closeField fills in.
func (e *Encoder) openJSON() int {
	at := len(e.rows.buf)
	e.rows.buf = append(e.rows.buf, 0, 0, 0, 0, jsonbVersion)
	return at
}

func (e *Encoder) closeField(at int) {
	binary.BigEndian.PutUint32(e.rows.buf[at:], uint32(len(e.rows.buf)-at-4))
}

// appendLSN appends an LSN as PostgreSQL writes it.
func appendLSN(b []byte, lsn pglogrepl.LSN) []byte {
	const digits = "0123456789ABCDEF"
	hex := func(b []byte, n uint32) []byte {
		shift := 28
		for shift > 0 && n>>shift == 0 {
			shift -= 4
		}
		for ; shift >= 0; shift -= 4 {
			b = append(b, digits[n>>shift&15])
		}
		return b
	}
	b = hex(b, uint32(lsn>>32))
	b = append(b, '/')
	return hex(b, uint32(lsn))
}

// groupHash is a row's group: FNV-1a over its table and key, and a last mix, as lanes are its low bits.
func groupHash(route int32, key []byte, hasKey bool) uint32 {
	const offset, prime = 14695981039346656037, 1099511628211
	h := uint64(offset)
	for i := range 4 {
		h = (h ^ uint64(byte(uint32(route)>>(8*i)))) * prime
	}
	if hasKey {
		h = (h ^ 1) * prime
	}
	for _, c := range key {
		h = (h ^ uint64(c)) * prime
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	return uint32(h)
}
