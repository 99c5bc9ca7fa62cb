package sql

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// Every change is a message, in commit order, with the old values of what changed.
func TestChangesMode(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('c', 's', group_by => '{}')`)
	f.Exec(`insert into item values (1, 1, 'a')`)
	f.Exec(`update item set note = 'b' where id = 1`)
	f.Exec(`update item set note = 'c', grp = null where id = 1`)
	f.Exec(`update item set note = note where id = 1`)
	f.Exec(`update item set id = 2 where id = 1`)
	f.Exec(`delete from item where id = 2`)
	got := f.take("c", 6)
	wantBrief(t, got, "insert item 1 a", "update item 1 b", "update item 1 c", "update item 1 c", "update item 2 c", "delete item 2 c")
	for i, want := range []string{"", `{"note": "a"}`, `{"grp": 1, "note": "b"}`, `{}`, `{"id": 1}`, ""} {
		changes := ""
		if got[i].Changes != nil {
			changes = *got[i].Changes
		}
		if changes != want {
			t.Errorf("changes of message %d: %s, want %s", i, changes, want)
		}
	}
}

// Without full identity some changes do not carry a column that messages are grouped by: create_consumer says which.
func TestGroupByWithoutOldValues(t *testing.T) {
	f := bridged(t)
	f.Exec(`create table plain (id int primary key, grp int, doc text); select sequin.create_stream('s', '{plain}')`)
	for _, test := range []struct{ name, options, want string }{
		{"a", `group_by => '{grp}'`, `of public.plain, deletes do not carry "grp"`},
		{"b", `group_by => '{doc}'`, `of public.plain, deletes and updates that leave a large value as it was do not carry "doc"`},
		{"c", `group_by => '{doc}', actions => '{insert,update}'`, `of public.plain, updates that leave a large value as it was do not carry "doc"`},
		{"d", `group_by => '{grp}', actions => '{insert,update}'`, ``},
		{"e", `group_by => '{id}'`, ``},
	} {
		got := f.notices(`select sequin.create_consumer('` + test.name + `', 's', ` + test.options + `)`)
		if test.want == "" && len(got) > 0 || test.want != "" && (len(got) != 1 || !strings.HasPrefix(got[0].Message, test.want)) {
			t.Errorf("%s: it says %+v", test.options, got)
		}
	}
}

// Without full identity Postgres gives the old key only: create_stream says so, and with what statement to mend it.
func TestChangesModeWithoutOldValues(t *testing.T) {
	f := bridged(t)
	f.Exec(`create table plain (id int primary key, note text)`)
	got := f.notices(`select sequin.create_stream('s', '{item,plain}', mode => 'changes')`)
	if len(got) != 1 || got[0].Severity != "WARNING" || !strings.Contains(got[0].Message, "plain") ||
		got[0].Hint != "alter table public.plain replica identity full;" {
		t.Errorf("create_stream says %+v", got)
	}
	f.Exec(`select sequin.create_consumer('c', 's', group_by => '{}')`)
	f.Exec(`insert into plain values (1, 'a')`)
	f.Exec(`update plain set note = 'b'`)
	f.Exec(`update plain set id = 2`)
	f.Exec(`delete from plain`)
	messages := f.take("c", 4)
	wantBrief(t, messages, "insert plain 1 a", "update plain 1 b", "update plain 2 b", "delete plain 2 ")
	if messages[1].Changes != nil && *messages[1].Changes != "{}" {
		t.Errorf("changes of an update of which the old values are not known: %s", *messages[1].Changes)
	}
	if messages[2].Changes == nil || *messages[2].Changes != `{"id": 1}` {
		t.Errorf("changes of an update of the key: %v", messages[2].Changes)
	}
}

// A message is the newest version of a row, and a row that changes goes to the end; a deleted row is one message.
func TestRowsMode(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}')`)
	f.Exec(`select sequin.create_consumer('c', 's', group_by => '{}')`)
	f.Exec(`insert into item select i, 1, 'a' from generate_series(1, 3) i`)
	f.Exec(`update item set note = 'b' where id = 1`)
	f.Exec(`delete from item where id = 2`)
	f.awaitLog()
	// Versions that were overtaken may be there or not: what counts is the last one of each row, and their order.
	got := f.pop(`'c', 100`)
	last := map[string]message{}
	for _, m := range got {
		if m.Changes != nil {
			t.Errorf("message %d of a rows stream has changes: %s", m.Seq, *m.Changes)
		}
		delete(last, m.Key)
		last[m.Key] = m
	}
	if last["1"].Note != "b" || last["2"].Action != "delete" || last["3"].Note != "a" || len(last) != 3 {
		t.Fatalf("got %q", brief(got))
	}
	if !(last["3"].Seq < last["1"].Seq && last["1"].Seq < last["2"].Seq) {
		t.Errorf("a row that changed is not at the end: %v", got)
	}

	// Another key: the old one is deleted, the new one has the row.
	f.Exec(`update item set id = 9 where id = 1`)
	got = f.take("c", 2)
	wantBrief(t, got, "delete item 1 b", "update item 9 b")
	wantBrief(t, f.take("c", 0))
}

