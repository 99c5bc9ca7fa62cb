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
	applied     pglogrepl.LSN // what is in the log at the start

	slot    *slot.Conn
	catalog *pgx.Conn // for what tables and types are
	watcher *pgx.Conn
	writer  *changelog.Writer
	write   *pgconn.PgConn
	queue   *changelog.Queue
	live    Live
	reader

	patience time.Duration // how long either side may be silent: wal_sender_timeout
	isDoubt  atomic.Bool   // the server has said something that may be of the publication
}

// source is where a source stands, as the database has it.
type source struct {
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
	if s.catalog, err = pinned.Connect(ctx, c.config.DatabaseURL, "sequin catalog", "UTF8"); err != nil {
		return nil, err
	}
	src, err := s.look(ctx, c.config.Source)
	if err != nil {
		return nil, err
	}
	s.sourceID, s.slotName, s.publication = src.id, src.slot, src.publication
	if c.stuck.isSure {
		isAccepted, err := c.isGivenUp(ctx, s.catalog, src.id)
		if err != nil {
			return nil, err
		}
		if !isAccepted {
			return nil, c.stuck.refusal(c.config.Source)
		}
	}
	// Text passes through as the log's database has it: nothing can fail to be converted, and nothing is lost in it.
	var encoding string
	err = s.catalog.QueryRow(ctx, `select pg_catalog.set_config('client_encoding', pg_catalog.current_setting('server_encoding'), false)`).
		Scan(&encoding)
	if err != nil {
		return nil, fmt.Errorf("set client_encoding: %w", err)
	}
	s.types = changelog.NewTypes(encoding == "UTF8")

	s.slot, err = slot.Connect(ctx, c.config.DatabaseURL, encoding, func(n *pgconn.Notice) {
		c.log.Warn("the server says", "message", n.Message, "detail", n.Detail)
		if n.Code == pgerrcode.ObjectNotInPrerequisiteState {
			s.isDoubt.Store(true)
		}
	})
	if err != nil {
		return nil, explain(err, s.catalog.Config().User)
	}
	id, err := s.slot.Identify(ctx)
	if err != nil {
		return nil, err
	}
	begin, err := s.prepareSlot(ctx, src, id)
	if err != nil {
		return nil, err
	}
	if s.patience, err = s.slot.Patience(ctx); err != nil {
		return nil, err
	}
	if err := s.slot.Start(ctx, s.slotName, src.publication, begin); err != nil {
		return nil, err
	}

	if s.watcher, err = pinned.Connect(ctx, c.config.DatabaseURL, "sequin watch", encoding); err != nil {
		return nil, err
	}
	writerName := fmt.Sprintf("sequin log writer %d", s.sourceID)
	writer, err := pinned.Connect(ctx, c.config.DatabaseURL, writerName, encoding)
	if err != nil {
		return nil, err
	}
	s.write = writer.PgConn()
	var applied string
	var step int64
	err = s.catalog.QueryRow(ctx, `select c.step, c.applied_lsn, c.last_seq, c.segment
		from pg_catalog.pg_database d cross join lateral sequin.bridge_claim($1, $2, $3, $4, d.oid::bigint, $5) c
		where d.datname = pg_catalog.current_database()`,
		s.sourceID, s.slotName, id.SystemID, id.Timeline, begin.String()).
		Scan(&step, &applied, &s.lastSeq, &s.segment)
	if err == nil {
		s.applied, err = pglogrepl.ParseLSN(applied)
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
	return s, nil
}

// endOthers ends what another bridge has left open: it can commit nothing any more, and would hold on to what it has locked
// for as long as it is frozen, or its network is cut.
func (s *session) endOthers(ctx context.Context, writerName string) {
	_, err := s.catalog.Exec(ctx, `select pg_catalog.pg_terminate_backend(a.pid) from pg_catalog.pg_stat_activity a
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
	for _, conn := range []*pgx.Conn{s.catalog, s.watcher} {
		if conn != nil {
			_ = conn.Close(ctx)
		}
	}
}

func (s *session) look(ctx context.Context, name string) (source, error) {
	var src source
	var applied, horizon *string
	err := s.catalog.QueryRow(ctx, `select source_id, slot_name, publication_name, system_identifier, timeline, database_oid, step,
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
// and returns where to start from.
func (s *session) prepareSlot(ctx context.Context, src source, id pglogrepl.IdentifySystemResult) (pglogrepl.LSN, error) {
	state, err := slot.Look(ctx, s.catalog, s.slotName)
	if err != nil {
		return 0, err
	}
	// What another bridge has confirmed since the source was looked at must not look like a hole.
	if src, err = s.look(ctx, s.config.Source); err != nil {
		return 0, err
	}
	if state.IsStandby {
		return 0, refuse("Give the bridge the address of the primary.", "the server is a standby, where the log cannot be written")
	}
	var hasPublication bool
	var databaseOID int64
	var walLevel string
	err = s.catalog.QueryRow(ctx, `select exists (select from pg_catalog.pg_publication p where p.pubname = $1), d.oid::bigint,
		pg_catalog.current_setting('wal_level') from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()`, src.publication).
		Scan(&hasPublication, &databaseOID, &walLevel)
	if err != nil {
		return 0, fmt.Errorf("look at publication %s: %w", src.publication, err)
	}
	if walLevel != "logical" {
		return 0, refuse("alter system set wal_level = 'logical'; and restart the server. On Amazon RDS set rds.logical_replication to 1, "+
			"on Google Cloud SQL cloudsql.logical_decoding to on.", "wal_level is %s, and changes can be decoded from logical only", walLevel)
	}
	if src.step == nil {
		if !hasPublication {
			return 0, refuse("sequin migrate --uninstall, then install anew: what was committed without a publication cannot be captured.",
				"publication %q does not exist: it was dropped", src.publication)
		}
		return s.firstStart(ctx, state)
	}
	hole, err := s.findHole(ctx, src, state, id, databaseOID)
	if err != nil {
		return 0, err
	}
	if hole != nil {
		return s.pass(ctx, src, state, databaseOID, hole)
	}
	if state.IsActive {
		return 0, fmt.Errorf("%w by process %d", errSlotInUse, state.ActivePID)
	}
	if state.Major >= 17 && !state.IsFailover {
		if err := s.slot.KeepForStandby(ctx, s.slotName); err != nil {
			s.log.Warn("the slot will be missing after a failover", "err", err)
		}
	}
	return src.applied, nil
}

// firstStart returns where a slot begins, which it makes if need be.
func (s *session) firstStart(ctx context.Context, state slot.State) (pglogrepl.LSN, error) {
	switch {
	case !state.Exists:
		return s.createSlot(ctx, state.Major)
	case !state.IsOurs:
		return 0, refuse(fmt.Sprintf("select pg_drop_replication_slot(%s); if nobody needs it.", quote.Literal(s.slotName)),
			"slot %q exists, and is another's (%s)", s.slotName, state.Kind)
	case state.IsActive:
		return 0, fmt.Errorf("%w by process %d", errSlotInUse, state.ActivePID)
	case state.IsLost, state.IsTwoPhase:
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
			_, _ = conn.Exec(ctx, `select sequin.bridge_error($1, $2, $3)`, s.sourceID,
				"creating the slot waits for transactions that were open before it: "+holders,
				"It goes on by itself when they have ended.")
		}
	})
	defer waiting.Stop()
	begin, err := slot.Create(ctx, s.catalog, s.slotName, major)
	return begin, explain(err, s.catalog.Config().User)
}
