package changelog

import (
	"bytes"
	"io"
	"strconv"
	"time"

	"github.com/jackc/pglogrepl"

	"sequin/bridge/wal"
)

var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// BeginRead opens a chunk of rows that a backfill has read from their table, when the server had written up to lsn.
func (e *Encoder) BeginRead(at time.Time, lsn pglogrepl.LSN, backfill int64) {
	e.rows = newChunk(e.segment)
	e.committedAt = at.Sub(epoch).Microseconds()
	m := append(e.metadata[:0], `{"xid":null,"backfill":`...)
	m = strconv.AppendInt(m, backfill, 10)
	m = append(m, `,"commit_lsn":"`...)
	m = appendLSN(m, lsn)
	e.metadata = append(m, '"')
}

// Read appends a row that was read.
func (e *Encoder) Read(t *Table, row wal.Tuple) error {
	if !t.fits(row) {
		return errShape(t, len(row))
	}
	e.reserve(row)
	omitted := t.omit(row)
	e.open(t, 'r', row, nil)
	e.record(t, row, nil, omitted)
	e.null()
	e.close(t, row, nil, omitted, nil)
	return nil
}

// EndRead returns the chunk's rows as COPY takes them, and the statement for it. They are good until the next BeginRead.
func (e *Encoder) EndRead() (rows io.Reader, copySQL string) {
	e.rows.sort(&e.spare)
	return io.MultiReader(
		bytes.NewReader([]byte("PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00")),
		bytes.NewReader(e.rows.buf[chunkHeader:]),
		bytes.NewReader([]byte{0xff, 0xff}),
	), "copy sequin.log_" + strconv.Itoa(int(e.segment)) + " (" + copyColumns + ") from stdin (format binary)"
}
