package capture

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/changelog"
	"sequin/bridge/pinned"
	"sequin/bridge/quote"
	"sequin/bridge/slot"
	"sequin/bridge/source"
)

// session is one time of holding the slot.
type session struct {
	log         *slog.Logger
	config      *Config
	sourceID    int32
	slotName    string
	publication string
	segment     int32
	lastSeq     int64
	encoding    string        // of the log's database
	applied     pglogrepl.LSN // what is in the log at the start

	slot     *slot.Conn
	home     *pgx.Conn // to the log's database
	catalog  *pgx.Conn // to the source, for what tables and types are there; home, where that is the same
	target   *source.Target
	captured string // another source's publication, as it was when the log was captured under it
	watcher  *pgx.Conn
	writer   *changelog.Writer
	write    *pgconn.PgConn
	queue    *changelog.Queue
	live     Live
	reader

	patience time.Duration // how long either side may be silent: wal_sender_timeout
	isDoubt  atomic.Bool   // the server has said something that may be of the publication
}

// standing is where a source stands, as the log's database has it.
type standing struct {
	id          int32
	slot        string
	publication string
	system      *string
	timeline    *int32
	databaseOID *int64
	step        *int64
	applied     pglogrepl.LSN
	horizon     pglogrepl.LSN
}

// open takes the slot and claims the source.
func (c *Capture) open(ctx context.Context) (_ *session, err error) {
	s := &session{log: c.log, config: &c.config}
	s.isStuck = c.isStuck
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.home, err = pinned.Connect(ctx, c.config.DatabaseURL, "sequin catalog", "UTF8"); err != nil {
		return nil, err
	}
	s.catalog = s.home
	if c.config.Target != nil {
		if s.target, err = c.config.Target(ctx); err != nil {
			return nil, err
		}
		c.target = s.target
		if s.catalog, err = s.connectSource(ctx, "sequin catalog", "UTF8"); err != nil {
			return nil, err
		}
	}
	src, err := s.look(ctx, c.config.Source)
	if err != nil {
		return nil, err
	}
	s.sourceID, s.slotName, s.publication = src.id, src.slot, src.publication
	if c.stuck.isSure {
		isAccepted, err := c.isGivenUp(ctx, s.home, src.id)
		if err != nil {
			return nil, err
		}
		if !isAccepted {
			return nil, c.stuck.refusal(c.config.Source)
		}
	}
	// Text passes through as the log's database has it: nothing can fail to be converted, and nothing is lost in it. What
	// another source has in another encoding, its server converts.
	err = s.home.QueryRow(ctx, `select pg_catalog.set_config('client_encoding', pg_catalog.current_setting('server_encoding'), false)`).
		Scan(&s.encoding)
	if err == nil && s.target != nil {
		_, err = s.catalog.Exec(ctx, `select pg_catalog.set_config('client_encoding', $1, false)`, s.encoding)
	}
	if err != nil {
		return nil, fmt.Errorf("set client_encoding: %w", err)
	}
	s.types = changelog.NewTypes(s.encoding == "UTF8")

	s.slot, err = slot.Connect(ctx, s.address(), s.encoding, func(n *pgconn.Notice) {
		c.log.Warn("the server says", "message", s.scrub(n.Message), "detail", s.scrub(n.Detail))
		if n.Code == pgerrcode.ObjectNotInPrerequisiteState {
			s.isDoubt.Store(true)
		}
	})
	if err != nil {
		return nil, s.explain(err)
	}
	id, err := s.slot.Identify(ctx)
	if err != nil {
		return nil, err
	}
	databaseOID, begin, err := s.prepareSlot(ctx, src, id)
	if err != nil {
		return nil, err
	}
	if s.patience, err = s.slot.Patience(ctx); err != nil {
		return nil, err
	}
	if err := s.slot.Start(ctx, s.slotName, src.publication, begin); err != nil {
		return nil, err
	}

	if s.watcher, err = s.connectSource(ctx, "sequin watch", s.encoding); err != nil {
		return nil, err
	}
	writerName := fmt.Sprintf("sequin log writer %d", s.sourceID)
	writer, err := pinned.Connect(ctx, c.config.DatabaseURL, writerName, s.encoding)
	if err != nil {
		return nil, err
	}
	s.write = writer.PgConn()
	var applied string
	var step int64
	err = s.home.QueryRow(ctx, `select step, applied_lsn, last_seq, segment from sequin.bridge_claim($1, $2, $3, $4, $5, $6)`,
		s.sourceID, s.slotName, id.SystemID, id.Timeline, databaseOID, begin.String()).
		Scan(&step, &applied, &s.lastSeq, &s.segment)
	if err == nil {
		s.applied, err = pglogrepl.ParseLSN(applied)
	}
	if err == nil && s.target != nil {
		err = s.settle(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("claim source: %w", err)
	}
	s.endOthers(ctx, writerName)
	s.queue = changelog.NewQueue(s.applied)
	s.writer = changelog.NewWriter(s.write, s.queue, s.sourceID, step)
	s.writer.Written = c.config.Written
	s.reader.open(s)
	if err := s.live.open(ctx, s); err != nil {
		return nil, err
	}
	if err := s.live.takeMark(ctx, s.catalog); err != nil {
		return nil, err
	}
	return s, nil
}

// connectSource opens a connection to the source.
func (s *session) connectSource(ctx context.Context, name, encoding string) (*pgx.Conn, error) {
	if s.target == nil {
		return pinned.Connect(ctx, s.config.DatabaseURL, name, encoding)
	}
	return s.target.Connect(ctx, name, map[string]string{"client_encoding": encoding})
}

// settle puts on record that it is this database that captures another source, and under which publication.
func (s *session) settle(ctx context.Context) error {
	row, _, err := s.publicationRow(ctx, s.catalog)
	if err != nil {
		return err
	}
	return s.home.QueryRow(ctx, `select coalesce(sequin.bridge_settle($1, nullif($2, '')::jsonb)::text, '')`, s.sourceID, row).Scan(&s.captured)
}

// scrub takes what another source is reached by out of a text.
func (s *session) scrub(text string) string {
	if s.target == nil {
		return text
	}
	return s.target.Scrub(text)
}

// address returns what the source is reached by: not to be shown, but of the log's own database.
func (s *session) address() string {
	if s.target == nil {
		return s.config.DatabaseURL
	}
	return s.target.Address()
}

// explain makes a Refusal of what the source's server says against replication, where no waiting mends it.
func (s *session) explain(err error) error {
	var connect *pgconn.ConnectError
	if err = explain(err, s.catalog.Config().User); s.target != nil && errors.As(err, &connect) {
		return s.target.Explain(err)
	}
	return err
}

// endOthers ends what another bridge has left open: it can commit nothing any more, and would hold on to what it has locked
// for as long as it is frozen, or its network is cut.
func (s *session) endOthers(ctx context.Context, writerName string) {
	_, err := s.home.Exec(ctx, `select pg_catalog.pg_terminate_backend(a.pid) from pg_catalog.pg_stat_activity a
		where a.datname = pg_catalog.current_database() and a.usename = current_user and a.application_name = $1 and a.pid <> $2`,
		writerName, int32(s.write.PID()))
	if err != nil && ctx.Err() == nil {
		s.log.Warn("cannot end what another bridge has left open", "err", err)
	}
}

func (s *session) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.slot != nil {
		s.slot.Close()
	}
	if s.write != nil {
		_ = s.write.Close(ctx)
	}
	for _, conn := range []*pgx.Conn{s.home, s.catalog, s.watcher} {
		if conn != nil && !conn.IsClosed() {
			_ = conn.Close(ctx)
		}
	}
}

