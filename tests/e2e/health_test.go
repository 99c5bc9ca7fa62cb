package e2e

import (
	"testing"

	"sequin/tests/pgtest"
)

// What is about to lose changes, or makes users' own statements fail, is in health() with the statement that mends it.
func TestCaptureHealth(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); create table u (id int primary key); create table p (id int primary key) partition by range (id);
		select sequin.create_stream('t', '{t}'), sequin.create_stream('u', '{u}')`)
	writer := db.Connect()
	if _, err := writer.Exec(t.Context(), `begin; insert into t values (-1)`); err != nil {
		t.Fatal(err)
	}
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("creating the slot waits for transactions that were open before it")
	awaitHealth(t, db, "error source local creating the slot waits for transactions that were open before it: process ", "It goes on by itself")
	if _, err := writer.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	b.AwaitLog("msg=capturing")
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status <> 'ok'`); n != 0 {
		t.Errorf("not well: %q", pgtest.Column[string](db, `select concat_ws(' ', status, name, detail) from sequin.health() where status <> 'ok'`))
	}
	db.Exec(`alter table t drop constraint t_pkey`)
	awaitHealth(t, db, "error table public.t the table has no primary key or replica identity any more: its updates and deletes fail",
		"alter table public.t add primary key")
	db.Exec(`alter table t replica identity full; alter table p attach partition u for values from (0) to (100)`)
	awaitHealth(t, db, "error table public.u the table is a partition of public.p now", "Stream public.p instead.")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	db.Exec(`drop publication sequin`)
	awaitHealth(t, db, `error publication sequin publication "sequin" was dropped: changes since are lost`)
}

func TestNeededMinor(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if got := pgtest.Value[string](db, `select string_agg(sequin._needed_minor(m)::text, ',' order by m) from generate_series(12, 18) m`); got != "0,21,18,14,10,6,0" {
		t.Errorf("got %s: sequin doctor has the same", got)
	}
}
