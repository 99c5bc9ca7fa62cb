package localpg

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// Config is what a Cluster needs.
type Config struct {
	Binaries Binaries
	Dir      string            // of the cluster: made where it does not exist
	Settings map[string]string // of the server, beside those that Sequin needs
	Port     int               // default: a free one
	Log      *slog.Logger      // default: slog.Default()
}

// Cluster is a running server.
type Cluster struct {
	config Config
	owner  owner
	cmd    *exec.Cmd
	exited chan struct{} // closed when the server has ended
}

// User is the superuser of a Cluster. It is let in without a password, from this machine only.
const User = "postgres"

const startTimeout = 60 * time.Second

// ErrRunning is returned where a server runs in the directory already.
var ErrRunning = errors.New("a server is running in this directory already")

// Start starts a server, on loopback, with wal_level logical. A new directory is made a cluster first.
func Start(ctx context.Context, config Config) (*Cluster, error) {
	c := &Cluster{config: config}
	c.config.Log = cmp.Or(config.Log, slog.Default())
	var err error
	if c.config.Dir, err = filepath.Abs(config.Dir); err != nil {
		return nil, err
	}
	if c.owner, err = findOwner(); err != nil {
		return nil, err
	}
	if err := c.owner.reach(c.config.Binaries.Dir); err != nil {
		return nil, err
	}
	if err := c.init(ctx); err != nil {
		return nil, err
	}
	if err := c.checkFree(); err != nil {
		return nil, err
	}
	if err := c.Start(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Cluster) data() string { return filepath.Join(c.config.Dir, "data") }

// MajorOf returns the major version that a directory's cluster was made by, 0 where there is none.
func MajorOf(dir string) (int, error) {
	text, err := os.ReadFile(filepath.Join(dir, "data", "PG_VERSION"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look into %s: %w", dir, err)
	}
	major, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("look into %s: it was made by PostgreSQL %s", dir, bytes.TrimSpace(text))
	}
	return major, nil
}

// init makes the directory a cluster, whole or not at all.
func (c *Cluster) init(ctx context.Context) error {
	major, err := MajorOf(c.config.Dir)
	if err != nil {
		return err
	}
	if major > 0 && major != c.config.Binaries.Major {
		return fmt.Errorf("%s was made by PostgreSQL %d, and this is %d: use that, or another directory",
			c.config.Dir, major, c.config.Binaries.Major)
	}
	if major > 0 {
		return nil
	}
	if err := os.MkdirAll(c.config.Dir, 0o755); err != nil {
		return err
	}
	if err := c.owner.give(c.config.Dir); err != nil {
		return err
	}
	unfinished := c.data() + ".new"
	if err := os.RemoveAll(unfinished); err != nil {
		return err
	}
	args := []string{"--pgdata", unfinished, "--username", User, "--auth", "trust", "--encoding", "UTF8", "--locale", "C"}
	if c.config.Settings["fsync"] == "off" {
		args = append(args, "--no-sync")
	}
	cmd := exec.CommandContext(ctx, filepath.Join(c.config.Binaries.Dir, "initdb"), args...)
	c.owner.run(cmd)
	cmd.Dir = c.config.Dir
	// It ends with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run initdb: %w: %s", err, bytes.TrimSpace(out))
	}
	return os.Rename(unfinished, c.data())
}

// checkFree refuses a directory whose server runs, and sees to it that what a killed one has left does not look so.
func (c *Cluster) checkFree() error {
	pidFile := filepath.Join(c.data(), "postmaster.pid")
	text, err := os.ReadFile(pidFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for a running server: %w", err)
	}
	line, rest, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return nil //nolint:nilerr // the server judges it
	}
	alive, ours := c.serverAt(pid)
	switch {
	case ours:
		return fmt.Errorf("%w: %s, process %d", ErrRunning, c.config.Dir, pid)
	case !alive:
		return nil
	}
	// Someone else has that number now, and the server would take that for a server. Its parent it does not. The rest
	// of the file stays: with it the server finds out whether the killed one's children are still at work.
	return os.WriteFile(pidFile, fmt.Appendf(nil, "%d\n%s", os.Getpid(), rest), 0o600)
}

// serverAt tells whether a process is alive, and whether it is this cluster's server.
func (c *Cluster) serverAt(pid int) (alive, ours bool) {
	if pid <= 0 || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return false, false
	}
	cwd, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "cwd"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		// This system does not tell, or not about another user's.
		_, procErr := os.Stat("/proc/self")
		return true, procErr != nil
	}
	data, err := filepath.EvalSymlinks(c.data())
	return true, err == nil && cwd == data
}

// Start starts the server again after a Stop, on the port it had.
func (c *Cluster) Start(ctx context.Context) error {
	if c.config.Port == 0 {
		port, err := freePort()
		if err != nil {
			return err
		}
		c.config.Port = port
	}
	settings := map[string]string{
		"listen_addresses":        "127.0.0.1",
		"port":                    strconv.Itoa(c.config.Port),
		"unix_socket_directories": c.socketDir(),
		"wal_level":               "logical",
		"logging_collector":       "off",
	}
	maps.Copy(settings, c.config.Settings)
	args := []string{"-D", c.data()}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	logFile, err := os.OpenFile(c.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	c.cmd = exec.Command(filepath.Join(c.config.Binaries.Dir, "postgres"), args...)
	c.owner.run(c.cmd)
	c.cmd.Dir = c.config.Dir
	c.cmd.Stdout, c.cmd.Stderr = logFile, logFile
	c.exited = make(chan struct{})
	started := make(chan error)
	go func(cmd *exec.Cmd, exited chan struct{}) {
		// The server ends with the thread that started it: this one, which lasts as long as it does.
		runtime.LockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}(c.cmd, c.exited)
	if err := <-started; err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	return c.await(ctx)
}

// await waits until the server takes connections.
func (c *Cluster) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		conn, err := pgx.Connect(ctx, c.URL("postgres"))
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-c.exited:
			return fmt.Errorf("the server ended as it started: %s", c.lastWords())
		case <-ctx.Done():
			stopErr := c.Stop(context.WithoutCancel(ctx), Immediate)
			return errors.Join(fmt.Errorf("wait for the server: %w", err), stopErr)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// lastWords returns the end of the server's log.
func (c *Cluster) lastWords() string {
	text, err := os.ReadFile(c.LogFile())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

// socketDir returns where the server's socket is: beside its data, unless that path is too long for one.
func (c *Cluster) socketDir() string {
	if len(c.config.Dir) < 80 {
		return c.config.Dir
	}
	return ""
}

// URL returns the superuser's address of a database.
func (c *Cluster) URL(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.User(User), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(c.config.Port)),
		Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// LogFile returns where the server writes its log.
func (c *Cluster) LogFile() string { return filepath.Join(c.config.Dir, "postgres.log") }

// Binaries returns what the server was started from.
func (c *Cluster) Binaries() Binaries { return c.config.Binaries }

// Port returns the port that the server listens on.
func (c *Cluster) Port() int { return c.config.Port }

// Dir returns the cluster's directory.
func (c *Cluster) Dir() string { return c.config.Dir }

// PID returns the server's process.
func (c *Cluster) PID() int { return c.cmd.Process.Pid }

// Exited returns a channel that is closed when the server has ended.
func (c *Cluster) Exited() <-chan struct{} { return c.exited }

// StopMode is how to stop a server.
type StopMode syscall.Signal

// The ways to stop: waiting for everyone to leave, sending everyone away, or at once as in a crash.
const (
	Smart     = StopMode(syscall.SIGTERM)
	Fast      = StopMode(syscall.SIGINT)
	Immediate = StopMode(syscall.SIGQUIT)
)

// Stop stops the server, and waits for its end.
func (c *Cluster) Stop(ctx context.Context, mode StopMode) error {
	select {
	case <-c.exited:
		return nil
	default:
	}
	if err := c.cmd.Process.Signal(syscall.Signal(mode)); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop the server: %w", err)
	}
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the server to stop: %w", ctx.Err())
	}
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
