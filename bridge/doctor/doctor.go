package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/cause"
	"sequin/bridge/quote"
	"sequin/bridge/schema"
	"sequin/bridge/slot"
)

// Status is how bad it is.
type Status string

// From good to bad.
const (
	OK      Status = "ok"
	Warning Status = "warning"
	Error   Status = "error"
)

// Finding is what a check has found.
type Finding struct {
	Name   string
	Status Status
	Detail string
	Mend   string // what to do, a statement where one does it; empty where there is nothing to
}

func ok(name, detail string, args ...any) Finding {
	return Finding{Name: name, Status: OK, Detail: fmt.Sprintf(detail, args...)}
}

func warn(name, mend, detail string, args ...any) Finding {
	return Finding{Name: name, Status: Warning, Detail: fmt.Sprintf(detail, args...), Mend: mend}
}

func fail(name, mend, detail string, args ...any) Finding {
	return Finding{Name: name, Status: Error, Detail: fmt.Sprintf(detail, args...), Mend: mend}
}

// facts are what most checks go by: one query.
type facts struct {
	version, walLevel, database, role      string
	owner                                  string // of the schema; empty where there is none
	versionNum                             int
	isStandby, mayCreate, ownsSchema       bool
	slots, slotsUsed, senders, sendersUsed int
	connections, connectionsUsed           int
	keepSize, idleTimeout, preparedOldest  string
	writers                                []string
}

const factsQuery = `
select current_setting('server_version'), current_setting('server_version_num')::int, current_setting('wal_level'),
       current_database(), current_user, pg_is_in_recovery(), has_database_privilege(current_database(), 'create'),
       coalesce((select pg_has_role(current_user, n.nspowner, 'usage') from pg_namespace n where n.nspname = 'sequin'), false),
       coalesce((select pg_get_userbyid(n.nspowner)::text from pg_namespace n where n.nspname = 'sequin'), ''),
       current_setting('max_replication_slots')::int, (select count(*) from pg_replication_slots),
       current_setting('max_wal_senders')::int, (select count(*) from pg_stat_replication),
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
         - coalesce(current_setting('reserved_connections', true)::int, 0), (select count(*) from pg_stat_activity where backend_type = 'client backend'),
       coalesce(current_setting('max_slot_wal_keep_size', true), '-1'), coalesce(current_setting('idle_replication_slot_timeout', true), '0'),
       coalesce((select format('%s, since %s', p.gid, p.prepared) from pg_prepared_xacts p order by p.prepared limit 1), ''),
       array(select format('process %s (%s, for %s s)', a.pid, coalesce(nullif(a.application_name, ''), a.usename),
               extract(epoch from clock_timestamp() - a.xact_start)::bigint)
             from pg_stat_activity a
             where a.backend_xid is not null and a.xact_start < clock_timestamp() - interval '1 minute' and a.pid <> pg_backend_pid()
             order by a.xact_start limit 3)`

// Examine looks at a database.
func Examine(ctx context.Context, databaseURL string) ([]Finding, error) {
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `set search_path = pg_catalog; set default_transaction_read_only = on`); err != nil {
		return nil, fmt.Errorf("prepare connection: %w", err)
	}
	var f facts
	err = conn.QueryRow(ctx, factsQuery).Scan(&f.version, &f.versionNum, &f.walLevel, &f.database, &f.role, &f.isStandby,
		&f.mayCreate, &f.ownsSchema, &f.owner, &f.slots, &f.slotsUsed, &f.senders, &f.sendersUsed, &f.connections, &f.connectionsUsed,
		&f.keepSize, &f.idleTimeout, &f.preparedOldest, &f.writers)
	if err != nil {
		return nil, fmt.Errorf("look at the server: %w", err)
	}
	status, err := schema.Look(ctx, conn)
	layer, isReadable := installed(status), true
	switch {
	case isDenied(err):
		layer, isReadable, status.State = f.hidden(), false, schema.Same
	case err != nil:
		return nil, err
	}
	if status.State == schema.Missing {
		if err := schema.CheckNames(ctx, conn); errors.Is(err, schema.ErrForeign) || errors.Is(err, schema.ErrPublication) {
			layer = fail(layer.Name, "Rename what is there, and then: sequin migrate", "%s", err)
		} else if err != nil {
			return nil, err
		}
	}
	own, name, err := ownSlot(ctx, conn, isReadable && status.State != schema.Missing)
	if err != nil {
		return nil, err
	}
	findings := []Finding{
		f.server(), f.standby(), f.logical(), f.rights(status.State), f.replication(ctx, databaseURL),
		f.freeSlots(own), f.freeSenders(own), f.freeConnections(), f.kept(), f.idle(), f.oldTransactions(own),
		layer, slotState(own, name),
	}
	if status.State == schema.Missing {
		return findings, nil
	}
	tables, err := tablesWithoutIdentity(ctx, conn)
	if err != nil {
		return nil, err
	}
	findings = append(findings, tables)
	if !isReadable {
		return findings, nil
	}
	others, err := otherSources(ctx, conn)
	if err != nil {
		return nil, err
	}
	return append(findings, others...), nil
}

func isDenied(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == pgerrcode.InsufficientPrivilege
}

func (f facts) server() Finding {
	const name = "server version"
	major, minor := f.versionNum/10000, f.versionNum%10000
	// What older minor releases lose or break: https://www.postgresql.org/docs/release/
	needed := map[int]int{13: 21, 14: 18, 15: 14, 16: 10, 17: 6}[major]
	switch {
	case major < 12:
		return fail(name, "Upgrade the server to PostgreSQL 12 or newer.", "PostgreSQL %s: its publications cannot do what is needed", f.version)
	case major > 18:
		return warn(name, "Look for a newer sequin.", "PostgreSQL %s: newer than what this program was tested with", f.version)
	case minor < needed:
		return warn(name, fmt.Sprintf("Upgrade the server to PostgreSQL %d.%d or newer.", major, needed),
			"PostgreSQL %s: adding a table to a publication beside writers can lose changes", f.version)
	}
	return ok(name, "PostgreSQL %s", f.version)
}

func (f facts) standby() Finding {
	if f.isStandby {
		return fail("primary", "Give the address of the primary.", "the server is a standby, where nothing can be written")
	}
	return ok("primary", "the server takes writes")
}

func (f facts) logical() Finding {
	if f.walLevel != "logical" {
		return fail("wal_level", "alter system set wal_level = 'logical'; -- and restart the server. "+
			"Amazon RDS: rds.logical_replication = 1; Google Cloud SQL: cloudsql.logical_decoding = on",
			"it is %s, and changes can be decoded from logical only", f.walLevel)
	}
	return ok("wal_level", "logical")
}

func (f facts) rights(state schema.State) Finding {
	const name = "right to install"
	switch {
	case f.ownsSchema:
		return ok(name, "role %s owns the schema", quote.Identifier(f.role))
	case state != schema.Missing:
		return warn(name, "Install and run the bridge as the schema's owner.", "role %s does not own the schema", quote.Identifier(f.role))
	case !f.mayCreate:
		return fail(name, fmt.Sprintf("grant create on database %s to %s;", quote.Identifier(f.database), quote.Identifier(f.role)),
			"role %s may not create a schema or a publication here", quote.Identifier(f.role))
	}
	return ok(name, "role %s may create a schema and a publication", quote.Identifier(f.role))
}

// replication tries a replication connection: nothing else tells whether one is let in, and goes to the server itself.
func (f facts) replication(ctx context.Context, databaseURL string) Finding {
	const name = "replication"
	conn, err := slot.Connect(ctx, databaseURL, "UTF8", func(*pgconn.Notice) {})
	if err == nil {
		defer conn.Close()
		if _, err = conn.Identify(ctx); err == nil {
			return ok(name, "role %s may replicate", quote.Identifier(f.role))
		}
	}
	mend := fmt.Sprintf("alter role %[1]s replication; -- Amazon RDS: grant rds_replication to %[1]s;", quote.Identifier(f.role))
	var pgErr *pgconn.PgError
	switch {
	case !errors.As(err, &pgErr):
		mend = "Give the server's own address: replication does not go through a pooler."
	case strings.HasPrefix(pgErr.Code, "28") && strings.Contains(pgErr.Message, "pg_hba.conf"):
		mend = "Let the role in for replication in pg_hba.conf: a line of type host with the database's name, not with 'replication'."
	case pgErr.Code == pgerrcode.TooManyConnections:
		mend = "alter system set max_wal_senders = 10; -- and restart the server; or, where its connections are all taken: end some."
	case strings.HasPrefix(pgErr.Code, "08"), strings.Contains(pgErr.Message, "unsupported startup parameter"):
		mend = "Give the server's own address: replication does not go through a pooler."
	}
	return fail(name, mend, "a replication connection is refused: %s", cause.Text(err))
}

