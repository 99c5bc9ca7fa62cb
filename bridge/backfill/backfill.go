package backfill

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/pinned"
)

// Live is the capture that goes on beside.
type Live interface {
	// Cut has the log go on in a segment with the first transaction that commits at lsn or after, and has not begun to be read.
	Cut(lsn pglogrepl.LSN, segment int32)
	// PassedCut waits until everything before a cut is in the log.
	PassedCut(ctx context.Context, lsn pglogrepl.LSN, segment int32) error
	// Passed waits until everything that committed before lsn is in the log.
	Passed(ctx context.Context, lsn pglogrepl.LSN) error
	// Recent returns the transactions before a segment that were read last.
	Recent(before int32) []uint32
	// IsBusy tells whether there are changes just now.
	IsBusy() bool
}

// Config is what a Backfill needs.
type Config struct {
	DatabaseURL string // of the log
	SourceID    int32
	Publication string // of the source
	Encoding    string // of the log's database: text comes from the source in it
	Log         *slog.Logger
	Live        Live
	// Connect opens a connection to another source than the log's own database; nil: there is none.
	Connect func(ctx context.Context, name string, settings map[string]string) (*pgx.Conn, error)
	// Scrub takes what that is reached by out of an error.
	Scrub func(error) error
	// Written is called after each chunk, with the route that its rows are under.
	Written func(routes []int32)
}

// Backfill does the backfills of a source, for the bridge that captures it.
type Backfill struct {
	config Config
	log    *slog.Logger

	logged []transaction // that were at the end of the log when this began; nil: not asked yet

	mu      sync.Mutex
	running map[int64]bool
	readers sync.WaitGroup
}

type transaction struct {
	xid     uint32
	segment int32
}

const (
	lookEvery  = 200 * time.Millisecond
	clearEvery = 2 * time.Second
	maxRunning = 4 // at a time: the others wait
)

// New returns a Backfill.
func New(config Config) *Backfill {
	return &Backfill{config: config, log: config.Log.With("component", "backfill"), running: map[int64]bool{}}
}

// Run does what there is to do until the context ends.
func (b *Backfill) Run(ctx context.Context) {
	defer b.readers.Wait()
	for ctx.Err() == nil {
		err := b.look(ctx)
		if ctx.Err() == nil {
			b.log.Warn("backfills were interrupted", "err", b.scrub(err), "again_in", time.Second)
			_ = sleep(ctx, time.Second)
		}
	}
}

// look looks for backfills again and again, and brings each on its way.
func (b *Backfill) look(ctx context.Context) error {
	conn, err := b.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	cleared := time.Now()
	tries := map[int64]int{}
	for n := 0; ; n++ {
		busy := b.busy() // what is done of these meanwhile, the list does not know
		works, err := b.works(ctx, conn)
		if err != nil {
			return err
		}
		hasBegun := false
		for i := range works {
			w := &works[i]
			// One whose consumer has a worker that does not let go is tried ever more seldom: a try keeps others waiting.
			if w.IsWaiting && n&(1<<min(tries[w.ID], 4)-1) == 0 {
				tries[w.ID]++
				var ok bool
				if err := conn.QueryRow(ctx, `select sequin.bridge_backfill_begin($1)`, w.ID).Scan(&ok); err != nil && !isLater(err) {
					return fmt.Errorf("begin backfill %d: %w", w.ID, err)
				}
				hasBegun = hasBegun || ok
			}
			hasBegun = hasBegun || !w.IsWaiting && w.LiveSegment == nil
		}
		if hasBegun {
			if err := b.cut(ctx, conn); err != nil {
				return err
			}
		}
		opened := map[int32]bool{}
		for i := range works {
			w := &works[i]
			if w.LiveSegment != nil && !w.IsOpen && !opened[*w.LiveSegment] {
				opened[*w.LiveSegment] = true
				if err := b.open(ctx, conn, w); err != nil {
					return err
				}
			}
			if w.IsOpen && !busy[w.ID] {
				b.start(ctx, *w)
			}
		}
		if time.Since(cleared) >= clearEvery {
			cleared = time.Now()
			if err := b.clear(ctx, conn); err != nil {
				return err
			}
		}
		if hasBegun || len(opened) > 0 {
			continue
		}
		if err := sleep(ctx, lookEvery); err != nil {
			return err
		}
	}
}

