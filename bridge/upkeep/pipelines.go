package upkeep

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	pipelinesEvery = time.Second            // a look at which pipelines there are, and what was left behind
	writeEvery     = 100 * time.Millisecond // a pipeline writes what has come in between at once

	// A pipeline writes so many rows of the log in a transaction as take about this long, wide as they are and whatever
	// the table's triggers do.
	writeTime        = 250 * time.Millisecond
	minRows, maxRows = 1, 1 << 20
	firstRows        = 1000

	// What takes longer than isQuick goes on apart from the others; longer than quickTime it is given up, and tried again there, with
	// less to write and more time.
	quickTime, slowTime                = "5s", "60s"
	quickConnections, apartConnections = 8, 4
	isQuick                            = time.Second

	minRetry = 500 * time.Millisecond
	maxRetry = 10 * time.Second
	retries  = 2 // of what passes by itself, before it is told

	resetTime = 5 * time.Second
)

// pipelines writes events, each pipeline by itself: one that fails, or waits for a lock, delays no other.
type pipelines struct {
	*Upkeep
	// Of their own: whatever they wait for, consumers do not. Those that take long have another: whatever their tables' triggers do,
	// the rest do not wait for them.
	pool, apart *pgxpool.Pool

	mu      sync.Mutex
	running map[int32]*pipeline
}

// pipeline is one that is written for.
type pipeline struct {
	id        int32
	name      string
	route     int32
	changedAt time.Time
	stop      context.CancelFunc
	wake      chan struct{} // there is something new
	retry     chan struct{} // somebody has changed it
}

// written takes note of new rows of the log.
func (p *pipelines) written(routes []int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.running {
		for _, r := range routes {
			if r == n.route {
				n.poke(n.wake)
			}
		}
	}
}

func (*pipeline) poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run writes for whatever pipelines there are until the context ends.
func (p *pipelines) run(ctx context.Context) {
	for _, pool := range []struct {
		of          **pgxpool.Pool
		connections int32
		timeout     string
	}{{&p.pool, quickConnections, quickTime}, {&p.apart, apartConnections, slowTime}} {
		config := p.Upkeep.pool.Config()
		config.MaxConns = pool.connections
		config.ConnConfig.RuntimeParams["application_name"] = "sequin pipelines"
		config.ConnConfig.RuntimeParams["statement_timeout"] = pool.timeout
		// Nothing is confirmed on the strength of it: what a crash takes is written again, with how far it had got.
		config.ConnConfig.RuntimeParams["synchronous_commit"] = "off"
		config.AfterRelease = func(conn *pgx.Conn) bool { return reset(conn, config.AfterConnect) }
		opened, err := pgxpool.NewWithConfig(ctx, config)
		if err != nil {
			p.warn(ctx, "open pool", err)
			return
		}
		defer opened.Close()
		*pool.of = opened
	}
	var parts sync.WaitGroup
	p.every(ctx, "look at pipelines", pipelinesEvery, func(ctx context.Context) error { return p.look(ctx, &parts) })
	parts.Wait()
}

// reset takes from a session what a table's triggers have left in it, which would be the next pipeline's, and settles it as when
// it was opened. Prepared statements stay.
func reset(conn *pgx.Conn, settle func(context.Context, *pgx.Conn) error) bool {
	ctx, cancel := context.WithTimeout(context.Background(), resetTime)
	defer cancel()
	_, err := conn.Exec(ctx, `reset all; unlisten *; discard temp; select pg_catalog.pg_advisory_unlock_all()`)
	return err == nil && settle(ctx, conn) == nil
}

