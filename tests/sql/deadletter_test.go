package sql

import (
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// After max_deliver deliveries a message is given up, its group goes on, and redrive puts it back.
func TestDeadLetter(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "max_deliver => 2", "backoff => '0'")
	all := f.write(inserts(1, 1, 2)...)
	fail := func(args string, text string, want ...int64) {
		t.Helper()
		got := f.eventually(args)
		wantSeqs(t, got, want...)
		f.call("nack", ids(got), int64(len(got)), "error => '"+text+"'")
	}
	one := f.receive(`'c', 10`)
	wantSeqsInAnyOrder(t, one, all...)
	f.call("nack", ids(one), 3, "error => 'first'")
	two := f.receive(`'c', 10`)
	wantSeqsInAnyOrder(t, two, all...)
	for _, m := range two {
		if m.Seq == all[1] {
			f.call("ack", []int64{m.AckID}, 1)
		} else {
			f.call("nack", []int64{m.AckID}, 1, "error => 'second'")
		}
	}
	dead := pgtest.Column[int64](f.DB, `select seq from sequin.dead_letters where consumer = 'c' and error = 'second' and deliver_count = 2 order by seq`)
	if len(dead) != 2 || dead[0] != all[0] || dead[1] != all[2] {
		t.Fatalf("dead letters %v, want %d and %d", dead, all[0], all[2])
	}
	// Its group goes on.
	next := f.write(inserts(1)...)
	got := f.receive(`'c', 10`)
	wantSeqs(t, got, next...)
	f.call("ack", ids(got), 1)

	if n := pgtest.Value[int64](f.DB, `select sequin.redrive('c', $1)`, []int64{all[0], 12345}); n != 1 {
		t.Errorf("redrive of one gives %d", n)
	}
	got = f.receive(`'c', 10`)
	wantSeqs(t, got, all[0])
	if got[0].DeliverCount != 1 {
		t.Errorf("redriven it is delivery %d, want 1", got[0].DeliverCount)
	}
	f.call("nack", ids(got), 1, "error => 'third'")
	fail(`'c', 10`, "fourth", all[0])
	if text := pgtest.Value[string](f.DB, `select error from sequin.dead_letters where seq = $1`, all[0]); text != "fourth" {
		t.Errorf("its error is %q", text)
	}
	if n := pgtest.Value[int64](f.DB, `select sequin.redrive('c')`); n != 2 {
		t.Errorf("redrive of all gives %d, want 2", n)
	}
	got = f.receive(`'c', 10`)
	wantSeqsInAnyOrder(t, got, all[0], all[2])
	f.call("ack", ids(got), 2)
	f.wantClean()
	if e := f.Error(`select sequin.redrive('e')`); e.Code != "42704" || e.Hint == "" {
		t.Errorf("redrive of an unknown consumer: %s %s, hint %q", e.Code, e.Message, e.Hint)
	}
}

// One delivery each: what is nacked or expires is given up at once.
func TestDeadLetterAtOnce(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "max_deliver => 1", "ack_wait => '50 ms'", "backoff => '0'")
	f.write(inserts(upto(10)...)...)
	got := f.receive(`'c', 10`)
	f.call("nack", ids(got[:3]), 3, "error => 'no'")
	pgtest.Eventually(t, 10*time.Second, func() error {
		f.tend()
		return want(pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`), 10)
	})
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters where error = 'not acknowledged within its ack_wait' and deliver_count = 1`); n != 7 {
		t.Errorf("%d were given up because they expired, want 7", n)
	}
	wantSeqs(t, f.receive(`'c', 10`))
	f.call("ack", ids(got), 0)
	f.wantClean()
}

// A message that expires time and again is given up as well, without anybody receiving, and what is behind it goes on.
func TestDeadLetterExpired(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "max_deliver => 3", "ack_wait => '30 ms'", "backoff => '0'")
	all := f.write(inserts(5, 5)...)
	for count := 1; count <= 3; count++ {
		got := f.eventually(`'c', 1`)
		wantSeqs(t, got, all[0])
		if got[0].DeliverCount != count {
			t.Errorf("delivery %d, want %d", got[0].DeliverCount, count)
		}
	}
	pgtest.Eventually(t, 10*time.Second, func() error {
		f.tend()
		return want(pgtest.Value[int](f.DB, `select count(*) from sequin.dead_letters`), 1)
	})
	got := f.eventually(`'c', 1, ack_wait => '1 minute'`)
	wantSeqs(t, got, all[1])
	f.call("ack", ids(got), 1)
	f.wantClean()
}

// A dead letter of a group that is out comes after what is out, not beside it.
func TestRedriveIntoBusyGroup(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "max_deliver => 1")
	all := f.write(inserts(1, 1, 1)...)
	f.call("nack", ids(f.receive(`'c', 1`)), 1)
	out := f.receive(`'c', 1`)
	wantSeqs(t, out, all[1])
	f.Exec(`select sequin.redrive('c')`)
	wantSeqs(t, f.receive(`'c', 10`))
	// The same where what is out is followed one by one.
	f.call("extend", append(ids(out), 0), 1)
	f.call("ack", ids(out), 1)
	got := f.receive(`'c', 10`)
	wantSeqs(t, got, all[0])
	wantSeqs(t, f.receive(`'c', 10`))
	f.call("ack", ids(got), 1)
	wantSeqs(t, f.receive(`'c', 10`), all[2])
}

func TestRedriveBesideTracked(t *testing.T) {
	f := setup(t, "changes")
	f.consumer("c", "max_deliver => 2", "backoff => '0'")
	all := f.write(inserts(1, 1)...)
	for range 2 {
		f.call("nack", ids(f.receive(`'c', 1`)), 1)
	}
	f.call("nack", ids(f.receive(`'c', 1`)), 1)
	out := f.receive(`'c', 1`)
	wantSeqs(t, out, all[1])
	f.Exec(`select sequin.redrive('c')`)
	wantSeqs(t, f.receive(`'c', 10`)) // the first waits for the second, which a worker has
	f.call("ack", ids(out), 1)
	wantSeqs(t, f.receive(`'c', 10`), all[0])
}
