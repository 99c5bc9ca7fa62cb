// Package e2e proves what a user sees: changes in a table, messages out of receive, with the program in between.
package e2e

import (
	"testing"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }
