package upkeep

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// How often what is done.
const (
	tendEvery   = time.Second
	trimEvery   = 2 * time.Second
	retainEvery = 5 * time.Second
	sampleEvery = 10 * time.Second

	// To drop a segment of the log, so long is waited for those who read it, while whoever else would read it waits as well.
	minPatience = 100 * time.Millisecond
	maxPatience = 2 * time.Second
)

// Upkeep looks after a source that this bridge has, and its consumers.
type Upkeep struct {
	pool     *pgxpool.Pool
	log      *slog.Logger
	sourceID int32

	segment atomic.Int32 // of the log that the next transaction goes to
	lastSeq atomic.Int64
	news    news
	awaited atomic.Bool

	pipelines *pipelines

	patience time.Duration
	holders  []string // of the log, when a segment of it last could not be dropped

	bounds      map[int32][]int64 // of consumers: see bridge_trim
	sourceBound *int64
}

// New returns the Upkeep of a source.
func New(pool *pgxpool.Pool, log *slog.Logger, sourceID, segment int32, lastSeq int64) *Upkeep {
	u := &Upkeep{
		pool: pool, log: log.With("component", "upkeep"), sourceID: sourceID,
		news: news{wake: make(chan struct{}, 1)}, bounds: map[int32][]int64{},
		patience: minPatience,
	}
	u.pipelines = &pipelines{Upkeep: u, running: map[int32]*pipeline{}}
	u.segment.Store(segment)
	u.lastSeq.Store(lastSeq)
	return u
}

// Segment returns the segment of the log that the next transaction goes to.
func (u *Upkeep) Segment() int32 { return u.segment.Load() }

// IsAwaited tells, once, that somebody waits for word that the log is complete so far.
func (u *Upkeep) IsAwaited() bool { return u.awaited.Swap(false) }

// Resume takes note that capture goes on here, after a while in which nothing was written.
func (u *Upkeep) Resume(segment int32, lastSeq int64) {
	u.segment.Store(max(u.segment.Load(), segment))
	u.lastSeq.Store(lastSeq)
}

// Written takes note of a batch of the log.
func (u *Upkeep) Written(lastSeq int64, routes []int32) {
	u.lastSeq.Store(lastSeq)
	u.news.add(routes)
	u.pipelines.written(routes)
}

// Added takes note of rows that a backfill has added, under these routes.
func (u *Upkeep) Added(routes []int32) { u.news.add(routes) }

// Run looks after the source until the context ends.
func (u *Upkeep) Run(ctx context.Context) {
	u.news.add(nil) // what has been left behind
	var parts sync.WaitGroup
	parts.Go(func() { u.dispatch(ctx) })
	parts.Go(func() { u.pipelines.run(ctx) })
	parts.Go(func() { u.every(ctx, "retain event tables", retainEvery, u.retainPipelines) })
	parts.Go(func() { u.every(ctx, "tend consumers", tendEvery, u.tend) })
	parts.Go(func() { u.every(ctx, "look for who waits", tendEvery, u.look) })
	parts.Go(func() { u.every(ctx, "trim", trimEvery, u.trim) })
	parts.Go(func() { u.every(ctx, "retain the log", retainEvery, u.retain) })
	parts.Go(func() {
		u.every(ctx, "sample counters", sampleEvery, func(ctx context.Context) error {
			_, err := u.pool.Exec(ctx, `select sequin.bridge_sample($1)`, u.sourceID)
			return err
		})
	})
	parts.Wait()
}

