// Package backfill proves how consumers get the rows that exist already: all of them, in order, beside live traffic,
// whatever is killed.
package backfill

import (
	"testing"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }
