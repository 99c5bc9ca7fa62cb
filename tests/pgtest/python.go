package pgtest

import (
	"os/exec"
	"strings"
	"testing"
)

// Python returns the system's Python, for which Debian has the packages, if it has these modules; else the test is skipped.
func Python(t *testing.T, modules ...string) string {
	t.Helper()
	for _, path := range []string{"/usr/bin/python3", "python3"} {
		if exec.Command(path, "-c", "import "+strings.Join(modules, ", ")).Run() == nil {
			return path
		}
	}
	t.Skipf("Python has no %s", strings.Join(modules, ", "))
	return ""
}