func (f facts) freeSlots(own slot.State) Finding {
	if f.slotsUsed >= f.slots && !own.Exists {
		return fail("replication slots", fmt.Sprintf("alter system set max_replication_slots = %d; -- and restart the server", f.slots+5),
			"all %d are in use", f.slots)
	}
	return ok("replication slots", "%d of %d in use", f.slotsUsed, f.slots)
}

func (f facts) freeSenders(own slot.State) Finding {
	if f.sendersUsed >= f.senders && !own.IsActive {
		return fail("WAL senders", fmt.Sprintf("alter system set max_wal_senders = %d; -- and restart the server", f.senders+5),
			"all %d are in use", f.senders)
	}
	return ok("WAL senders", "%d of %d in use", f.sendersUsed, f.senders)
}

// bridgeConnections is how many a bridge opens that has a pipeline to write, beside the replication connection.
const bridgeConnections = 10

func (f facts) freeConnections() Finding {
	if f.connections-f.connectionsUsed < bridgeConnections {
		return warn("connections", fmt.Sprintf("alter system set max_connections = %d; -- and restart the server", f.connections+20),
			"%d of %d in use, and a bridge takes %d", f.connectionsUsed, f.connections, bridgeConnections)
	}
	return ok("connections", "%d of %d in use", f.connectionsUsed, f.connections)
}

func (f facts) kept() Finding {
	if f.keepSize != "-1" {
		return warn("max_slot_wal_keep_size", "Keep an eye on sequin.health(): it says how much of it is taken.",
			"it is %s: a bridge that is away for longer than that much WAL loses changes, and says so", f.keepSize)
	}
	return ok("max_slot_wal_keep_size", "no limit: a bridge that is away fills the disk, and loses nothing")
}

func (f facts) idle() Finding {
	const name = "idle_replication_slot_timeout"
	if f.idleTimeout != "0" {
		return warn(name, "alter system set idle_replication_slot_timeout = 0; select pg_reload_conf();",
			"it is %s: the slot of a bridge that is away for longer is lost, and changes with it", f.idleTimeout)
	}
	return ok(name, "none: the slot of a bridge that is away stays")
}

func (f facts) oldTransactions(own slot.State) Finding {
	const name = "open transactions"
	switch {
	case f.preparedOldest != "":
		return warn(name, "commit prepared or rollback prepared it: select * from pg_prepared_xacts;",
			"a prepared transaction keeps WAL, and a new slot waits for it: %s", f.preparedOldest)
	case len(f.writers) > 0 && !own.Exists:
		return warn(name, "Let them end, or select pg_terminate_backend(pid);",
			"the slot is made only when these have ended: %s", strings.Join(f.writers, ", "))
	case len(f.writers) > 0:
		return warn(name, "Let them end, or select pg_terminate_backend(pid);", "these keep WAL: %s", strings.Join(f.writers, ", "))
	}
	return ok(name, "none that has written and is older than a minute")
}

// hidden is what there is to say of a schema that the role may not look into.
func (f facts) hidden() Finding {
	return fail("schema", fmt.Sprintf("Give the address of its owner; or: grant %s to %s;", quote.Identifier(f.owner), quote.Identifier(f.role)),
		"role %s may not look into it: what is installed is not known", quote.Identifier(f.role))
}

func installed(s schema.Status) Finding {
	const name = "schema"
	switch s.State {
	case schema.Missing:
		return warn(name, "sequin migrate", "not installed yet")
	case schema.Changed:
		return warn(name, "sequin migrate", "functions and views of %s, with another text than this program's", s.Version)
	case schema.Older:
		return warn(name, "sequin migrate", "%s, and this program has %s", s.Version, schema.Version)
	case schema.Newer:
		return fail(name, "Upgrade the program.", "%s, and this program has %s", s.Version, schema.Version)
	}
	return ok(name, "%s", s.Version)
}