func (s *session) look(ctx context.Context, name string) (standing, error) {
	var src standing
	var applied, horizon *string
	err := s.home.QueryRow(ctx, `select source_id, slot_name, publication_name, system_identifier, timeline, database_oid, step,
		applied_lsn, horizon_lsn from sequin.bridge_source($1)`, name).
		Scan(&src.id, &src.slot, &src.publication, &src.system, &src.timeline, &src.databaseOID, &src.step, &applied, &horizon)
	if errors.Is(err, pgx.ErrNoRows) {
		return src, refuse("select * from sequin.sources;", "source %q does not exist", name)
	}
	if err == nil && applied != nil {
		src.applied, err = pglogrepl.ParseLSN(*applied)
	}
	if err == nil && horizon != nil {
		src.horizon, err = pglogrepl.ParseLSN(*horizon)
	}
	if err != nil {
		return src, fmt.Errorf("look at source %s: %w", name, err)
	}
	return src, nil
}

// prepareSlot makes sure that the slot has all that the log does not, or that somebody has accepted that it has not,
// and returns where to start from, and the oid of the source's database.
func (s *session) prepareSlot(ctx context.Context, src standing, id pglogrepl.IdentifySystemResult) (databaseOID int64, begin pglogrepl.LSN, err error) {
	state, err := slot.Look(ctx, s.catalog, s.slotName)
	if err != nil {
		return 0, 0, err
	}
	// What another bridge has confirmed since the source was looked at must not look like a hole.
	if src, err = s.look(ctx, s.config.Source); err != nil {
		return 0, 0, err
	}
	switch {
	case state.IsStandby && s.target != nil:
		return 0, 0, refuse(fmt.Sprintf("select sequin.alter_source(%s, conninfo); with the address of the primary.", quote.Literal(s.config.Source)),
			"the source is a standby, where no slot is made")
	case state.IsStandby:
		return 0, 0, refuse("Give the bridge the address of the primary.", "the server is a standby, where the log cannot be written")
	case state.IsAwaited:
		return 0, 0, errAwaited
	}
	var hasPublication bool
	var walLevel string
	err = s.catalog.QueryRow(ctx, `select exists (select from pg_catalog.pg_publication p where p.pubname = $1), d.oid::bigint,
		pg_catalog.current_setting('wal_level') from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()`, src.publication).
		Scan(&hasPublication, &databaseOID, &walLevel)
	if err != nil {
		return 0, 0, fmt.Errorf("look at publication %s: %w", src.publication, err)
	}
	if walLevel != "logical" {
		return 0, 0, refuse("alter system set wal_level = 'logical'; and restart the server. On Amazon RDS set rds.logical_replication to 1, "+
			"on Google Cloud SQL cloudsql.logical_decoding to on.", "wal_level is %s, and changes can be decoded from logical only", walLevel)
	}
	if src.step == nil {
		if !hasPublication && s.target == nil {
			return 0, 0, refuse("sequin migrate --uninstall, then install anew: what was committed without a publication cannot be captured.",
				"publication %q does not exist: it was dropped", src.publication)
		}
		if s.target == nil {
			_, err = s.home.Exec(ctx, `select sequin.bridge_republish($1)`, src.id)
		} else if !hasPublication {
			err = s.makePublication(ctx, src)
		}
		if err != nil {
			return 0, 0, err
		}
		// A slot of ours was made by a bridge that was killed before it had begun, and streams have counted on it since; or it is
		// older than the publication, and turns out to be unreadable.
		begin, err = s.firstStart(ctx, state, true)
		return databaseOID, begin, err
	}
	if s.target != nil {
		if err := s.refuseCopy(ctx, src); err != nil {
			return 0, 0, err
		}
	}
	missing, err := s.findHole(ctx, src, state, id, databaseOID)
	if err != nil {
		return 0, 0, err
	}
	if missing != nil {
		begin, err = s.pass(ctx, src, state, databaseOID, missing)
		return databaseOID, begin, err
	}
	if state.IsActive {
		return 0, 0, fmt.Errorf("%w by process %d", errSlotInUse, state.ActivePID)
	}
	if _, err := s.home.Exec(ctx, `select sequin.bridge_no_gap($1)`, src.id); err != nil {
		return 0, 0, fmt.Errorf("withdraw a gap that is none: %w", err)
	}
	if state.Major >= 17 && !state.IsFailover {
		if err := s.slot.KeepForStandby(ctx, s.slotName); err != nil {
			s.log.Warn("the slot will be missing after a failover", "err", err)
		}
	}
	return databaseOID, src.applied, nil
}

