// Package address reads how a database is reached.
package address

import (
	"errors"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Errors of Parse. What pgx says of an address quotes it, and finds by its own lights what of it is a password.
var (
	errUnreadable = errors.New("the database's address cannot be read as a URL or as libpq's key=value pairs (it is not shown, " +
		"as there may be a password in it): try it with psql")
	errTwoAts = errors.New("the database's address has an @ in its user or its password: write it as %40")
)

// Parse reads a URL or libpq's key=value pairs. Its errors show nothing of them.
func Parse(text string) (*pgx.ConnConfig, error) {
	config, err := pgx.ParseConfig(text)
	var parse *pgconn.ParseConfigError
	switch {
	case errors.As(err, &parse):
		// Of files and modes, and of nothing that was cut out of the address where it seemed to be a name.
		if _, reason, ok := strings.Cut(err.Error(), "`: failed to configure TLS"); ok {
			return nil, errors.New("the database's address cannot be used: failed to configure TLS" + reason)
		}
		return nil, errUnreadable
	case err != nil:
		return nil, errUnreadable
	}
	// What follows the first @ would be looked up as a host, and shown where it is not found.
	if strings.Contains(text, "://") {
		for _, host := range hosts(config) {
			if strings.Contains(host, "@") {
				return nil, errTwoAts
			}
		}
	}
	return config, nil
}

func hosts(config *pgx.ConnConfig) []string {
	all := []string{config.Host}
	for _, f := range config.Fallbacks {
		all = append(all, f.Host)
	}
	return all
}
