package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// world is a server, a bridge and the network between them, and writers that a trigger writes an audit of.
type world struct {
	t       *testing.T
	random  *rand.Rand
	cluster *localpg.Cluster
	network *pgtest.Network
	db      *pgtest.DB
	audit   *pgtest.Audit
	url     string // of the database, over the network
	bridge  *pgtest.Process
}

// senderTimeout is the server's patience with a bridge that has fallen silent.
const senderTimeout = 3 * time.Second

// faults are what can happen to a world, each undone when it returns.
var faults = []struct {
	name   string
	happen func(w *world)
}{
	{"bridge killed", func(w *world) {
		w.bridge.Kill()
		w.bridge = pgtest.BridgeProcess(w.t, w.url)
	}},
	{"bridge told to stop", func(w *world) {
		if err := w.bridge.Stop(); err != nil {
			w.t.Errorf("it ended with %v: %s", err, w.bridge.Log())
		}
		w.bridge = pgtest.BridgeProcess(w.t, w.url)
	}},
	{"bridge frozen for longer than wal_sender_timeout", func(w *world) { w.freeze(senderTimeout + time.Second) }},
	{"bridge frozen for a moment", func(w *world) { w.freeze(time.Duration(w.random.IntN(500)) * time.Millisecond) }},
	{"server crashes", func(w *world) { w.restart(localpg.Immediate) }},
	{"server stops fast", func(w *world) { w.restart(localpg.Fast) }},
	{"server stops smart", func(w *world) { w.restart(localpg.Smart) }},
	{"walsender ended", func(w *world) { w.terminate("sequin bridge") }},
	{"log writer ended", func(w *world) { w.terminate("sequin log writer%") }},
	{"catalog connection ended", func(w *world) { w.terminate("sequin catalog") }},
	{"watch connection ended", func(w *world) { w.terminate("sequin watch") }},
	{"every connection ended", func(w *world) { w.terminate("sequin%") }},
	{"network cut", func(w *world) { w.disturb(pgtest.Cut) }},
	{"network reset", func(w *world) { w.disturb(pgtest.Reset) }},
	{"network half open", func(w *world) { w.disturb(pgtest.HalfOpen) }},
	{"network silent", func(w *world) { w.disturb(pgtest.Silent) }},
	{"network that ends connections in the middle", func(w *world) { w.disturb(pgtest.Limited) }},
	{"network in small pieces", func(w *world) { w.disturb(pgtest.Sliced) }},
	{"network slow", func(w *world) { w.disturb(pgtest.Slow) }},
}

// moments are when it happens.
var moments = []struct {
	name  string
	await func(w *world)
}{
	{"idle", func(w *world) {
		w.audit.Pause()
		w.caughtUp()
	}},
	{"under load", func(w *world) { time.Sleep(time.Duration(w.random.IntN(300)) * time.Millisecond) }}, // a random moment is the point
	{"in the middle of a large transaction", func(w *world) {
		w.audit.Large(40_000)                                            // goes on in a draft
		time.Sleep(time.Duration(w.random.IntN(500)) * time.Millisecond) // a random moment is the point
	}},
	{"between a commit of the log and its confirmation", func(w *world) {
		before := w.step()
		pgtest.Eventually(w.t, time.Minute, func() error {
			if w.step() == before {
				return fmt.Errorf("the log is where it was")
			}
			return nil
		})
	}},
}

// Whatever happens, and whenever: the log has every change that was committed, once, in order, in whole transactions.
func TestMatrix(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	w := newWorld(t, seed)
	rounds := pgtest.Rounds(t, 8)
	deck := w.deck()
	for round := range rounds {
		if round > 0 && round%len(deck) == 0 {
			deck = w.deck()
		}
		fault, moment := faults[deck[round%len(deck)]/len(moments)], moments[deck[round%len(deck)]%len(moments)]
		began := time.Now()
		t.Logf("round %d: %s, %s", round, fault.name, moment.name)
		moment.await(w)
		fault.happen(w)
		w.audit.Resume()
		w.caughtUp()
		t.Logf("caught up after %s", time.Since(began).Round(time.Millisecond))
		if round%10 == 9 {
			w.audit.Pause()
			w.audit.Check(t, time.Minute)
			w.audit.Resume()
		}
	}
	w.audit.Stop()
	w.audit.Check(t, time.Minute)
	if n := pgtest.Value[int](w.db, `select count(*) from sequin.gap`); n != 0 {
		t.Errorf("%d gaps were recorded", n)
	}
	if err := w.bridge.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, w.bridge.Log())
	}
}

func newWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	w := &world{t: t, random: rand.New(rand.NewPCG(seed, 2000))}
	w.cluster = pgtest.NewCluster(t, map[string]string{"wal_sender_timeout": fmt.Sprintf("%dms", senderTimeout.Milliseconds())})
	w.db = pgtest.NewOn(t, w.cluster)
	w.audit = pgtest.NewAudit(w.db, seed)
	w.network = pgtest.NewNetwork(t, w.cluster)
	w.url = w.network.URL(t, w.db)
	w.bridge = pgtest.BridgeProcess(t, w.url)
	w.bridge.AwaitLog("msg=capturing")
	w.audit.Start(3, 5*time.Millisecond)
	return w
}

// deck is every fault at every moment, shuffled.
func (w *world) deck() []int { return w.random.Perm(len(faults) * len(moments)) }

func (w *world) freeze(span time.Duration) {
	_ = w.bridge.Cmd.Process.Signal(syscall.SIGSTOP)
	time.Sleep(span) // being frozen for so long is the point
	_ = w.bridge.Cmd.Process.Signal(syscall.SIGCONT)
}

func (w *world) restart(mode localpg.StopMode) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if mode == localpg.Smart {
		// It waits for everybody to leave, which a bridge does not do; the next signal ends that.
		soon, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
		_ = w.cluster.Stop(soon, mode)
		cancel()
		mode = localpg.Fast
	}
	began := time.Now()
	if err := w.cluster.Stop(ctx, mode); err != nil {
		w.t.Fatal(err)
	}
	if took := time.Since(began); took > 10*time.Second {
		w.t.Errorf("the server took %s to stop: %s", took, w.bridge.Log())
	}
	if err := w.cluster.Start(ctx); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) terminate(applicationName string) {
	w.db.Exec(`select pg_terminate_backend(pid) from pg_stat_activity where application_name like $1 and pid <> pg_backend_pid()`, applicationName)
}

func (w *world) disturb(fault pgtest.Fault) {
	w.network.Set(fault)
	time.Sleep(time.Duration(100+w.random.IntN(900)) * time.Millisecond) // lasting for a while is the point
	w.network.Set(pgtest.Whole)
}

func (w *world) step() int64 {
	var step int64
	_ = w.db.Pool.QueryRow(context.Background(), `select max(step) from sequin.progress`).Scan(&step)
	return step
}

// caughtUp waits until the log has what is committed by now.
func (w *world) caughtUp() {
	w.t.Helper()
	var want string
	pgtest.Eventually(w.t, time.Minute, func() error {
		return w.db.Pool.QueryRow(context.Background(),
			`insert into item (id, writer, step) values (-1 - (select count(*) from audit), -1, 0) returning id::text`).Scan(&want)
	})
	began := time.Now()
	pgtest.Eventually(w.t, time.Minute, func() error {
		var isThere bool
		err := w.db.Pool.QueryRow(context.Background(), `select exists (select from sequin.messages where stream = 'items' and record_pk = $1)`, want).Scan(&isThere)
		if err == nil && !isThere {
			err = fmt.Errorf("the log does not have %s after %s; the bridge: %s", want, time.Since(began), tail(w.bridge.Log()))
		}
		return err
	})
}

func tail(log string) string {
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// A bridge that is frozen while another takes over can write nothing more when it wakes.
func TestFrozenBridgeIsFenced(t *testing.T) {
	t.Parallel()
	w := newWorld(t, pgtest.Seed(t))
	for range pgtest.Rounds(t, 1) {
		other := pgtest.BridgeProcess(t, w.url)
		other.AwaitLog("standing by")
		w.audit.Large(40_000)
		_ = w.bridge.Cmd.Process.Signal(syscall.SIGSTOP)
		other.AwaitLog("msg=capturing")
		// The server takes a moment to end the other's.
		pgtest.Eventually(t, 10*time.Second, func() error {
			if n := pgtest.Value[int](w.db, `select count(*) from pg_stat_activity where application_name like 'sequin log writer%'`); n != 1 {
				return fmt.Errorf("%d log writers are connected", n)
			}
			return nil
		})
		_ = w.bridge.Cmd.Process.Signal(syscall.SIGCONT)
		w.bridge.AwaitLog("standing by")
		frozen := w.bridge
		w.bridge = other
		w.caughtUp()
		if err := frozen.Stop(); err != nil {
			t.Errorf("it ended with %v: %s", err, frozen.Log())
		}
	}
	w.audit.Stop()
	w.audit.Check(t, time.Minute)
}

// A network that falls silent is noticed, by itself and well before TCP gives up; and a bridge that gets no answer at all does
// not take the slot from itself for good.
func TestSilentNetwork(t *testing.T) {
	t.Parallel()
	w := newWorld(t, pgtest.Seed(t))
	for range pgtest.Rounds(t, 1) {
		w.network.Set(pgtest.Silent)
		w.bridge.AwaitLog("capture was interrupted")
		w.network.Set(pgtest.Whole)
		w.caughtUp()
	}
	w.audit.Stop()
	w.audit.Check(t, time.Minute)
}
