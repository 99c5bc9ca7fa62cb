package capture

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/quote"
	"sequin/bridge/slot"
)

// hole is what of the changes after the log's last is missing in the slot.
type hole struct {
	reason   string // the same words for as long as it is the same hole: they are what is accepted
	hasSlot  bool   // the slot that is there has what follows the hole
	isCopied bool   // the slot is another database's: this one was copied from it, or is another altogether
}

// findHole says what is missing; nothing, where the slot has all that the log has not.
func (s *session) findHole(ctx context.Context, src standing, state slot.State, id pglogrepl.IdentifySystemResult, databaseOID int64) (*hole, error) {
	switch {
	case src.system != nil && *src.system != id.SystemID:
		return &hole{isCopied: true, reason: fmt.Sprintf("this is another server (system identifier %s) than the one that was captured (%s)",
			id.SystemID, *src.system)}, nil
	case src.databaseOID != nil && *src.databaseOID != databaseOID && s.target != nil:
		return &hole{isCopied: true, reason: fmt.Sprintf("this is another database (oid %d) than the one that was captured (%d)",
			databaseOID, *src.databaseOID)}, nil
	case src.databaseOID != nil && *src.databaseOID != databaseOID:
		return &hole{isCopied: true, reason: fmt.Sprintf("this is a copy of the database that was captured (oid %d, which was %d)",
			databaseOID, *src.databaseOID)}, nil
	case src.applied > state.CurrentLSN:
		return &hole{reason: "the server has not written as far as that: it was restored from a backup, or lost its last changes in a failover"}, nil
	}
	if src.timeline != nil && *src.timeline != id.Timeline {
		left, err := s.leftAt(ctx, *src.timeline, id.Timeline)
		if err != nil {
			return nil, err
		}
		if left < src.applied {
			return &hole{reason: fmt.Sprintf("the server was promoted at %s (timeline %d, which was %d): what the log has after that was never committed here",
				left, id.Timeline, *src.timeline)}, nil
		}
		if !state.IsActive {
			s.log.Info("the server was promoted, and has all that was captured", "timeline", id.Timeline, "was", *src.timeline, "at", left)
		}
	}
	switch {
	case !state.Exists:
		return &hole{reason: fmt.Sprintf("slot %q does not exist any more: it was dropped, or a failover has left it behind", s.slotName)}, nil
	case !state.IsOurs:
		return &hole{reason: fmt.Sprintf("slot %q is another's (%s)", s.slotName, state.Kind)}, nil
	case state.IsLost && state.LostReason != "":
		return &hole{reason: fmt.Sprintf("slot %q was invalidated by the server (%s)", s.slotName, state.LostReason)}, nil
	case state.IsLost:
		return &hole{reason: fmt.Sprintf("slot %q was invalidated by the server (max_slot_wal_keep_size)", s.slotName)}, nil
	case state.IsTwoPhase:
		return &hole{reason: fmt.Sprintf("slot %q was made two-phase by another reader: it sends what is only prepared", s.slotName)}, nil
	case !state.IsActive && state.ConfirmedLSN > max(src.applied, src.horizon):
		return &hole{hasSlot: true, reason: fmt.Sprintf("slot %q begins at %s: it was made anew, or moved by another", s.slotName, state.ConfirmedLSN)}, nil
	}
	fault, err := s.publicationFault(ctx, s.catalog)
	if err != nil || fault == "" {
		return nil, err
	}
	return &hole{reason: fault}, nil
}

// isUnreadable tells whether the stream has ended at a change that was made while there was no publication of the name: 12 to 17
// never get past it.
func (r *reader) isUnreadable(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && r.isFromServer && pgErr.Code == pgerrcode.UndefinedObject && strings.Contains(pgErr.Message, r.publication)
}

// leftAt returns where a server's history has left a timeline for the next on the way to its own; 0 where it was never on it.
func (s *session) leftAt(ctx context.Context, was, now int32) (pglogrepl.LSN, error) {
	history, err := s.slot.TimelineHistory(ctx, now)
	if err != nil {
		return 0, err
	}
	return switchPoint(history, was), nil
}

// switchPoint finds in a history file (lines of timeline, LSN, reason) where it leaves a timeline.
func switchPoint(history string, timeline int32) pglogrepl.LSN {
	for line := range strings.Lines(history) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != strconv.Itoa(int(timeline)) {
			continue
		}
		if lsn, err := pglogrepl.ParseLSN(fields[1]); err == nil {
			return lsn
		}
	}
	return 0
}

// pass goes on after a hole, where somebody has accepted it, and returns where. The rest of the old slot is of no use.
func (s *session) pass(ctx context.Context, src standing, state slot.State, databaseOID int64, h *hole) (pglogrepl.LSN, error) {
	var isAccepted bool
	err := s.home.QueryRow(ctx, `select sequin.bridge_pass($1, $2, $3)`, src.id, src.applied.String(), h.reason).Scan(&isAccepted)
	if err != nil {
		return 0, fmt.Errorf("record gap: %w", err)
	}
	if !isAccepted {
		hint := fmt.Sprintf("select sequin.accept_gap(%s); goes on with what is committed from then on.", quote.Literal(s.config.Source))
		if s.target != nil {
			hint = fmt.Sprintf("If the address is wrong: select sequin.alter_source(%s, conninfo); else: %s", quote.Literal(s.config.Source), hint)
		}
		return 0, refuse(hint, "changes after %s are lost: %s", src.applied, h.reason)
	}
	s.log.Warn("going on after a gap", "from", src.applied, "reason", h.reason)
	isAnew := false
	if s.target != nil {
		if isAnew, err = s.makeAnew(ctx, src, h.isCopied); err != nil {
			return 0, err
		}
	} else if _, err := s.home.Exec(ctx, `select sequin.bridge_republish($1)`, src.id); err != nil {
		return 0, fmt.Errorf("make publication %s again: %w", src.publication, err)
	}
	if h.isCopied {
		// The slot of the original is not this copy's to touch.
		s.slotName = fmt.Sprintf("sequin_%d", databaseOID)
		if s.target != nil {
			s.slotName = fmt.Sprintf("%s_%d", src.publication, databaseOID)
		}
		if state, err = slot.Look(ctx, s.catalog, s.slotName); err != nil {
			return 0, err
		}
	}
	// A slot cannot be read from before its publication was made.
	return s.firstStart(ctx, state, h.hasSlot && !isAnew)
}

// makeAnew makes another source's publication again where it is not the one that was captured. Whether it did. On another
// server than before each table is looked up anew.
func (s *session) makeAnew(ctx context.Context, src standing, isOther bool) (bool, error) {
	if isOther {
		if _, err := s.home.Exec(ctx, `select sequin.bridge_unpublish_source($1, true)`, src.id); err != nil {
			return false, fmt.Errorf("take note that it is another server: %w", err)
		}
	}
	fault, err := s.publicationFault(ctx, s.catalog)
	if err != nil || fault == "" {
		return false, err
	}
	if _, err := s.catalog.Exec(ctx, "drop publication if exists "+quote.Identifier(src.publication)); err != nil {
		return false, fmt.Errorf("drop publication %s: %w", src.publication, err)
	}
	return true, s.makePublication(ctx, src)
}