func ownSlot(ctx context.Context, conn *pgx.Conn, isInstalled bool) (slot.State, string, error) {
	query := `select 'sequin_' || d.oid from pg_database d where d.datname = current_database()`
	if isInstalled {
		query = `select coalesce(s.slot_name, 'sequin_' || d.oid) from sequin.source s, pg_database d
			where s.name = 'local' and d.datname = current_database()`
	}
	var name string
	err := conn.QueryRow(ctx, query).Scan(&name)
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return slot.State{}, "", fmt.Errorf("look for the slot's name (as the schema's owner, please): %w", err)
	}
	if err != nil {
		return slot.State{}, "", fmt.Errorf("look for the slot's name: %w", err)
	}
	state, err := slot.Look(ctx, conn, name)
	return state, name, err
}

func slotState(s slot.State, name string) Finding {
	drop := fmt.Sprintf("select pg_drop_replication_slot(%s);", quote.Literal(name))
	switch {
	case s.IsAwaited:
		return fail("slot", "alter system set synchronous_standby_names = 'FIRST 1 (…)'; select pg_reload_conf(); -- name the standbys",
			"synchronous_standby_names is *, and so takes the bridge for a standby: commits would wait for it")
	case !s.Exists:
		return ok("slot", "there is none yet: the bridge makes %s when it first starts", name)
	case !s.IsOurs:
		return fail("slot", drop, "%s is another's: %s", name, s.Kind)
	case s.IsLost:
		return fail("slot", "Start the bridge: it says what is lost, and how to go on.", "%s was invalidated by the server %s", name, s.LostReason)
	case !s.IsActive:
		return warn("slot", "sequin bridge --database-url …", "%s is read by nobody: the server keeps WAL for it", name)
	}
	return ok("slot", "%s is read by process %d", name, s.ActivePID)
}

// otherSources says what the bridge has found of other databases than this one.
func otherSources(ctx context.Context, conn *pgx.Conn) ([]Finding, error) {
	rows, err := conn.Query(ctx, `select s.name, case when s.state = 'ok' then t.state else s.state end, coalesce(s.error, ''), coalesce(s.hint, '')
		from sequin.sources s join sequin.source_status t on t.name = s.name
		where not s.is_local order by s.name`)
	if err != nil {
		return nil, fmt.Errorf("look at other sources: %w", err)
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (Finding, error) {
		var name, state, reason, hint string
		if err := row.Scan(&name, &state, &reason, &hint); err != nil {
			return Finding{}, err
		}
		name = "source " + name
		switch state {
		case "error":
			return fail(name, cmp.Or(hint, "select * from sequin.health();"), "%s", reason), nil
		case "pending":
			return warn(name, "sequin bridge --database-url …", "no bridge has captured it yet"), nil
		case "no bridge", "no slot":
			return warn(name, "sequin bridge --database-url …", "no bridge captures it: its server keeps WAL for it"), nil
		}
		return ok(name, "captured"), nil
	})
}

// tablesWithoutIdentity finds streamed tables whose updates and deletes fail, or are about to.
func tablesWithoutIdentity(ctx context.Context, conn *pgx.Conn) (Finding, error) {
	const name = "replica identity"
	rows, err := conn.Query(ctx, `
		with recursive leaf(oid, kind) as (
		  select c.oid, c.relkind
		  from pg_publication p join pg_publication_rel r on r.prpubid = p.oid join pg_class c on c.oid = r.prrelid
		  where p.pubname = 'sequin'
		  union all
		  select c.oid, c.relkind from leaf l join pg_inherits i on i.inhparent = l.oid join pg_class c on c.oid = i.inhrelid
		  where l.kind = 'p'
		)
		select l.oid::regclass::text from leaf l join pg_class c on c.oid = l.oid
		where l.kind = 'r' and (c.relreplident = 'n'
		  or c.relreplident = 'd' and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary and i.indimmediate)
		  or c.relreplident = 'i' and not exists (select from pg_index i where i.indrelid = c.oid and i.indisreplident))
		order by 1`)
	if err != nil {
		return Finding{}, fmt.Errorf("look at streamed tables: %w", err)
	}
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return Finding{}, fmt.Errorf("look at streamed tables: %w", err)
	}
	if len(tables) > 0 {
		return fail(name, fmt.Sprintf("alter table %s add primary key (…); or: alter table %[1]s replica identity full;", tables[0]),
			"updates and deletes fail in %s", strings.Join(tables, ", ")), nil
	}
	return ok(name, "each streamed table has one"), nil
}
