package sql

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// alter calls alter_consumer of the consumer c.
func (f *fixture) alter(options string) {
	f.Helper()
	if got := pgtest.Value[string](f.DB, `select sequin.alter_consumer('c', `+options+`)`); got != "altered" {
		f.Fatalf("alter_consumer('c', %s) gives %s", options, got)
	}
}

func TestAlterOptions(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "backoff => '0'")
	for option, value := range map[string]string{
		"ack_wait": "00:00:07", "max_deliver": "3", "max_ack_pending": "17", "backoff": "00:00:02", "max_backoff": "00:01:00",
		"actions": "{insert,update}", "group_by": "{grp}",
	} {
		f.alter(fmt.Sprintf("%s => '%s'", option, value))
		if got := pgtest.Value[string](f.DB, `select `+option+`::text from sequin.consumers`); got != value {
			t.Errorf("%s is %s, want %s", option, got, value)
		}
		if got := pgtest.Value[string](f.DB, fmt.Sprintf(`select sequin.alter_consumer('c', %s => '%s')`, option, value)); got != "unchanged" {
			t.Errorf("the same %s again: %s", option, got)
		}
	}
	f.alter(`max_deliver => 0`)
	if got := pgtest.Value[*int](f.DB, `select max_deliver from sequin.consumers`); got != nil {
		t.Errorf("max_deliver is %d, want null", *got)
	}
	for options, code := range map[string]string{
		`ack_wait => '0'`: "22023", `max_ack_pending => 0`: "22023", `max_deliver => -1`: "22023", `backoff => '-1 s'`: "22023",
		`max_backoff => '1 s'`: "22023", `actions => '{}'`: "22023", `actions => '{upsert}'`: "22023", `group_by => '{nothing}'`: "42703",
		`start_at => 'now'`: "22023", `filter => 'nothing'`: "42703", `transform => 'new.id'`: "42804",
	} {
		if e := f.Error(`select sequin.alter_consumer('c', ` + options + `)`); e.Code != code || e.Hint == "" {
			t.Errorf("%s: %s %s, hint %q, want %s", options, e.Code, e.Message, e.Hint, code)
		}
	}
	if e := f.Error(`select sequin.alter_consumer('e', ack_wait => '1 s')`); e.Code != "42704" || e.Hint == "" {
		t.Errorf("an unknown consumer: %s %s, hint %q", e.Code, e.Message, e.Hint)
	}
}

// A new lease, a new limit of deliveries, hold for what is handed out from then on.
func TestAlterTakesEffect(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "backoff => '0'")
	f.write(inserts(upto(50)...)...)
	first := f.receive(`'c', 5`)
	f.alter(`ack_wait => '1 hour', max_deliver => 1`)
	f.receive(`'c', 5`)
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.deliveries where expires_at > now() + interval '50 minutes'`); n != 5 {
		t.Errorf("%d deliveries have the new ack_wait, want 5", n)
	}
	f.call("nack", ids(first), 5)
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`); n != 5 {
		t.Errorf("%d dead letters, want 5", n)
	}
}

// A lower limit holds as soon as what is out has come back; a higher one at once.
func TestAlterMaxAckPending(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "max_ack_pending => 50")
	f.write(inserts(upto(500)...)...)
	out := f.receive(`'c', 100`)
	if len(out) != 50 {
		t.Fatalf("got %d messages, want 50", len(out))
	}
	f.alter(`max_ack_pending => 10`)
	wantSeqs(t, f.receive(`'c', 100`))
	f.call("ack", ids(out), 50)
	out = f.receive(`'c', 100`)
	if len(out) != 10 {
		t.Fatalf("with the lower limit %d messages, want 10", len(out))
	}
	f.alter(`max_ack_pending => 300`)
	more := f.receive(`'c', 500`)
	if n := len(out) + len(more); n > 300 || n < 200 {
		t.Errorf("with the higher limit %d messages are out, want up to 300", n)
	}
	f.call("ack", ids(append(out, more...)), int64(len(out)+len(more)))
	for len(f.pop(`'c', 500`)) > 0 {
	}
	f.wantClean()
}

// Grouped anew while messages are out, back off, are held back and dead: nothing is lost, nothing comes twice, and
// each is in its new group's order.
func TestAlterGroupBy(t *testing.T) {
	for _, way := range [][2]string{{"", "{grp}"}, {"", "{}"}, {"{grp}", "{note}"}, {"{grp}", "{}"}, {"{}", "{grp,id}"}} {
		from, to := way[0], way[1]
		t.Run(fmt.Sprintf("%s to %s", from, to), func(t *testing.T) {
			f := setup(t, "changes")
			options := []string{"backoff => '0'", "max_deliver => 2"}
			if from != "" {
				options = append(options, "group_by => '"+from+"'")
			}
			f.consumer("c", options...)
			var rows []row
			for i := range 300 {
				rows = append(rows, row{action: "i", key: i % 60, grp: i % 7, note: fmt.Sprint(i % 11)})
			}
			all := f.write(rows...)
			settled := map[int64]bool{}
			done := func(messages ...message) {
				for _, m := range messages {
					if settled[m.Seq] {
						t.Fatalf("message %d was settled twice", m.Seq)
					}
					settled[m.Seq] = true
				}
			}
			before := map[int64]bool{} // handed out already: not in its new group's turn
			receive := func(args string) []message {
				got := f.receive(args)
				for _, m := range got {
					before[m.Seq] = true
				}
				return got
			}
			out := receive(`'c', 60`)
			f.call("ack", ids(out[:10]), 10)
			done(out[:10]...)
			f.call("nack", ids(out[10:20]), 10, "delay => '0'")
			out = out[20:]
			again := receive(`'c', 5`)
			f.call("nack", ids(again), int64(len(again))) // some are dead now
			receive(`'c', 40`)                            // and some forgotten

			f.alter(`group_by => '` + to + `', ack_wait => '100 ms'`)
			f.write(inserts(1000)...)
			all = append(all, f.lastSeq)
			// What was out is still its worker's.
			n := min(5, len(out))
			f.call("ack", ids(out[:n]), int64(n))
			f.call("ack", ids(out[:n]), 0)
			done(out[:n]...)
			f.Exec(`update sequin.delivery set not_before = now(), due_at = case when due_at > '-infinity' then now() else due_at end where not is_done`)
			f.Exec(`select sequin.redrive('c')`)

			group := func(m message) string {
				r := row{key: 1000}
				if m.Seq < f.lastSeq {
					r = rows[slices.Index(all, m.Seq)]
				}
				return map[string]string{"{grp}": fmt.Sprint(r.grp), "{}": "", "{grp,id}": fmt.Sprint(r.grp, r.key), "{note}": r.note}[to]
			}
			deadline := time.Now().Add(20 * time.Second)
			newest := map[string]int64{}
			for len(settled) < len(all) {
				if time.Now().After(deadline) {
					t.Fatalf("%d of %d messages", len(settled), len(all))
				}
				f.tend()
				for range 3 {
					got := f.receive(`'c', 17, ack_wait => '1 minute'`)
					for _, m := range got {
						g := group(m)
						if before[m.Seq] {
							continue
						}
						if newest[g] > m.Seq {
							t.Errorf("message %d of group %s came after %d", m.Seq, g, newest[g])
						}
						newest[g] = m.Seq
					}
					f.call("ack", ids(got), int64(len(got)))
					done(got...)
				}
				f.Exec(`select sequin.redrive('c')`)
			}
			f.wantClean()
		})
	}
}

// Other actions from now on; what has been chosen already stays.
func TestAlterActions(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	first := f.write(row{action: "i", key: 1}, row{action: "u", key: 2}, row{action: "d", key: 3}, row{action: "t"})
	out := f.receive(`'c', 1`)
	wantSeqs(t, out, first[0])
	f.alter(`actions => '{update,truncate}'`)
	next := f.write(row{action: "i", key: 4}, row{action: "u", key: 5}, row{action: "t"})
	f.call("ack", ids(out), 1)
	got := f.pop(`'c', 10`)
	wantSeqsInAnyOrder(t, got, first[1], first[3], next[1], next[2])
	f.alter(`actions => '{insert,update,delete}'`)
	last := f.write(row{action: "i", key: 6}, row{action: "t"})
	wantSeqs(t, f.pop(`'c', 10`), last[0])
	f.wantClean()
}

// awaitLock waits until what a connection runs waits for a lock.
func (f *fixture) awaitLock(conn *pgx.Conn) {
	f.Helper()
	pgtest.Eventually(f.TB, 10*time.Second, func() error {
		if pgtest.Value[int](f.DB, `select count(*) from pg_stat_activity where pid = $1 and wait_event_type = 'Lock'`, conn.PgConn().PID()) == 0 {
			return errors.New("it waits for no lock")
		}
		return nil
	})
}

// An ack that begins before alter_consumer is through counts, though its lane is no more afterwards.
func TestAckMeetsAlter(t *testing.T) {
	for name, count := range map[string]int{"whole lease": 1, "part of a lease": 1000} {
		t.Run(name, func(t *testing.T) {
			f := setup(t, "changes")
			f.consumer("c")
			f.write(inserts(upto(count)...)...)
			got := f.receive(fmt.Sprintf(`'c', %d`, count))
			// Grouped by nothing, lane 0 is the only one.
			late := slices.IndexFunc(got, func(m message) bool { return m.AckID>>14&63 > 0 })
			tx := f.begin("")
			f.execIn(tx, `select sequin.alter_consumer('c', group_by => '{}')`)
			worker := f.Connect()
			acked := make(chan int)
			go func() {
				var n int
				if err := worker.QueryRow(context.Background(), `select sequin.ack('c', array[$1::bigint])`, got[late].AckID).Scan(&n); err != nil {
					f.TB.Errorf("ack: %v", err)
				}
				acked <- n
			}()
			f.awaitLock(worker)
			f.end(tx.Commit)
			if n := <-acked; n != 1 {
				t.Errorf("%d counted", n)
			}
			f.call("ack", ids(slices.Delete(got, late, late+1)), int64(count-1))
			f.wantClean()
			f.alter(`group_by => '{id}'`)
			next := f.write(inserts(count+1, count+2)...)
			wantSeqsInAnyOrder(t, f.pop(`'c', 10`), next...)
			f.wantClean()
		})
	}
}

// What is put back while the consumer is altered goes to the lanes that it has by then; where it is dropped, that is said.
func TestPutBackMeetsAlter(t *testing.T) {
	for name, call := range map[string]string{
		"republish": `select sequin.republish('c', 'table sequin.messages')`,
		"redrive":   `select sequin.redrive('c')`,
	} {
		for _, isDropped := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, dropped: %t", name, isDropped), func(t *testing.T) {
				f := setup(t, "changes")
				f.consumer("c", "max_deliver => 1")
				all := f.write(inserts(upto(300)...)...)
				got := f.receive(`'c', 300`)
				if name == "redrive" {
					f.call("nack", ids(got), int64(len(all)))
				} else {
					f.call("ack", ids(got), int64(len(all)))
				}
				// A worker has a lane. The change waits for it, and then what is put back for the change.
				worker := f.begin("")
				f.execIn(worker, `select pg_advisory_xact_lock(sequin._lane_key('c', 40::smallint))`)
				start := func(sql string) <-chan error {
					conn, done := f.Connect(), make(chan error, 1)
					go func() {
						_, err := conn.Exec(context.Background(), sql)
						done <- err
					}()
					f.awaitLock(conn)
					return done
				}
				if isDropped {
					put := start(call)
					f.Exec(`select sequin.drop_consumer('c')`)
					f.end(worker.Commit)
					if e := pgError(t, <-put); e.Code != pgerrcode.UndefinedObject {
						t.Errorf("%s: %v", call, e)
					}
					return
				}
				altered := start(`select sequin.alter_consumer('c', group_by => '{}')`)
				put := start(call)
				f.end(worker.Commit)
				if err := errors.Join(<-altered, <-put); err != nil {
					t.Fatal(err)
				}
				wantSeqs(t, f.drain(), all...)
				f.wantClean()
			})
		}
	}
}

// Workers and alter_consumer get on with each other: each message once, whatever its shape at the time.
func TestAlterUnderWay(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(inserts(upto(2000)...)...)
	conn := f.Connect()
	altered := make(chan int)
	stop := make(chan struct{})
	go func() {
		n := 0
		defer func() { altered <- n }()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			options := []string{`group_by => '{grp}'`, `group_by => '{}'`, `max_ack_pending => 20`, `group_by => '{id}'`, `max_ack_pending => 5000`}[i%5]
			if _, err := conn.Exec(context.Background(), `select sequin.alter_consumer('c', `+options+`)`); err != nil {
				f.TB.Errorf("%s: %v", options, err)
				return
			}
			n++
			time.Sleep(50 * time.Millisecond) // it keeps the workers from all there is, each time
		}
	}()
	seen := make(chan []int64, 4)
	done := make(chan struct{})
	for range 4 {
		worker := f.Connect()
		go func() {
			var mine []int64
			defer func() { seen <- mine }()
			for {
				select {
				case <-done:
					return
				default:
				}
				got := f.receiveIn(worker, `'c', 9, '20 ms'`)
				if len(got) == 0 {
					continue
				}
				var n int
				if err := worker.QueryRow(context.Background(), `select sequin.ack('c', $1)`, ids(got)).Scan(&n); err != nil || n != len(got) {
					f.TB.Errorf("ack counted %d of %d: %v", n, len(got), err)
					return
				}
				mine = append(mine, seqs(got)...)
			}
		}()
	}
	left := ""
	for deadline := time.Now().Add(4 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		left = pgtest.Value[string](f.DB, `select coalesce((select s::text from sequin.consumer_status s where pending > 0 or in_flight > 0), '')`)
		if left == "" {
			break
		}
	}
	close(done)
	var got []int64
	for range 4 {
		got = append(got, <-seen...)
	}
	close(stop)
	if left != "" {
		t.Errorf("left over: %s", left)
	}
	if n := <-altered; n < 5 {
		t.Errorf("altered %d times only", n)
	}
	slices.Sort(got)
	if !slices.Equal(got, all) {
		t.Errorf("%d messages were delivered, %d of them once, want %d", len(got), len(slices.Compact(got)), len(all))
	}
}

func TestDropConsumer(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "backoff => '0'")
	f.consumer("feed", "actions => '{insert}'")
	f.write(inserts(upto(5000)...)...)
	got := f.receive(`'c', 100`)
	f.call("nack", ids(got[:50]), 50)
	open := f.begin("")
	if got := f.receiveIn(open, `'c', 100`); len(got) < 60 { // of both kinds
		t.Fatalf("in an open transaction %d messages", len(got))
	}
	began := time.Now()
	for _, name := range []string{"c", "feed"} {
		if got := pgtest.Value[string](f.DB, `select sequin.drop_consumer($1)`, name); got != "dropped" {
			t.Errorf("drop_consumer gives %s", got)
		}
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("dropping took %s", took)
	}
	f.end(open.Commit)
	for _, call := range []string{`select * from sequin.receive('c')`, `select sequin.ack('c', '{1}')`, `select sequin.drop_consumer('c')`} {
		if e := f.Error(call); e.Code != "42704" {
			t.Errorf("%s: %s %s", call, e.Code, e.Message)
		}
	}
	if got := pgtest.Value[string](f.DB, `select sequin.drop_consumer('c', if_exists => true)`); got != "absent" {
		t.Errorf("drop_consumer(if_exists) gives %s", got)
	}
	// Not even what a transaction that was open meanwhile has left.
	f.Exec(`select sequin.bridge_sample()`)
	for _, table := range []string{"lane", "floor", "delivery", "held_group", "dead_letter", "consumer_sample"} {
		if n := pgtest.Value[int](f.DB, `select count(*) from sequin.`+table); n != 0 {
			t.Errorf("%d rows are left in sequin.%s", n, table)
		}
	}
	f.consumer("c")
	all := f.write(inserts(1)...)
	wantSeqs(t, f.receive(`'c', 10`), all...)
}

// 'now' is when the consumer was made, in commits, wherever the bridge is.
func TestStartsNow(t *testing.T) {
	f := setup(t, "changes")
	for _, options := range []string{"", ", group_by => '{}'", ", group_by => '{grp}'"} {
		before := pgtest.Value[string](f.DB, `select pg_current_wal_insert_lsn()::text`)
		f.Exec(`create table if not exists noise (n int); insert into noise values (1)`) // the log moves on
		f.Exec(fmt.Sprintf(`select sequin.create_consumer('c', 's'%s)`, options))
		if state := pgtest.Value[string](f.DB, `select state from sequin.consumers`); state != "starting" {
			t.Errorf("it is %s, want starting", state)
		}
		wantSeqs(t, f.receive(`'c', 10`))
		// The bridge was behind: what it writes now was committed before.
		f.Exec(`update sequin.consumer set start_lsn = pg_current_wal_insert_lsn()`)
		f.writeAt(before, inserts(1, 2)...)
		f.Exec(`insert into noise values (1)`)
		after := f.write(inserts(1, 3)...)
		wantSeqsInAnyOrder(t, f.pop(`'c', 10`), after...)
		if state := pgtest.Value[string](f.DB, `select state from sequin.consumers`); state != "active" {
			t.Errorf("it is %s, want active", state)
		}
		f.wantClean()
		f.Exec(`select sequin.drop_consumer('c')`)
	}
}
