// Package cause says why a connection could not be made.
package cause

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// Text is what an error says. Where a server that takes no TLS was asked for it first and then gone on without, as sslmode
// prefer has it, only what came of the latter: the former would stand in front of a wrong password and seem to be it.
func Text(err error) string {
	var connect *pgconn.ConnectError
	if !errors.As(err, &connect) {
		return err.Error()
	}
	all, ok := connect.Unwrap().(interface{ Unwrap() []error })
	if !ok {
		return err.Error()
	}
	var kept []string
	for _, attempt := range all.Unwrap() {
		text := attempt.Error()
		if !strings.HasSuffix(text, "server refused TLS connection") && !slices.Contains(kept, text) {
			kept = append(kept, text)
		}
	}
	if len(kept) == 0 {
		return err.Error()
	}
	text := fmt.Sprintf("failed to connect to `user=%s database=%s`: %s", connect.Config.User, connect.Config.Database, strings.Join(kept, "; "))
	return strings.Replace(err.Error(), connect.Error(), text, 1)
}
