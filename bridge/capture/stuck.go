package capture

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/pinned"
	"sequin/bridge/quote"
)

// A transaction can be such that the server cannot send it: an update whose old and new row are together more than a
// gigabyte, a value whose output function fails. The slot then ends at the same place each time, and nothing after it
// arrives. What is lost when it is left out is for an operator to say, and only that transaction is lost: everything
// before it is in the log first, and reading begins again right behind it.

// stuck is the transaction at which the server failed, as often as it did.
type stuck struct {
	commitLSN   pglogrepl.LSN
	xid         uint32
	committedAt int64
	count       int
	err         *pgconn.PgError
	isSure      bool // it is: on record, to be accepted
}

// errNotStuck is returned where the server gets past a transaction after all: it is read again, and kept.
var errNotStuck = errors.New("the server can send the transaction after all")

// enough is how often the server has to fail at a transaction for that to be the reason.
const enough = 3

// isOfData tells whether an error may come of what was to be sent: not of the connection, of resources, or of an operator.
func isOfData(code string) bool {
	return pgerrcode.IsDataException(code) || pgerrcode.IsProgramLimitExceeded(code) || pgerrcode.IsInternalError(code)
}

// failedAt takes note of a stream's end by the server in the middle of a transaction.
func (c *Capture) failedAt(r *reader, err error) {
	if errors.Is(err, errNotStuck) {
		c.stuck = stuck{}
		return
	}
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || !isOfData(pgErr.Code) || !r.inTx || !r.isFromServer {
		return
	}
	if c.stuck.commitLSN != r.begin.CommitLSN {
		c.stuck = stuck{commitLSN: r.begin.CommitLSN, xid: r.begin.XID, committedAt: r.begin.CommitTime}
	}
	c.stuck.count++
	c.stuck.err = pgErr
	if pgErr.Code == pgerrcode.ProgramLimitExceeded {
		c.stuck.count = max(c.stuck.count, enough-1) // too large stays too large
	}
}

// isStuck tells whether the server is known to fail at a transaction.
func (c *Capture) isStuck(commitLSN pglogrepl.LSN) bool {
	return c.stuck.commitLSN == commitLSN && c.stuck.count >= enough-1
}

// goPast goes past the transaction at which the server fails, once everything before it is in the log and somebody has
// said so. Until then it returns a refusal.
func (c *Capture) goPast(ctx context.Context, sourceID int32) error {
	conn, err := pinned.Connect(ctx, c.config.DatabaseURL, "sequin catalog", "UTF8")
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	isAccepted, err := c.isGivenUp(ctx, conn, sourceID)
	if err != nil {
		return err
	}
	if !isAccepted {
		return c.stuck.refusal(c.config.Source)
	}
	var isPast bool
	err = conn.QueryRow(ctx, `select sequin.bridge_skip($1, $2, $3)`, sourceID, c.stuck.commitLSN.String(), (c.stuck.commitLSN + 1).String()).Scan(&isPast)
	if err != nil {
		return fmt.Errorf("skip transaction: %w", err)
	}
	c.log.Warn("going on without a transaction that the server cannot send", "xid", c.stuck.xid, "commit_lsn", c.stuck.commitLSN)
	c.stuck = stuck{}
	return nil
}

// isGivenUp puts the transaction on record, and tells whether it may be left out.
func (c *Capture) isGivenUp(ctx context.Context, conn *pgx.Conn, sourceID int32) (isAccepted bool, err error) {
	c.stuck.isSure = true
	err = conn.QueryRow(ctx, `select sequin.bridge_stuck($1, $2, $3)`, sourceID, c.stuck.commitLSN.String(), c.stuck.reason()).Scan(&isAccepted)
	if err != nil {
		return false, fmt.Errorf("record gap: %w", err)
	}
	return isAccepted, nil
}

func (k *stuck) reason() string {
	at := time.UnixMicro(k.committedAt + microsecondsTo2000).UTC().Format("2006-01-02 15:04:05Z07:00")
	return fmt.Sprintf("the server cannot send transaction %d, committed at %s (%s): %s (SQLSTATE %s); without it, all its changes, of every table, are missing",
		k.xid, at, k.commitLSN, k.err.Message, k.err.Code)
}

// microsecondsTo2000 is where PostgreSQL's times begin.
const microsecondsTo2000 = 946684800 * 1_000_000

func (k *stuck) refusal(source string) *Refusal {
	hint := fmt.Sprintf("select sequin.accept_gap(%s); leaves that transaction out, and goes on after it.", quote.Literal(source))
	if k.err.Code == pgerrcode.ProgramLimitExceeded {
		hint += " An old and a new row may together be no more than 1 GB: replica identity full sends both."
	}
	return &Refusal{Reason: k.reason(), Hint: hint}
}