// refuseCopy refuses to go on with another source that is captured by the database that this one is a copy of: there is
// one slot, and two would take turns with it.
func (s *session) refuseCopy(ctx context.Context, src standing) error {
	var isCopy, isAccepted bool
	const reason = "this database is a copy of the one that captures the source: one of the two may go on"
	err := s.home.QueryRow(ctx, `select sequin.bridge_is_copy($1)`, src.id).Scan(&isCopy)
	if err == nil && isCopy {
		err = s.home.QueryRow(ctx, `select sequin.bridge_gap($1, $2, $3)`, src.id, src.applied.String(), reason).Scan(&isAccepted)
	}
	if err != nil {
		return fmt.Errorf("look whose the slot is: %w", err)
	}
	if isCopy && !isAccepted {
		return refuse(fmt.Sprintf("Where the other is gone for good: select sequin.accept_gap(%s); else drop this one's streams, and the source: "+
			"sequin.drop_source leaves the other's slot alone.", quote.Literal(s.config.Source)), reason)
	}
	return nil
}

// makePublication makes another source's publication, with no table in it: they are put there when it is captured.
func (s *session) makePublication(ctx context.Context, src standing) error {
	if _, err := s.home.Exec(ctx, `select sequin.bridge_unpublish_source($1, false)`, src.id); err != nil {
		return fmt.Errorf("take note that no table is published: %w", err)
	}
	return s.target.MakePublication(ctx, s.catalog, src.publication)
}

