package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// program builds the program, once a run, and returns its path.
func (b *bench) program(ctx context.Context) (string, error) {
	if b.sequin != "" {
		return b.sequin, nil
	}
	dir, err := os.MkdirTemp("", "sequin-bench")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "sequin")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", path, "sequin/cmd/sequin").CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("build the program: %w: %s", err, bytes.TrimSpace(out)), os.RemoveAll(dir))
	}
	b.sequin = path
	return path, nil
}

// bridgeProcess is the program's bridge, running as it does for its users: in a process of its own.
type bridgeProcess struct {
	cmd    *exec.Cmd
	exited chan error
	log    bytes.Buffer
}

// startBridge starts a bridge and waits until it reads its slot.
func (b *bench) startBridge(ctx context.Context, url string) (*bridgeProcess, error) {
	path, err := b.program(ctx)
	if err != nil {
		return nil, err
	}
	p := &bridgeProcess{cmd: exec.Command(path, "bridge", "--database-url", url), exited: make(chan error, 1)}
	p.cmd.Stderr = &p.log
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start bridge: %w", err)
	}
	go func() { p.exited <- p.cmd.Wait() }()
	if err := await(ctx, url, `
		select exists (
		  -- While it is made, it is active too, and ends with the bridge.
		  select from pg_replication_slots
		  where slot_name like 'sequin%' and database = current_database() and active and confirmed_flush_lsn is not null)`); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

// stop tells it to stop, and waits until it has.
func (p *bridgeProcess) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop bridge: %w", err)
	}
	select {
	case err := <-p.exited:
		if err != nil {
			return fmt.Errorf("bridge: %w: %s", err, p.log.Bytes())
		}
		return nil
	case <-time.After(time.Minute):
		return errors.Join(errors.New("bridge: it does not stop"), p.cmd.Process.Kill())
	}
}

// source is a database with a table orders, a stream over it, and a slot that a bridge has made.
type source struct {
	url    string
	drop   func()
	lastID int
}

func (b *bench) source(ctx context.Context, name string, statements ...string) (*source, error) {
	url, drop, err := b.database(ctx, name)
	if err != nil {
		return nil, err
	}
	statements = append([]string{ordersTable, `select sequin.create_stream('orders', '{orders}')`}, statements...)
	if err = execute(ctx, url, statements...); err == nil {
		var p *bridgeProcess
		if p, err = b.startBridge(ctx, url); err == nil {
			err = p.stop()
		}
	}
	if err != nil {
		drop()
		return nil, err
	}
	return &source{url: url, drop: drop}, nil
}

const ordersTable = `
	create table orders (id bigint primary key, customer text, amount numeric, status text, note text, created_at timestamptz)`

// write inserts rows of about 100 bytes into orders: all of them in one transaction, or each in its own.
func (s *source) write(ctx context.Context, rows int, isOne bool) error {
	insert := fmt.Sprintf(`
		insert into orders
		select i, 'customer ' || i %% 1000, (i * 7919 %% 100000) / 100.0, 'pending', repeat('x', 60), now()
		from generate_series(%d::bigint, %d) i`, s.lastID+1, s.lastID+rows)
	if !isOne {
		insert = fmt.Sprintf(`
			do $$ begin
			  for i in %d..%d loop
			    insert into orders
			    values (i, 'customer ' || i %% 1000, (i::bigint * 7919 %% 100000) / 100.0, 'pending', repeat('x', 60), now());
			    commit;
			  end loop;
			end $$`, s.lastID+1, s.lastID+rows)
	}
	s.lastID += rows
	// How long the source waits for its disk is not what is measured; the last commit is flushed with all before it.
	return execute(ctx, s.url, "set synchronous_commit = off", insert, "set synchronous_commit = on", "create table flushed (); drop table flushed")
}

// awaitLog waits until the log has the last row.
func (s *source) awaitLog(ctx context.Context) error {
	return await(ctx, s.url, `select exists (select from sequin.log where record_pk = $1 and route_id = 1)`, fmt.Sprint(s.lastID))
}

// captureRate starts a bridge, and returns how many of the rows written since the last one it captures a second.
func (b *bench) captureRate(ctx context.Context, s *source, rows int) (float64, error) {
	p, err := b.startBridge(ctx, s.url)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	err = s.awaitLog(ctx)
	elapsed := time.Since(start).Seconds()
	return float64(rows) / elapsed, errors.Join(err, p.stop())
}
