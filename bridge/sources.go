package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"sequin/bridge/backfill"
	"sequin/bridge/capture"
	"sequin/bridge/changelog"
	"sequin/bridge/pinned"
	"sequin/bridge/source"
	"sequin/bridge/upkeep"
)

// lookForSources is how often the other sources are looked for, and whether this bridge still has those it serves.
const lookForSources = time.Second

// otherSource is another source than the database itself, as the database has it.
type otherSource struct {
	ID        int32
	Name      string
	AlteredAt time.Time
	IsDropped bool
	MayGiveUp bool
}

// serveSources serves the other sources, those that come later too, each by a keeper of its own: one that is down, or
// cannot be captured, is nothing to the others, nor to the database's own tables.
func (b *Bridge) serveSources(ctx context.Context, pool *pgxpool.Pool) {
	type serving struct {
		otherSource
		stop context.CancelFunc
		done chan struct{}
	}
	served := map[int32]serving{}
	defer func() {
		for _, s := range served {
			s.stop()
			<-s.done
		}
	}()
	isLost := false
	for {
		sources, err := otherSources(ctx, pool)
		if err != nil && ctx.Err() == nil && !isLost {
			b.log.Warn("look for sources: trying again", "err", err)
		}
		isLost = err != nil
		if err == nil {
			gone := map[int32]bool{}
			for id := range served {
				gone[id] = true
			}
			for _, s := range sources {
				gone[s.ID] = false
				before, isServed := served[s.ID]
				if isServed && before.otherSource == s {
					continue
				}
				keeping, stop := context.WithCancel(ctx)
				now := serving{otherSource: s, stop: stop, done: make(chan struct{})}
				served[s.ID] = now
				go func() {
					defer close(now.done)
					defer stop()
					if isServed {
						before.stop()
						<-before.done
					}
					k := &keeper{bridge: b, source: s, log: b.log.With("source", s.Name)}
					k.run(keeping)
				}()
			}
			for id, isGone := range gone {
				if isGone {
					served[id].stop()
					<-served[id].done
					delete(served, id)
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookForSources):
		}
	}
}

func otherSources(ctx context.Context, pool *pgxpool.Pool) ([]otherSource, error) {
	rows, err := pool.Query(ctx, `select * from sequin.bridge_sources()`)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[otherSource])
}

// keeper serves another source, in turn with the keepers of other bridges: an advisory lock in the database says whose
// turn it is. The source's slot cannot: deliveries go on, and are looked after, while the source is away.
type keeper struct {
	bridge *Bridge
	source otherSource
	log    *slog.Logger

	pool       *pgxpool.Pool
	upkeep     atomic.Pointer[upkeep.Upkeep]
	background sync.WaitGroup // upkeep

	stopParts func()
}

// run serves the source whenever it is this bridge's turn.
func (k *keeper) run(ctx context.Context) {
	isWaiting := false
	var conn *pgx.Conn
	defer func() { closeConn(ctx, conn) }()
	for ctx.Err() == nil {
		var isOurs bool
		var err error
		if conn == nil {
			conn, err = k.connect(ctx)
		}
		if err == nil {
			err = conn.QueryRow(ctx, `select sequin.bridge_serve($1)`, k.source.ID).Scan(&isOurs)
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			k.log.Warn("cannot take the source on: trying again", "err", err)
			closeConn(ctx, conn)
			conn = nil
		case isOurs:
			k.serveWhile(ctx, conn)
			closeConn(ctx, conn)
			conn = nil
			continue
		case !isWaiting:
			k.log.Info("another bridge serves the source: standing by")
			isWaiting = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(lookForSources):
		}
	}
}

// connect opens the connection that holds the lock. Should this bridge hang, or its machine be gone, the server ends it.
func (k *keeper) connect(ctx context.Context) (*pgx.Conn, error) {
	conn, err := pinned.Connect(ctx, k.bridge.config.DatabaseURL, "sequin source", "UTF8")
	if err != nil {
		return nil, err
	}
	_, err = conn.Exec(ctx, `select pg_catalog.set_config(s.name, w.value, false)
		from pg_catalog.pg_settings s
		join (values ('idle_session_timeout', '30s'), ('tcp_keepalives_idle', '10'), ('tcp_keepalives_interval', '5'),
		             ('tcp_keepalives_count', '3')) w(name, value) on s.name = w.name`)
	if err != nil {
		closeConn(ctx, conn)
		return nil, err
	}
	return conn, nil
}

func closeConn(ctx context.Context, conn *pgx.Conn) {
	if conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = conn.Close(ctx)
}

// serveWhile serves the source for as long as this connection, and with it the lock, is there.
func (k *keeper) serveWhile(ctx context.Context, conn *pgx.Conn) {
	serving, stop := context.WithCancel(ctx)
	defer stop()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		defer stop()
		for {
			select {
			case <-serving.Done():
				return
			case <-time.After(lookForSources):
			}
			asking, cancel := context.WithTimeout(context.WithoutCancel(serving), 5*time.Second)
			_, err := conn.Exec(asking, `select`)
			cancel()
			if err != nil && serving.Err() == nil {
				k.log.Warn("lost the connection that the source is held by", "err", err)
				return
			}
		}
	}()
	if k.source.IsDropped {
		k.clear(serving)
	} else {
		k.serve(serving)
	}
	stop()
	<-watched
}

// serve captures the source, and looks after its consumers whether it can be captured or not.
func (k *keeper) serve(ctx context.Context) {
	var err error
	if k.pool, err = k.bridge.connect(ctx); err != nil {
		k.log.Error("cannot serve the source", "err", err)
		return
	}
	defer closeSoon(k.pool)
	defer k.background.Wait()
	k.upkeep.Store(nil)
	var lastSeq *int64
	err = k.pool.QueryRow(ctx, `select last_seq from sequin.bridge_source($1)`, k.source.Name).Scan(&lastSeq)
	if err == nil && lastSeq != nil {
		k.lookAfter(ctx, int32(*lastSeq>>32), *lastSeq)
	}
	capture.New(capture.Config{
		DatabaseURL: k.bridge.config.DatabaseURL,
		Log:         k.bridge.log,
		Source:      k.source.Name,
		Target: func(ctx context.Context) (*source.Target, error) {
			return source.Reach(ctx, k.pool, k.source.ID, k.source.Name)
		},
		Segment:   func() int32 { return k.upkeep.Load().Segment() },
		IsAwaited: func() bool { return k.upkeep.Load().IsAwaited() },
		Claimed:   func(claim capture.Claim) { k.claimed(ctx, claim) },
		Written:   func(batch changelog.Batch) { k.upkeep.Load().Written(batch.LastSeq, batch.Routes) },
		Lost: func() {
			k.stopParts()
			k.pool.Reset() // what ended the one may have cut the others off as well, and told nobody
		},
	}).Run(ctx)
}

func (k *keeper) lookAfter(ctx context.Context, segment int32, lastSeq int64) {
	u := upkeep.New(k.pool, k.log, k.source.ID, segment, lastSeq)
	k.upkeep.Store(u)
	k.background.Go(func() { u.Run(ctx) })
}

// claimed looks after the tables from here on, and after the consumers if that has not begun.
func (k *keeper) claimed(ctx context.Context, claim capture.Claim) {
	if u := k.upkeep.Load(); u != nil {
		u.Resume(claim.Segment, claim.LastSeq)
	} else {
		k.lookAfter(ctx, claim.Segment, claim.LastSeq)
	}
	tables := source.NewTables(source.TablesConfig{
		Home: k.pool, Log: k.log.With("component", "tables"), Target: claim.Target,
		SourceID: k.source.ID, Slot: claim.Slot, Publication: claim.Publication,
	})
	history := backfill.New(backfill.Config{
		DatabaseURL: k.bridge.config.DatabaseURL, SourceID: k.source.ID, Publication: claim.Publication, Encoding: claim.Encoding,
		Log: k.log, Live: claim.Live, Connect: claim.Target.Connect, Scrub: claim.Target.ScrubError, Written: k.upkeep.Load().Added,
	})
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	parts.Go(func() { tables.Run(ctx) })
	parts.Go(func() { history.Run(ctx) })
	k.stopParts = func() {
		cancel()
		parts.Wait()
	}
}

// clear removes what is left of a source that was dropped: there, and then here.
func (k *keeper) clear(ctx context.Context) {
	var err error
	if k.pool, err = k.bridge.connect(ctx); err != nil {
		k.log.Error("cannot clear the source away", "err", err)
		return
	}
	defer closeSoon(k.pool)
	complaint := ""
	for ctx.Err() == nil {
		err := k.clearThere(ctx)
		var problem *source.Problem
		if errors.As(err, &problem) {
			_, _ = k.pool.Exec(ctx, `select sequin.bridge_error($1, $2, $3)`, k.source.ID, problem.Reason, problem.Hint)
		}
		if err != nil && complaint != err.Error() && ctx.Err() == nil {
			complaint = err.Error()
			k.log.Warn("cannot clear away what is on a source that was dropped", "err", err, "given_up", k.source.MayGiveUp)
		}
		if err == nil || k.source.MayGiveUp {
			var isDone bool
			if err := k.pool.QueryRow(ctx, `select sequin.bridge_forget_source($1)`, k.source.ID).Scan(&isDone); err != nil && ctx.Err() == nil {
				k.log.Warn("forget a source: trying again", "err", err)
			}
			if isDone {
				k.log.Info("source dropped")
				<-ctx.Done() // it is not among the sources any more
				return
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(lookForSources):
		}
	}
}

func (k *keeper) clearThere(ctx context.Context) error {
	var slot, publication string
	err := k.pool.QueryRow(ctx, `select slot_name, publication_name from sequin.bridge_source($1)`, k.source.Name).Scan(&slot, &publication)
	var isCopy bool
	if err == nil {
		err = k.pool.QueryRow(ctx, `select sequin.bridge_is_copy($1)`, k.source.ID).Scan(&isCopy)
	}
	if err != nil {
		return fmt.Errorf("look at the source: %w", err)
	}
	if isCopy {
		return nil // what is there is another database's
	}
	target, err := source.Reach(ctx, k.pool, k.source.ID, k.source.Name)
	if err != nil {
		return err
	}
	conn, err := target.Connect(ctx, "sequin", nil)
	if err != nil {
		return err
	}
	defer closeConn(ctx, conn)
	if err := source.Clear(ctx, conn, slot, publication); err != nil {
		return target.ScrubError(err)
	}
	return nil
}
