package sql

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// Who listens on "sequin.<consumer>" hears when there is something: new, or back after a nack or an expiry. Of a
// paused consumer, of one whose tables are quiet, and of what one leaves out, nothing is heard.
func TestNotify(t *testing.T) {
	f := bridged(t)
	const odd = `Müller's "q"`
	f.Exec(`select sequin.create_stream('s', '{item}', mode => 'changes'), sequin.create_stream('r', '{other}')`)
	f.Exec(`select sequin.create_consumer('c', 's', ack_wait => '300 ms', backoff => '0'), sequin.create_consumer('g', 's', group_by => '{grp}'),
		sequin.create_consumer('paused', 's'), sequin.create_consumer('quiet', 'r'),
		sequin.create_consumer('choosy', 's', filter => 'new.id = -1'), sequin.create_consumer('deletes', 's', actions => '{delete}')`)
	f.Exec(`select sequin.create_consumer($1, 's')`, odd)
	f.Exec(`select sequin.pause_consumer('paused')`)
	listen := func(consumer string) *pgx.Conn {
		conn := f.Connect()
		f.execIn(conn, "listen "+pgx.Identifier{"sequin." + consumer}.Sanitize())
		return conn
	}
	hears := func(conn *pgx.Conn, within time.Duration) bool {
		ctx, cancel := context.WithTimeout(context.Background(), within)
		defer cancel()
		_, err := conn.WaitForNotification(ctx)
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		return err == nil
	}
	paused, quiet, choosy, deletes := listen("paused"), listen("quiet"), listen("choosy"), listen("deletes")
	for _, consumer := range []string{"c", "g", odd} {
		conn := listen(consumer)
		f.Exec(`insert into item values ((select count(*) from item), 1, 'a')`)
		if !hears(conn, 10*time.Second) {
			t.Errorf("no notification on sequin.%s", consumer)
		}
		// By then it is there.
		var n int
		if err := conn.QueryRow(context.Background(), `select count(*) from sequin.receive($1, 1)`, consumer).Scan(&n); err != nil || n != 1 {
			t.Errorf("after the notification receive gives %d messages, %v", n, err)
		}
	}
	for _, conn := range []*pgx.Conn{paused, quiet, choosy, deletes} {
		if hears(conn, 100*time.Millisecond) {
			t.Error("a consumer that is paused, or has nothing, was notified")
		}
	}

	// What c was handed has expired, or will; it is told when that may be received again.
	conn := listen("c")
	out := f.receive(`'c', 10, '10 s'`)
	if len(out) == 0 {
		t.Fatal("nothing to receive")
	}
	if !hears(conn, 10*time.Second) {
		t.Error("no notification of what has expired")
	}
	again := f.receive(`'c', 10, '10 s', ack_wait => '1 hour'`)
	f.call("nack", ids(again), int64(len(again)), "'1 s'")
	if !hears(listen("c"), 10*time.Second) {
		t.Error("no notification of what was nacked")
	}
	// And of what is put back by hand, or was kept back.
	f.Exec(`select sequin.create_consumer('d', 's', max_deliver => 1)`)
	f.Exec(`insert into item values (-2, 1, 'a')`)
	dead := pgtest.Column[int64](f.DB, `select ack_id from sequin.receive('d', 1, '10 s')`)
	f.Exec(`select sequin.nack('d', $1)`, dead)
	conn = listen("d")
	f.Exec(`select sequin.redrive('d')`)
	if !hears(conn, 10*time.Second) {
		t.Error("no notification of what was redriven")
	}
	conn = listen("paused")
	f.Exec(`select sequin.resume_consumer('paused')`)
	if !hears(conn, 10*time.Second) {
		t.Error("no notification of what waited for a pause to end")
	}
}
