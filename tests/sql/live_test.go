package sql

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// bridged makes a fixture whose log a bridge writes: a database with the tables item and other, no stream yet.
func bridged(t *testing.T) *fixture {
	t.Helper()
	t.Parallel()
	f := &fixture{DB: pgtest.New(t)}
	f.Exec(`create table item (id int primary key, grp int, note text); alter table item replica identity full`)
	f.Exec(`create table other (id int primary key, grp int, note text); alter table other replica identity full`)
	pgtest.StartBridge(t, f.URL)
	return f
}

// take pops from a consumer until it has so many messages, and sees that there are no more.
func (f *fixture) take(consumer string, count int) []message {
	f.Helper()
	f.awaitLog()
	var got []message
	args := "'" + consumer + "', 1000"
	pgtest.Eventually(f.TB, 30*time.Second, func() error {
		got = append(got, f.pop(args)...)
		return wantAtLeast(len(got), count)
	})
	got = append(got, f.pop(args)...)
	if len(got) != count {
		f.Fatalf("got %d messages, want %d: %v", len(got), count, brief(got))
	}
	return got
}

func wantAtLeast(got, count int) error {
	if got < count {
		return fmt.Errorf("got %d messages, want %d", got, count)
	}
	return nil
}

// awaitLog waits until all that has been committed so far is in the log, and in each consumer's feed: a mark that
// commits after it is.
func (f *fixture) awaitLog() {
	f.Helper()
	f.Exec(`create table if not exists mark (id serial primary key); select sequin.create_stream('mark', '{mark}', if_not_exists => true)`)
	mark := pgtest.Value[string](f.DB, `insert into mark default values returning id::text`)
	pgtest.Eventually(f.TB, 30*time.Second, func() error {
		if !pgtest.Value[bool](f.DB, `
			select exists (
			  select from sequin.messages m
			  where m.stream = 'mark' and m.record_pk = $1
			    and not exists (
			      select from sequin.consumer c
			      where c.start_seq is null
			         or c.reads = 'feed'
			            and (select max(p.seq) from sequin.feed_progress p where p.feed_id = c.feed_id)
			                < (select max(l.seq) from sequin.log l where l.route_id = any (c.routes) and l.seq < m.seq)))`, mark) {
			return fmt.Errorf("the log has not come to mark %s yet", mark)
		}
		return nil
	})
}

// brief says what messages are, one a line would be too long: action, table and key, and the note.
func brief(messages []message) []string {
	lines := make([]string, len(messages))
	for i, m := range messages {
		lines[i] = fmt.Sprintf("%s %s %s %s", m.Action, m.Table, m.Key, m.Note)
	}
	return lines
}

// wantBrief checks what messages are, in this order.
func wantBrief(t testing.TB, got []message, want ...string) {
	t.Helper()
	lines := brief(got)
	if fmt.Sprintf("%q", lines) != fmt.Sprintf("%q", want) {
		t.Fatalf("got  %q\nwant %q", lines, want)
	}
	for i := 1; i < len(got); i++ {
		if got[i].Seq <= got[i-1].Seq {
			t.Fatalf("%q has seq %d, after %d", lines[i], got[i].Seq, got[i-1].Seq)
		}
	}
}

// notices runs a statement and returns what the server says beside its result.
func (f *fixture) notices(sql string) []*pgconn.Notice {
	f.Helper()
	config, err := pgx.ParseConfig(f.URL)
	if err != nil {
		f.Fatal(err)
	}
	var notices []*pgconn.Notice
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { notices = append(notices, n) }
	conn, err := pgx.ConnectConfig(context.Background(), config)
	if err != nil {
		f.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), sql); err != nil {
		f.Fatalf("%s: %v", sql, err)
	}
	return notices
}
