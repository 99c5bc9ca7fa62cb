// Package layout proves which package knows of which: parts meet in the one that composes them, and not sideways.
package layout

import (
	"io/fs"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"sequin/migrations"
	"sequin/sql"
)

// mayImport is what each package may import of this project's own.
var mayImport = map[string][]string{
	"sequin/sql":              {},
	"sequin/migrations":       {},
	"sequin/bridge/address":   {},
	"sequin/bridge/cause":     {},
	"sequin/bridge/quote":     {},
	"sequin/bridge/wal":       {},
	"sequin/bridge/localpg":   {},
	"sequin/bridge/pinned":    {},
	"sequin/bridge/slot":      {"sequin/bridge/pinned", "sequin/bridge/quote"},
	"sequin/bridge/changelog": {"sequin/bridge/wal"},
	"sequin/bridge/source":    {"sequin/bridge/address", "sequin/bridge/pinned", "sequin/bridge/quote"},
	"sequin/bridge/upkeep":    {},
	"sequin/bridge/schema":    {"sequin/bridge/quote", "sequin/migrations", "sequin/sql"},
	"sequin/bridge/capture": {
		"sequin/bridge/changelog", "sequin/bridge/pinned", "sequin/bridge/quote", "sequin/bridge/slot", "sequin/bridge/source",
		"sequin/bridge/wal",
	},
	"sequin/bridge/backfill": {"sequin/bridge/changelog", "sequin/bridge/pinned", "sequin/bridge/quote", "sequin/bridge/wal"},
	"sequin/bridge": {
		"sequin/bridge/address", "sequin/bridge/backfill", "sequin/bridge/capture", "sequin/bridge/changelog", "sequin/bridge/pinned",
		"sequin/bridge/schema", "sequin/bridge/source", "sequin/bridge/upkeep",
	},
	"sequin/bridge/doctor": {"sequin/bridge/cause", "sequin/bridge/quote", "sequin/bridge/schema", "sequin/bridge/slot"},
	"sequin/bridge/dev":    {"sequin/bridge", "sequin/bridge/localpg", "sequin/bridge/schema"},
	"sequin/cmd/sequin": {
		"sequin/bridge", "sequin/bridge/address", "sequin/bridge/cause", "sequin/bridge/dev", "sequin/bridge/doctor", "sequin/bridge/localpg", "sequin/bridge/schema",
	},
}

func TestImports(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`,
		"sequin/sql/...", "sequin/migrations/...", "sequin/bridge/...", "sequin/cmd/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		allowed, ok := mayImport[fields[0]]
		if !ok {
			t.Errorf("%s is not in the list of packages", fields[0])
		}
		for _, imported := range fields[1:] {
			if strings.HasPrefix(imported, "sequin/") && !slices.Contains(allowed, imported) {
				t.Errorf("%s imports %s", fields[0], imported)
			}
		}
	}
}

// A database may be of any encoding: what is installed in it is ASCII, but for an ellipsis, which is replaced where need be.
func TestEncoding(t *testing.T) {
	t.Parallel()
	for _, from := range []fs.FS{sql.FS, migrations.FS} {
		names, err := fs.Glob(from, "*.sql")
		if err != nil || len(names) == 0 {
			t.Fatal(names, err)
		}
		for _, name := range names {
			text, err := fs.ReadFile(from, name)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range string(text) {
				if c > 0x7f && !(c == '…' && from == fs.FS(sql.FS)) {
					t.Errorf("%s has %q", name, c)
				}
			}
		}
	}
}