// look starts and stops pipelines as there are, and wakes those that have something to write.
func (p *pipelines) look(ctx context.Context, parts *sync.WaitGroup) error {
	rows, err := p.Upkeep.pool.Query(ctx, `select pipeline_id, name, route_id, changed_at, is_behind from sequin.bridge_pipelines($1)
		where not is_paused`, p.sourceID)
	if err != nil {
		return fmt.Errorf("read pipelines: %w", err)
	}
	type state struct {
		ID        int32
		Name      string
		Route     int32
		ChangedAt time.Time
		IsBehind  bool
	}
	states, err := pgx.CollectRows(rows, pgx.RowToStructByPos[state])
	if err != nil {
		return fmt.Errorf("read pipelines: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	there := map[int32]bool{}
	for _, s := range states {
		there[s.ID] = true
		n := p.running[s.ID]
		if n == nil {
			n = &pipeline{
				id: s.ID, name: s.Name, route: s.Route, changedAt: s.ChangedAt,
				wake: make(chan struct{}, 1), retry: make(chan struct{}, 1),
			}
			p.running[s.ID] = n
			var running context.Context
			running, n.stop = context.WithCancel(ctx)
			parts.Go(func() { p.follow(running, n) })
		}
		if !s.ChangedAt.Equal(n.changedAt) {
			n.changedAt = s.ChangedAt
			n.poke(n.retry)
		}
		if s.IsBehind {
			n.poke(n.wake)
		}
	}
	for id, n := range p.running {
		if !there[id] {
			n.stop()
			delete(p.running, id)
		}
	}
	return nil
}

// follow writes what comes, until the context ends.
func (p *pipelines) follow(ctx context.Context, n *pipeline) {
	rows, retry, failures, pool := int64(firstRows), time.Duration(0), 0, p.pool
	for {
		var began time.Time
		isBehind := true
		for isBehind {
			began = time.Now()
			var took time.Duration
			var err error
			isBehind, took, err = p.write(ctx, pool, n, rows)
			if took >= isQuick && err != nil {
				pool = p.apart
			} else if took < isQuick {
				pool = p.pool
			}
			switch {
			case ctx.Err() != nil:
				return
			case err != nil:
				failures++
				p.report(ctx, n, err, failures)
				if took > 10*writeTime {
					rows = max(rows/16, minRows)
				}
				retry = min(max(2*retry, minRetry), maxRetry)
				select {
				case <-ctx.Done():
					return
				case <-n.retry:
				case <-time.After(retry):
				}
				isBehind = true
			default:
				retry, failures = 0, 0
				if took > 2*writeTime {
					rows = max(rows/2, minRows)
				} else if isBehind && took < writeTime/2 {
					rows = min(rows*2, maxRows)
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(writeEvery - time.Since(began)):
		}
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		}
	}
}

// write writes a pipeline's next events. It may be behind still. How long it took is without the wait for a connection, which is others'.
func (*pipelines) write(ctx context.Context, pool *pgxpool.Pool, n *pipeline, rows int64) (isBehind bool, took time.Duration, err error) {
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return true, 0, err
	}
	defer conn.Release()
	began := time.Now()
	err = conn.QueryRow(ctx, `select sequin.bridge_pipeline($1, $2)`, n.id, rows).Scan(&isBehind)
	return isBehind, time.Since(began), err
}

// report puts a pipeline's failure, so many in a row, where its view and health() show it. One of the connection's is not the
// pipeline's; what may pass by itself is, once it has not.
func (p *pipelines) report(ctx context.Context, n *pipeline, err error, failures int) {
	var pgErr *pgconn.PgError
	var connectErr *pgconn.ConnectError
	switch {
	case !errors.As(err, &pgErr) || errors.As(err, &connectErr),
		failures <= retries && pgerrcode.IsOperatorIntervention(pgErr.Code) && pgErr.Code != pgerrcode.QueryCanceled:
		p.log.Warn("write for a pipeline: trying again", "pipeline", n.name, "err", err)
		return
	case failures <= retries && (pgErr.Code == pgerrcode.SerializationFailure || pgErr.Code == pgerrcode.DeadlockDetected):
		return
	}
	var isNew bool
	err = p.Upkeep.pool.QueryRow(ctx, `select sequin.bridge_pipeline_error($1, $2, $3, $4, $5, false)`,
		n.id, pgErr.Code, pgErr.Message, pgErr.Hint, pgErr.ConstraintName).Scan(&isNew)
	if err != nil {
		p.warn(ctx, "record why a pipeline does not go on", err)
	} else if isNew {
		p.log.Warn("a pipeline does not go on: trying again", "pipeline", n.name, "err", pgErr)
	}
}

// retainPipelines drops what pipelines keep for longer than they should.
func (u *Upkeep) retainPipelines(ctx context.Context) error {
	rows, err := u.pool.Query(ctx, `select pipeline_id, name from sequin.bridge_pipelines($1) where has_retention`, u.sourceID)
	if err != nil {
		return err
	}
	type one struct {
		ID   int32
		Name string
	}
	pipelines, err := pgx.CollectRows(rows, pgx.RowToStructByPos[one])
	if err != nil {
		return err
	}
	for _, n := range pipelines {
		var dropped int64
		err := u.pool.QueryRow(ctx, `select sequin.bridge_pipeline_retain($1)`, n.ID).Scan(&dropped)
		var pgErr *pgconn.PgError
		var why *string
		switch {
		case errors.As(err, &pgErr) && pgErr.Code == pgerrcode.LockNotAvailable:
			continue
		case pgErr != nil:
			why = &pgErr.Message
		case err != nil:
			return err
		case dropped > 0:
			u.log.Info("dropped old partitions of an event table", "pipeline", n.Name, "count", dropped)
		}
		if _, err := u.pool.Exec(ctx, `select sequin.bridge_pipeline_error($1, null, $2, null, null, true)`, n.ID, why); err != nil {
			u.warn(ctx, "record why old partitions are not dropped", err)
		}
	}
	return nil
}