// firstStart returns where a slot begins, which it makes if need be. hasSlot: one of ours that is there has what is wanted.
func (s *session) firstStart(ctx context.Context, state slot.State, hasSlot bool) (pglogrepl.LSN, error) {
	switch {
	case !state.Exists:
		return s.createSlot(ctx, state.Major)
	case !state.IsOurs:
		return 0, refuse(fmt.Sprintf("select pg_drop_replication_slot(%s); if nobody needs it.", quote.Literal(s.slotName)),
			"slot %q exists, and is another's (%s)", s.slotName, state.Kind)
	case state.IsActive:
		return 0, fmt.Errorf("%w by process %d", errSlotInUse, state.ActivePID)
	case !hasSlot, state.IsLost, state.IsTwoPhase:
		if err := slot.Drop(ctx, s.catalog, s.slotName); err != nil {
			return 0, err
		}
		return s.createSlot(ctx, state.Major)
	}
	return state.ConfirmedLSN, nil
}

func (s *session) createSlot(ctx context.Context, major int) (pglogrepl.LSN, error) {
	s.log.Info("creating slot", "slot", s.slotName)
	waiting := time.AfterFunc(2*time.Second, func() {
		config := s.catalog.Config().Copy()
		conn, err := pgx.ConnectConfig(ctx, config)
		if err != nil {
			return
		}
		defer conn.Close(context.WithoutCancel(ctx))
		if holders, err := slot.Holders(ctx, conn); err == nil {
			s.log.Warn("creating the slot waits for transactions that were open before it", "slot", s.slotName, "oldest", holders)
			if home, err := pinned.Connect(ctx, s.config.DatabaseURL, "sequin report", "UTF8"); err == nil {
				defer home.Close(context.WithoutCancel(ctx))
				_, _ = home.Exec(ctx, `select sequin.bridge_error($1, $2, $3)`, s.sourceID,
					"creating the slot waits for transactions that were open before it: "+holders,
					"It goes on by itself when they have ended.")
			}
		}
	})
	defer waiting.Stop()
	begin, err := slot.Create(ctx, s.catalog, s.slotName, major)
	return begin, s.explain(err)
}
