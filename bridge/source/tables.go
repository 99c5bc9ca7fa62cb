package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"sequin/bridge/quote"
)

const (
	lookEvery   = time.Second     // for tables to find, or to let go of
	retryEvery  = 5 * time.Second // a table that cannot be streamed as it is
	sampleEvery = 5 * time.Second
)

// TablesConfig is what a Tables needs.
type TablesConfig struct {
	Home        *pgxpool.Pool // the log's database
	Log         *slog.Logger
	Target      *Target
	SourceID    int32
	Slot        string
	Publication string
}

// Tables keeps a source's publication as the streams want it, and watches what is in it.
type Tables struct {
	TablesConfig
	conn      *pgx.Conn
	retryAt   map[int32]time.Time
	sampleAt  time.Time
	isTidied  bool
	complaint string
}

// NewTables returns the Tables of a source that is captured.
func NewTables(config TablesConfig) *Tables {
	return &Tables{TablesConfig: config, retryAt: map[int32]time.Time{}}
}

// Run looks after the tables until the context ends. What fails is tried again.
func (t *Tables) Run(ctx context.Context) {
	defer func() {
		if t.conn != nil {
			_ = t.conn.Close(context.WithoutCancel(ctx))
		}
	}()
	for {
		err := t.look(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			t.complaint = ""
		case t.complaint != err.Error():
			t.complaint = err.Error()
			t.Log.Warn("look after the tables: trying again", "err", t.Target.ScrubError(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookEvery):
		}
	}
}

// table is a table of the source, as the log's database has it.
type table struct {
	ID          int32
	Name        string // as create_stream was given it; once it is known, what it is called there
	OID         *int64
	SortColumns []string
	IsWanted    bool
	IsCaptured  bool
	Error       *string
	RelOID      *int64 // its place in the publication
}

func (t *Tables) look(ctx context.Context) error {
	rows, err := t.Home.Query(ctx, `select * from sequin.bridge_source_tables($1)`, t.SourceID)
	if err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowToStructByPos[table])
	if err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	isSurplus := slices.ContainsFunc(tables, func(w table) bool { return !w.IsWanted })
	if isSurplus || !t.isTidied {
		if err := t.tidy(ctx, tables); err != nil {
			return err
		}
		t.isTidied = true
	}
	now := time.Now()
	for _, w := range tables {
		if !w.IsWanted || w.IsCaptured || now.Before(t.retryAt[w.ID]) {
			continue
		}
		t.retryAt[w.ID] = now.Add(retryEvery)
		if err := t.capture(ctx, w); err != nil {
			return err
		}
	}
	if now.Before(t.sampleAt) {
		return nil
	}
	t.sampleAt = now.Add(sampleEvery)
	if err := t.watch(ctx, tables); err != nil {
		return err
	}
	return t.sample(ctx)
}

// connect returns the connection to the source: its role's search_path is what names are looked up by.
func (t *Tables) connect(ctx context.Context) (*pgx.Conn, error) {
	if t.conn != nil && !t.conn.IsClosed() {
		return t.conn, nil
	}
	var err error
	t.conn, err = t.Target.connect(ctx, "sequin tables", map[string]string{"client_encoding": "UTF8", "statement_timeout": "60s"}, true)
	return t.conn, err
}

