package schema

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/bridge/quote"
)

// Uninstall removes everything that Sequin has put into a database: slots, publication, schema, and with it every
// consumer's position and the change log. Tables that were streamed stay as they are. It refuses while a bridge is at
// work, where the schema is somebody else's, and where something outside of it depends on it.
func Uninstall(ctx context.Context, databaseURL string, log *slog.Logger) error {
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := settle(ctx, conn); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, `select pg_catalog.pg_advisory_lock($1)`, lockKey); err != nil {
		return fmt.Errorf("wait for another installation to end: %w", err)
	}
	if err := checkOwn(ctx, conn); err != nil {
		return err
	}
	if err := checkDependents(ctx, conn); err != nil {
		return err
	}
	isThere, slots, publications, err := belongings(ctx, conn)
	// A bridge that has just ended is gone a moment later.
	for deadline := time.Now().Add(leaveTime); err == nil && inUse(slots) != nil && time.Now().Before(deadline); {
		time.Sleep(leaveTime / 20)
		isThere, slots, publications, err = belongings(ctx, conn)
	}
	if err != nil {
		return err
	}
	if s := inUse(slots); s != nil {
		return fmt.Errorf("slot %s is in use by process %d: stop the bridge first", s.name, *s.activePID)
	}
	if err := warnOfSources(ctx, conn, log); err != nil {
		return err
	}
	// The schema first: should that fail, the slot still has what was not captured.
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		for _, name := range publications {
			if _, err := tx.Exec(ctx, `drop publication if exists `+quote.Identifier(name)); err != nil {
				return fmt.Errorf("drop publication %s: %w", name, err)
			}
		}
		if _, err := tx.Exec(ctx, `drop schema if exists sequin cascade`); err != nil {
			return fmt.Errorf("drop schema: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, s := range slots {
		if _, err := conn.Exec(ctx, `select pg_catalog.pg_drop_replication_slot($1)`, s.name); err != nil {
			return fmt.Errorf("drop slot %s: %w", s.name, err)
		}
		log.Info("dropped slot", "slot", s.name)
	}
	if !isThere && len(slots) == 0 {
		log.Info("nothing is installed")
		return nil
	}
	log.Info("uninstalled")
	return nil
}

// checkDependents refuses where views, functions or tables of somebody's would go with the schema.
func checkDependents(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, `
		with own as (
		  select 'pg_class'::regclass as class, c.oid from pg_catalog.pg_class c where c.relnamespace = pg_catalog.to_regnamespace('sequin')
		  union all
		  select 'pg_proc'::regclass, p.oid from pg_catalog.pg_proc p where p.pronamespace = pg_catalog.to_regnamespace('sequin')
		  union all
		  select 'pg_type'::regclass, t.oid from pg_catalog.pg_type t where t.typnamespace = pg_catalog.to_regnamespace('sequin'))
		select distinct i.type || ' ' || i.identity
		from own
		join pg_catalog.pg_depend d on (d.refclassid, d.refobjid) = (own.class, own.oid)
		left join pg_catalog.pg_rewrite r on d.classid = 'pg_rewrite'::regclass and r.oid = d.objid
		cross join lateral (
		  select case when r.oid is null then d.classid else 'pg_class'::regclass end as class, coalesce(r.ev_class, d.objid) as oid) o
		cross join lateral pg_catalog.pg_identify_object(o.class, o.oid, 0) i
		where o.class in ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass) and i.schema not in ('sequin', 'pg_toast')
		order by 1
		limit 10`)
	if err != nil {
		return fmt.Errorf("look for what depends on the schema: %w", err)
	}
	dependents, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("look for what depends on the schema: %w", err)
	}
	if len(dependents) > 0 {
		return fmt.Errorf("schema sequin cannot be removed: drop first what depends on it: %s", strings.Join(dependents, ", "))
	}
	return nil
}

// warnOfSources says what stays behind on other databases.
func warnOfSources(ctx context.Context, conn *pgx.Conn, log *slog.Logger) error {
	var isThere bool
	err := conn.QueryRow(ctx, `select exists (select from pg_catalog.pg_attribute a
		where a.attrelid = pg_catalog.to_regclass('sequin.source') and a.attname = 'dropped_at')`).Scan(&isThere)
	if err != nil || !isThere {
		return err
	}
	rows, err := conn.Query(ctx, `select s.name, coalesce(s.slot_name, s.publication_name), s.publication_name
		from sequin.source s where s.conninfo is not null`)
	if err != nil {
		return fmt.Errorf("read sources: %w", err)
	}
	var name, slot, publication string
	_, err = pgx.ForEachRow(rows, []any{&name, &slot, &publication}, func() error {
		log.Warn("a source keeps its slot and its publication: drop them there", "source", name, "statements",
			fmt.Sprintf("select pg_drop_replication_slot(%s); drop publication %s;", quote.Literal(slot), quote.Identifier(publication)))
		return nil
	})
	if err != nil {
		return fmt.Errorf("read sources: %w", err)
	}
	return nil
}

// leaveTime is how long a bridge that has ended may still seem to hold its slot.
const leaveTime = 2 * time.Second

// inUse returns a slot that somebody reads.
func inUse(slots []ownSlot) *ownSlot {
	for _, s := range slots {
		if s.activePID != nil {
			return &s
		}
	}
	return nil
}

type ownSlot struct {
	name      string
	activePID *int32
}

// belongings returns whether the schema is there, and what of Sequin's is outside of it. Without a schema, a slot by the
// name that a bridge gives is still one; whose a publication is then, its name does not say.
func belongings(ctx context.Context, conn *pgx.Conn) (isThere bool, slots []ownSlot, publications []string, err error) {
	names := []string{}
	err = conn.QueryRow(ctx, `select pg_catalog.to_regclass('sequin.source') is not null`).Scan(&isThere)
	if err != nil {
		return false, nil, nil, fmt.Errorf("look at the schema: %w", err)
	}
	if isThere {
		err = conn.QueryRow(ctx, `select coalesce(array_agg(s.slot_name) filter (where s.slot_name is not null), '{}'),
			coalesce(array_agg(distinct s.publication_name), '{}') from sequin.source s where s.conninfo is null`).
			Scan(&names, &publications)
		if err != nil {
			return false, nil, nil, fmt.Errorf("read sources: %w", err)
		}
	}
	rows, err := conn.Query(ctx, `select s.slot_name::text, s.active_pid from pg_catalog.pg_replication_slots s
		join pg_catalog.pg_database d on d.datname = s.database
		where d.datname = pg_catalog.current_database() and (s.slot_name = any ($1) or s.slot_name = 'sequin_' || d.oid)`, names)
	if err != nil {
		return false, nil, nil, fmt.Errorf("read slots: %w", err)
	}
	slots, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (s ownSlot, err error) {
		err = row.Scan(&s.name, &s.activePID)
		return s, err
	})
	if err != nil {
		return false, nil, nil, fmt.Errorf("read slots: %w", err)
	}
	return isThere, slots, publications, nil
}
