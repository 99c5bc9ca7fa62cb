package backfill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/changelog"
	"sequin/bridge/quote"
	"sequin/bridge/wal"
)

const (
	fetchRows = 1000
	chunkTime = 60 * time.Millisecond // of reading; where the first rows take longer to come, a few times that
	maxTime   = 2 * time.Second
	maxRows   = 20_000
	maxBytes  = 4 << 20

	// While there are live changes, which wait for processors, the disk, and for the server to decode what is written here.
	busyRows   = 200 // are fetched
	busyBytes  = 512 << 10
	yieldEvery = 32 << 10 // bytes that are written
	restFactor = 30       // times as long as it has worked: a piece is handed over long before it is written
	longestNap = 200 * time.Millisecond

	lockTimeout = "5s" // behind somebody who alters the table
)

// run is a backfill that is being done.
type run struct {
	*Backfill
	work
	log   *slog.Logger
	types *changelog.Types

	source *pgx.Conn
	target *pgx.Conn
}

// chunk is what one transaction has read.
type chunk struct {
	place  int32
	table  *table
	rows   []wal.Tuple
	doubts []int // places of rows that may have changed since the cut
	last   []*string
	at     time.Time
	lsn    pglogrepl.LSN // the server had written so far when they were read
}

// do reads what is left, and ends the backfill. An error is one that may go away.
func (r *run) do(ctx context.Context) error {
	err := r.readAll(ctx)
	if err == nil || ctx.Err() != nil {
		return err
	}
	var pgErr *pgconn.PgError
	var wrong problem
	switch {
	case errors.As(err, &wrong):
	case errors.Is(err, errEnded):
		r.config.Written(r.Routes)
		return nil
	case !errors.As(err, &pgErr) || isTransient(pgErr.Code):
		return err
	}
	conn, connErr := r.connect(ctx)
	if connErr != nil {
		return connErr
	}
	defer conn.Close(context.WithoutCancel(ctx))
	r.log.Error("a backfill has failed", "err", r.scrub(err))
	reason := err.Error()
	if pgErr != nil && wrong == "" {
		reason = pgErr.Message
	}
	reason = r.scrub(errors.New(reason)).Error()
	if _, endErr := conn.Exec(ctx, `select sequin.bridge_backfill_end($1, $2)`, r.ID, reason); endErr != nil {
		return fmt.Errorf("end backfill: %w", endErr)
	}
	r.config.Written(r.Routes)
	return nil
}

// guard makes a panic the backfill's error: it would end the bridge, and the next one, when that comes to the same place.
func (r *run) guard(err *error) {
	if cause := recover(); cause != nil {
		r.log.Error("a defect in the bridge", "panic", cause, "stack", string(debug.Stack()))
		*err = problem(fmt.Sprintf("a defect in the bridge: %v", cause))
	}
}

// errEnded is returned where the backfill was cancelled, or its consumer dropped, or another bridge does it.
var errEnded = errors.New("the backfill is not this bridge's any more")

func isTransient(code string) bool {
	return pgerrcode.IsConnectionException(code) || pgerrcode.IsOperatorIntervention(code) || pgerrcode.IsInsufficientResources(code) ||
		pgerrcode.IsTransactionRollback(code) || pgerrcode.IsSystemError(code) || code == pgerrcode.LockNotAvailable ||
		code == pgerrcode.ObjectInUse
}

// readAll reads the tables from where the last bridge has got, one chunk ahead of what is written.
func (r *run) readAll(ctx context.Context) (err error) {
	defer r.guard(&err)
	if r.source, err = r.connectSource(ctx); err != nil {
		return err
	}
	defer r.source.Close(context.WithoutCancel(ctx))
	if r.target, err = r.connect(ctx); err != nil {
		return err
	}
	defer r.target.Close(context.WithoutCancel(ctx))
	r.types = changelog.NewTypes(r.config.Encoding == "UTF8")
	// What is lost in a crash of the server is lost with whatever was made of it.
	if _, err := r.target.Exec(ctx, `set synchronous_commit = off`); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	r.log.Info("reading rows that exist", "tables", len(r.Relations), "done", r.RowsDone)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	chunks := make(chan *chunk)
	read := make(chan error, 1)
	go func() {
		var err error
		defer close(chunks)
		defer func() { read <- err }()
		defer r.guard(&err)
		err = r.read(ctx, chunks)
	}()
	w := &writer{run: r, encoder: changelog.NewEncoder(*r.LastSeq, *r.Segment)}
	for c := range chunks {
		if err := w.write(ctx, c); err != nil {
			cancel(err)
			for range chunks { // it ends
			}
			<-read
			return err
		}
	}
	if err := <-read; err != nil {
		return err
	}
	if _, err := r.target.Exec(ctx, `select sequin.bridge_backfill_end($1, null)`, r.ID); err != nil {
		return fmt.Errorf("end backfill: %w", err)
	}
	r.config.Written(append(slices.Clone(r.SideRoutes), r.Routes...))
	r.log.Info("read all rows", "rows", r.RowsDone)
	return nil
}

