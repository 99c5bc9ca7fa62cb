package localpg

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

var discard = slog.New(slog.NewTextHandler(io.Discard, nil))

// testConfig returns a configuration with a directory that the server's user can reach.
func testConfig(t *testing.T) Config {
	t.Helper()
	major, _ := strconv.Atoi(os.Getenv("PGTEST_MAJOR"))
	binaries, err := Find(major)
	if errors.Is(err, ErrNotFound) {
		binaries, err = Look(filepath.Join("..", "..", ".cache", "postgres", strconv.Itoa(major), "bin"))
	}
	if err != nil {
		t.Fatal(err)
	}
	if binaries.Dir, err = filepath.Abs(binaries.Dir); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "localpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return Config{Binaries: binaries, Dir: dir, Settings: map[string]string{"fsync": "off"}, Log: discard}
}

func start(t *testing.T, config Config) *Cluster {
	t.Helper()
	c, err := Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(context.Background(), Immediate); err != nil {
			t.Error(err)
		}
	})
	return c
}

func query(t *testing.T, c *Cluster, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var text string
	if err := conn.QueryRow(t.Context(), sql).Scan(&text); err != nil {
		t.Fatal(err)
	}
	return text
}

func TestStartStop(t *testing.T) {
	t.Parallel()
	config := testConfig(t)
	config.Settings["work_mem"] = "5MB"
	c := start(t, config)
	if got := query(t, c, `select current_setting('wal_level') || ' ' || current_setting('work_mem')`); got != "logical 5MB" {
		t.Errorf("the settings are %s", got)
	}
	if got := query(t, c, `select (current_setting('server_version_num')::int / 10000)::text`); got != strconv.Itoa(config.Binaries.Major) {
		t.Errorf("its major version is %s, the programs' %d", got, config.Binaries.Major)
	}
	port := c.Port()
	before := query(t, c, `select system_identifier::text from pg_control_system()`)
	for _, mode := range []StopMode{Smart, Fast, Immediate} {
		if err := c.Stop(t.Context(), mode); err != nil {
			t.Fatalf("stop %d: %v", mode, err)
		}
		select {
		case <-c.Exited():
		default:
			t.Fatalf("stop %d: it is still there", mode)
		}
		if err := c.Stop(t.Context(), mode); err != nil {
			t.Errorf("stopping it twice: %v", err)
		}
		if err := c.Start(t.Context()); err != nil {
			t.Fatalf("start after stop %d: %v", mode, err)
		}
		if c.Port() != port {
			t.Errorf("it had port %d, and now %d", port, c.Port())
		}
		if after := query(t, c, `select system_identifier::text from pg_control_system()`); after != before {
			t.Errorf("it was cluster %s, and now %s", before, after)
		}
	}
}

func TestRunsAsNobodySpecial(t *testing.T) {
	t.Parallel()
	c := start(t, testConfig(t))
	info, err := os.Stat(c.data())
	if err != nil {
		t.Fatal(err)
	}
	if info.Sys().(*syscall.Stat_t).Uid == 0 {
		t.Error("the data are root's")
	}
}

// A directory whose server runs is refused, and that server goes on.
func TestRunning(t *testing.T) {
	t.Parallel()
	c := start(t, testConfig(t))
	config := c.config
	config.Port = 0
	_, err := Start(t.Context(), config)
	if !errors.Is(err, ErrRunning) {
		t.Fatalf("got %v", err)
	}
	if want := fmt.Sprintf("process %d", c.PID()); !strings.Contains(err.Error(), want) {
		t.Errorf("the error does not say %q: %v", want, err)
	}
	query(t, c, `select 'it answers'`)
}

// A killed server's directory can be used again, whoever has its process number now.
func TestKilled(t *testing.T) {
	t.Parallel()
	config := testConfig(t)
	c := start(t, config)
	stranger := exec.Command("sleep", "60")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stranger.Process.Kill()
		_ = stranger.Wait()
	}()
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.Exited()
	pidFile := filepath.Join(c.data(), "postmaster.pid")
	text, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatalf("a killed server leaves postmaster.pid: %v", err)
	}

	// Its children may outlive it for a moment, and the server refuses to start beside them.
	deadline := time.Now().Add(time.Minute)
	for {
		_, rest, _ := strings.Cut(string(text), "\n")
		if err := os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n%s", stranger.Process.Pid, rest), 0o600); err != nil {
			t.Fatal(err)
		}
		again, err := Start(t.Context(), config)
		if err == nil {
			query(t, again, `select 'it answers'`)
			if err := again.Stop(t.Context(), Fast); err != nil {
				t.Error(err)
			}
			return
		}
		if !strings.Contains(err.Error(), "shared memory") || time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestOtherMajor(t *testing.T) {
	t.Parallel()
	config := testConfig(t)
	if err := os.MkdirAll(filepath.Join(config.Dir, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(config.Dir, "data", "PG_VERSION"), []byte("9\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), config); err == nil || !strings.Contains(err.Error(), "PostgreSQL 9") {
		t.Errorf("got %v", err)
	}
}

// What a server says as it fails to start is in the error.
func TestFailsToStart(t *testing.T) {
	t.Parallel()
	config := testConfig(t)
	config.Settings["shared_buffers"] = "a lot"
	_, err := Start(t.Context(), config)
	if err == nil || !strings.Contains(err.Error(), "shared_buffers") {
		t.Errorf("got %v", err)
	}
}

// An initdb that was cut short leaves nothing that looks like a cluster.
func TestUnfinishedInit(t *testing.T) {
	t.Parallel()
	config := testConfig(t)
	unfinished := filepath.Join(config.Dir, "data.new")
	if err := os.MkdirAll(unfinished, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(unfinished, "PG_VERSION"), []byte("0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	query(t, start(t, config), `select 'it answers'`)
}

func TestFind(t *testing.T) {
	if _, err := Find(7); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "7") {
		t.Errorf("PostgreSQL 7: got %v", err)
	}
	want := testConfig(t).Binaries
	t.Setenv(fmt.Sprint("SEQUIN_PG_", want.Major), want.Dir)
	got, err := Find(want.Major)
	if err != nil || got != want {
		t.Errorf("got %v (%v), want %v", got, err, want)
	}
}
