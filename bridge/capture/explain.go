package capture

import (
	"errors"
	"strings"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/quote"
)

// explain makes a Refusal of what the server says against replication, or a slot, where no waiting mends it.
func explain(err error, user string) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return err
	}
	switch {
	case pgErr.Code == pgerrcode.InsufficientPrivilege, strings.Contains(pgErr.Message, "replication role"):
		return refuse("alter role "+quote.Identifier(user)+" replication; on Amazon RDS: grant rds_replication to "+quote.Identifier(user)+";",
			"role %q may not replicate", user)
	case pgErr.Code == pgerrcode.ConfigurationLimitExceeded:
		return refuse("Raise max_replication_slots and max_wal_senders, or drop a slot that nobody needs: select * from pg_replication_slots;",
			"the server has no replication slot left: %s", pgErr.Message)
	case pgErr.Code == pgerrcode.TooManyConnections && strings.Contains(pgErr.Message, "max_wal_senders"):
		return refuse("Raise max_wal_senders, and restart the server.", "the server has no connection for replication left: %s", pgErr.Message)
	}
	return err
}