// work is a backfill that is not over.
type work struct {
	ID          int64
	Consumer    string
	IsWaiting   bool
	Segment     *int32
	LiveSegment *int32
	CutLSN      *string
	CutXmin     *int64
	IsOpen      bool
	Relations   []int64
	Routes      []int32
	SideRoutes  []int32
	SortColumn  *string
	FromRow     *string
	Conditions  []string // on a row, of each table; none: all rows
	Step        int64
	Place       int32
	LastKey     []*string
	RowOrder    *string // what LastKey is in
	LastSeq     *int64
	RowsDone    int64
}

func (b *Backfill) works(ctx context.Context, conn *pgx.Conn) ([]work, error) {
	rows, err := conn.Query(ctx, `select * from sequin.bridge_backfills($1)`, b.config.SourceID)
	if err != nil {
		return nil, fmt.Errorf("read backfills: %w", err)
	}
	works, err := pgx.CollectRows(rows, pgx.RowToStructByPos[work])
	if err != nil {
		return nil, fmt.Errorf("read backfills: %w", err)
	}
	return works, nil
}

// cut cuts the live log for the backfills that have begun. The snapshot comes first: what it sees committed before the cut.
func (b *Backfill) cut(ctx context.Context, conn *pgx.Conn) error {
	source, err := b.connectSource(ctx)
	if err != nil {
		return err
	}
	defer source.Close(context.WithoutCancel(ctx))
	var xmin int64
	var lsn string
	if err := source.QueryRow(ctx, `select pg_catalog.txid_snapshot_xmin(pg_catalog.txid_current_snapshot())`).Scan(&xmin); err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	if err := source.QueryRow(ctx, `select pg_catalog.pg_current_wal_insert_lsn()::text`).Scan(&lsn); err != nil {
		return fmt.Errorf("read position: %w", err)
	}
	at, err := pglogrepl.ParseLSN(lsn)
	if err != nil {
		return err
	}
	var segment *int32
	if err := conn.QueryRow(ctx, `select sequin.bridge_backfill_cut($1, $2, $3)`, b.config.SourceID, xmin, lsn).Scan(&segment); err != nil {
		return fmt.Errorf("cut the log: %w", err)
	}
	if segment != nil {
		b.config.Live.Cut(at, *segment)
		b.log.Debug("cut the log", "at", lsn, "segment", *segment)
	}
	return flush(ctx, source)
}

// flush has the server write its WAL out so far, so that it can be decoded.
func flush(ctx context.Context, source *pgx.Conn) error {
	if _, err := source.Exec(ctx, `select pg_catalog.txid_current()`); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// open waits until the log is past a cut, and everything before it can be read in the tables.
func (b *Backfill) open(ctx context.Context, conn *pgx.Conn, w *work) error {
	at, err := pglogrepl.ParseLSN(*w.CutLSN)
	if err != nil {
		return err
	}
	if err := b.config.Live.PassedCut(ctx, at, *w.LiveSegment); err != nil {
		return err
	}
	if b.logged == nil {
		if err := b.readLogged(ctx, conn); err != nil {
			return err
		}
	}
	source, err := b.connectSource(ctx)
	if err != nil {
		return err
	}
	defer source.Close(context.WithoutCancel(ctx))
	before := map[uint32]bool{}
	for _, xid := range b.config.Live.Recent(*w.LiveSegment) {
		before[xid] = true
	}
	for _, t := range b.logged {
		if t.segment < *w.LiveSegment {
			before[t.xid] = true
		}
	}
	for n := 0; ; n++ {
		unseen, err := firstUnseen(ctx, source, before)
		if err != nil {
			return err
		}
		if unseen == 0 {
			break
		}
		if n == 100 {
			b.log.Warn("a backfill waits for a transaction that is committed and not visible yet: it may be waiting for a synchronous standby",
				"consumer", w.Consumer, "xid", unseen)
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
		// Nothing to wait for any more, where all of them were cancelled.
		works, err := b.works(ctx, conn)
		if err != nil {
			return err
		}
		isWanted := false
		for i := range works {
			isWanted = isWanted || works[i].LiveSegment != nil && *works[i].LiveSegment == *w.LiveSegment
		}
		if !isWanted {
			return nil
		}
	}
	if _, err := conn.Exec(ctx, `select sequin.bridge_backfill_open($1)`, *w.LiveSegment); err != nil {
		return fmt.Errorf("open backfills: %w", err)
	}
	return nil
}

// readLogged reads which transactions were at the end of the log already.
func (b *Backfill) readLogged(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, `select xid, segment from sequin.bridge_recent($1, 50000)`, b.config.SourceID)
	if err != nil {
		return fmt.Errorf("read the end of the log: %w", err)
	}
	b.logged, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (t transaction, err error) {
		var xid int64
		err = row.Scan(&xid, &t.segment)
		t.xid = uint32(xid)
		return t, err
	})
	if err != nil {
		b.logged = nil
		return fmt.Errorf("read the end of the log: %w", err)
	}
	return nil
}

