package slot

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// State is how a slot stands.
type State struct {
	Exists       bool
	IsOurs       bool   // a logical slot of this database that writes pgoutput
	Kind         string // what it is otherwise
	IsActive     bool
	ActivePID    int
	IsLost       bool   // the server has removed what it had to keep
	LostReason   string // where the server says so (17 and newer)
	ConfirmedLSN pglogrepl.LSN
	IsTwoPhase   bool // it sends transactions when they are prepared
	IsFailover   bool // the server takes it along to its standbys
	IsAwaited    bool // synchronous_standby_names takes its reader for a standby: commits wait for it

	IsStandby  bool // of the server
	CurrentLSN pglogrepl.LSN
	Major      int
}

// Columns that are not there in every version are asked for by name.
const stateQuery = `
select s.slot_name is not null,
       coalesce(s.slot_type = 'logical' and s.plugin = 'pgoutput' and s.database = pg_catalog.current_database(), false),
       coalesce(s.slot_type || ' slot of database ' || coalesce(s.database, '(none)') || ', plugin ' || coalesce(s.plugin, '(none)'), ''),
       coalesce(s.active, false), coalesce(s.active_pid, 0),
       coalesce(pg_catalog.to_jsonb(s) ->> 'wal_status' = 'lost', false) or s.slot_name is not null and s.restart_lsn is null,
       coalesce(pg_catalog.to_jsonb(s) ->> 'invalidation_reason', ''),
       coalesce(s.confirmed_flush_lsn, '0/0'::pg_catalog.pg_lsn)::pg_catalog.text,
       coalesce((pg_catalog.to_jsonb(s) ->> 'two_phase')::pg_catalog.bool, false),
       coalesce((pg_catalog.to_jsonb(s) ->> 'failover')::pg_catalog.bool, false),
       exists (
         select from pg_catalog.regexp_split_to_table(pg_catalog.regexp_replace(
           pg_catalog.current_setting('synchronous_standby_names'), '^\s*((first|any)\s+)?\d+\s*\(|\)\s*$', '', 'gi'), ',') n
         where pg_catalog.lower(pg_catalog.btrim(n, E' \t\n"')) in ('*', '` + reader + `')),
       pg_catalog.current_setting('server_version_num')::int / 10000,
       pg_catalog.pg_is_in_recovery(),
       case when pg_catalog.pg_is_in_recovery() then '0/0'
            else pg_catalog.pg_current_wal_insert_lsn()::pg_catalog.text end
from (select) one
left join pg_catalog.pg_replication_slots s on s.slot_name = $1`

// Look finds out how a slot stands.
func Look(ctx context.Context, conn *pgx.Conn, name string) (State, error) {
	var s State
	var confirmed, current string
	err := conn.QueryRow(ctx, stateQuery, name).Scan(&s.Exists, &s.IsOurs, &s.Kind, &s.IsActive, &s.ActivePID, &s.IsLost,
		&s.LostReason, &confirmed, &s.IsTwoPhase, &s.IsFailover, &s.IsAwaited, &s.Major, &s.IsStandby, &current)
	if err == nil {
		s.ConfirmedLSN, err = pglogrepl.ParseLSN(confirmed)
	}
	if err == nil {
		s.CurrentLSN, err = pglogrepl.ParseLSN(current)
	}
	if err != nil {
		return s, fmt.Errorf("look at slot %s: %w", name, err)
	}
	return s, nil
}

// Create makes a slot, which waits for every transaction that is writing anywhere on the server. From 17 on the server
// takes it along to its standbys. It returns where the slot begins.
func Create(ctx context.Context, conn *pgx.Conn, name string, major int) (pglogrepl.LSN, error) {
	query := `select lsn::pg_catalog.text from pg_catalog.pg_create_logical_replication_slot($1, 'pgoutput')`
	if major >= 17 {
		query = `select lsn::pg_catalog.text from pg_catalog.pg_create_logical_replication_slot($1, 'pgoutput', failover => true)`
	}
	var begin string
	if err := conn.QueryRow(ctx, query, name).Scan(&begin); err != nil {
		return 0, fmt.Errorf("create slot %s: %w", name, err)
	}
	return pglogrepl.ParseLSN(begin)
}

// Drop drops a slot.
func Drop(ctx context.Context, conn *pgx.Conn, name string) error {
	if _, err := conn.Exec(ctx, `select pg_catalog.pg_drop_replication_slot($1)`, name); err != nil {
		return fmt.Errorf("drop slot %s: %w", name, err)
	}
	return nil
}

const holdersQuery = `
select coalesce(pg_catalog.string_agg(h.holder, ', ' order by h.since), '')
from (
  select pg_catalog.format('process %s (database %s, for %s s)', a.pid, a.datname,
           extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::bigint) as holder, a.xact_start as since
  from pg_catalog.pg_stat_activity a
  where a.backend_xid is not null and a.pid <> pg_catalog.pg_backend_pid()
  union all
  select pg_catalog.format('prepared transaction %L (database %s, for %s s)', p.gid, p.database,
           extract(epoch from pg_catalog.clock_timestamp() - p.prepared)::bigint), p.prepared
  from pg_catalog.pg_prepared_xacts p
  order by since
  limit 3) h`

// Holders names the oldest transactions that Create waits for, for a log line.
func Holders(ctx context.Context, conn *pgx.Conn) (string, error) {
	var holders string
	err := conn.QueryRow(ctx, holdersQuery).Scan(&holders)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return "", fmt.Errorf("look for open transactions: %w", err)
	}
	return holders, nil
}
