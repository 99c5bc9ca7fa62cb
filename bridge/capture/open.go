package capture

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/changelog"
	"sequin/bridge/quote"
	"sequin/bridge/slot"
	"sequin/bridge/source"
)

// session is one time of holding the slot.
type session struct {
	log      *slog.Logger
	config   *Config
	sourceID int32
	slotName string
	segment  int32
	lastSeq  int64
	applied  pglogrepl.LSN // what is in the log at the start

	publication string

	slot    *slot.Conn
	home    *pgx.Conn // to the log's database
	catalog *pgx.Conn // to the source, for what tables and types are there; home, where that is the same
	target  *source.Target
	watcher *pgx.Conn
	writer  *changelog.Writer
	write   *pgconn.PgConn
	queue   *changelog.Queue
	reader
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
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.home, err = c.connect(ctx, "sequin catalog"); err != nil {
		return nil, err
	}
	s.catalog = s.home
	if c.config.Target != nil {
		if s.target, err = c.config.Target(ctx); err != nil {
			return nil, err
		}
		c.target = s.target
		if s.catalog, err = c.connectSource(ctx, "sequin catalog"); err != nil {
			return nil, err
		}
	}
	src, err := s.look(ctx, c.config.Source)
	if err != nil {
		return nil, err
	}
	s.sourceID, s.slotName, s.publication = src.id, src.slot, src.publication

	var notices []string
	s.slot, err = slot.Connect(ctx, s.address(), func(n *pgconn.Notice) {
		notices = append(notices, n.Message)
		c.log.Warn("the server says", "message", n.Message, "detail", n.Detail)
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
	if err := s.slot.Start(ctx, s.slotName, src.publication, begin); err != nil {
		return nil, err
	}

	if s.watcher, err = c.connectSource(ctx, "sequin watch"); err != nil {
		return nil, err
	}
	writer, err := c.connect(ctx, "sequin log writer")
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
		_, err = s.home.Exec(ctx, `select sequin.bridge_settle($1)`, s.sourceID)
	}
	if err != nil {
		return nil, fmt.Errorf("claim source: %w", err)
	}
	s.queue = changelog.NewQueue(s.applied)
	s.writer = changelog.NewWriter(s.write, s.queue, s.sourceID, step)
	s.writer.Written = c.config.Written
	s.reader.open(s)
	return s, nil
}

// connectSource opens a connection to the source.
func (c *Capture) connectSource(ctx context.Context, name string) (*pgx.Conn, error) {
	if c.config.Target == nil {
		return c.connect(ctx, name)
	}
	return c.target.Connect(ctx, name, map[string]string{
		"client_encoding":               "UTF8",
		"default_transaction_isolation": "read committed",
		"default_transaction_read_only": "off",
		"lock_timeout":                  "0",
		"statement_timeout":             "0",
	})
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

// connect opens a connection that no setting of the database or the role gets in the way of.
func (c *Capture) connect(ctx context.Context, name string) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(c.config.DatabaseURL)
	if err != nil {
		return nil, err
	}
	config.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	for setting, value := range map[string]string{
		"application_name":                    name,
		"client_encoding":                     "UTF8",
		"default_transaction_isolation":       "read committed",
		"default_transaction_read_only":       "off",
		"idle_in_transaction_session_timeout": "0",
		"jit":                                 "off",
		"lock_timeout":                        "0",
		"statement_timeout":                   "0",
		"synchronous_commit":                  "on",
	} {
		config.RuntimeParams[setting] = value
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return conn, nil
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
	if state.IsStandby && s.target != nil {
		return 0, 0, refuse("select sequin.alter_source(name, conninfo); with the address of the primary.", "the source is a standby, where no slot is made")
	}
	if state.IsStandby {
		return 0, 0, refuse("Give the bridge the address of the primary.", "the server is a standby, where the log cannot be written")
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
	if !hasPublication && s.target == nil {
		return 0, 0, refuse("sequin migrate --uninstall, then install anew: what was committed without a publication cannot be captured.",
			"publication %q does not exist: it was dropped", src.publication)
	}
	begin, err = s.beginning(ctx, src, id, state, databaseOID, hasPublication)
	return databaseOID, begin, err
}

// beginning is where to start from, on a server that is fit to be captured.
func (s *session) beginning(
	ctx context.Context, src standing, id pglogrepl.IdentifySystemResult, state slot.State, databaseOID int64, hasPublication bool,
) (pglogrepl.LSN, error) {
	if src.step == nil {
		if !hasPublication {
			if err := s.makePublication(ctx, src); err != nil {
				return 0, err
			}
		}
		return s.firstStart(ctx, state)
	}

	if err := s.refuseCopy(ctx, src); err != nil {
		return 0, err
	}
	hole := s.hole(src, state, id, databaseOID)
	if hole == "" && !hasPublication {
		hole = fmt.Sprintf("publication %q does not exist any more: it was dropped", src.publication)
	}
	if hole == "" {
		if state.IsActive {
			return 0, fmt.Errorf("%w by process %d", errSlotInUse, state.ActivePID)
		}
		return src.applied, nil
	}
	var isAccepted bool
	err := s.home.QueryRow(ctx, `select sequin.bridge_gap($1, $2, $3)`, src.id, src.applied.String(), hole).Scan(&isAccepted)
	if err != nil {
		return 0, fmt.Errorf("record gap: %w", err)
	}
	if !isAccepted {
		return 0, refuse(fmt.Sprintf("select sequin.accept_gap(%s); goes on with what is committed from then on.", quote.Literal(s.config.Source)),
			"changes after %s are lost: %s", src.applied, hole)
	}
	s.log.Warn("going on after a gap", "from", src.applied, "reason", hole)
	if src.databaseOID != nil && *src.databaseOID != databaseOID || src.system != nil && *src.system != id.SystemID {
		// The slot of the original is not this copy's to touch.
		s.slotName = fmt.Sprintf("sequin_%d", databaseOID)
		if s.target != nil {
			s.slotName = fmt.Sprintf("%s_%d", src.publication, databaseOID)
			if _, err := s.home.Exec(ctx, `select sequin.bridge_unpublish_source($1, true)`, src.id); err != nil {
				return 0, fmt.Errorf("take note that it is another server: %w", err)
			}
		}
		if state, err = slot.Look(ctx, s.catalog, s.slotName); err != nil {
			return 0, err
		}
	}
	if state.Exists && state.IsOurs && (state.IsLost || !hasPublication) {
		// A slot cannot be read from before its publication was made.
		if err := slot.Drop(ctx, s.catalog, s.slotName); err != nil {
			return 0, err
		}
		state.Exists = false
	}
	if !hasPublication {
		if err := s.makePublication(ctx, src); err != nil {
			return 0, err
		}
	}
	return s.firstStart(ctx, state)
}

// refuseCopy refuses to go on with another source that is captured by the database that this one is a copy of: there is
// one slot, and two would take turns with it.
func (s *session) refuseCopy(ctx context.Context, src standing) error {
	if s.target == nil {
		return nil
	}
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

// hole says what of the changes after the log's last is missing in the slot; nothing, where it has them all.
func (s *session) hole(src standing, state slot.State, id pglogrepl.IdentifySystemResult, databaseOID int64) string {
	switch {
	case src.system != nil && *src.system != id.SystemID:
		return fmt.Sprintf("this is another server (system identifier %s) than the one that was captured (%s)", id.SystemID, *src.system)
	case src.databaseOID != nil && *src.databaseOID != databaseOID:
		return fmt.Sprintf("this is a copy of the database that was captured (oid %d, which was %d)", databaseOID, *src.databaseOID)
	case src.applied > state.CurrentLSN:
		return fmt.Sprintf("the server has written up to %s only: it was restored from a backup, or lost its last changes in a failover", state.CurrentLSN)
	case !state.Exists:
		return fmt.Sprintf("slot %q does not exist any more: it was dropped", s.slotName)
	case !state.IsOurs:
		return fmt.Sprintf("slot %q is another's (%s)", s.slotName, state.Kind)
	case state.IsLost && state.LostReason != "":
		return fmt.Sprintf("slot %q was invalidated by the server (%s)", s.slotName, state.LostReason)
	case state.IsLost:
		return fmt.Sprintf("slot %q was invalidated by the server (max_slot_wal_keep_size)", s.slotName)
	case !state.IsActive && state.ConfirmedLSN > max(src.applied, src.horizon):
		return fmt.Sprintf("slot %q begins at %s: it was made anew, or moved by another", s.slotName, state.ConfirmedLSN)
	}
	return ""
}

// firstStart returns where a slot begins, which it makes if need be.
func (s *session) firstStart(ctx context.Context, state slot.State) (pglogrepl.LSN, error) {
	switch {
	case !state.Exists:
		return s.createSlot(ctx)
	case !state.IsOurs:
		return 0, refuse(fmt.Sprintf("select pg_drop_replication_slot(%s); if nobody needs it.", quote.Literal(s.slotName)),
			"slot %q exists, and is another's (%s)", s.slotName, state.Kind)
	case state.IsActive:
		return 0, fmt.Errorf("%w by process %d", errSlotInUse, state.ActivePID)
	}
	return state.ConfirmedLSN, nil
}

func (s *session) createSlot(ctx context.Context) (pglogrepl.LSN, error) {
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
		}
	})
	defer waiting.Stop()
	begin, err := slot.Create(ctx, s.catalog, s.slotName)
	return begin, s.explain(err)
}
