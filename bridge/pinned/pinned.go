// Package pinned opens connections that no setting of the database, or of the role, gets in the way of.
package pinned

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// ConnectTimeout is how long a server may take to let somebody in.
const ConnectTimeout = 30 * time.Second

// Pin puts settings into what a connection begins with: those that every version has.
func Pin(params map[string]string) {
	for setting, value := range map[string]string{
		"client_min_messages":                 "warning",
		"default_transaction_isolation":       "read committed",
		"default_transaction_read_only":       "off",
		"idle_in_transaction_session_timeout": "0",
		"jit":                                 "off", // a plan made without enable_seqscan looks dear, and is compiled at each call
		"lock_timeout":                        "0",
		"search_path":                         "pg_catalog",
		"standard_conforming_strings":         "on", // what a backfill chooses rows by is text that the server has printed
		"statement_timeout":                   "0",
		"synchronous_commit":                  "on",
	} {
		if _, ok := params[setting]; !ok {
			params[setting] = value
		}
	}
}

// Print puts the settings into it that values are printed under, so that their text means one thing, whatever the database
// or the role says, and a row is the same however it was read. An empty search_path has names in values (of regclass, say)
// printed with their schema.
func Print(params map[string]string) {
	for setting, value := range map[string]string{
		"bytea_output":       "hex",
		"DateStyle":          "ISO, MDY",
		"extra_float_digits": "3",
		"IntervalStyle":      "postgres",
		"lc_monetary":        "C",
		"search_path":        "",
		"TimeZone":           "UTC",
	} {
		params[setting] = value
	}
}

// Settings pins those that not every version has, and has the server notice within minutes that a bridge has vanished: what
// that has left open would hold on to what it has locked.
const Settings = `
	select pg_catalog.set_config(w.name, w.value, false)
	from (values ('idle_session_timeout', '0'), ('transaction_timeout', '0'),
	             ('tcp_keepalives_idle', '60'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '6')) w(name, value)
	where pg_catalog.current_setting(w.name, true) is not null`

// Connect opens a connection for SQL.
func Connect(ctx context.Context, databaseURL, applicationName, encoding string) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	config.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	config.RuntimeParams["application_name"] = applicationName
	config.RuntimeParams["client_encoding"] = encoding
	Pin(config.RuntimeParams)
	ctx, cancel := context.WithTimeout(ctx, ConnectTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	if err := Settle(ctx, conn); err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	return conn, nil
}

// Settle pins what Pin cannot.
func Settle(ctx context.Context, conn *pgx.Conn) error {
	if _, err := conn.Exec(ctx, Settings); err != nil {
		return fmt.Errorf("pin settings: %w", err)
	}
	return nil
}
