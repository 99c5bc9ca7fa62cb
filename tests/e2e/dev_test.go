package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// devDir returns a directory that is not there yet, where the server's user can get.
func devDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dev")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "a", "b")
}

var psqlLine = regexp.MustCompile(`(?m)^  \S*psql (postgres://\S+)$`)

// connect connects as sequin dev says one can.
func connect(t *testing.T, p *pgtest.Process) *pgx.Conn {
	t.Helper()
	p.AwaitLog("Control-C stops it")
	m := psqlLine.FindStringSubmatch(p.Log())
	if m == nil {
		t.Fatalf("it does not say how to connect: %s", p.Log())
	}
	conn, err := pgx.Connect(t.Context(), m[1])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// typeGreeting runs the statements that sequin dev suggests, and returns how many rows the last one has.
func typeGreeting(t *testing.T, p *pgtest.Process, conn *pgx.Conn) int64 {
	t.Helper()
	_, text, _ := strings.Cut(p.Log(), "To try it:")
	text, _, _ = strings.Cut(text, "Control-C")
	var count int64
	for _, sql := range strings.Split(strings.TrimSpace(text), ";\n") {
		tag, err := conn.Exec(t.Context(), sql)
		if err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
		count = tag.RowsAffected()
	}
	return count
}

// What sequin dev prints is what one can type, and it stops cleanly, with what is in it there the next time.
func TestDev(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	first := pgtest.DevProcess(t, dir)
	conn := connect(t, first)
	if n := typeGreeting(t, first, conn); n != 2 {
		t.Errorf("what it says to try received %d messages, not 2", n)
	}
	url := psqlLine.FindStringSubmatch(first.Log())[1]

	second := pgtest.DevProcess(t, dir)
	if err := second.Exited(30 * time.Second); err == nil {
		t.Error("a second one in its directory is not refused")
	}
	if want := "process " + strconv.Itoa(first.Cmd.Process.Pid); !strings.Contains(second.Log(), want) || !strings.Contains(second.Log(), "--dir") {
		t.Errorf("the refusal does not name %s and --dir: %s", want, second.Log())
	}

	if err := first.Stop(); err != nil {
		t.Fatalf("told to stop, it ended with %v: %s", err, first.Log())
	}
	if _, err := os.Stat(filepath.Join(dir, "data", "postmaster.pid")); !os.IsNotExist(err) {
		t.Errorf("the server was not stopped (%v)", err)
	}

	third := pgtest.DevProcess(t, dir)
	conn = connect(t, third)
	if got := psqlLine.FindStringSubmatch(third.Log())[1]; got != url {
		t.Errorf("its address was %s and now is %s", url, got)
	}
	var count int
	if err := conn.QueryRow(t.Context(), `select count(*) from orders`).Scan(&count); err != nil || count != 2 {
		t.Errorf("orders has %d rows (%v), not 2", count, err)
	}
	if _, err := conn.Exec(t.Context(), `insert into orders (item) values ('table')`); err != nil {
		t.Fatal(err)
	}
	tag, err := conn.Exec(t.Context(), `select * from sequin.pop(wait => '10s')`)
	if err != nil || tag.RowsAffected() != 1 {
		t.Errorf("pop gives %d messages (%v)", tag.RowsAffected(), err)
	}
	if err := third.Cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := third.Exited(30 * time.Second); err != nil {
		t.Errorf("interrupted, it ended with %v: %s", err, third.Log())
	}
}

// Killed, it leaves no server behind, and starts again where it was.
func TestDevKilled(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	first := pgtest.DevProcess(t, dir)
	typeGreeting(t, first, connect(t, first))
	pid := serverPID(t, dir)
	first.Kill()
	pgtest.Eventually(t, 30*time.Second, func() error {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("the server is still there, process %d (%v)", pid, err)
		}
		return nil
	})
	again := pgtest.DevProcess(t, dir)
	var count int
	err := connect(t, again).QueryRow(t.Context(), `select count(*) from orders`).Scan(&count)
	if err != nil || count != 2 {
		t.Errorf("orders has %d rows (%v), not 2", count, err)
	}
	if err := again.Stop(); err != nil {
		t.Errorf("told to stop, it ended with %v: %s", err, again.Log())
	}
}

// A server that dies ends it, with where to look.
func TestDevServerDies(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	p := pgtest.DevProcess(t, dir)
	_ = connect(t, p)
	if err := syscall.Kill(serverPID(t, dir), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := p.Exited(30 * time.Second); err == nil {
		t.Error("it ended with 0")
	}
	if want := filepath.Join(dir, "postgres.log"); !strings.Contains(p.Log(), want) {
		t.Errorf("it does not name %s: %s", want, p.Log())
	}
}

func serverPID(t *testing.T, dir string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "data", "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
