package sql

import (
	"context"
	"fmt"
	"slices"
	"strings"
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

// What a transaction has written to a table before it makes the first stream of it cannot be captured, and it is told so.
func TestWrittenBefore(t *testing.T) {
	f := bridged(t)
	told := func(sql string) bool {
		t.Helper()
		return slices.ContainsFunc(f.notices(sql), func(n *pgconn.Notice) bool { return strings.Contains(n.Message, "is not captured") && n.Hint != "" })
	}
	if !told(`begin; create table seed (id int primary key); insert into seed values (1); select sequin.create_stream('seed', '{seed}'); commit`) {
		t.Error("nobody is told that row 1 is not captured")
	}
	if told(`begin; insert into seed values (2); select sequin.create_stream('again', '{seed}'); create table more (id int primary key);
		select sequin.create_stream('more', '{more}'); insert into more values (1); commit`) {
		t.Error("what is captured is said not to be")
	}
}

// A row is called the same wherever it comes from, where its replica identity is another index than the primary key.
func TestIdentityOfAnIndex(t *testing.T) {
	f := bridged(t)
	f.Exec(`create table coded (id int primary key, code text not null unique, v int); alter table coded replica identity using index coded_code_key;
		create table pairs (id int primary key, b text not null, a int not null, unique (a, b)); alter table pairs replica identity using index pairs_a_b_key`)
	f.Exec(`insert into coded values (1, 'old', 1); insert into pairs values (1, 'old', 1)`)
	for table, pks := range map[string][2]string{"coded": {"old", "new"}, "pairs": {"old,1", "new,2"}} {
		f.Exec(`select sequin.create_stream($1, array[$1]), sequin.create_consumer($1, $1, group_by => null)`, table)
		f.Exec(`insert into ` + table + ` values (2, 'new', 2)`)
		got := pgtest.Column[string](f.DB, `select record_pk from sequin.receive($1, 10, '10 s')`, table)
		if !slices.Equal(got, []string{pks[1]}) {
			t.Fatalf("%s: received %q", table, got)
		}
		// It is out: nothing else of the row is handed out beside it.
		if n := pgtest.Value[int](f.DB, `select sequin.republish($1, $2)`, table, "select * from "+table); n != 2 {
			t.Errorf("%s: %d rows come again", table, n)
		}
		got = pgtest.Column[string](f.DB, `select record_pk from sequin.receive($1, 10)`, table)
		if !slices.Equal(got, []string{pks[0]}) {
			t.Errorf("%s: received %q beside what is out", table, got)
		}
		got = pgtest.Column[string](f.DB, `select record_pk from sequin.sync($1)`, table)
		if !slices.Equal(got, pks[:]) {
			t.Errorf("%s: sync has %q", table, got)
		}
	}
}
