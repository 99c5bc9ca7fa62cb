// Package sources proves that one bridge captures any number of databases beside each other, and none at another's cost.
package sources

import (
	"testing"

	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }
