// Package sql holds the repeatable layer: Sequin's functions, views and grants. See install.sql.
package sql

import "embed"

// FS has install.sql, which names the other files in the order they are installed.
//
//go:embed *.sql
var FS embed.FS
