// Package migrations holds the schema's history, as goose migrations that only go up.
package migrations

import "embed"

// FS has one file a migration.
//
//go:embed *.sql
var FS embed.FS
