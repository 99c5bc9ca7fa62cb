package capture

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/changelog"
	"sequin/bridge/pinned"
	"sequin/bridge/slot"
	"sequin/bridge/source"
)

// Config is what a Capture needs.
type Config struct {
	DatabaseURL string
	Log         *slog.Logger
	Source      string // default: local
	// Target is asked how another source than local is reached, each time anew. DatabaseURL is where its log is.
	Target func(context.Context) (*source.Target, error)

	// Segment is called for the segment of the log to go on in, before each transaction.
	Segment func() int32
	// Claimed is called when this bridge has taken the source over, in this segment of the log.
	Claimed func(Claim)
	// IsAwaited is called while nothing is on its way: whether somebody waits for word of that. It is forgotten then.
	IsAwaited func() bool
	// Written is called after each batch.
	Written func(changelog.Batch)
	// Lost is called when capturing ends, for whatever reason, after Claimed.
	Lost func()
}

// Claim is what a bridge holds of a source.
type Claim struct {
	SourceID    int32
	Slot        string
	Publication string
	Segment     int32
	LastSeq     int64
	Encoding    string // of the log's database
	Live        *Live
	Target      *source.Target // of another source than local
}

// Capture keeps a source's log up.
type Capture struct {
	config  Config
	target  *source.Target // of another source
	log     *slog.Logger
	refused string // the last refusal that was logged
	waiting bool   // whether it was logged that another bridge has the slot
	stuck   stuck
	failure failure

	waitingSince time.Time
}

// failure is what capture ends with, again and again.
type failure struct {
	text  string
	count int
}

// How long between two looks at a slot that is not to be had, and after something went wrong.
const (
	waitBetweenLooks = time.Second
	minBackoff       = 200 * time.Millisecond
	maxBackoff       = 5 * time.Second

	// A bridge that is gone lets go of another source's slot within wal_sender_timeout, a minute by default.
	slotLeaveTime = 90 * time.Second
)

// New returns a Capture.
func New(config Config) *Capture {
	config.Source = cmp.Or(config.Source, "local")
	return &Capture{config: config, log: config.Log.With("component", "capture", "source", config.Source)}
}