// firstUnseen returns one of these transactions that a snapshot of now does not see; 0: it sees all.
func firstUnseen(ctx context.Context, source *pgx.Conn, xids map[uint32]bool) (uint32, error) {
	var snapshot string
	if err := source.QueryRow(ctx, `select pg_catalog.txid_current_snapshot()::text`).Scan(&snapshot); err != nil {
		return 0, fmt.Errorf("read snapshot: %w", err)
	}
	parts := strings.Split(snapshot, ":") // xmin:xmax:running,running
	if len(parts) != 3 {
		return 0, fmt.Errorf("read snapshot: %q is none", snapshot)
	}
	xmax, err := strconv.ParseUint(parts[1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read snapshot: %w", err)
	}
	for _, text := range strings.Split(parts[2], ",") {
		if text == "" {
			continue
		}
		xid, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read snapshot: %w", err)
		}
		if xids[uint32(xid)] {
			return uint32(xid), nil
		}
	}
	for xid := range xids {
		if int32(xid-uint32(xmax)) >= 0 {
			return xid, nil
		}
	}
	return 0, nil
}

// busy returns the backfills that are being done.
func (b *Backfill) busy() map[int64]bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return maps.Clone(b.running)
}

// start does a backfill in a goroutine of its own, unless it is being done, or there are enough of them.
func (b *Backfill) start(ctx context.Context, w work) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.running[w.ID] || len(b.running) >= maxRunning {
		return
	}
	b.running[w.ID] = true
	b.readers.Go(func() {
		r := &run{Backfill: b, work: w, log: b.log.With("consumer", w.Consumer, "backfill", w.ID)}
		if err := r.do(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("a backfill was interrupted", "err", b.scrub(err), "again_in", time.Second)
			_ = sleep(ctx, time.Second)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.running, w.ID)
	})
}

// clear drops histories that have been delivered.
func (b *Backfill) clear(ctx context.Context, conn *pgx.Conn) error {
	if _, err := conn.Exec(ctx, `select sequin.bridge_backfill_leave($1)`, b.config.SourceID); err != nil && !isLater(err) {
		return fmt.Errorf("leave histories: %w", err)
	}
	for {
		var dropped *int32
		if err := conn.QueryRow(ctx, `select sequin.bridge_backfill_clear($1)`, b.config.SourceID).Scan(&dropped); err != nil {
			if isLater(err) {
				return nil
			}
			return fmt.Errorf("drop a history: %w", err)
		}
		if dropped == nil {
			return nil
		}
		b.log.Debug("dropped a history", "segment", *dropped)
	}
}

// isLater tells whether a lock was not to be had.
func isLater(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && (pgErr.Code == pgerrcode.LockNotAvailable || pgErr.Code == pgerrcode.DeadlockDetected)
}

const applicationName = "sequin backfill"

// settings are those that a row is printed under as the slot prints it. Text passes through as the log's database has it, as
// in capture.
func (b *Backfill) settings() map[string]string {
	settings := map[string]string{
		"client_encoding":    b.config.Encoding,
		"lock_timeout":       "10s",
		"row_security":       "off", // rather an error than a part of the table
		"synchronous_commit": "local",
	}
	pinned.Print(settings)
	return settings
}

// connect opens a connection to the log's database.
func (b *Backfill) connect(ctx context.Context) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(b.config.DatabaseURL)
	if err != nil {
		return nil, err
	}
	config.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	maps.Copy(config.RuntimeParams, b.settings())
	config.RuntimeParams["application_name"] = applicationName
	pinned.Pin(config.RuntimeParams)
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	if err := pinned.Settle(ctx, conn); err != nil {
		_ = conn.Close(context.WithoutCancel(ctx))
		return nil, err
	}
	return conn, nil
}

// connectSource opens a connection to the tables' database.
func (b *Backfill) connectSource(ctx context.Context) (*pgx.Conn, error) {
	if b.config.Connect == nil {
		return b.connect(ctx)
	}
	return b.config.Connect(ctx, applicationName, b.settings())
}

func (b *Backfill) scrub(err error) error {
	if b.config.Scrub == nil {
		return err
	}
	return b.config.Scrub(err)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
