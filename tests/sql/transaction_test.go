package sql

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// begin opens a transaction on a connection of its own.
func (f *fixture) begin(level pgx.TxIsoLevel) pgx.Tx {
	f.Helper()
	tx, err := f.Connect().BeginTx(context.Background(), pgx.TxOptions{IsoLevel: level})
	if err != nil {
		f.Fatal(err)
	}
	return tx
}

func (f *fixture) end(end func(context.Context) error) {
	f.Helper()
	if err := end(context.Background()); err != nil {
		f.Fatal(err)
	}
}

func (f *fixture) execIn(q querier, sql string) {
	f.Helper()
	if _, err := q.Exec(context.Background(), sql); err != nil {
		f.Fatalf("%s: %v", sql, err)
	}
}

// Rolled back, it was never received, acknowledged, given back, extended or popped.
func TestRollback(t *testing.T) {
	for _, level := range []pgx.TxIsoLevel{pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(level), func(t *testing.T) {
			f := setup(t, "changes")
			f.consumer("c")
			all := f.write(inserts(1, 2, 1, 2, 3)...)
			tx := f.begin(level)
			wantSeqsInAnyOrder(t, f.receiveIn(tx, `'c', 10`), all...)
			wantSeqs(t, f.receive(`'c', 10`)) // not while it is open
			f.end(tx.Rollback)

			got := f.receive(`'c', 10`)
			wantSeqsInAnyOrder(t, got, all...)
			for _, m := range got {
				if m.DeliverCount != 1 {
					t.Errorf("delivery %d of message %d", m.DeliverCount, m.Seq)
				}
			}
			tx = f.begin(level)
			f.callIn(tx, "ack", ids(got[:2]), 2)
			f.callIn(tx, "ack", ids(got[:1]), 0)
			f.callIn(tx, "nack", ids(got[2:3]), 1, "'0'")
			f.callIn(tx, "extend", ids(got[3:4]), 1, "'1 hour'")
			f.end(tx.Rollback)
			f.call("ack", ids(got), 5)

			more := f.write(inserts(4, 5)...)
			tx = f.begin(level)
			wantSeqsInAnyOrder(t, f.popIn(tx, `'c', 10`), more...)
			wantSeqs(t, f.pop(`'c', 10`))
			f.end(tx.Rollback)
			tx = f.begin(level)
			wantSeqsInAnyOrder(t, f.popIn(tx, `'c', 10`), more...)
			f.end(tx.Commit)
			f.wantClean()
		})
	}
}

// The same to a savepoint, and twice over.
func TestRollbackToSavepoint(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	all := f.write(inserts(1, 1, 2, 2)...)
	tx := f.begin(pgx.ReadCommitted)
	f.execIn(tx, `savepoint a`)
	wantSeqsInAnyOrder(t, f.receiveIn(tx, `'c', 10`), all...)
	f.execIn(tx, `rollback to a`)
	got := f.receiveIn(tx, `'c', 10`)
	wantSeqsInAnyOrder(t, got, all...)
	f.execIn(tx, `savepoint b`)
	f.callIn(tx, "ack", ids(got), 4)
	wantSeqs(t, f.receiveIn(tx, `'c', 10`))
	f.execIn(tx, `rollback to b`)
	f.callIn(tx, "nack", ids(got[:1]), 1, "'0'")
	f.callIn(tx, "ack", ids(got[1:]), 3)
	f.execIn(tx, `savepoint c`)
	wantSeqs(t, f.popIn(tx, `'c', 10`), got[0].Seq)
	f.execIn(tx, `rollback to c`)
	wantSeqs(t, f.popIn(tx, `'c', 10`), got[0].Seq)
	f.end(tx.Commit)
	f.wantClean()
}

// Pop, and what is made of it, happen once or not at all.
func TestPopExactlyOnce(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c")
	f.Exec(`create table total (seq bigint primary key)`)
	all := f.write(inserts(upto(500)...)...)
	const pop = `insert into total select seq from sequin.pop('c', 37)`
	for round := 0; ; round++ {
		tx := f.begin(pgx.ReadCommitted)
		f.execIn(tx, pop)
		if round%3 == 2 {
			f.end(tx.Rollback)
		} else {
			f.end(tx.Commit)
		}
		if n := pgtest.Value[int](f.DB, `select count(*) from total`); n == len(all) {
			break
		}
		if round > 100 {
			t.Fatal("it does not come to an end")
		}
	}
	f.wantClean()
}

