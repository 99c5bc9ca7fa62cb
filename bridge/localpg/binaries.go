package localpg

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
)

// Binaries is a directory with initdb and postgres in it.
type Binaries struct {
	Dir   string
	Major int
}

// ErrNotFound is returned where no PostgreSQL is installed.
var ErrNotFound = errors.New("no PostgreSQL found")

// places are where packages put PostgreSQL's programs, besides PATH.
var places = []string{
	"/usr/lib/postgresql/*/bin",          // Debian, Ubuntu
	"/usr/pgsql-*/bin",                   // Red Hat
	"/opt/homebrew/opt/postgresql@*/bin", // Homebrew on Apple silicon
	"/usr/local/opt/postgresql@*/bin",    // Homebrew on Intel
	"/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
	"/usr/local/pgsql/bin", // from source
}

// Find returns the programs of a major version that are installed here; 0: of the newest.
// SEQUIN_PG_<major> names a directory to look into first.
func Find(major int) (Binaries, error) {
	var dirs []string
	if dir := os.Getenv("SEQUIN_PG_" + strconv.Itoa(major)); dir != "" {
		dirs = append(dirs, dir)
	}
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			dirs = append(dirs, filepath.Dir(path))
		}
	}
	for _, place := range places {
		found, _ := filepath.Glob(place) // the patterns are well formed
		dirs = append(dirs, found...)
	}
	var all []Binaries
	for _, dir := range dirs {
		if b, err := Look(dir); err == nil && (major == 0 || b.Major == major) {
			all = append(all, b)
		}
	}
	if len(all) == 0 {
		if major > 0 {
			return Binaries{}, fmt.Errorf("%w of major version %d", ErrNotFound, major)
		}
		return Binaries{}, ErrNotFound
	}
	if major == 0 {
		slices.SortStableFunc(all, func(a, b Binaries) int { return b.Major - a.Major })
	}
	return all[0], nil
}

var versionPattern = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

// Look returns what programs a directory has.
func Look(dir string) (Binaries, error) {
	for _, name := range []string{"initdb", "postgres"} {
		if _, err := exec.LookPath(filepath.Join(dir, name)); err != nil {
			return Binaries{}, fmt.Errorf("look for %s: %w", name, err)
		}
	}
	out, err := exec.Command(filepath.Join(dir, "postgres"), "--version").Output()
	if err != nil {
		return Binaries{}, fmt.Errorf("ask postgres for its version: %w", err)
	}
	m := versionPattern.FindSubmatch(out)
	if m == nil {
		return Binaries{}, fmt.Errorf("ask postgres for its version: it says %q", out)
	}
	major, err := strconv.Atoi(string(m[1]))
	return Binaries{Dir: dir, Major: major}, err
}
