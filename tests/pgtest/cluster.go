package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"sequin/bridge/localpg"
)

// Major returns the major version that is tested with, 0 for the newest there is.
func Major() int {
	n, err := strconv.Atoi(os.Getenv("PGTEST_MAJOR"))
	if err != nil {
		return 0
	}
	return n
}

var shared struct {
	sync.Mutex
	cluster  *localpg.Cluster
	dir      string
	err      error
	template string
}

// Main runs a package's tests, and stops the server that they have shared.
func Main(m *testing.M) {
	code := m.Run()
	if shared.cluster != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := shared.cluster.Stop(ctx, localpg.Immediate); err != nil {
			fmt.Fprintln(os.Stderr, "pgtest:", err)
			code = max(code, 1)
		}
	}
	if shared.dir != "" {
		_ = os.RemoveAll(shared.dir)
	}
	if program.path != "" {
		_ = os.RemoveAll(filepath.Dir(program.path))
	}
	os.Exit(code)
}

// Cluster returns the server that the tests of a process share.
func Cluster(t testing.TB) *localpg.Cluster {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.cluster == nil && shared.err == nil {
		var binaries localpg.Binaries
		if binaries, shared.err = Find(); shared.err == nil {
			shared.dir, shared.cluster, shared.err = start(binaries, map[string]string{
				"fsync":              "off",
				"full_page_writes":   "off",
				"synchronous_commit": "off",
			})
		}
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.cluster
}

// NewCluster starts a server of the test's own, that it may stop and kill. It writes to disk as one in production.
func NewCluster(t testing.TB, settings map[string]string) *localpg.Cluster {
	t.Helper()
	binaries, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	return newCluster(t, binaries, settings)
}

// NewClusterOf is NewCluster of another major version than the one that is tested with. It skips the test where there
// is none.
func NewClusterOf(t testing.TB, major int, settings map[string]string) *localpg.Cluster {
	t.Helper()
	binaries, err := localpg.Find(major)
	if err != nil {
		root, rootErr := moduleRoot()
		if rootErr != nil {
			t.Fatal(rootErr)
		}
		if binaries, err = localpg.Look(filepath.Join(root, ".cache", "postgres", strconv.Itoa(major), "bin")); err != nil {
			t.Skipf("there is no PostgreSQL %d: %v", major, err)
		}
	}
	return newCluster(t, binaries, settings)
}

// Rules writes a pg_hba.conf in a directory that any server can read, and returns it, for the setting hba_file.
func Rules(t testing.TB, text string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(dir, "pg_hba.conf")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
	return file
}

func newCluster(t testing.TB, binaries localpg.Binaries, settings map[string]string) *localpg.Cluster {
	t.Helper()
	dir, c, err := start(binaries, settings)
	if dir != "" {
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := c.Stop(ctx, localpg.Immediate); err != nil {
			t.Error(err)
		}
	})
	return c
}

func start(binaries localpg.Binaries, settings map[string]string) (string, *localpg.Cluster, error) {
	dir, err := os.MkdirTemp("", "pgtest")
	if err != nil {
		return "", nil, err
	}
	all := map[string]string{
		"max_connections":       "300",
		"max_replication_slots": "50",
		"max_wal_senders":       "50",
		"shared_buffers":        "256MB",
		"max_wal_size":          "2GB",
	}
	maps.Copy(all, settings)
	c, err := localpg.Start(context.Background(), localpg.Config{
		Binaries: binaries, Dir: dir, Settings: all, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	return dir, c, err
}

// Binaries returns the programs that are tested with.
func Binaries(t testing.TB) localpg.Binaries {
	t.Helper()
	binaries, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	return binaries
}

// Find returns the programs to test with: what is installed, or else what make has fetched.
func Find() (localpg.Binaries, error) {
	binaries, err := localpg.Find(Major())
	if err == nil {
		return binaries, nil
	}
	root, rootErr := moduleRoot()
	if rootErr != nil {
		return localpg.Binaries{}, rootErr
	}
	major := "*"
	if Major() > 0 {
		major = strconv.Itoa(Major())
	}
	fetched, _ := filepath.Glob(filepath.Join(root, ".cache", "postgres", major, "bin")) // the pattern is well formed
	for _, dir := range slices.Backward(fetched) {
		if binaries, err := localpg.Look(dir); err == nil {
			return binaries, nil
		}
	}
	return localpg.Binaries{}, fmt.Errorf("%w: make test and make test-all see to it", err)
}

// moduleRoot returns the directory of go.mod, above the package that is tested.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("find go.mod above the tests: there is none")
		}
	}
}
