package sources

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// pop gets what there is for a consumer until it is as wanted, whatever the order of its groups.
func pop(t *testing.T, home *pgtest.DB, consumer string, want ...string) {
	t.Helper()
	var got []string
	slices.Sort(want)
	pgtest.Eventually(t, 30*time.Second, func() error {
		got = append(got, pgtest.Column[string](home, `select concat_ws(' ', action, record_pk, record::text) from sequin.pop($1, 100, '200 ms')`, consumer)...)
		slices.Sort(got)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("%s got %q, want %q", consumer, got, want)
		}
		return nil
	})
}

// The types of another source's tables are not known here: new and old are jsonb. Everything else is as it is with local
// tables: what is refused, what fails on one message, and what the old row of an update has.
func TestFilter(t *testing.T) {
	home, far := pair(t)
	far.Exec(`
		create table a (id int primary key, amount numeric, note text); alter table a replica identity full;
		create table b (id int primary key, amount numeric, note text not null unique); alter table b replica identity using index b_note_key;
		create table c (id int primary key, amount numeric)`)
	create(home, "all", "{a,b,c}", ", mode => 'changes'")
	// Before the bridge has found the tables, too.
	home.Exec(`select sequin.create_consumer('early', 'all', filter => $$ (new->>'amount')::numeric > 100 $$,
		transform => $$ jsonb_build_object('amount', new->'amount', 'of', table_name) $$)`)
	awaitStream(t, home, "all", "active")
	for filter, want := range map[string]string{
		`new->>'amount'`:                            "42804 not boolean at position",
		`new->>'amount' > 100`:                      "42804 text > integer at position",
		`(new->>'amount')::numeric >`:               "42601 position",
		`new.amount > 100`:                          "42703 new is jsonb here, and has no columns at position 1",
		`(select true)`:                             "42601 a subquery at position",
		`random() > 0.5`:                            "42601 a volatile function: random at position",
		`exists (select from pg_class)`:             "42601 a subquery at position",
		`amount > 100`:                              "42703 position",
		`pg_read_file('x') is null`:                 "42601 position",
		`true); drop table sequin.consumer cascade`: "42601 position",
		`'x'::regclass is null`:                     "42703 position",
		`(new->>'amount')::numeric / 0 > 1 and`:     "42601 position",
	} {
		e := home.Error(`select sequin.create_consumer('bad', 'all', filter => $1)`, filter)
		code, text, _ := strings.Cut(want, " ")
		if e.Code != code || !strings.Contains(e.Message, text) {
			t.Errorf("%s: got %s: %s", filter, e.Code, e.Message)
		}
		if strings.Contains(e.Hint, "new.") || strings.Contains(filter, "amount") && !strings.Contains(e.Hint, `(new->>'amount')::numeric > 100`) {
			t.Errorf("%s: the hint is %s", filter, e.Hint)
		}
	}
	if e := home.Error(`select sequin.create_consumer('bad', 'all', transform => 'new->>''id''')`); e.Code != "42804" {
		t.Errorf("got %s: %s", e.Code, e.Message)
	}
	home.Exec(`select sequin.create_consumer('fails', 'all', filter => $$ 10 / (new->>'amount')::numeric > 1 $$)`)
	home.Exec(`select sequin.create_consumer('old', 'all', filter => $$ action = 'update' $$, transform => 'old')`)
	home.Exec(`select sequin.create_consumer('gone', 'all', filter => $$ new is null and table_name <> 'b' $$, transform => 'old')`)
	far.Exec(`insert into a values (1, 5, 'x'), (2, 500, null); insert into b values (3, 0, 'y'), (4, 200, 'z'); insert into c values (5, 300)`)
	far.Exec(`update a set note = 'n' where id = 1; update b set amount = 1 where id = 3; update b set note = 'yy' where id = 3; update c set amount = 2`)
	far.Exec(`delete from a where id = 1; delete from c`)

	pop(t, home, "early", `insert 2 {"of": "a", "amount": 500}`, `insert z {"of": "b", "amount": 200}`, `insert 5 {"of": "c", "amount": 300}`)
	pop(t, home, "old", `update 1 {"id": 1, "note": "x", "amount": 5}`, `update y {"note": "y"}`, `update yy {"note": "y"}`, `update 5 {"id": 5}`)
	pop(t, home, "gone", `delete 1 {"id": 1, "note": "n", "amount": 5}`, `delete 5 {"id": 5}`)
	pop(t, home, "fails", `insert 1 {"id": 1, "note": "x", "amount": 5}`, `update 1 {"id": 1, "note": "n", "amount": 5}`,
		`update y {"id": 3, "note": "y", "amount": 1}`, `update yy {"id": 3, "note": "yy", "amount": 1}`, `update 5 {"id": 5, "amount": 2}`)
	dead := pgtest.Column[string](home, `select concat_ws(' ', record_pk, error, deliver_count) from sequin.dead_letters where consumer = 'fails'`)
	if fmt.Sprint(dead) != "[y filter: division by zero 0]" {
		t.Errorf("dead letters: %q", dead)
	}

	// Another filter is another choice of what is pending, and of what has failed.
	far.Exec(`insert into a values (10, 0, 'later'), (11, 1, 'later')`)
	awaitMessages(t, home, `select record_pk from sequin.messages where table_name = 'a' and record_pk like '1_' order by seq`, "10", "11")
	home.Exec(`select sequin.alter_consumer('fails', filter => $$ (new->>'amount')::numeric = 0 $$)`)
	home.Exec(`select sequin.redrive('fails')`)
	pop(t, home, "fails", `insert y {"id": 3, "note": "y", "amount": 0}`, `insert 10 {"id": 10, "note": "later", "amount": 0}`)

	// Republish chooses among messages; of rows, it knows none here.
	home.Exec(`select sequin.republish('fails', $$ select seq from sequin.messages where stream = 'all' and record_pk = '10' $$)`)
	pop(t, home, "fails", `insert 10 {"id": 10, "note": "later", "amount": 0}`)
	if e := home.Error(`select sequin.republish('fails', 'select 5 as id, 300 as amount')`); e.Code != "0A000" || !strings.Contains(e.Hint, "sequin.messages") {
		t.Errorf("got %s: %s (%s)", e.Code, e.Message, e.Hint)
	}
	if e := home.Error(`select * from sequin.sync('all')`); e.Code != "0A000" || e.Hint == "" {
		t.Errorf("got %s: %s (%s)", e.Code, e.Message, e.Hint)
	}
}