// Versions of a row that pile up while nobody receives end in the newest one.
func TestRowsModeSkips(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}')`)
	f.Exec(`select sequin.create_consumer('c', 's')`)
	f.Exec(`insert into item values (1, 1, '0'), (2, 1, '0')`)
	for i := range 50 {
		f.Exec(`update item set note = $1 where id = 1`, fmt.Sprint(i+1))
	}
	f.awaitLog()
	var got []message
	for {
		more := f.pop(`'c', 7`)
		if len(more) == 0 {
			break
		}
		got = append(got, more...)
	}
	wantAscending(t, got)
	notes := map[string]string{}
	for _, m := range got {
		notes[m.Key] = m.Note
	}
	if notes["1"] != "50" || notes["2"] != "0" {
		t.Errorf("the rows ended as %v: %q", notes, brief(got))
	}
}

// Several tables in one stream: in the order in which their transactions committed, not in which they began.
func TestCommitOrder(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item, other}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('c', 's', group_by => '{}')`)
	ctx := context.Background()
	slow, err := f.Connect().Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	f.execIn(slow, `insert into item values (1, 1, 'slow')`)
	f.Exec(`insert into other values (1, 1, 'quick')`)
	f.Exec(`begin; insert into item values (2, 1, 'both'); insert into other values (2, 1, 'both'); insert into item values (3, 1, 'both'); commit`)
	f.execIn(slow, `insert into other values (3, 1, 'slow')`)
	if err := slow.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	f.Exec(`insert into item values (4, 1, 'last')`)
	wantBrief(t, f.take("c", 7),
		"insert other 1 quick", "insert item 2 both", "insert other 2 both", "insert item 3 both", "insert item 1 slow", "insert other 3 slow",
		"insert item 4 last")
}

// What is rolled back, whole or to a savepoint, never was.
func TestSourceRollback(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('c', 's', group_by => '{}')`)
	f.Exec(`begin; insert into item values (1); rollback`)
	f.Exec(`begin; insert into item values (2, 1, 'kept'); savepoint a; insert into item values (3); rollback to a; commit`)
	wantBrief(t, f.take("c", 1), "insert item 2 kept")
}

// A truncate is one message of each table, for a consumer that asks for it, in its place.
func TestTruncate(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item, other}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('all', 's', actions => '{insert,update,delete,truncate}', group_by => '{}')`)
	f.Exec(`select sequin.create_consumer('only', 's', actions => '{truncate}')`)
	f.Exec(`select sequin.create_consumer('default', 's', group_by => '{}')`)
	f.Exec(`insert into item values (1, 1, 'a')`)
	f.Exec(`truncate item, other`)
	f.Exec(`insert into item values (1, 1, 'b')`)
	all := f.take("all", 4)
	if all[1].Table > all[2].Table { // Postgres does not say in which order
		all[1].Table, all[2].Table = all[2].Table, all[1].Table
	}
	wantBrief(t, all, "insert item 1 a", "truncate item  ", "truncate other  ", "insert item 1 b")
	wantBrief(t, f.take("default", 2), "insert item 1 a", "insert item 1 b")
	if got := f.take("only", 2); got[0].Action != "truncate" || got[1].Action != "truncate" {
		t.Errorf("got %q", brief(got))
	}
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.messages where stream = 's' and action = 'truncate' and record is null and record_pk is null`); n != 2 {
		t.Errorf("%d truncates without a record or a key, want 2", n)
	}
}

