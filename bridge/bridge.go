package bridge

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"sequin/bridge/address"
	"sequin/bridge/backfill"
	"sequin/bridge/capture"
	"sequin/bridge/changelog"
	"sequin/bridge/pinned"
	"sequin/bridge/schema"
	"sequin/bridge/upkeep"
)

// Config is what a Bridge needs.
type Config struct {
	DatabaseURL string
	Log         *slog.Logger // default: slog.Default()
	Version     string       // of the program, for log lines
}

// Bridge serves one database.
type Bridge struct {
	config Config
	log    *slog.Logger

	ready     chan struct{}
	readyOnce sync.Once

	upkeep     atomic.Pointer[upkeep.Upkeep] // while this bridge has the source
	stopUpkeep func()
}

// New returns a Bridge. It refuses an address that is none.
func New(config Config) (*Bridge, error) {
	config.Log = cmp.Or(config.Log, slog.Default())
	if _, err := address.Parse(config.DatabaseURL); err != nil {
		return nil, err
	}
	return &Bridge{config: config, log: config.Log, ready: make(chan struct{})}, nil
}

// Ready returns a channel that is closed when the bridge captures for the first time: not while it stands by.
func (b *Bridge) Ready() <-chan struct{} { return b.ready }

// Run serves the database until the context ends; then it writes and confirms what it has read, and returns nil. It
// refuses a database whose schema is not this program's.
func (b *Bridge) Run(ctx context.Context) error {
	if err := b.check(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	pool, err := b.connect(ctx)
	if err != nil {
		return err
	}
	defer closeSoon(pool)
	b.log.Info("bridge started", "version", b.config.Version)
	var others sync.WaitGroup
	others.Go(func() { b.serveSources(ctx, pool) })
	defer others.Wait()
	capture.New(capture.Config{
		DatabaseURL: b.config.DatabaseURL,
		Log:         b.log,
		Segment:     func() int32 { return b.upkeep.Load().Segment() },
		IsAwaited:   func() bool { return b.upkeep.Load().IsAwaited() },
		Claimed:     func(claim capture.Claim) { b.claimed(ctx, pool, claim) },
		Written: func(batch changelog.Batch) {
			b.upkeep.Load().Written(batch.LastSeq, batch.Routes)
		},
		Lost: func() {
			b.stopUpkeep()
			pool.Reset() // what ended the one may have cut the others off as well, and told nobody
		},
	}).Run(ctx)
	b.log.Info("bridge stopped")
	return nil
}

// check waits for the database to be reached, and then for nothing.
func (b *Bridge) check(ctx context.Context) error {
	for {
		conn, err := pinned.Connect(ctx, b.config.DatabaseURL, "sequin", "UTF8")
		if err == nil {
			defer conn.Close(context.WithoutCancel(ctx))
			return schema.Check(ctx, conn)
		}
		if ctx.Err() != nil {
			return nil
		}
		if !isTransient(err) {
			return err
		}
		b.log.Warn("cannot reach the database", "err", err, "again_in", time.Second)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

// connect opens the connections that upkeep shares.
func (b *Bridge) connect(ctx context.Context) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(b.config.DatabaseURL)
	if err != nil {
		return nil, err
	}
	config.MaxConns = 4
	config.ConnConfig.RuntimeParams["application_name"] = "sequin upkeep"
	config.ConnConfig.RuntimeParams["statement_timeout"] = "60s"
	pinned.Pin(config.ConnConfig.RuntimeParams)
	config.ConnConfig.ConnectTimeout = pinned.ConnectTimeout
	config.AfterConnect = pinned.Settle
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	return pool, nil
}

// closeSoon closes a pool, and does not wait long for a server that does not answer.
func closeSoon(pool *pgxpool.Pool) {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		pool.Close()
	}()
	select {
	case <-closed:
	case <-time.After(3 * time.Second):
	}
}

// claimed looks after the source from here on.
func (b *Bridge) claimed(ctx context.Context, pool *pgxpool.Pool, claim capture.Claim) {
	u := upkeep.New(pool, b.log, claim.SourceID, claim.Segment, claim.LastSeq)
	b.upkeep.Store(u)
	history := backfill.New(backfill.Config{
		DatabaseURL: b.config.DatabaseURL, SourceID: claim.SourceID,
		Publication: claim.Publication, Encoding: claim.Encoding, Log: b.log, Live: claim.Live, Written: u.Added,
	})
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	parts.Go(func() { u.Run(ctx) })
	parts.Go(func() { history.Run(ctx) })
	b.stopUpkeep = func() {
		cancel()
		parts.Wait()
	}
	b.readyOnce.Do(func() { close(b.ready) })
}
