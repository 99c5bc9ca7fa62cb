package pgtest

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sequin/bridge"
)

// StartBridge runs a bridge in this process, and waits until it captures. The function it returns stops it, and so
// does the end of the test.
func StartBridge(t testing.TB, databaseURL string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	b, err := bridge.New(bridge.Config{DatabaseURL: databaseURL, Log: slog.New(slog.NewTextHandler(testLog{t}, nil)), Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("bridge: %v", err)
				}
			case <-time.After(patience * 30 * time.Second):
				t.Error("bridge: it does not stop")
			}
		})
	}
	t.Cleanup(stop)
	select {
	case <-b.Ready():
	case err := <-done:
		done <- err
		t.Fatalf("bridge: %v", err)
	case <-time.After(patience * 30 * time.Second):
		t.Fatal("bridge: it does not start")
	}
	return stop
}

// testLog writes to a test's log.
type testLog struct{ t testing.TB }

func (l testLog) Write(line []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(line)))
	return len(line), nil
}

var program struct {
	sync.Once
	path string
	err  error
}

// Program builds the program, once, and returns its path.
func Program(t testing.TB) string {
	t.Helper()
	program.Do(func() {
		dir, err := os.MkdirTemp("", "sequin")
		if err != nil {
			program.err = err
			return
		}
		program.path = filepath.Join(dir, "sequin")
		out, err := exec.Command("go", "build", "-o", program.path, "sequin/cmd/sequin").CombinedOutput()
		if err != nil {
			program.err = fmt.Errorf("build the program: %w: %s", err, out)
		}
	})
	if program.err != nil {
		t.Fatal(program.err)
	}
	return program.path
}

// Process is the program, running.
type Process struct {
	t      testing.TB
	Cmd    *exec.Cmd
	exited chan struct{}
	err    error
	mu     sync.Mutex
	log    bytes.Buffer
}

// StartProcess runs the program, and kills it when the test ends.
func StartProcess(t testing.TB, args ...string) *Process {
	t.Helper()
	return startCommand(t, exec.Command(Program(t), args...))
}

func startCommand(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{t: t, Cmd: cmd, exited: make(chan struct{})}
	p.Cmd.Stdout, p.Cmd.Stderr = p, p
	if err := p.Cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.Cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(p.Kill)
	return p
}

// BridgeProcess runs sequin bridge, which may be killed. It does not wait until that captures.
func BridgeProcess(t testing.TB, databaseURL string) *Process {
	t.Helper()
	return StartProcess(t, "bridge", "--database-url", databaseURL)
}

// BridgeProcessEnv is BridgeProcess with environment variables, as NAME=value.
func BridgeProcessEnv(t testing.TB, databaseURL string, env ...string) *Process {
	t.Helper()
	cmd := exec.Command(Program(t), "bridge", "--database-url", databaseURL)
	cmd.Env = append(os.Environ(), env...)
	return startCommand(t, cmd)
}

// DevProcess runs sequin dev, on the PostgreSQL that is tested with. It does not wait until that serves.
func DevProcess(t testing.TB, dir string, args ...string) *Process {
	t.Helper()
	binaries := Binaries(t)
	major := strconv.Itoa(binaries.Major)
	cmd := exec.Command(Program(t), append([]string{"dev", "--dir", dir, "--postgres", major}, args...)...)
	cmd.Env = append(os.Environ(), "SEQUIN_PG_"+major+"="+binaries.Dir)
	return startCommand(t, cmd)
}

func (p *Process) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(line)
}

// Log returns what it has written, to stdout and stderr.
func (p *Process) Log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// AwaitLog waits until a text is in its log, which must be before it ends.
func (p *Process) AwaitLog(text string) {
	p.t.Helper()
	Eventually(p.t, 30*time.Second, func() error {
		var ended bool
		select {
		case <-p.exited:
			ended = true
		default:
		}
		if strings.Contains(p.Log(), text) {
			return nil
		}
		if ended {
			p.t.Fatalf("it ended (%v) before it wrote %q: %s", p.err, text, p.Log())
		}
		return fmt.Errorf("%q is not in the log: %s", text, p.Log())
	})
}

// Kill ends it as a crash does.
func (p *Process) Kill() {
	_ = p.Cmd.Process.Kill()
	<-p.exited
}

// Stop tells it to stop, and returns its exit's error.
func (p *Process) Stop() error {
	p.t.Helper()
	_ = p.Cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
		return p.err
	case <-time.After(patience * 30 * time.Second):
		p.t.Fatalf("it does not stop: %s", p.Log())
		return nil
	}
}

// Exited waits for it to end by itself, and returns its exit's error.
func (p *Process) Exited(within time.Duration) error {
	p.t.Helper()
	select {
	case <-p.exited:
		return p.err
	case <-time.After(patience * within):
		p.t.Fatalf("it does not end: %s", p.Log())
		return nil
	}
}
