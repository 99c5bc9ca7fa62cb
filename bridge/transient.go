package bridge

import (
	"errors"
	"strings"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
)

// isTransient tells whether a server that refuses a connection may take it later: it is down, starting, or full. A
// wrong password or a database that does not exist is not mended by waiting.
func isTransient(err error) bool {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return true
	}
	return pgerrcode.IsOperatorIntervention(pgErr.Code) || pgerrcode.IsInsufficientResources(pgErr.Code) ||
		strings.HasPrefix(pgErr.Code, "08")
}