// every does something again and again. What fails is tried again next time.
func (u *Upkeep) every(ctx context.Context, what string, period time.Duration, do func(context.Context) error) {
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		if err := do(ctx); err != nil {
			u.warn(ctx, what, err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (u *Upkeep) warn(ctx context.Context, what string, err error) {
	// A lock that is not had at once is not waited for.
	var pgErr *pgconn.PgError
	if ctx.Err() != nil || errors.As(err, &pgErr) && pgErr.Code == pgerrcode.LockNotAvailable {
		return
	}
	u.log.Warn(what+": trying again", "err", err)
}

type consumer struct {
	ID      int32
	HasFeed bool
}

func (u *Upkeep) consumers(ctx context.Context) ([]consumer, error) {
	rows, err := u.pool.Query(ctx, `select consumer_id, has_feed from sequin.bridge_consumers($1)`, u.sourceID)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[consumer])
}

// tend starts consumers that wait to be, ends leases, and notifies those whose messages have come due.
func (u *Upkeep) tend(ctx context.Context) error {
	consumers, err := u.consumers(ctx)
	if err != nil {
		return err
	}
	for _, c := range consumers {
		var isNews bool
		if err := u.pool.QueryRow(ctx, `select sequin.bridge_tend($1)`, c.ID).Scan(&isNews); err != nil {
			u.warn(ctx, "tend a consumer", err)
		}
		if isNews && c.HasFeed {
			u.news.add(nil)
		}
	}
	if len(consumers) == 0 {
		return nil
	}
	_, err = u.pool.Exec(ctx, `select sequin.bridge_notify('{}', $1)`, u.sourceID)
	return err
}

// look finds out whether anybody waits for word that the log is complete.
func (u *Upkeep) look(ctx context.Context) error {
	var isAwaited bool
	err := u.pool.QueryRow(ctx, `select sequin.bridge_is_awaited($1)`, u.sourceID).Scan(&isAwaited)
	if isAwaited {
		u.awaited.Store(true)
	}
	return err
}

// trim removes what newer rows have replaced.
func (u *Upkeep) trim(ctx context.Context) error {
	consumers, err := u.consumers(ctx)
	if err != nil {
		return err
	}
	kept := make(map[int32][]int64, len(consumers))
	for _, c := range consumers {
		bounds := u.bounds[c.ID]
		if err := u.pool.QueryRow(ctx, `select sequin.bridge_trim($1, $2)`, c.ID, bounds).Scan(&bounds); err != nil {
			u.warn(ctx, "trim a consumer", err)
		}
		kept[c.ID] = bounds
	}
	u.bounds = kept
	return u.pool.QueryRow(ctx, `select sequin.bridge_trim_source($1, $2)`, u.sourceID, u.sourceBound).Scan(&u.sourceBound)
}

// retain goes on in a new segment of the log where it is time to, and drops those that nobody needs.
func (u *Upkeep) retain(ctx context.Context) error {
	var segment int32
	if err := u.pool.QueryRow(ctx, `select sequin.bridge_rotate($1, $2)`, u.sourceID, u.lastSeq.Load()).Scan(&segment); err != nil {
		return err
	}
	if u.segment.Swap(segment) != segment {
		u.log.Info("opened a segment of the log", "segment", segment)
	}
	for {
		if isHeld, err := u.isStillHeld(ctx); isHeld || err != nil {
			return err
		}
		var dropped *int32
		err := u.pool.QueryRow(ctx, `select sequin.bridge_retain($1, $2)`, u.sourceID, u.patience).Scan(&dropped)
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.LockNotAvailable {
			u.patience = min(2*u.patience, maxPatience)
			u.holders, err = u.logHolders(ctx)
		}
		if err != nil || pgErr != nil || dropped == nil {
			return err
		}
		u.patience = minPatience
		u.log.Info("dropped a segment of the log", "segment", *dropped)
	}
}

// isStillHeld tells whether a transaction has the log locked that had it when a segment could not be dropped: it takes its time,
// and to wait for it would have all others wait in vain.
func (u *Upkeep) isStillHeld(ctx context.Context) (bool, error) {
	if len(u.holders) == 0 {
		return false, nil
	}
	now, err := u.logHolders(ctx)
	if err != nil {
		return false, err
	}
	u.holders = slices.DeleteFunc(u.holders, func(h string) bool { return !slices.Contains(now, h) })
	return len(u.holders) > 0, nil
}

func (u *Upkeep) logHolders(ctx context.Context) ([]string, error) {
	var holders []string
	err := u.pool.QueryRow(ctx, `select sequin.bridge_log_holders()`).Scan(&holders)
	return holders, err
}
