package capture

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"sequin/bridge/changelog"
	"sequin/bridge/slot"
	"sequin/bridge/source"
	"sequin/bridge/wal"
)

const (
	confirmEvery = time.Second      // while something new is in the log
	speakEvery   = 5 * time.Second  // at the latest, well within any wal_sender_timeout
	silentAfter  = 30 * time.Second // a server that was asked, and does not answer, is gone
)

// reader reads the slot, makes log rows of what it gets, and confirms what is in the log.
type reader struct {
	*session

	decoder wal.Decoder
	encoder *changelog.Encoder
	types   *changelog.Types
	routes  map[uint32]int32
	tables  map[uint32]*changelog.Table

	inTx   bool
	isSkip bool          // of the open transaction: the log has it
	idle   pglogrepl.LSN // the server has nothing for us before this
	// The slot may be confirmed this far, though nothing was logged: on record, so that start-up can tell it from a loss.
	horizon atomic.Uint64

	confirmed   pglogrepl.LSN
	confirmedAt time.Time
	heardAt     time.Time
	askedAt     time.Time // of the horizon
}

func (r *reader) open(s *session) {
	r.session = s
	r.encoder = changelog.NewEncoder(s.lastSeq, s.segment)
	r.types = changelog.NewTypes()
	r.tables = map[uint32]*changelog.Table{}
	r.confirmed = s.applied
	r.horizon.Store(uint64(s.applied))
	s.writer.HorizonWritten = func(lsn pglogrepl.LSN) { r.horizon.Store(uint64(lsn)) }
}

// read reads until the context ends, or the stream does.
func (r *reader) read(ctx context.Context) error {
	// A read is ended by its deadline, and so is a wait for the context.
	defer context.AfterFunc(ctx, func() { r.session.slot.SetReadDeadline(time.Unix(1, 0)) })()
	r.heardAt = time.Now()
	for n := 0; ; n++ {
		if n%256 == 0 {
			r.session.slot.SetReadDeadline(time.Now().Add(confirmEvery))
			if ctx.Err() != nil {
				return nil
			}
			if err := r.confirm(ctx, false); err != nil {
				return err
			}
		}
		if room := r.queue.Full(); room != nil {
			n = -1
			select {
			case <-room:
			case <-ctx.Done():
			case <-time.After(confirmEvery):
			}
			continue
		}
		m, err := r.session.slot.Receive()
		if slot.Timeout(err) {
			n = -1
			if time.Since(r.heardAt) > silentAfter {
				return fmt.Errorf("the server has been silent for %s", time.Since(r.heardAt).Round(time.Second))
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("read slot: %w", err)
		}
		if n%256 == 0 || m[0] == pglogrepl.PrimaryKeepaliveMessageByteID {
			r.heardAt = time.Now()
		}
		switch m[0] {
		case pglogrepl.PrimaryKeepaliveMessageByteID:
			err = r.keepalive(ctx, m[1:])
		case pglogrepl.XLogDataByteID:
			var data pglogrepl.XLogData
			if data, err = pglogrepl.ParseXLogData(m[1:]); err == nil {
				err = r.message(ctx, data.WALData)
			}
		default:
			err = fmt.Errorf("message %q: %w", m[0], wal.ErrMalformed)
		}
		if err != nil {
			return err
		}
	}
}

func (r *reader) keepalive(ctx context.Context, data []byte) error {
	k, err := pglogrepl.ParsePrimaryKeepaliveMessage(data)
	if err != nil {
		return fmt.Errorf("read keepalive: %w", err)
	}
	if !r.inTx {
		r.idle = k.ServerWALEnd
	}
	return r.confirm(ctx, k.ReplyRequested)
}

// confirm tells the server how far it may forget, if there is something new to say or it is time to be heard.
func (r *reader) confirm(ctx context.Context, isAsked bool) error {
	now := time.Now()
	written, isAll := r.queue.Written()
	position := max(r.confirmed, written)
	if isAll && !r.inTx {
		// Nothing is on its way: what the server has sent so far holds nothing for us.
		horizon := max(pglogrepl.LSN(r.horizon.Load()), written)
		position = max(position, min(r.idle, horizon))
		r.askHorizon(now, horizon)
	}
	since := now.Sub(r.confirmedAt)
	if !isAsked && since < speakEvery && (position == r.confirmed || since < confirmEvery) {
		return nil
	}
	// Unless it has just spoken, it is asked to: silence then means that it is gone.
	if err := r.session.slot.Confirm(ctx, position, !isAsked && now.Sub(r.heardAt) >= speakEvery); err != nil {
		return err
	}
	r.confirmed, r.confirmedAt = position, now
	return nil
}

// askHorizon has it put on record that the slot may be confirmed up to where the server stands, when that is worth a
// write: others have written much, or something for long. Our own writes must not bring it about, or they never end.
func (r *reader) askHorizon(now time.Time, horizon pglogrepl.LSN) {
	if r.idle <= horizon {
		return
	}
	moved, since := r.idle-horizon, now.Sub(r.askedAt)
	if moved >= 1<<20 && since >= time.Second || moved >= 64<<10 && since >= 10*time.Second || moved >= 16<<10 && since >= time.Minute {
		r.askedAt = now
		r.queue.AskHorizon(r.idle)
	}
}

// confirmLast confirms what the log has at the end, and waits for the server to have heard it.
func (r *reader) confirmLast(ctx context.Context) error {
	written, _ := r.queue.Written()
	if err := r.session.slot.Confirm(ctx, max(r.confirmed, written), true); err != nil {
		return err
	}
	r.session.slot.SetReadDeadline(time.Now().Add(2 * time.Second))
	for {
		m, err := r.session.slot.Receive()
		if err != nil {
			return fmt.Errorf("wait for the server to hear the last position: %w", err)
		}
		if m[0] == pglogrepl.PrimaryKeepaliveMessageByteID {
			return nil
		}
	}
}

// message takes a message of the stream.
func (r *reader) message(ctx context.Context, data []byte) error {
	m, err := r.decoder.Decode(data)
	if err != nil {
		return err
	}
	switch m := m.(type) {
	case *wal.Begin:
		r.inTx = true
		r.isSkip = m.CommitLSN < r.applied
		if !r.isSkip {
			r.encoder.Begin(m, r.config.Segment())
		}
		return nil
	case *wal.Commit:
		r.inTx = false
		if !r.isSkip {
			r.queue.Commit(r.encoder, m.EndLSN)
			r.idle = max(r.idle, m.EndLSN)
		}
		return nil
	case *wal.Relation:
		return r.relation(ctx, m)
	}
	if r.isSkip {
		return nil
	}
	switch m := m.(type) {
	case *wal.Insert:
		if t := r.tables[m.RelationOID]; t != nil {
			err = r.encoder.Insert(t, m)
		}
	case *wal.Update:
		if t := r.tables[m.RelationOID]; t != nil {
			err = r.encoder.Update(t, m)
		}
	case *wal.Delete:
		if t := r.tables[m.RelationOID]; t != nil {
			err = r.encoder.Delete(t, m)
		}
	case *wal.Truncate:
		for _, oid := range m.RelationOIDs {
			if t := r.tables[oid]; t != nil {
				r.encoder.Truncate(t)
			}
		}
	}
	if err != nil {
		return err
	}
	r.queue.Spill(r.encoder)
	return nil
}

// relation takes note of what a table looks like from here on.
func (r *reader) relation(ctx context.Context, rel *wal.Relation) error {
	delete(r.tables, rel.OID)
	// Another source's table may have come again under another route; a relation is rare.
	if _, ok := r.routes[rel.OID]; !ok || r.session.target != nil {
		if err := r.loadRoutes(ctx); err != nil {
			return err
		}
	}
	route, ok := r.routes[rel.OID]
	if !ok {
		return nil // a partition, whose changes come under its root, or a table that is not streamed any more
	}
	key, err := r.keyColumns(ctx, rel)
	if err != nil {
		return fmt.Errorf("take note of table %s.%s: %w", rel.Schema, rel.Name, err)
	}
	t, err := changelog.NewTable(ctx, r.catalog, r.types, rel, route, key)
	if err != nil {
		return err
	}
	r.tables[rel.OID] = t
	return nil
}

// keyColumns returns the columns that name a relation's rows, and has what it looks like now put on record.
func (r *reader) keyColumns(ctx context.Context, rel *wal.Relation) (key []string, err error) {
	if r.session.target == nil {
		err = r.home.QueryRow(ctx, `select sequin.bridge_relation($1, $2, $3, $4)`, r.sourceID, int64(rel.OID), rel.Schema, rel.Name).Scan(&key)
		return key, err
	}
	var columns []string // none: it has been dropped since
	err = r.catalog.QueryRow(ctx, source.ColumnsQuery, int64(rel.OID)).Scan(&key, &columns)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	}
	err = r.home.QueryRow(ctx, `select sequin.bridge_far_relation($1, $2, $3, $4, $5, $6)`,
		r.sourceID, int64(rel.OID), rel.Schema, rel.Name, key, columns).Scan(&key)
	return key, err
}

func (r *reader) loadRoutes(ctx context.Context) error {
	rows, err := r.home.Query(ctx, `select relation_oid, route_id from sequin.bridge_tables($1)`, r.sourceID)
	if err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	defer rows.Close()
	r.routes = map[uint32]int32{}
	for rows.Next() {
		var oid int64
		var route int32
		if err := rows.Scan(&oid, &route); err != nil {
			return fmt.Errorf("read tables: %w", err)
		}
		r.routes[uint32(oid)] = route
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	return nil
}