// A partitioned table is one table, under its root's name, whatever partition a row is in or goes to.
func TestPartitioned(t *testing.T) {
	f := bridged(t)
	f.Exec(`create table visit (id int, year int, note text, primary key (id, year)) partition by range (year);
		create table visit_old partition of visit for values from (2000) to (2020);
		create table visit_new partition of visit for values from (2020) to (2040) partition by list (year);
		create table visit_2024 partition of visit_new for values in (2024);
		create table visit_rest partition of visit_new default`)
	if f.Major() < 13 {
		if err := f.Error(`select sequin.create_stream('s', '{visit}')`); err.Code != pgerrcode.FeatureNotSupported ||
			!strings.Contains(err.Message, "visit") || err.Hint == "" {
			t.Errorf("%s %s, hint %q", err.Code, err.Message, err.Hint)
		}
		return
	}
	f.Exec(`select sequin.create_stream('s', '{visit}', mode => 'changes')`)
	f.Exec(`select sequin.create_consumer('c', 's', group_by => '{}')`)
	f.Exec(`insert into visit values (1, 2001, 'a')`)
	f.Exec(`insert into visit values (2, 2024, 'b')`)
	f.Exec(`update visit set note = 'c' where id = 2`)
	f.Exec(`update visit set year = 2030 where id = 2`) // a delete here and an insert there
	f.Exec(`create table visit_2044 partition of visit for values from (2040) to (2050)`)
	f.Exec(`insert into visit values (3, 2044, 'd')`)
	f.Exec(`delete from visit_old`)
	wantBrief(t, f.take("c", 7),
		"insert visit 1,2001 a", "insert visit 2,2024 b", "update visit 2,2024 c", "delete visit 2,2024 ", "insert visit 2,2030 c",
		"insert visit 3,2044 d", "delete visit 1,2001 ")
}

// Consumers of a stream, and streams of a table, do not disturb each other.
func TestConsumersAreIndependent(t *testing.T) {
	f := bridged(t)
	f.Exec(`select sequin.create_stream('s', '{item}', mode => 'changes'), sequin.create_stream('r', '{item, other}')`)
	f.Exec(`select sequin.create_consumer('a', 's', group_by => '{}'), sequin.create_consumer('b', 's', group_by => '{}'),
		sequin.create_consumer('d', 'r', group_by => '{}')`)
	f.Exec(`insert into item values (1, 1, 'a')`)
	f.Exec(`insert into other values (1, 1, 'o')`)
	wantBrief(t, f.take("a", 1), "insert item 1 a")
	wantBrief(t, f.take("d", 2), "insert item 1 a", "insert other 1 o")
	f.Exec(`select sequin.drop_consumer('a')`)
	wantBrief(t, f.take("b", 1), "insert item 1 a")
}

// Whatever may be a name is one, and is kept as it is given; tables are found as regclass finds them.
func TestNames(t *testing.T) {
	f := bridged(t)
	f.Exec(`create schema "Über uns"; create table "Über uns"."Order's ""x""" ("Id" int primary key, "a,b" text)`)
	stream, consumer := `S'"; drop table item; --`, strings.Repeat("é", 24)
	if got := pgtest.Value[string](f.DB, `select sequin.create_stream($1, array[$2])`, stream, `"Über uns"."Order's ""x"""`); got != "created" {
		t.Errorf("create_stream gives %s", got)
	}
	f.Exec(`select sequin.create_consumer($1, $2, group_by => '{"a,b"}')`, consumer, stream)
	f.Exec(`insert into "Über uns"."Order's ""x""" values (7, 'z')`)
	f.awaitLog()
	var schema, table, key, record string
	pgtest.Eventually(t, 10*time.Second, func() error {
		return f.Pool.QueryRow(context.Background(), `select table_schema, table_name, record_pk, record::text from sequin.pop($1)`, consumer).
			Scan(&schema, &table, &key, &record)
	})
	if got := fmt.Sprintf("%s|%s|%s|%s", schema, table, key, record); got != `Über uns|Order's "x"|7|{"Id": 7, "a,b": "z"}` {
		t.Errorf("got %s", got)
	}
	// By search_path, as the caller has it; of a table that was renamed since.
	conn := f.Connect()
	for _, sql := range []string{
		`set search_path = "Über uns"`, `select sequin.create_stream('t', array['"Order''s ""x"""'])`,
		`alter table "Order's ""x""" rename to orders`, `select sequin.create_consumer('c', 't')`, `insert into orders values (8)`,
	} {
		f.execIn(conn, sql)
	}
	wantBrief(t, f.take("c", 1), "insert orders 8 ")
}

// A stream that exists already is left alone if it is the same, and is an error if it is not, or unless asked.
func TestStreamIfNotExists(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, at int); create table other (id int primary key)`)
	call := func(sql string) string { return pgtest.Value[string](db, `select sequin.create_stream(`+sql+`)`) }
	if got := call(`'s', '{item}', sort_column => 'at', if_not_exists => true`); got != "created" {
		t.Errorf("the first gives %s", got)
	}
	if got := call(`'s', '{public.item}', sort_column => 'at', if_not_exists => true`); got != "unchanged" {
		t.Errorf("the second gives %s", got)
	}
	for _, other := range []string{
		`'s', '{item}', sort_column => 'at'`, `'s', '{item}', if_not_exists => true`, `'s', '{other}', if_not_exists => true`,
		`'s', '{item}', 'changes', sort_column => 'at', if_not_exists => true`,
	} {
		if err := db.Error(`select sequin.create_stream(` + other + `)`); err.Code != pgerrcode.DuplicateObject || err.Hint == "" {
			t.Errorf("create_stream(%s): %s %s, hint %q", other, err.Code, err.Message, err.Hint)
		}
	}
}

// A stream with consumers is not dropped; one without takes its tables out of the publication that no other needs.
func TestDropStream(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key); create table other (id int primary key);
		select sequin.create_stream('s', '{item}'); select sequin.create_stream('r', '{item,other}'); select sequin.create_consumer('c', 'r')`)
	published := func() string {
		return pgtest.Value[string](db, `select coalesce(string_agg(tablename, ',' order by tablename), '') from pg_publication_tables where pubname = 'sequin'`)
	}
	if got := published(); got != "item,other" {
		t.Errorf("published: %s", got)
	}
	if err := db.Error(`select sequin.drop_stream('r')`); err.Code != pgerrcode.ObjectNotInPrerequisiteState || !strings.Contains(err.Hint, "drop_consumer('c')") {
		t.Errorf("%s %s, hint %q", err.Code, err.Message, err.Hint)
	}
	db.Exec(`select sequin.drop_consumer('c')`)
	if got := pgtest.Value[string](db, `select sequin.drop_stream('r')`); got != "dropped" || published() != "item" {
		t.Errorf("drop_stream gives %s, published then: %s", got, published())
	}
	if got := pgtest.Value[string](db, `select sequin.drop_stream('r', if_exists => true)`); got != "absent" {
		t.Errorf("a second time: %s", got)
	}
	if err := db.Error(`select sequin.drop_stream('r')`); err.Code != pgerrcode.UndefinedObject || err.Hint == "" {
		t.Errorf("%s %s, hint %q", err.Code, err.Message, err.Hint)
	}
	if db.Exec(`insert into other values (1)`); published() != "item" {
		t.Errorf("published: %s", published())
	}
}

// A change that commits after create_stream returned is not missed, though no bridge was running, and though its
// transaction began before.
func TestStreamMissesNothing(t *testing.T) {
	t.Parallel()
	f := &fixture{DB: pgtest.New(t)}
	f.Exec(`create table item (id int primary key, note text); create table other (id int primary key, note text)`)
	warned := f.notices(`select sequin.create_stream('s', '{item}', mode => 'rows')`)
	if len(warned) != 1 || warned[0].Severity != "WARNING" || !strings.Contains(warned[0].Hint, "sequin bridge") {
		t.Errorf("before there is a slot: %+v", warned)
	}
	stop := pgtest.StartBridge(t, f.URL)
	stop()
	if warned := f.notices(`select sequin.create_stream('r', '{item, other}')`); len(warned) != 0 {
		t.Errorf("with a slot: %+v", warned)
	}
	f.Exec(`select sequin.create_consumer('c', 'r', group_by => '{}')`)
	f.Exec(`insert into other values (1, 'a')`)
	tx, err := f.Connect().BeginTx(context.Background(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	f.execIn(tx, `insert into item values (1, 'b')`)
	pgtest.StartBridge(t, f.URL)
	f.Exec(`insert into other values (2, 'c')`)
	if err := tx.Commit(context.Background()); err != nil {
		t.Fatal(err)
	}
	wantBrief(t, f.take("c", 3), "insert other 1 a", "insert other 2 c", "insert item 1 b")
}