// read reads the tables, chunk after chunk.
func (r *run) read(ctx context.Context, chunks chan<- *chunk) error {
	p := part{after: r.LastKey}
	if r.RowOrder != nil {
		p.order = *r.RowOrder
	}
	if p.after != nil && p.after[0] == nil {
		p.nulls = true
	}
	if r.RowsDone == 0 {
		if err := r.estimate(ctx); err != nil {
			return err
		}
	}
	for place := r.Place; int(place) <= len(r.Relations); {
		c, isEnd, err := r.readChunk(ctx, place, &p)
		if err != nil {
			return err
		}
		if len(c.rows) > 0 {
			select {
			case chunks <- c:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			p.after = c.last
		}
		switch {
		case !isEnd:
		case !p.nulls && !c.table.order[0].isNotNull && r.FromRow == nil:
			p = part{nulls: true, order: p.order}
		default:
			p = part{}
			place++
		}
	}
	return nil
}

// readChunk reads some rows in a transaction of their own, and tells whether there are no more. Where what they are in the
// order of has been altered since the last chunk, it begins with the table anew: the rows after one are others then.
func (r *run) readChunk(ctx context.Context, place int32, p *part) (_ *chunk, isEnd bool, err error) {
	began := time.Now()
	c := &chunk{place: place, at: began}
	if err := r.begin(ctx, place); err != nil {
		return nil, false, err
	}
	defer func() {
		if err == nil {
			_, err = r.source.Exec(ctx, "commit")
		}
		if err == nil && len(c.doubts) > 0 {
			err = flush(ctx, r.source)
		}
		if err != nil && !r.source.IsClosed() {
			_, _ = r.source.Exec(context.WithoutCancel(ctx), "rollback")
		}
	}()
	if c.table, err = r.describe(ctx, r.source, place); err != nil {
		return nil, false, err
	}
	if order := c.table.orderText(); order != p.order {
		if p.order != "" {
			r.log.Warn("what the rows are read in the order of was altered: reading the table from its beginning",
				"table", c.table.Name(), "was", p.order, "is", order)
			*p = part{}
		}
		p.order = order
	}
	doubt, err := r.doubt(ctx)
	if err != nil {
		return nil, false, err
	}
	sql, args := c.table.query(*p, r.FromRow, r.condition(place), doubt, maxRows)
	pg := r.source.PgConn()
	values := make([][]byte, len(args))
	for i, text := range args {
		values[i] = []byte(text)
	}
	if err := pg.ExecParams(ctx, "declare rows no scroll cursor for "+sql, values, nil, nil, nil).Read().Err; err != nil {
		return nil, false, fmt.Errorf("read %s: %w", c.table.Name(), err)
	}
	budget, most := chunkTime, maxBytes
	if r.config.Live.IsBusy() {
		most = busyBytes
	}
	bytes := 0
	for began := time.Now(); len(c.rows) < maxRows && bytes < most && time.Since(began) < budget; {
		fetch := fetchRows
		if len(c.rows) == 0 {
			fetch = 100 // nothing is known of how large they are
		}
		fetching := time.Now()
		if len(c.rows) > 0 && r.config.Live.IsBusy() {
			fetch = busyRows
		}
		n := 0
		result := pg.ExecParams(ctx, fmt.Sprintf("fetch forward %d from rows", fetch), nil, nil, nil, nil)
		for result.NextRow() {
			n++
			bytes += c.add(result.Values())
		}
		if _, err := result.Close(); err != nil {
			return nil, false, fmt.Errorf("read %s: %w", c.table.Name(), err)
		}
		if n < fetch {
			isEnd = len(c.rows) < maxRows
			break
		}
		if first := time.Since(began); len(c.rows) == n && 4*first > budget {
			budget, most = min(4*first, maxTime), maxBytes // what has to be sorted first is read in larger pieces
		} else if err := r.yield(ctx, fetching); err != nil {
			return nil, false, err
		}
	}
	if len(c.doubts) > 0 || len(c.rows) > 0 {
		var lsn string
		if err := r.source.QueryRow(ctx, `select pg_catalog.pg_current_wal_insert_lsn()::text`).Scan(&lsn); err != nil {
			return nil, false, fmt.Errorf("read position: %w", err)
		}
		if c.lsn, err = pglogrepl.ParseLSN(lsn); err != nil {
			return nil, false, err
		}
	}
	return c, isEnd, nil
}

// add takes a row, and returns how many bytes it is.
func (c *chunk) add(values [][]byte) int {
	count := len(c.table.columns)
	size := 0
	for _, v := range values {
		size += len(v)
	}
	buf := make([]byte, 0, size)
	keep := func(v []byte) []byte {
		at := len(buf)
		buf = append(buf, v...)
		return buf[at:]
	}
	row := make(wal.Tuple, count)
	for i, v := range values[:count] {
		row[i].Kind = wal.Null
		if v != nil {
			row[i] = wal.Value{Kind: wal.Text, Text: keep(v)}
		}
	}
	if string(values[count]) != "f" {
		c.doubts = append(c.doubts, len(c.rows))
	}
	c.last = c.last[:0:0]
	for _, v := range values[count+1:] {
		if v == nil {
			c.last = append(c.last, nil)
			continue
		}
		text := string(v)
		c.last = append(c.last, &text)
	}
	c.rows = append(c.rows, row)
	return size
}

// begin begins a transaction that reads a table. The table is locked before its snapshot is taken: one that is being
// rewritten would seem empty.
func (r *run) begin(ctx context.Context, place int32) error {
	schema, name, err := nameOf(ctx, r.source, uint32(r.Relations[place-1]))
	if err != nil {
		return err
	}
	_, err = r.source.Exec(ctx, "begin isolation level repeatable read read only; set local lock_timeout = '"+lockTimeout+"'; "+
		"lock table "+quote.Identifier(schema)+"."+quote.Identifier(name)+" in access share mode", pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		_, _ = r.source.Exec(ctx, "rollback")
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.UndefinedTable {
			// Renamed or dropped in between: the next look tells.
			_, _, err = nameOf(ctx, r.source, uint32(r.Relations[place-1]))
			if err == nil {
				err = errors.New("the table has another name now")
			}
			return err
		}
		return fmt.Errorf("lock %s.%s: %w", schema, name, err)
	}
	return nil
}

// doubt returns a condition for rows that may have changed since the cut. One that was written by a transaction that had
// ended by then has not.
func (r *run) doubt(ctx context.Context) (string, error) {
	const farOff = 1 << 30 // transactions are told apart over half of their numbers only
	var age int64
	err := r.source.QueryRow(ctx, `select pg_catalog.txid_snapshot_xmax(pg_catalog.txid_current_snapshot()) - $1::bigint`, *r.CutXmin).Scan(&age)
	if err != nil {
		return "", fmt.Errorf("read snapshot: %w", err)
	}
	if age > farOff {
		return "true", nil
	}
	// A row that seems to be of the future was frozen long ago.
	return fmt.Sprintf("pg_catalog.age(new.xmin) between 0 and pg_catalog.age('%d'::pg_catalog.xid)", uint32(*r.CutXmin)), nil
}

// estimate has the planner say about how many rows there are.
func (r *run) estimate(ctx context.Context) error {
	var total int64
	for place := range int32(len(r.Relations)) {
		t, err := r.describe(ctx, r.source, place+1)
		if err != nil {
			return err
		}
		sql, args := t.query(part{}, r.FromRow, r.condition(place+1), "false", 1<<62)
		values := make([][]byte, len(args))
		for i, text := range args {
			values[i] = []byte(text)
		}
		result := r.source.PgConn().ExecParams(ctx, "explain "+sql, values, nil, nil, nil).Read()
		if result.Err != nil {
			return fmt.Errorf("estimate %s: %w", t.Name(), result.Err)
		}
		if len(result.Rows) > 0 {
			var rows int64
			if _, found, ok := strings.Cut(string(result.Rows[0][0]), " rows="); ok {
				_, _ = fmt.Sscan(found, &rows)
			}
			total += rows
		}
	}
	if _, err := r.target.Exec(ctx, `select sequin.bridge_backfill_total($1, $2)`, r.ID, total); err != nil {
		return fmt.Errorf("estimate: %w", err)
	}
	return nil
}

// writer writes chunks.
type writer struct {
	*run
	encoder *changelog.Encoder
}

// yield lets live changes come first, if there are any: it rests a few times as long as it has been since a piece of work
// began.
func (r *run) yield(ctx context.Context, began time.Time) error {
	if !r.config.Live.IsBusy() {
		return nil
	}
	return sleep(ctx, min(restFactor*time.Since(began), longestNap))
}

// yielding hands rows to COPY in pieces, and lets live changes come first between them.
type yielding struct {
	io.Reader
	yield func(began time.Time) error
	began time.Time // the last piece
}

func (y *yielding) Read(p []byte) (int, error) {
	if err := y.yield(y.began); err != nil {
		return 0, err
	}
	y.began = time.Now()
	return y.Reader.Read(p[:min(len(p), yieldEvery)])
}

// write writes a chunk, but for rows that live changes bring.
func (w *writer) write(ctx context.Context, c *chunk) error {
	skipped, err := w.changed(ctx, c)
	if err != nil {
		return err
	}
	if skipped, err = w.choose(ctx, c, skipped); err != nil {
		return err
	}
	began := w.encoder.Seq()
	w.encoder.BeginRead(c.at, c.lsn, w.ID)
	for i, row := range c.rows {
		if skipped[i] {
			continue
		}
		if err := w.encoder.Read(c.table.Table, row); err != nil {
			return err
		}
	}
	seq := w.encoder.Seq()
	rows, copySQL := w.encoder.EndRead()
	tx, err := w.target.Begin(ctx)
	if err != nil {
		return fmt.Errorf("write rows: %w", err)
	}
	defer tx.Rollback(context.WithoutCancel(ctx)) //nolint:errcheck // after the commit it does nothing
	if seq > began {
		paced := &yielding{rows, func(began time.Time) error { return w.yield(ctx, began) }, time.Now()}
		if _, err := w.target.PgConn().CopyFrom(ctx, paced, copySQL); err != nil {
			return w.ended(fmt.Errorf("write rows: %w", err))
		}
	}
	committing := time.Now()
	err = tx.QueryRow(ctx, `select sequin.bridge_backfill_step($1, $2, $3, $4, $5, $6, $7, $8)`,
		w.ID, w.Step, c.place, c.last, c.table.orderText(), seq, w.RowsDone+int64(len(c.rows)), seq-began).Scan(&w.Step)
	if err != nil {
		return w.ended(fmt.Errorf("write step: %w", err))
	}
	if err := tx.Commit(ctx); err != nil {
		return fmt.Errorf("write rows: %w", err)
	}
	w.RowsDone += int64(len(c.rows))
	w.config.Written([]int32{c.table.Route})
	return w.yield(ctx, committing)
}

// ended tells an error that comes of the backfill's end from others: its history may be gone, or another bridge has it.
func (w *writer) ended(err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && (pgErr.Code == pgerrcode.ObjectNotInPrerequisiteState || pgErr.Code == pgerrcode.ObjectInUse ||
		pgErr.Code == pgerrcode.UndefinedTable) {
		return errEnded
	}
	return err
}

// changed returns the places of rows that live changes bring whole.
func (w *writer) changed(ctx context.Context, c *chunk) (map[int]bool, error) {
	if len(c.doubts) == 0 {
		return nil, nil
	}
	if err := w.config.Live.Passed(ctx, c.lsn); err != nil {
		return nil, err
	}
	places := make(map[string]int, len(c.doubts))
	keys := make([]string, len(c.doubts))
	for i, place := range c.doubts {
		keys[i] = c.table.Key(c.rows[place])
		places[keys[i]] = place
	}
	var changed []string
	err := w.target.QueryRow(ctx, `select sequin.bridge_backfill_changed($1, $2, $3)`, w.Routes[c.place-1], *w.LiveSegment, keys).Scan(&changed)
	if err != nil {
		return nil, fmt.Errorf("look for changes: %w", err)
	}
	skipped := make(map[int]bool, len(changed))
	for _, key := range changed {
		skipped[places[key]] = true
	}
	return skipped, nil
}

// choose adds the places of rows that the backfill's filter does not choose, where it is not the source that chooses.
func (w *writer) choose(ctx context.Context, c *chunk, skipped map[int]bool) (map[int]bool, error) {
	if w.config.Connect == nil || len(w.Conditions) == 0 {
		return skipped, nil
	}
	records := make([]string, len(c.rows))
	for i, row := range c.rows {
		records[i] = c.table.Record(row)
	}
	var chosen []int
	err := w.target.QueryRow(ctx, `select sequin.bridge_backfill_chosen($1, $2, $3::text[]::jsonb[])`, w.ID, c.place, records).Scan(&chosen)
	if err != nil {
		return nil, fmt.Errorf("filter rows: %w", err)
	}
	left := make(map[int]bool, len(c.rows))
	for i := range c.rows {
		left[i] = true
	}
	for _, place := range chosen {
		left[place-1] = skipped[place-1]
	}
	return left, nil
}
