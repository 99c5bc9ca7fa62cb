package capture

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	speakEvery   = 5 * time.Second  // at the latest
	silentAfter  = 30 * time.Second // a server that was asked, and does not answer, may be gone
)

// reader reads the slot, makes log rows of what it gets, and confirms what is in the log.
type reader struct {
	*session

	decoder wal.Decoder
	encoder *changelog.Encoder
	types   *changelog.Types
	routes  map[uint32]int32
	tables  map[uint32]*changelog.Table

	keys    map[uint32]known // of tables, as they were when they were last described
	doubts  map[uint32]doubt // of tables whose key is of before, as far as that can be told
	isStuck func(pglogrepl.LSN) bool

	inTx         bool
	isSkip       bool // of the open transaction: the log has it
	begin        wal.Begin
	isFromServer bool          // that the stream has ended
	idle         pglogrepl.LSN // the server has nothing for us before this
	// The slot may be confirmed this far, though nothing was logged: on record, so that start-up can tell it from a loss.
	horizon atomic.Uint64

	confirmed   pglogrepl.LSN
	confirmedAt time.Time
	askedAt     time.Time // of the horizon
	busyAt      time.Time // the server was silent, and at work
}

func (r *reader) open(s *session) {
	r.session = s
	r.encoder = changelog.NewEncoder(s.lastSeq, s.segment)
	r.tables = map[uint32]*changelog.Table{}
	r.keys = map[uint32]known{}
	r.doubts = map[uint32]doubt{}
	r.confirmed = s.applied
	r.horizon.Store(uint64(s.applied))
	s.writer.HorizonWritten = func(lsn pglogrepl.LSN) { r.horizon.Store(uint64(lsn)) }
}

// read reads until the context ends, or the stream does.
func (r *reader) read(ctx context.Context) error {
	// A read is ended by its deadline, and so is a wait for the context.
	defer context.AfterFunc(ctx, func() { r.session.slot.SetReadDeadline(time.Unix(1, 0)) })()
	for n := 0; ; n++ {
		if n%256 == 0 {
			r.session.slot.SetReadDeadline(time.Now().Add(min(confirmEvery, r.patience/4)))
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
			case <-time.After(min(confirmEvery, r.patience/4)):
			}
			continue
		}
		m, err := r.session.slot.Receive()
		if slot.Timeout(err) {
			n = -1
			if err := r.judgeSilence(ctx); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			r.isFromServer = true
			return fmt.Errorf("read slot: %w", err)
		}
		if r.isDoubt.Swap(false) {
			if err := r.checkPublication(ctx, r.catalog); err != nil {
				return err
			}
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

// judgeSilence tells a server that is gone from one that is at work: before 15 it says nothing, and hears nothing, while
// it goes through a large transaction of tables that are not streamed. Another connection asks after the process.
func (r *reader) judgeSilence(ctx context.Context) error {
	limit := min(silentAfter, r.patience/2)
	silence := time.Since(r.session.slot.Heard())
	if silence < limit || time.Since(r.busyAt) < limit {
		return nil
	}
	ask, cancel := context.WithTimeout(ctx, r.answerWithin())
	defer cancel()
	var isThere bool
	err := r.catalog.QueryRow(ask, `select exists (
		select from pg_catalog.pg_replication_slots s where s.slot_name = $1 and s.active_pid = $2)`, r.slotName, int32(r.session.slot.PID())).
		Scan(&isThere)
	switch {
	case err != nil:
		return fmt.Errorf("the server has been silent for %s, and: %w", silence.Round(time.Second), err)
	case !isThere:
		return fmt.Errorf("the server has been silent for %s, and sends to this bridge no more", silence.Round(time.Second))
	}
	if r.busyAt.IsZero() {
		r.log.Info("the server is silent, and at work: a large transaction, of tables that are not streamed")
	}
	r.busyAt = time.Now()
	return nil
}

func (r *reader) keepalive(ctx context.Context, data []byte) error {
	k, err := pglogrepl.ParsePrimaryKeepaliveMessage(data)
	if err != nil {
		return fmt.Errorf("read keepalive: %w", err)
	}
	if !r.inTx {
		r.idle = k.ServerWALEnd
		r.live.read(r.idle)
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
	speak := min(speakEvery, r.patience/4)
	if r.live.isAsking(now) {
		r.confirmed, r.confirmedAt = position, now
		return r.session.slot.Confirm(ctx, position, true)
	}
	if !isAsked && since < speak && (position == r.confirmed || since < confirmEvery) {
		return nil
	}
	// Unless it has just spoken, it is asked to: silence then means something.
	if err := r.session.slot.Confirm(ctx, position, !isAsked && now.Sub(r.session.slot.Heard()) >= speak); err != nil {
		return err
	}
	r.confirmed, r.confirmedAt = position, now
	return nil
}

// askHorizon has it put on record that the slot may be confirmed up to where the server stands, when that is worth a
// write: others have written much, or something for long, or somebody waits to hear it. Our own writes must not bring it about, or they never end.
func (r *reader) askHorizon(now time.Time, horizon pglogrepl.LSN) {
	if r.idle <= horizon {
		return
	}
	moved, since := r.idle-horizon, now.Sub(r.askedAt)
	if moved >= 1<<20 && since >= time.Second || moved >= 64<<10 && since >= 10*time.Second || moved >= 16<<10 && since >= time.Minute ||
		since >= time.Second && r.config.IsAwaited() {
		r.askedAt = now
		r.queue.AskHorizon(r.idle)
	}
}

// confirmLast confirms what the log has at the end, and waits for the server to have heard it.
func (r *reader) confirmLast(ctx context.Context) error {
	written, _ := r.queue.Written()
	last := max(r.confirmed, written)
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	deadline, _ := ctx.Deadline()
	r.session.slot.SetReadDeadline(deadline)
	for {
		if err := r.session.slot.Confirm(ctx, last, true); err != nil {
			return err
		}
		for {
			m, err := r.session.slot.Receive()
			if err != nil {
				return fmt.Errorf("wait for the server to hear the last position: %w", err)
			}
			if m[0] == pglogrepl.PrimaryKeepaliveMessageByteID {
				break
			}
		}
		// That may have been on its way already. The catalog may not answer any more: it was asked something when the end came.
		state, err := slot.Look(ctx, r.catalog, r.slotName)
		if err != nil || state.ConfirmedLSN >= last {
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
		r.inTx, r.begin = true, *m
		r.isSkip = m.CommitLSN < r.applied || r.isStuck(m.CommitLSN)
		if !r.isSkip {
			r.encoder.Begin(m, r.live.begin(m, r.config.Segment()))
		}
		r.dispel()
		return nil
	case *wal.Commit:
		r.inTx = false
		if r.isSkip && m.CommitLSN >= r.applied {
			return errNotStuck
		}
		if !r.isSkip {
			r.queue.Commit(r.encoder, m.EndLSN)
			r.idle = max(r.idle, m.EndLSN)
			r.live.end(m.EndLSN)
		}
		return nil
	case *wal.Relation:
		return r.relation(ctx, m)
	}
	if r.isSkip {
		return nil
	}
	if r.encoder.IsLarge() {
		if err := r.place(ctx); err != nil {
			return err
		}
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

// place has a large transaction go on in a segment of its own, where the log may have one.
func (r *reader) place(ctx context.Context) error {
	var draft *int32
	err := r.home.QueryRow(ctx, `select sequin.bridge_draft($1, $2, $3)`, r.sourceID, r.encoder.Segment(), r.begin.CommitLSN.String()).
		Scan(&draft)
	if err != nil {
		return fmt.Errorf("make a segment for a large transaction: %w", err)
	}
	r.encoder.Place(draft)
	return nil
}

// relation takes note of what a table looks like from here on.
func (r *reader) relation(ctx context.Context, rel *wal.Relation) error {
	delete(r.tables, rel.OID)
	delete(r.doubts, rel.OID)
	_, isKnown := r.routes[rel.OID]
	if !isKnown {
		if err := r.awaitSeen(ctx, rel); err != nil {
			return err
		}
	}
	// Another source's table may have come again under another route; a relation is rare.
	if !isKnown || r.session.target != nil {
		if err := r.loadRoutes(ctx); err != nil {
			return err
		}
	}
	route, ok := r.routes[rel.OID]
	if !ok {
		return nil // a partition, whose changes come under its root, or a table that is not streamed any more
	}
	now, isMixed, isSame, err := r.describe(ctx, rel)
	if err != nil {
		return err
	}
	if !isSame {
		if err := r.awaitSeen(ctx, rel); err != nil {
			return err
		}
		if now, isMixed, _, err = r.describe(ctx, rel); err != nil {
			return err
		}
	}
	r.live.sent(rel.OID, rel.Schema+"."+rel.Name)
	last, columns := r.keys[rel.OID], columnNames(rel)
	isLater := now.madeBy != nil && r.live.isLater(uint32(*now.madeBy), &r.begin)
	name := func(key []string) { // what names its rows from here on
		r.tables[rel.OID] = changelog.NewTable(r.types, rel, route, key, isMixed)
		k := known{key, columns}
		if !slices.Equal(last.key, key) || !slices.Equal(last.columns, columns) {
			r.encoder.Describe(changelog.Key{Route: route, RelationOID: rel.OID, Key: key, Columns: columns})
		}
		r.keys[rel.OID], last = k, k
	}
	key, next := keyThen(rel, now, last, isLater), keyThen(rel, now, last, false)
	name(key)
	if isLater && !slices.Equal(key, next) {
		r.log.Warn("the key of a table was altered after what is read now, as far as can be told: until then its rows have the key of before",
			"table", rel.Schema+"."+rel.Name, "before", key, "after", next)
		r.doubts[rel.OID] = doubt{uint32(*now.madeBy), func() { name(next) }}
	}
	return nil
}

// doubt is a key that a transaction has altered, by all that can be told after what is read; and what is done where that turns
// out not to be so, or comes to be read.
type doubt struct {
	madeBy uint32
	dispel func()
}

// dispel takes the keys of now that are not later than the transaction that begins: had one been altered since, the table
// would be described anew.
func (r *reader) dispel() {
	for oid, d := range r.doubts {
		if !r.live.isLater(d.madeBy, &r.begin) {
			d.dispel()
			delete(r.doubts, oid)
		}
	}
}

// describe finds out about a relation's types, and returns what the catalog has of it now, and what keyColumns does besides.
// isSame: the catalog has all of it as the stream says it is.
func (r *reader) describe(ctx context.Context, rel *wal.Relation) (now present, isMixed, isSame bool, err error) {
	isKnown, err := r.types.Know(ctx, r.catalog, rel)
	if err == nil {
		now.key, isMixed, err = r.keyColumns(ctx, rel)
	}
	if err == nil {
		err = r.catalog.QueryRow(ctx, presentQuery, int64(rel.OID)).Scan(&now.columns, &now.dropped, &now.droppedCount, &now.madeBy)
	}
	if err != nil {
		return present{}, false, false, fmt.Errorf("take note of table %s.%s: %w", rel.Schema, rel.Name, err)
	}
	return now, isMixed, now.isSame(rel) && isKnown, nil
}

// mixedQuery takes what has been dropped since for partitioned: it may have been.
const mixedQuery = `
	select sequin.bridge_relation($1, $2, $3, $4),
	  not exists (select from pg_catalog.pg_class c where c.oid = $2::bigint::oid and c.relkind <> 'p')`

// keyColumns returns the columns that name a relation's rows, and whether it may be partitioned, and has what it looks like now
// put on record.
func (r *reader) keyColumns(ctx context.Context, rel *wal.Relation) (key []string, isMixed bool, err error) {
	if r.session.target == nil {
		err = r.home.QueryRow(ctx, mixedQuery, r.sourceID, int64(rel.OID), rel.Schema, rel.Name).
			Scan(&key, &isMixed)
		return key, isMixed, err
	}
	var columns, identity []string // no columns: it has been dropped since
	err = r.catalog.QueryRow(ctx, source.ColumnsQuery, int64(rel.OID)).Scan(&key, &columns, &identity, &isMixed)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, false, err
	}
	isMixed = isMixed || err != nil
	err = r.home.QueryRow(ctx, `select sequin.bridge_far_relation($1, $2, $3, $4, $5, $6, $7)`,
		r.sourceID, int64(rel.OID), rel.Schema, rel.Name, key, columns, identity).Scan(&key)
	return key, isMixed, err
}

func (r *reader) loadRoutes(ctx context.Context) error {
	rows, err := r.home.Query(ctx, `select relation_oid, route_id, key_columns, log_key_columns, log_column_names from sequin.bridge_tables($1)`, r.sourceID)
	if err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	defer rows.Close()
	r.routes = map[uint32]int32{}
	for rows.Next() {
		var oid int64
		var route int32
		var key []string
		var last known
		if err := rows.Scan(&oid, &route, &key, &last.key, &last.columns); err != nil {
			return fmt.Errorf("read tables: %w", err)
		}
		r.routes[uint32(oid)] = route
		if _, ok := r.keys[uint32(oid)]; !ok {
			if last.columns == nil {
				last.key = key
			}
			r.keys[uint32(oid)] = last
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	return nil
}