// Run captures until the context ends; then what was read is written and confirmed.
func (c *Capture) Run(ctx context.Context) {
	backoff := minBackoff
	for ctx.Err() == nil {
		began := time.Now()
		err := c.judge(c.capture(ctx))
		if ctx.Err() != nil {
			if err != nil && !errors.Is(err, context.Canceled) {
				c.log.Warn("stopped before everything was confirmed: it is read again next time", "err", err)
			}
			return
		}
		if time.Since(began) > 2*maxBackoff {
			backoff = minBackoff
		}
		wait := backoff
		var refusal *Refusal
		switch {
		case errors.Is(err, errSlotInUse):
			wait = waitBetweenLooks
			if !c.waiting {
				c.log.Info("another bridge is at work: standing by", "reason", err)
				c.waiting, c.waitingSince = true, time.Now()
			}
			if c.target != nil && time.Since(c.waitingSince) > slotLeaveTime {
				c.report(ctx, refuse("Who is it? On the source: select * from pg_stat_replication;", "the slot is read by somebody else: %s", err))
			}
		case errors.As(err, &refusal):
			wait = waitBetweenLooks
			if c.refused != refusal.Reason {
				c.log.Error("not capturing: "+refusal.Reason, "hint", refusal.Hint)
				c.refused = refusal.Reason
			}
			c.report(ctx, refusal)
		case err == nil:
			wait = 0 // it has gone past something, and goes on
		default:
			c.log.Warn("capture was interrupted", "err", err, "again_in", wait)
			backoff = min(2*backoff, maxBackoff)
			if c.fails(err) {
				c.report(ctx, refuse("It tries again every few seconds; the bridge's log, and the server's, say more.",
					"capture fails again and again: %s", err))
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// fails tells whether something has gone wrong in the same way several times in a row.
func (c *Capture) fails(err error) bool {
	if c.failure.text != err.Error() {
		c.failure = failure{text: err.Error()}
	}
	c.failure.count++
	return c.failure.count >= 3
}

// judge makes a Refusal of what keeps another source from being reached, and takes out of the rest what nobody is to see.
func (c *Capture) judge(err error) error {
	var problem *source.Problem
	if errors.As(err, &problem) {
		return &Refusal{Reason: problem.Reason, Hint: problem.Hint}
	}
	var refusal *Refusal
	if err == nil || c.target == nil || errors.Is(err, errSlotInUse) || errors.As(err, &refusal) {
		return err
	}
	return c.target.ScrubError(err)
}

// errSlotInUse is returned where another bridge reads the slot, or has taken the source over.
var errSlotInUse = errors.New("the slot is in use")

func isSlotInUse(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == pgerrcode.ObjectInUse
}

// report puts a refusal where health() shows it.
func (c *Capture) report(ctx context.Context, r *Refusal) {
	conn, err := pinned.Connect(ctx, c.config.DatabaseURL, "sequin report", "UTF8")
	if err == nil {
		defer conn.Close(context.WithoutCancel(ctx))
		_, err = conn.Exec(ctx, `select sequin.bridge_error(s.source_id, $2, $3) from sequin.bridge_source($1) s`,
			c.config.Source, r.Reason, r.Hint)
	}
	if err != nil && ctx.Err() == nil {
		c.log.Warn("cannot record why the source is not captured", "err", err)
	}
}

// capture takes the source over and captures it, until something ends that.
func (c *Capture) capture(ctx context.Context) error {
	s, err := c.open(ctx)
	if err != nil {
		if isSlotInUse(err) {
			return fmt.Errorf("%w: %w", errSlotInUse, err)
		}
		return err
	}
	defer s.close()
	c.waiting, c.refused = false, ""
	c.log.Info("capturing", "slot", s.slotName, "from", s.applied)
	c.config.Claimed(Claim{
		SourceID: s.sourceID, Slot: s.slotName, Publication: s.publication, Segment: s.segment, LastSeq: s.lastSeq,
		Encoding: s.encoding, Live: &s.live, Target: c.target,
	})
	defer c.config.Lost()
	err = s.run(ctx)
	if isSlotInUse(err) {
		return fmt.Errorf("%w: %w", errSlotInUse, err)
	}
	if ctx.Err() == nil && errors.Is(err, errRenamed) {
		c.log.Info("the server is asked anew", "reason", err)
		return nil
	}
	if ctx.Err() == nil {
		c.failedAt(&s.reader, err)
		if s.isUnreadable(err) {
			_, noteErr := s.home.Exec(ctx, `select sequin.bridge_unreadable($1)`, s.sourceID)
			return errors.Join(err, noteErr)
		}
		if _, isAll := s.queue.Written(); isAll && c.stuck.count >= enough {
			s.close()
			return c.goPast(ctx, s.sourceID)
		}
	}
	return err
}

// run reads and writes until the context ends, or either fails.
func (s *session) run(ctx context.Context) error {
	// Either side's end is the other's; a stop from outside lets the writer finish first.
	reading, stopReading := context.WithCancelCause(ctx)
	defer stopReading(nil)
	writing, stopWriting := context.WithCancel(context.WithoutCancel(ctx))
	defer stopWriting()
	// A server that takes nothing any more must not hold the writer.
	defer context.AfterFunc(writing, func() { _ = s.write.Conn().SetDeadline(time.Unix(1, 0)) })()

	var parts sync.WaitGroup
	var writeErr error
	parts.Go(func() {
		if writeErr = s.writer.Run(writing); writeErr != nil {
			stopReading(writeErr)
		}
	})
	parts.Go(func() {
		if err := s.watch(reading); err != nil {
			stopReading(err)
		}
	})
	readErr := s.read(reading)
	stopReading(readErr)
	s.queue.End()
	// A batch in the middle of a transaction is not waited for: the rest of it will not come.
	timer := time.AfterFunc(drainTime, stopWriting)
	defer timer.Stop()
	parts.Wait()

	switch {
	case ctx.Err() == nil:
		return context.Cause(reading)
	case writeErr != nil && !errors.Is(writeErr, context.Canceled) && !errors.Is(writeErr, changelog.ErrCut):
		return writeErr
	}
	return s.confirmLast(context.WithoutCancel(ctx))
}

// drainTime is how long a bridge that is told to stop takes to write what it has read.
const drainTime = 5 * time.Second

// watch waits for the server to end: it ends this connection at once, and the slot's only when the slot's has
// confirmed everything up to the server's last word, which is not ours to confirm. Now and then it asks the server
// something: one that does not answer is out of reach, whatever the other connections wait for.
func (s *session) watch(ctx context.Context) error {
	for {
		quiet, cancel := context.WithTimeout(ctx, min(askEvery, s.patience/4))
		_, err := s.watcher.WaitForNotification(quiet)
		isTime := quiet.Err() != nil
		cancel()
		if err == nil || isTime && !s.watcher.IsClosed() {
			ask, cancel := context.WithTimeout(ctx, s.answerWithin())
			err = errors.Join(s.checkPublication(ask, s.watcher), s.checkStandbys(ask, s.watcher), s.live.takeMark(ask, s.watcher),
				s.live.checkNames(ask, s.watcher))
			cancel()
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("watch the server: %w", err)
		}
	}
}

const askEvery = 10 * time.Second

// answerWithin is how long a server may take to answer a question.
func (s *session) answerWithin() time.Duration {
	return max(5*time.Second, min(silentAfter, s.patience/2))
}

// errPublication is returned where what the server sends is not what was asked for any more.
var errPublication = errors.New("the publication is not the one that was captured")

// checkPublication looks whether the publication is still the one that was made: 18 goes on without it. What it means that
// another source's is not is found out when it is opened again.
func (s *session) checkPublication(ctx context.Context, conn *pgx.Conn) error {
	if s.target != nil {
		row, _, err := s.publicationRow(ctx, conn)
		if err == nil && row != s.captured {
			err = errPublication
		}
		return err
	}
	fault, err := s.publicationFault(ctx, conn)
	if err == nil && fault != "" {
		err = fmt.Errorf("%w: %s", errPublication, fault)
	}
	return err
}

// checkStandbys looks whether the server has come to take the bridge for a standby.
func (s *session) checkStandbys(ctx context.Context, conn *pgx.Conn) error {
	state, err := slot.Look(ctx, conn, s.slotName)
	if err == nil && state.IsAwaited {
		err = errAwaited
	}
	return err
}

// publicationFault says what is wrong with the publication; nothing, where it is the one that was made. conn is to the source.
func (s *session) publicationFault(ctx context.Context, conn *pgx.Conn) (fault string, err error) {
	if s.target == nil {
		err = conn.QueryRow(ctx, `select coalesce(sequin.bridge_publication($1), '')`, s.sourceID).Scan(&fault)
	} else {
		var row, lsn string
		if row, lsn, err = s.publicationRow(ctx, conn); err != nil {
			return "", err
		}
		err = s.home.QueryRow(ctx, `select coalesce(sequin.bridge_far_publication($1, nullif($2, '')::jsonb, $3), '')`, s.sourceID, row, lsn).
			Scan(&fault)
	}
	if err != nil {
		return "", fmt.Errorf("look at the publication: %w", err)
	}
	return fault, nil
}

// publicationRow returns what the publication is on another source, as sequin._publication_row has it, and how far the server
// has written; nothing where there is none of that name.
func (s *session) publicationRow(ctx context.Context, conn *pgx.Conn) (row, lsn string, err error) {
	if err = conn.QueryRow(ctx, source.PublicationQuery, s.publication).Scan(&row, &lsn); err != nil {
		return "", "", fmt.Errorf("look at the publication: %w", err)
	}
	return row, lsn, nil
}