// capture finds a table on the source, and publishes it.
func (t *Tables) capture(ctx context.Context, w table) error {
	conn, err := t.connect(ctx)
	if err != nil {
		return err
	}
	var oid int64
	var schema, name, title, problem, hint string
	var key, columns, identity []string
	err = conn.QueryRow(ctx, checkQuery, w.Name, w.OID).Scan(&oid, &schema, &name, &title, &key, &columns, &identity, &problem, &hint)
	var pgErr *pgconn.PgError
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return t.refuse(ctx, w, fmt.Sprintf("table %s does not exist on the source", w.Name),
			"Names are looked up by the search_path of the bridge's role there: write schema.table. The bridge looks again every few seconds.")
	case errors.As(err, &pgErr) && pgErr.Code == pgerrcode.InsufficientPrivilege:
		return t.refuse(ctx, w, pgErr.Message, "On the source: grant usage on schema … to "+quote.Identifier(t.Target.User())+";")
	case err != nil:
		return fmt.Errorf("look at table %s: %w", w.Name, err)
	case problem != "":
		return t.refuse(ctx, w, problem, hint)
	}
	for _, c := range w.SortColumns {
		if !slices.Contains(columns, c) {
			return t.refuse(ctx, w, fmt.Sprintf("sort_column: table %s has no column %q", title, c), "Drop the stream, and make it anew with another sort_column.")
		}
	}
	// Known here first, published there then: no change comes before it is known whose it is.
	var id *int32
	err = t.Home.QueryRow(ctx, `select sequin.bridge_resolved($1, $2, $3, $4, $5, $6, $7)`, w.ID, oid, schema, name, key, columns, identity).Scan(&id)
	if err != nil {
		return fmt.Errorf("take note of table %s: %w", title, err)
	}
	if id == nil {
		return nil
	}
	w.ID = *id
	var isCaptured bool
	err = t.Home.QueryRow(ctx, `select t.is_captured from sequin.bridge_source_tables($1) t where t.table_id = $2`, t.SourceID, w.ID).Scan(&isCaptured)
	if errors.Is(err, pgx.ErrNoRows) || isCaptured {
		return nil // dropped meanwhile, or another stream's already
	}
	if err != nil {
		return fmt.Errorf("look for table %s: %w", title, err)
	}
	relOID, err := t.publish(ctx, conn, oid, title)
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == pgerrcode.LockNotAvailable:
		return t.refuse(ctx, w, fmt.Sprintf("table %s is being written to by a long transaction, which has to end before it is published", title),
			"The bridge tries again every few seconds. On the source: select * from pg_stat_activity order by xact_start;")
	case errors.As(err, &pgErr):
		return t.refuse(ctx, w, fmt.Sprintf("table %s cannot be published: %s", title, t.Target.Scrub(pgErr.Message)), "The bridge tries again every few seconds.")
	case err != nil:
		return fmt.Errorf("publish table %s: %w", title, err)
	}
	if _, err := t.Home.Exec(ctx, `select sequin.bridge_published($1, $2)`, w.ID, relOID); err != nil {
		return fmt.Errorf("take note of table %s: %w", title, err)
	}
	t.Log.Info("table captured", "table", title)
	if identity != nil {
		t.Log.Debug("old values are the key's only, as its replica identity is not full", "table", title)
	}
	return nil
}

func (t *Tables) refuse(ctx context.Context, w table, reason, hint string) error {
	if w.Error == nil || *w.Error != reason {
		t.Log.Error("table not captured: "+reason, "hint", hint)
	}
	if _, err := t.Home.Exec(ctx, `select sequin.bridge_table_error($1, $2, $3)`, w.ID, reason, hint); err != nil {
		return fmt.Errorf("record why table %s is not captured: %w", w.Name, err)
	}
	return nil
}

// publish puts a table into the publication. It waits for transactions that are writing to it, for a short while, and
// keeps others from starting: what was written before is not captured, whenever it commits. One that is there already is
// put there anew, and so told to the bridge's reader again, which may have forgotten it while nobody wanted it.
func (t *Tables) publish(ctx context.Context, conn *pgx.Conn, oid int64, title string) (relOID int64, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "set local lock_timeout = '3s'"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, "lock table "+title+" in share mode"); err != nil {
			return err
		}
		const place = `select coalesce((select r.oid::bigint from pg_catalog.pg_publication p
			join pg_catalog.pg_publication_rel r on r.prpubid = p.oid
			where p.pubname = $1 and r.prrelid = $2::bigint::pg_catalog.oid), 0)`
		if err := tx.QueryRow(ctx, place, t.Publication, oid).Scan(&relOID); err != nil {
			return err
		}
		if relOID != 0 {
			if _, err := tx.Exec(ctx, "alter publication "+quote.Identifier(t.Publication)+" drop table only "+title); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, "alter publication "+quote.Identifier(t.Publication)+" add table only "+title); err != nil {
			return err
		}
		return tx.QueryRow(ctx, place, t.Publication, oid).Scan(&relOID)
	})
	return relOID, err
}

// tidy takes what no stream wants any more out of the publication.
func (t *Tables) tidy(ctx context.Context, tables []table) error {
	conn, err := t.connect(ctx)
	if err != nil {
		return err
	}
	wanted := []int64{}
	for _, w := range tables {
		if w.IsWanted && w.OID != nil {
			wanted = append(wanted, *w.OID)
		}
	}
	rows, err := conn.Query(ctx, surplusQuery, wanted, t.Publication)
	if err != nil {
		return fmt.Errorf("look at publication %s: %w", t.Publication, err)
	}
	surplus, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("look at publication %s: %w", t.Publication, err)
	}
	for _, title := range surplus {
		if _, err := conn.Exec(ctx, "alter publication "+quote.Identifier(t.Publication)+" drop table only "+title); err != nil {
			return fmt.Errorf("take table %s out of publication %s: %w", title, t.Publication, err)
		}
		t.Log.Info("table not captured any more", "table", title)
	}
	for _, w := range tables {
		if w.IsWanted {
			continue
		}
		if _, err := t.Home.Exec(ctx, `select sequin.bridge_unpublished($1)`, w.ID); err != nil {
			return fmt.Errorf("take note that table %s is not captured: %w", w.Name, err)
		}
	}
	return nil
}

// watch looks for captured tables that are gone from the source, or from the publication, or have been, and for those that it
// keeps some of back.
func (t *Tables) watch(ctx context.Context, tables []table) error {
	captured := map[int64]table{}
	oids := []int64{}
	for _, w := range tables {
		if w.IsWanted && w.IsCaptured && w.OID != nil {
			captured[*w.OID] = w
			oids = append(oids, *w.OID)
		}
	}
	if len(oids) == 0 {
		return nil
	}
	conn, err := t.connect(ctx)
	if err != nil {
		return err
	}
	type place struct {
		OID    int64
		IsGone bool
		Title  string
		RelOID *int64
		LSN    string
		Detail string
		Mend   string
	}
	rows, err := conn.Query(ctx, placesQuery, oids, t.Publication)
	if err != nil {
		return fmt.Errorf("look at publication %s: %w", t.Publication, err)
	}
	places, err := pgx.CollectRows(rows, pgx.RowToStructByPos[place])
	if err != nil {
		return fmt.Errorf("look at publication %s: %w", t.Publication, err)
	}
	for _, p := range places {
		w := captured[p.OID]
		switch {
		case p.IsGone:
			err = t.refuse(ctx, w, fmt.Sprintf("table %s was dropped on the source: there is no more of it", w.Name),
				"Drop the stream and make it anew, if the table is back.")
		case p.Detail != "":
			if _, err = t.Home.Exec(ctx, `select sequin.bridge_unpublished_at($1, $2)`, w.ID, p.LSN); err == nil {
				err = t.refuse(ctx, w, p.Detail, "On the source: "+p.Mend)
			}
		default:
			if w.RelOID == nil || *w.RelOID != *p.RelOID || w.Error != nil {
				_, err = t.Home.Exec(ctx, `select sequin.bridge_republished($1, $2, $3)`, w.ID, *p.RelOID, p.LSN)
			}
			if err == nil && w.Error != nil {
				_, err = t.Home.Exec(ctx, `select sequin.bridge_table_error($1, null, null)`, w.ID)
			}
		}
		if err != nil {
			return fmt.Errorf("take note of table %s: %w", w.Name, err)
		}
	}
	return nil
}

// sample puts it on record where the source's server and the slot are.
func (t *Tables) sample(ctx context.Context) error {
	conn, err := t.connect(ctx)
	if err != nil {
		return err
	}
	var current string
	var confirmed, restart *string
	if err := conn.QueryRow(ctx, positionQuery, t.Slot).Scan(&current, &confirmed, &restart); err != nil {
		return fmt.Errorf("look where the slot is: %w", err)
	}
	if _, err := t.Home.Exec(ctx, `select sequin.bridge_sample_source($1, $2, $3, $4)`, t.SourceID, current, confirmed, restart); err != nil {
		return fmt.Errorf("put it on record where the slot is: %w", err)
	}
	return nil
}
