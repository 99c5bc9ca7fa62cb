package source

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/quote"
)

// MakePublication makes an empty publication on the source: before its slot, which could not be read otherwise.
func (t *Target) MakePublication(ctx context.Context, conn *pgx.Conn, name string) error {
	var version int
	var database string
	err := conn.QueryRow(ctx, `select pg_catalog.current_setting('server_version_num')::int, pg_catalog.current_database()`).Scan(&version, &database)
	if err != nil {
		return fmt.Errorf("look at the source: %w", err)
	}
	options := "publish = 'insert, update, delete, truncate'"
	// A partitioned table is one table, under its root's name (13 and newer can).
	if version >= 130000 {
		options += ", publish_via_partition_root = true"
	}
	// Without it, a table with a stored generated column and replica identity full refuses its owner's updates on 18.
	if version >= 180000 {
		options += ", publish_generated_columns = stored"
	}
	_, err = conn.Exec(ctx, "create publication "+quote.Identifier(name)+" with ("+options+")")
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.InsufficientPrivilege {
		return problem(fmt.Sprintf("On the source: grant create on database %s to %s;", quote.Identifier(database), quote.Identifier(t.User())),
			"the bridge's role may not make a publication on the source")
	}
	if err != nil {
		return fmt.Errorf("create publication %s: %w", name, err)
	}
	return nil
}

// Clear drops the slot and the publication of a source that is not captured any more. 55006 while somebody reads the slot.
func Clear(ctx context.Context, conn *pgx.Conn, slot, publication string) error {
	_, err := conn.Exec(ctx, `select pg_catalog.pg_drop_replication_slot(s.slot_name) from pg_catalog.pg_replication_slots s
		where s.slot_name = $1 and s.database = pg_catalog.current_database()`, slot)
	if err != nil {
		return fmt.Errorf("drop slot %s: %w", slot, err)
	}
	if _, err := conn.Exec(ctx, "drop publication if exists "+quote.Identifier(publication)); err != nil {
		return fmt.Errorf("drop publication %s: %w", publication, err)
	}
	return nil
}
