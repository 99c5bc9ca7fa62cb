package pipelines

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// What a filter leaves out is not written, and is passed all the same; and a delete has an old row to choose by.
func TestFilter(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, price int, note text); alter table item replica identity full;
		select sequin.create_pipeline('dear', 'item', 'events', filter => 'coalesce(new.price, old.price) >= 100 and old.price is distinct from new.price')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1, 100, 'a'), (2, 99, 'b'), (3, null, 'c')`)
	db.Exec(`update item set note = 'another' where id = 1; update item set price = 120 where id = 2; delete from item where id in (1, 3)`)
	awaitEvents(db, "events",
		`insert 1 {"id": 1, "note": "a", "price": 100} -`,
		`update 2 {"id": 2, "note": "b", "price": 120} {"price": 99}`,
		`delete 1 {"id": 1, "note": "another", "price": 100} -`)
	awaitStatus(db, "dear", "active 0 3")
	// Another filter, from the next change on.
	db.Exec(`select sequin.alter_pipeline('dear', filter => 'new.price < 10')`)
	db.Exec(`insert into item values (4, 500, 'd'), (5, 5, 'e')`)
	awaitCount(db, "events", 4)
	db.Exec(`select sequin.alter_pipeline('dear', filter => '')`)
	db.Exec(`insert into item values (6, null, 'f')`)
	awaitCount(db, "events", 5)
	awaitStatus(db, "dear", "active 0 5")
}

// awaitStatus waits until a pipeline is in a state, with so many changes pending and so many events written.
func awaitStatus(db *pgtest.DB, pipeline, want string) {
	db.Helper()
	pgtest.Eventually(db.TB, 20*time.Second, func() error {
		if got := pgtest.Value[string](db, `select concat_ws(' ', state, pending, rows_written) from sequin.pipeline_status where name = $1`, pipeline); got != want {
			return fmt.Errorf("it is %s, want %s: %v", got, want, status(db))
		}
		return nil
	})
}

// A change that the filter fails on holds its pipeline back, which says which it is and why; nothing is lost, and other
// pipelines go on. So does a column that is dropped, once the filter names it.
func TestFilterFails(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, price int, parts int);
		select sequin.create_pipeline('each', 'item', 'prices', filter => 'new.price / new.parts > 10'),
			sequin.create_pipeline('all', 'item', 'everything'), sequin.create_pipeline('named', 'item', 'named', filter => 'new.parts > 0')`)
	pgtest.StartBridge(t, db.URL)
	others, check := beside(db)
	db.Exec(`insert into item values (1, 100, 2), (2, 100, 50)`)
	awaitEvents(db, "prices", `insert 1 {"id": 1, "parts": 2, "price": 100} -`)
	db.Exec(`insert into item values (3, 100, 0), (4, 100, 5)`)
	hint := awaitError(db, "each", "22023", "division by zero")
	awaitCount(db, "everything", 4)
	seq := pgtest.Value[int64](db, `select seq from everything where record_pk = '3'`)
	if got := pgtest.Value[string](db, `select error from sequin.pipeline_status where name = 'each'`); !strings.Contains(got, fmt.Sprintf("change %d", seq)) {
		t.Errorf("it says %s, of change %d", got, seq)
	}
	if !strings.Contains(hint, "sequin.alter_pipeline('each', filter") {
		t.Errorf("the hint is %s", hint)
	}
	if got := pgtest.Column[string](db, `select status || ' ' || detail from sequin.health() where name = 'pipeline each'`); len(got) != 1 || !strings.HasPrefix(got[0], "error ") || !strings.Contains(got[0], "division by zero") {
		t.Errorf("health() says %v", got)
	}
	awaitCount(db, "everything", 4)
	db.Exec(`select sequin.alter_pipeline('each', filter => 'new.price / nullif(new.parts, 0) > 10')`)
	awaitEvents(db, "prices", `insert 1 {"id": 1, "parts": 2, "price": 100} -`, `insert 4 {"id": 4, "parts": 5, "price": 100} -`)
	awaitStatus(db, "each", "active 0 2")

	awaitStatus(db, "named", "active 0 3")
	before := others()
	db.Exec(`alter table item drop column parts; insert into item values (5, 1)`)
	if hint := awaitError(db, "named", "55000", "parts"); !strings.Contains(hint, "sequin.alter_pipeline('named', filter") {
		t.Errorf("the hint is %s", hint)
	}
	awaitCount(db, "everything", 5)
	pgtest.Eventually(t, 20*time.Second, func() error {
		if others() == before {
			return fmt.Errorf("beside it nothing goes on")
		}
		return nil
	})
	db.Exec(`select sequin.alter_pipeline('named', filter => 'new.price > 0'), sequin.alter_pipeline('each', filter => '')`)
	awaitCount(db, "named", 4)
	awaitCount(db, "prices", 3)
	check()
}

// A filter that can no longer be evaluated at all is said of its pipeline, with what mends it.
func TestFilterLabelGoes(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create type mood as enum ('sad', 'happy'); create table item (id int primary key, feeling mood);
		select sequin.create_pipeline('sad', 'item', 'events', filter => 'new.feeling = ''sad''')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into item values (1, 'sad')`)
	awaitCount(db, "events", 1)
	db.Exec(`alter type mood rename value 'sad' to 'blue'; insert into item values (2, 'blue')`)
	if hint := awaitError(db, "sad", "55000", `pipeline "sad": filter: invalid input value for enum`); !strings.HasPrefix(hint, "select sequin.alter_pipeline('sad', filter") {
		t.Errorf("the hint is %s", hint)
	}
	db.Exec(`select sequin.alter_pipeline('sad', filter => 'new.feeling = ''blue''')`)
	awaitCount(db, "events", 2)
}
