// Package sql proves the SQL interface, call by call. The log is written by the tests themselves, row by row, so that
// each says exactly what there is to deliver; that the bridge writes the same is for tests/e2e to prove.
package sql

import (
	"testing"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }
