// Package slot speaks to a replication slot: finds out how it stands, makes it, reads it, confirms it.
package slot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"sequin/bridge/pinned"
	"sequin/bridge/quote"
)

const readBuffer = 256 << 10

// reader is what the connection that reads a slot calls itself.
const reader = "sequin bridge"

// Conn is a replication connection.
type Conn struct {
	pg    *pgconn.PgConn
	heard *ear
}

// ear takes the time of the last byte that came: a message of a gigabyte is long on its way.
type ear struct {
	io.Reader
	at atomic.Int64
}

func (e *ear) Read(b []byte) (int, error) {
	n, err := e.Reader.Read(b)
	if n > 0 {
		e.at.Store(time.Now().UnixNano())
	}
	return n, err
}

// Connect opens a replication connection, on which text comes in this encoding. notice gets what the server has to say
// meanwhile.
func Connect(ctx context.Context, databaseURL, encoding string, notice func(*pgconn.Notice)) (*Conn, error) {
	config, err := pgconn.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	config.RuntimeParams["application_name"] = reader
	config.RuntimeParams["client_encoding"] = encoding
	config.RuntimeParams["replication"] = "database"
	pinned.Print(config.RuntimeParams)
	pinned.Pin(config.RuntimeParams)
	heard := &ear{}
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notice(n) }
	config.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
		heard.Reader = &paced{r: r}
		return pgproto3.NewFrontend(bufio.NewReaderSize(heard, readBuffer), w)
	}
	ctx, cancel := context.WithTimeout(ctx, pinned.ConnectTimeout)
	defer cancel()
	pg, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connect for replication: %w", err)
	}
	c := &Conn{pg: pg, heard: heard}
	if _, err := pg.Exec(ctx, pinned.Settings).ReadAll(); err != nil {
		c.Close()
		return nil, fmt.Errorf("pin settings: %w", err)
	}
	return c, nil
}

// Heard returns when the last byte came.
func (c *Conn) Heard() time.Time { return time.Unix(0, c.heard.at.Load()) }

// PID returns the server's process that sends.
func (c *Conn) PID() uint32 { return c.pg.PID() }

// Identify returns what server this is, and how far it has written.
func (c *Conn) Identify(ctx context.Context) (pglogrepl.IdentifySystemResult, error) {
	id, err := pglogrepl.IdentifySystem(ctx, c.pg)
	if err != nil {
		return id, fmt.Errorf("identify system: %w", err)
	}
	return id, nil
}

// TimelineHistory returns a timeline's history file, which the first has none of.
func (c *Conn) TimelineHistory(ctx context.Context, timeline int32) (string, error) {
	if timeline == 1 {
		return "", nil
	}
	history, err := pglogrepl.TimelineHistory(ctx, c.pg, timeline)
	if err != nil {
		return "", fmt.Errorf("read the history of timeline %d: %w", timeline, err)
	}
	return string(history.Content), nil
}

// decodeInMemory lets the server (13 and newer) hold as much of open transactions in memory as a quarter of its
// shared_buffers, 1 GB at most, where its own setting is less. What it holds on disk, it writes and reads again: that
// cost a third of the decoding of a transaction of 500,000 rows.
const decodeInMemory = `
	select pg_catalog.set_config(m.name, b.kb::text, false)
	from pg_catalog.pg_settings m
	cross join lateral (
	  select least(b.setting::bigint * 8 / 4, 1048576) as kb
	  from pg_catalog.pg_settings b where b.name = 'shared_buffers') b
	where m.name = 'logical_decoding_work_mem' and m.setting::bigint < b.kb`

// endSilence has a server that waits without end for a reader that has vanished wait a minute.
const endSilence = `
	select pg_catalog.set_config(s.name, '60s', false)
	from pg_catalog.pg_settings s where s.name = 'wal_sender_timeout' and s.setting = '0'`

// Patience returns how long the server waits for a reader that says nothing: wal_sender_timeout.
func (c *Conn) Patience(ctx context.Context) (time.Duration, error) {
	results, err := c.pg.Exec(ctx, endSilence+`; select setting from pg_catalog.pg_settings where name = 'wal_sender_timeout'`).ReadAll()
	if err != nil {
		return 0, fmt.Errorf("set wal_sender_timeout: %w", err)
	}
	ms, err := strconv.Atoi(string(results[len(results)-1].Rows[0][0]))
	if err != nil {
		return 0, fmt.Errorf("read wal_sender_timeout: %w", err)
	}
	return time.Duration(ms) * time.Millisecond, nil
}

// KeepForStandby has the server take a slot along to its standbys (17 and newer), which is made so since.
func (c *Conn) KeepForStandby(ctx context.Context, name string) error {
	if _, err := c.pg.Exec(ctx, "ALTER_REPLICATION_SLOT "+quote.Identifier(name)+" (FAILOVER true)").ReadAll(); err != nil {
		return fmt.Errorf("alter slot %s: %w", name, err)
	}
	return nil
}

// Start begins to read a slot, from a position on. 55006 where another reads it.
func (c *Conn) Start(ctx context.Context, name, publication string, from pglogrepl.LSN) error {
	if _, err := c.pg.Exec(ctx, decodeInMemory).ReadAll(); err != nil {
		return fmt.Errorf("set logical_decoding_work_mem: %w", err)
	}
	err := pglogrepl.StartReplication(ctx, c.pg, quote.Identifier(name), from, pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.LogicalReplication,
		PluginArgs: []string{
			"proto_version '1'",
			"publication_names " + quote.Literal(quote.Identifier(publication)),
		},
	})
	if err != nil {
		return fmt.Errorf("start replication: %w", err)
	}
	return nil
}

// ErrEnded is returned when the server ends the stream: it is shutting down.
var ErrEnded = errors.New("the server has ended the stream")

// Receive returns the payload of the next message of the stream: 'w' (data) or 'k' (keepalive) and what follows. It is
// good until the next call. At the deadline it returns an error of which Timeout is true, and nothing is lost.
func (c *Conn) Receive() ([]byte, error) {
	for {
		m, err := c.pg.ReceiveMessage(context.Background())
		if err != nil {
			return nil, err
		}
		switch m := m.(type) {
		case *pgproto3.CopyData:
			return m.Data, nil
		case *pgproto3.ErrorResponse:
			return nil, pgconn.ErrorResponseToPgError(m)
		case *pgproto3.CopyDone, *pgproto3.CommandComplete:
			return nil, ErrEnded
		}
	}
}

// Timeout tells whether Receive ended at the deadline.
func Timeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// SetReadDeadline sets when Receive ends at the latest. It may be called from anywhere.
func (c *Conn) SetReadDeadline(t time.Time) { _ = c.pg.Conn().SetReadDeadline(t) }

// Confirm tells the server that everything before flushed is safe. With ask, it answers with a keepalive at once.
func (c *Conn) Confirm(ctx context.Context, flushed pglogrepl.LSN, ask bool) error {
	// A server that takes nothing any more must not hold the reader.
	_ = c.pg.Conn().SetWriteDeadline(time.Now().Add(10 * time.Second))
	err := pglogrepl.SendStandbyStatusUpdate(ctx, c.pg, pglogrepl.StandbyStatusUpdate{
		WALWritePosition: flushed,
		WALFlushPosition: flushed,
		WALApplyPosition: flushed,
		ReplyRequested:   ask,
	})
	if err != nil {
		return fmt.Errorf("confirm %s: %w", flushed, err)
	}
	return nil
}

// Close ends the connection.
func (c *Conn) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.pg.Close(ctx)
}
