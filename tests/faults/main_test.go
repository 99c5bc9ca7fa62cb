// Package faults proves what is left of the log when things are killed: all of it, once, in order.
package faults

import (
	"testing"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }
