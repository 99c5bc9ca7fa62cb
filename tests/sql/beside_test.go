package sql

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// endSegment has the log go on in a second segment, so that the first may be dropped once nobody needs it.
func (f *fixture) endSegment() {
	f.Helper()
	f.Exec(`select sequin._open_segment(1);
		update sequin.setting set keep = '0';
		update sequin.log_segment set closed_at = now() - interval '1 hour' where id = 0`)
	f.lastSeq = 1 << 32
}

// Who waits keeps nobody from dropping a segment of the log.
func TestWaitingHoldsNoLog(t *testing.T) {
	for _, call := range []string{
		`select count(*) from sequin.receive('c', 10, '60 s')`, `select count(*) from sequin.pop('c', 10, '60 s')`,
		`select count(*) from sequin.receive(wait => '60 s')`,
	} {
		t.Run(call, func(t *testing.T) {
			f := setup(t, "changes")
			f.consumer("c")
			f.write(inserts(1, 2, 3)...)
			f.drain()
			f.endSegment()
			f.write(inserts(1000)...)
			f.drain()
			f.tend()
			ctx, cancel := context.WithCancel(t.Context())
			conn := f.Connect()
			ended := make(chan error, 1)
			go func() {
				var n int
				ended <- conn.QueryRow(ctx, call).Scan(&n)
			}()
			pgtest.Eventually(t, 10*time.Second, func() error {
				return want(pgtest.Value[int](f.DB, `select count(*) from pg_stat_activity where pid = $1 and state = 'active' and wait_event is not null`,
					conn.PgConn().PID()), 1)
			})
			if got := pgtest.Value[*int](f.DB, `select sequin.bridge_retain(1, '5 seconds')`); got == nil || *got != 0 {
				t.Errorf("dropped %v beside one who waits, want segment 0", got)
			}
			select {
			case err := <-ended:
				t.Errorf("it waits no longer: %v", err)
			default:
			}
			cancel()
			<-ended
		})
	}
}

// A message that backs off is kept by itself: the log is not kept for it.
func TestBackingOffHoldsNoLog(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	f.write(inserts(1)...)
	f.call("nack", ids(f.receive(`'c', 10`)), 1, `'1 hour'`)
	f.write(inserts(2, 3)...)
	f.call("ack", ids(f.receive(`'c', 10`)), 2)
	f.endSegment()
	f.write(inserts(4)...)
	f.call("ack", ids(f.receive(`'c', 10`)), 1)
	f.tend()
	if got := pgtest.Value[*int](f.DB, `select sequin.bridge_retain(1)`); got == nil || *got != 0 {
		t.Errorf("dropped %v, want segment 0", got)
	}
	f.Exec(`update sequin.delivery set not_before = now(), due_at = now()`)
	f.call("ack", ids(f.receive(`'c', 10`)), 1)
	f.wantClean()
}

// A worker's transaction that has acknowledged a lease, and stays open, keeps no other worker waiting: also where it did not get
// the lane's lock, as another had it for a message of its own.
func TestOpenAckKeepsNobodyWaiting(t *testing.T) {
	for _, lease := range []string{"1 second", "60 seconds"} {
		t.Run(lease, func(t *testing.T) {
			f := setup(t, "changes")
			f.consumer("c", "backoff => '10 ms'", "ack_wait => '"+lease+"'")
			inLane := func(key int) row { return row{action: "i", key: key, hash: int32(64 * key)} }
			f.write(inLane(1))
			f.call("nack", ids(f.receive(`'c', 1`)), 1, `'200 ms'`)
			f.write(inLane(2))
			second := f.receive(`'c', 1`)
			wantLen(t, second, 1)
			f.Exec(`update sequin.delivery set not_before = now(), due_at = now()`)
			other, open := f.begin(""), f.begin("")
			wantLen(t, f.receiveIn(other, `'c', 1`), 1) // has the lane's lock
			f.callIn(open, "ack", ids(second), 1)
			f.write(inLane(3))
			f.end(other.Commit)
			if lease == "1 second" {
				f.Exec(`select pg_sleep(1.1)`)
			} else {
				f.Exec(`select pg_sleep(0.2)`) // a lease so old may be overtaken
			}
			for _, call := range []string{`'c', 10`, `'c', 10, '10 ms'`} {
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				var n int
				if err := f.Pool.QueryRow(ctx, `select count(*) from sequin.receive(`+call+`)`).Scan(&n); err != nil {
					t.Errorf("receive(%s) waits for another worker: %v", call, err)
				}
				cancel()
			}
			f.end(open.Commit)
		})
	}
}

func wantLen(t testing.TB, got []message, want int) {
	t.Helper()
	if len(got) != want {
		t.Fatalf("got %d messages, want %d", len(got), want)
	}
}

// A consumer that is dropped while a worker's call waits for another's: it ends, and says so.
func TestDroppedBesideAck(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "backoff => '1 ms'")
	f.write(inserts(1)...)
	f.call("nack", ids(f.receive(`'c', 1`)), 1, `'0'`)
	got := f.eventually(`'c', 1`)
	extends := f.begin("")
	f.callIn(extends, "extend", ids(got), 1)
	conn := f.Connect()
	ended := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go func() {
		var n int
		ended <- conn.QueryRow(ctx, `select sequin.ack('c', $1)`, ids(got)).Scan(&n)
	}()
	f.awaitLock(conn)
	f.Exec(`select sequin.drop_consumer('c')`)
	f.end(extends.Rollback)
	var e *pgconn.PgError
	if err := <-ended; err != nil && !(errors.As(err, &e) && e.Code == "42704") {
		t.Errorf("ack: %v", err)
	}
}

// Under a snapshot from before others went on, a consumer is not sent back, nor given messages again: 40001, and not nothing.
func TestSentBackUnderAnOldSnapshot(t *testing.T) {
	for _, call := range []string{
		`select sequin.rewind('c', to_seq => $1)`,
		`select sequin.republish('c', format('select seq from sequin.messages where seq >= %s', $1::bigint))`,
	} {
		for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
			t.Run(call+" "+string(level), func(t *testing.T) {
				f := setup(t, "changes")
				f.consumer("c")
				all := f.write(inserts(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)...)
				tx := f.begin(level)
				f.execIn(tx, `select from sequin.consumers`)
				f.drain()
				var answer string
				if err := tx.QueryRow(t.Context(), call, all[0]).Scan(&answer); err != nil {
					if e := pgError(t, err); e.Code != "40001" {
						t.Errorf("%s %s", e.Code, e.Message)
					}
					f.end(tx.Rollback)
					return
				}
				f.end(tx.Commit)
				wantSeqsInAnyOrder(t, f.drain(), all...)
			})
		}
	}
}