// A lane's rows are trimmed under an old snapshot, which then does not see that the lane has moved on: the loser gets
// 40001, and no second lease.
func TestStaleSnapshot(t *testing.T) {
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		for name, call := range map[string]func(f *fixture, tx pgx.Tx, got []message) error{
			"receive": func(_ *fixture, tx pgx.Tx, _ []message) error { return run(tx, `select * from sequin.receive('c', 1)`) },
			"batch": func(_ *fixture, tx pgx.Tx, _ []message) error {
				return run(tx, `select * from sequin.receive('c', 50)`)
			},
			"pop": func(_ *fixture, tx pgx.Tx, _ []message) error { return run(tx, `select * from sequin.pop('c', 50)`) },
			"ack": func(_ *fixture, tx pgx.Tx, got []message) error {
				return run(tx, `select sequin.ack('c', $1)`, ids(got))
			},
			"nack": func(_ *fixture, tx pgx.Tx, got []message) error {
				return run(tx, `select sequin.nack('c', $1)`, ids(got))
			},
			"extend": func(_ *fixture, tx pgx.Tx, got []message) error {
				return run(tx, `select sequin.extend('c', $1)`, ids(got))
			},
		} {
			t.Run(fmt.Sprintf("%s %s", level, name), func(t *testing.T) {
				f := setup(t, "changes")
				f.consumer("c")
				all := f.write(inserts(8, 8, 8, 8)...)
				var got []message
				if name == "ack" || name == "nack" || name == "extend" {
					got = f.receive(`'c', 1`)
				}
				tx := f.begin(level)
				f.execIn(tx, `select 1 from item`) // from here on it sees nothing new
				if got != nil {
					f.call("ack", ids(got), 1)
				}
				for range 2 {
					f.call("ack", ids(f.receive(`'c', 1`)), 1)
				}
				f.trim()
				err := call(f, tx, got)
				if e := new(pgconn.PgError); !errors.As(err, &e) || e.Code != pgerrcode.SerializationFailure {
					t.Fatalf("got %v, want 40001", err)
				}
				f.end(tx.Rollback)
				wantSeqs(t, f.receive(`'c', 10`), all[2+len(got):]...)
			})
		}
	}
}

func run(q querier, sql string, args ...any) error {
	rows, err := q.Query(context.Background(), sql, args...)
	if err != nil {
		return err
	}
	rows.Close()
	return rows.Err()
}

// A worker that sits in an open transaction keeps what it has, and nothing else: not the messages of other groups, and
// never another worker's call.
func TestOpenTransaction(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "backoff => '0'", "ack_wait => '1 minute'")
	all := f.write(inserts(upto(1000)...)...)
	other := f.receive(`'c', 300`)
	// Some of the other worker's messages have been through something.
	f.call("nack", ids(other[:100]), 100)
	f.call("extend", ids(other[100:120]), 20)
	again := f.receive(`'c', 100`)
	if len(again) != 100 {
		t.Fatalf("%d messages came again, want 100", len(again))
	}

	open := f.begin(pgx.ReadCommitted)
	stuck := f.receiveIn(open, `'c', 1`)
	if len(stuck) != 1 {
		t.Fatalf("got %d messages, want 1", len(stuck))
	}
	stuck = append(stuck, f.receiveIn(open, `'c', 9`)...)

	// Whatever the other worker says of its own, it says at once.
	conn := f.Connect()
	f.execIn(conn, `set lock_timeout = '100 ms'`)
	f.callIn(conn, "ack", ids(again[:50]), 50)
	f.callIn(conn, "nack", ids(again[50:60]), 10)
	f.callIn(conn, "extend", ids(again[60:70]), 10)
	f.callIn(conn, "ack", ids(other[100:200]), 100)
	f.callIn(conn, "nack", ids(other[200:210]), 10)
	f.callIn(conn, "extend", ids(other[210:220]), 10)

	// And it is handed nearly all of the rest.
	began := time.Now()
	seen := map[int64]bool{}
	for range 100 {
		got := f.receiveIn(conn, `'c', 20`)
		f.callIn(conn, "ack", ids(got), int64(len(got)))
		for _, m := range got {
			seen[m.Seq] = true
		}
	}
	free := len(all) - 300 - len(stuck)
	if len(seen) < free*95/100 {
		t.Errorf("beside an open transaction %d of %d messages, want 95 of 100", len(seen), free)
	}
	t.Logf("beside an open transaction with %d messages: %d of %d others in %s", len(stuck), len(seen), free, time.Since(began))
	f.end(open.Rollback)
}
