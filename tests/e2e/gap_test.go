package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/bridge/schema"
	"sequin/tests/pgtest"
)

// gapped is a database whose bridge has captured the row 1 of table t, and has been stopped.
func gapped(t *testing.T, db *pgtest.DB) (applied string) {
	t.Helper()
	db.Exec(`create table t (id int primary key, a text); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (1)`)
	awaitKeys(t, db, "1")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	return pgtest.Value[string](db, `select applied_lsn::text from sequin.progress order by step desc limit 1`)
}

// awaitKeys waits until the log has these rows' messages, in this order, and no other.
func awaitKeys(t *testing.T, db *pgtest.DB, want ...string) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		got := pgtest.Column[string](db, `select coalesce(record_pk, '-') from sequin.messages order by seq`)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("the log has %v, not %v", got, want)
		}
		return nil
	})
}

// awaitHealth waits until health() says all of this.
func awaitHealth(t *testing.T, db *pgtest.DB, want ...string) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		all := strings.Join(pgtest.Column[string](db, `select concat_ws(' ', status, name, detail, hint) from sequin.health()`), "\n")
		for _, text := range want {
			if !strings.Contains(all, text) {
				return fmt.Errorf("health() does not say %q:\n%s", text, all)
			}
		}
		return nil
	})
}

// refusedThenAccepted starts a bridge, which must refuse with these words and name where the gap begins, and not go on; and
// accepts the gap, upon which it goes on, and captures.
func refusedThenAccepted(t *testing.T, db *pgtest.DB, applied string, words ...string) {
	t.Helper()
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("changes after " + applied + " are lost")
	for _, w := range words {
		b.AwaitLog(w)
	}
	awaitHealth(t, db, "error source local changes after "+applied+" are lost", "error gap in source local lost changes from "+applied,
		words[0], "select sequin.accept_gap('local');")
	if state := pgtest.Value[string](db, `select state || error from sequin.sources where name = 'local'`); !strings.HasPrefix(state, "error") ||
		!strings.Contains(state, words[0]) {
		t.Errorf("sequin.sources says %s", state)
	}
	if strings.Contains(b.Log(), "msg=capturing") {
		t.Fatalf("it went on before the gap was accepted: %s", b.Log())
	}
	if n := pgtest.Value[int](db, `select sequin.accept_gap('local')`); n != 1 {
		t.Errorf("%d gaps were accepted", n)
	}
	b.AwaitLog("going on after a gap")
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (100)`)
	awaitKeys(t, db, "1", "100")
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status = 'error'`); n != 0 {
		t.Errorf("%d errors are left in health()", n)
	}
	if to := pgtest.Value[bool](db, `select bool_and(to_lsn > from_lsn or from_lsn = 'FFFF/0' and to_lsn is not null) from sequin.gap`); !to {
		t.Error("the gap has no end")
	}
	// The next bridge has nothing to say against it.
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	b = pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
}

// The ways in which a slot loses what the log has not: each is told from the others, and gone on from when it is accepted.
func TestSlotLost(t *testing.T) {
	t.Parallel()
	slotName := func(db *pgtest.DB) string {
		return pgtest.Value[string](db, `select slot_name::text from pg_replication_slots where database = current_database()`)
	}
	for name, lose := range map[string]struct {
		lose  func(t *testing.T, db *pgtest.DB)
		words string
		since int
	}{
		"dropped": {func(t *testing.T, db *pgtest.DB) {
			dropSlot(t, db)
			db.Exec(`insert into t values (2)`)
		}, "does not exist any more", 0},
		"made anew": {func(t *testing.T, db *pgtest.DB) {
			name := slotName(db)
			dropSlot(t, db)
			db.Exec(`insert into t values (2)`)
			db.Exec(`select pg_create_logical_replication_slot($1, 'pgoutput')`, name)
		}, "it was made anew, or moved by another", 0},
		"moved": {func(t *testing.T, db *pgtest.DB) {
			db.Exec(`begin; set local synchronous_commit = on; insert into t values (2); commit`)
			pgtest.Eventually(t, 10*time.Second, func() error {
				_, err := db.Pool.Exec(t.Context(), `select pg_replication_slot_advance($1, pg_current_wal_lsn())`, slotName(db))
				return err
			})
		}, "it was made anew, or moved by another", 0},
		"of another server": {func(t *testing.T, db *pgtest.DB) {
			db.Exec(`update sequin.source set system_identifier = '1'`)
			dropSlot(t, db)
		}, "this is another server", 0},
		"restored": {func(t *testing.T, db *pgtest.DB) {
			// As if what the log has came after what the server has kept.
			db.Exec(`insert into sequin.progress (source_id, step, applied_lsn, horizon_lsn, last_seq)
				select source_id, step + 1, 'FFFF/0', 'FFFF/0', last_seq from sequin.progress order by step desc limit 1`)
		}, "it was restored from a backup", 0},
		"two-phase": {func(t *testing.T, db *pgtest.DB) {
			pgtest.Eventually(t, 10*time.Second, func() error {
				_, err := db.Pool.Exec(t.Context(), `select count(*) from pg_logical_slot_peek_binary_changes($1, null, null, 'proto_version', '3',
					'publication_names', 'sequin', 'two_phase', 'on')`, slotName(db))
				return err
			})
		}, "it sends what is only prepared", 15},
		"another's": {func(t *testing.T, db *pgtest.DB) {
			name := slotName(db)
			dropSlot(t, db)
			db.Exec(`select pg_create_logical_replication_slot($1, 'test_decoding')`, name)
		}, "is another's (logical slot of database", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.New(t)
			if db.Major() < lose.since {
				t.Skip("this server does not know of it")
			}
			applied := gapped(t, db)
			lose.lose(t, db)
			switch name {
			case "restored":
				applied = "FFFF/0"
			case "another's":
				b := pgtest.BridgeProcess(t, db.URL)
				b.AwaitLog(lose.words)
				db.Exec(`select sequin.accept_gap('local')`)
				b.AwaitLog("select pg_drop_replication_slot('" + slotName(db) + "'); if nobody needs it.")
				dropSlot(t, db)
				b.AwaitLog("msg=capturing")
				db.Exec(`insert into t values (100)`)
				awaitKeys(t, db, "1", "100")
				return
			}
			refusedThenAccepted(t, db, applied, lose.words)
		})
	}
}

// What is accepted is one hole: another one, from the same place in the log of an idle source, is asked about anew.
func TestAcceptedAnother(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	applied := gapped(t, db)
	system := pgtest.Value[string](db, `select system_identifier from sequin.source`)
	db.Exec(`update sequin.source set system_identifier = '1'`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("this is another server")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	db.Exec(`update sequin.source set system_identifier = $1`, system)
	db.Exec(`select sequin.accept_gap('local')`)
	dropSlot(t, db)
	db.Exec(`insert into t values (2)`)
	refusedThenAccepted(t, db, applied, "does not exist any more")
}

// A bridge that is interrupted while it goes on after a hole, which looks different by then, is not asked again.
func TestPassInterrupted(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, nil))
	gapped(t, db)
	db.Exec(`drop publication sequin`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("was dropped")
	open := db.Connect()
	if _, err := open.Exec(t.Context(), `begin; select txid_current()`); err != nil {
		t.Fatal(err)
	}
	db.Exec(`select sequin.accept_gap('local')`)
	b.AwaitLog("creating the slot waits for transactions that were open before it")
	b.Kill()
	if _, err := open.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	b = pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (100)`)
	awaitKeys(t, db, "1", "100")
	if strings.Contains(b.Log(), "not capturing") {
		t.Errorf("it asked again: %s", b.Log())
	}
}

func TestSlotInvalidated(t *testing.T) {
	t.Parallel()
	if m := pgtest.Binaries(t).Major; m == 12 {
		t.Skip("PostgreSQL 12 keeps WAL for a slot without limit")
	}
	db := pgtest.NewOn(t, pgtest.NewCluster(t, map[string]string{"max_slot_wal_keep_size": "16MB", "wal_keep_size": "0", "checkpoint_timeout": "1h"}))
	applied := gapped(t, db)
	pgtest.Eventually(t, 60*time.Second, func() error {
		db.Exec(`insert into t select -i, repeat('x', 1000) from generate_series(1, 1000) i; delete from t where id < 0; select pg_switch_wal()`)
		db.Exec(`checkpoint`)
		if status := pgtest.Value[string](db, `select wal_status from pg_replication_slots`); status != "lost" {
			return fmt.Errorf("the slot is %s", status)
		}
		return nil
	})
	reason := "max_slot_wal_keep_size"
	if db.Major() >= 17 {
		reason = "wal_removed"
	}
	refusedThenAccepted(t, db, applied, "was invalidated by the server ("+reason+")")
}

// A copy of a database, made while nobody was in it, has the log of the original, and must leave its slot alone.
func TestDatabaseCopied(t *testing.T) {
	t.Parallel()
	c := pgtest.NewCluster(t, nil)
	original := pgtest.NewOn(t, c)
	applied := gapped(t, original)
	slots := pgtest.Column[string](original, `select slot_name || ' ' || confirmed_flush_lsn from pg_replication_slots`)
	db := pgtest.CopyOf(t, original)
	refusedThenAccepted(t, db, applied, "this is a copy of the database that was captured")
	if got := pgtest.Column[string](original, `select slot_name || ' ' || confirmed_flush_lsn from pg_replication_slots
		where database = $1`, original.Name); fmt.Sprint(got) != fmt.Sprint(slots) {
		t.Errorf("the original's slot is %v, and was %v", got, slots)
	}
	b := pgtest.BridgeProcess(t, original.URL)
	b.AwaitLog("msg=capturing")
	original.Exec(`insert into t values (2)`)
	awaitKeys(t, original, "1", "2")
}

// A publication that is dropped under a bridge, and perhaps made again before anybody looks, is a gap: from 18 on the server
// goes on without it, and before that it never gets past it.
func TestPublicationDropped(t *testing.T) {
	t.Parallel()
	for _, isMadeAgain := range []bool{false, true} {
		for _, isRunning := range []bool{false, true} {
			t.Run(fmt.Sprintf("made again %t, bridge running %t", isMadeAgain, isRunning), func(t *testing.T) {
				t.Parallel()
				db := pgtest.New(t)
				db.Exec(`create table t (id int primary key, a text); create table u (id int primary key);
					select sequin.create_stream('t', '{t}'), sequin.create_stream('u', '{u}')`)
				b := pgtest.BridgeProcess(t, db.URL)
				b.AwaitLog("msg=capturing")
				db.Exec(`insert into t values (1)`)
				awaitKeys(t, db, "1")
				if !isRunning {
					if err := b.Stop(); err != nil {
						t.Fatal(err)
					}
				}
				conn := db.Connect()
				for _, statement := range []string{
					`drop publication sequin`, `insert into t values (2)`, `create publication sequin for table t, u`, `insert into t values (3)`,
				} {
					if strings.HasPrefix(statement, "create") && !isMadeAgain {
						continue
					}
					if _, err := conn.Exec(t.Context(), statement); err != nil {
						t.Fatal(err)
					}
				}
				if !isRunning {
					b = pgtest.BridgeProcess(t, db.URL)
				}
				words := `publication \"sequin\" was dropped`
				if isMadeAgain {
					words += ", and made anew"
				}
				b.AwaitLog(words)
				b.AwaitLog("select sequin.accept_gap('local');")
				awaitHealth(t, db, "error gap in source local", `publication "sequin" was dropped`)
				db.Exec(`select sequin.accept_gap('local')`)
				b.AwaitLog("going on after a gap")
				pgtest.Eventually(t, 20*time.Second, func() error {
					if strings.LastIndex(b.Log(), "msg=capturing") < strings.Index(b.Log(), "going on after a gap") {
						return fmt.Errorf("it does not go on: %s", b.Log())
					}
					return nil
				})
				db.Exec(`insert into t values (4); insert into u values (5)`)
				awaitKeys(t, db, "1", "4", "5")
				if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status = 'error'`); n != 0 {
					t.Errorf("%d errors are left in health()", n)
				}
			})
		}
	}
}

// A table that somebody takes out of the publication is named, with the statement that mends it; once it is back, what was
// lost meanwhile is a gap. Others are captured all along.
func TestTableUnpublished(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); create table u (id int primary key);
		select sequin.create_stream('t', '{t}'), sequin.create_stream('u', '{u}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into t values (1)`)
	db.Exec(`alter publication sequin drop table t`)
	db.Exec(`insert into t values (2)`)
	db.Exec(`insert into u values (3)`)
	awaitHealth(t, db, "error table public.t", "alter publication sequin add table only public.t;")
	db.Exec(`alter publication sequin add table public.t`)
	db.Exec(`insert into t values (4)`)
	awaitKeys(t, db, "1", "3", "4")
	awaitHealth(t, db, "error gap in source local", "table public.t was out of publication")
	db.Exec(`select sequin.accept_gap('local')`)
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status = 'error'`); n != 0 {
		t.Errorf("%d errors are left in health()", n)
	}
	db.Exec(`insert into u values (5)`)
	awaitKeys(t, db, "1", "3", "4", "5")
}

// A publication that keeps some of a table's changes back is as bad as one without the table: it is named, with the statement that
// mends it, and what was lost is a gap. A table that is whole is captured all along.
func TestPublicationAltered(t *testing.T) {
	t.Parallel()
	for name, altered := range map[string]struct {
		since                   int
		alter, detail, mend, of string
	}{
		"kinds":     {12, `alter publication sequin set (publish = 'insert')`, "publishes some kinds of changes only", `alter publication sequin set (publish = 'insert, update, delete, truncate');`, "published in part"},
		"root":      {13, `alter publication sequin set (publish_via_partition_root = false)`, "publishes partitions under their own names", `alter publication sequin set (publish_via_partition_root = true);`, "published in part"},
		"generated": {18, `alter publication sequin set (publish_generated_columns = none)`, "publishes no generated columns", `alter publication sequin set (publish_generated_columns = stored);`, "published in part"},
		"rows":      {15, `alter publication sequin set table t where (id < 0), u`, "has a row filter or a column list", `alter publication sequin drop table only public.t; alter publication sequin add table only public.t;`, "out of publication"},
		"columns":   {15, `alter publication sequin drop table t; alter publication sequin add table t (id)`, "has a row filter or a column list", `alter publication sequin drop table only public.t; alter publication sequin add table only public.t;`, "out of publication"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := pgtest.New(t)
			if db.Major() < altered.since {
				t.Skip("this server does not know of it")
			}
			partitions := ``
			if db.Major() >= 13 {
				partitions = ` partition by range (id); create table t1 partition of t for values from (0) to (100)`
			}
			db.Exec(`create table t (id int primary key, a text, d int generated always as (id) stored)` + partitions + `; create table u (id int primary key, a text);
				select sequin.create_stream('t', '{t}'), sequin.create_stream('u', '{u}')`)
			b := pgtest.BridgeProcess(t, db.URL)
			b.AwaitLog("msg=capturing")
			db.Exec(`insert into t values (1)`)
			awaitKeys(t, db, "1")
			db.Exec(altered.alter)
			awaitHealth(t, db, "error table public.t publication sequin "+altered.detail, altered.mend)
			pgtest.Eventually(t, 30*time.Second, func() error {
				if !pgtest.Value[bool](db, `select unpublished_lsn is not null from sequin.source_table where table_name = 't'`) {
					return fmt.Errorf("it is not missed")
				}
				return nil
			})
			db.Exec(`update t set a = 'lost'`)
			db.Exec(`insert into u values (2)`)
			db.Exec(altered.mend)
			awaitHealth(t, db, "error gap in source local", "table public.t was "+altered.of)
			db.Exec(`insert into t values (3); update u set a = 'kept'`)
			pgtest.Eventually(t, 30*time.Second, func() error {
				keys := fmt.Sprint(pgtest.Column[string](db, `select record_pk from sequin.messages order by seq`))
				if !strings.HasPrefix(keys, "[1 ") || !strings.HasSuffix(keys, "2 3 2]") {
					return fmt.Errorf("the log has %s", keys)
				}
				return nil
			})
			db.Exec(`select sequin.accept_gap('local')`)
			if bad := pgtest.Column[string](db, `select name || ' ' || detail from sequin.health() where status = 'error'`); len(bad) > 0 {
				t.Errorf("health() says %q", bad)
			}
			if strings.Count(b.Log(), "msg=capturing") != 1 {
				t.Errorf("it was interrupted: %s", b.Log())
			}
		})
	}
}

// A publication that is altered and put back, or renamed and renamed back, before anybody looks has kept changes back, and all looks
// well again: it is a gap. 12 to 17 end the stream at a change that was made while there was no publication of the name, each time.
func TestPublicationPutBack(t *testing.T) {
	t.Parallel()
	for name, altered := range map[string]struct {
		away, back   string
		isUnreadable bool
	}{
		"altered": {`alter publication sequin set (publish = 'insert')`, `alter publication sequin set (publish = 'insert, update, delete, truncate')`, false},
		"renamed": {`alter publication sequin rename to x`, `alter publication x rename to sequin`, true},
	} {
		for _, isRunning := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, bridge running %t", name, isRunning), func(t *testing.T) {
				t.Parallel()
				db := pgtest.New(t)
				db.Exec(`create table t (id int primary key, a text); select sequin.create_stream('t', '{t}', mode => 'changes')`)
				b := pgtest.BridgeProcess(t, db.URL)
				b.AwaitLog("msg=capturing")
				db.Exec(`insert into t values (1)`)
				awaitKeys(t, db, "1")
				if !isRunning {
					if err := b.Stop(); err != nil {
						t.Fatal(err)
					}
				}
				conn := db.Connect()
				for _, statement := range []string{altered.away, `update t set a = 'lost'`, `delete from t`, altered.back, `insert into t values (2)`} {
					if _, err := conn.Exec(t.Context(), statement); err != nil {
						t.Fatal(err)
					}
				}
				if !isRunning {
					b = pgtest.BridgeProcess(t, db.URL)
				}
				if altered.isUnreadable && db.Major() < 18 {
					awaitHealth(t, db, "error source local changes after", "when changes were made that the server has still to send",
						"error gap in source local", "select sequin.accept_gap('local');")
					db.Exec(`select sequin.accept_gap('local')`)
					b.AwaitLog("going on after a gap")
					pgtest.Eventually(t, 20*time.Second, func() error {
						if strings.LastIndex(b.Log(), "msg=capturing") < strings.Index(b.Log(), "going on after a gap") {
							return fmt.Errorf("it does not go on: %s", b.Log())
						}
						return nil
					})
					db.Exec(`insert into t values (3)`)
					awaitKeys(t, db, "1", "3")
				} else {
					awaitKeys(t, db, "1", "2")
					awaitHealth(t, db, "error gap in source local", `publication "sequin" was altered or renamed, and put back`)
					if n := pgtest.Value[int](db, `select sequin.accept_gap('local')`); n != 1 {
						t.Errorf("%d gaps were accepted", n)
					}
				}
				if n := pgtest.Value[int](db, `select count(*) from sequin.gap where to_lsn is null or to_lsn <= from_lsn`); n != 0 {
					t.Errorf("%d gaps are empty, or have no end", n)
				}
				if bad := pgtest.Column[string](db, `select name || ' ' || detail from sequin.health() where status = 'error'`); len(bad) > 0 {
					t.Errorf("health() says %q", bad)
				}
				// It is told once.
				if err := b.Stop(); err != nil {
					t.Fatal(err)
				}
				b = pgtest.BridgeProcess(t, db.URL)
				b.AwaitLog("msg=capturing")
				if n := pgtest.Value[int](db, `select count(*) from sequin.gap where accepted_at is null`); n != 0 {
					t.Errorf("%d gaps are new", n)
				}
			})
		}
	}
}

// A publication that was seen to be away, and is back by its name, is gone on with from after the gap, whether that was accepted
// before it was back, or after.
func TestPublicationSeenAway(t *testing.T) {
	t.Parallel()
	for _, isAcceptedBefore := range []bool{false, true} {
		t.Run(fmt.Sprintf("accepted before %t", isAcceptedBefore), func(t *testing.T) {
			t.Parallel()
			db := pgtest.New(t)
			gapped(t, db)
			db.Exec(`alter publication sequin rename to x`)
			db.Exec(`insert into t values (2)`)
			b := pgtest.BridgeProcess(t, db.URL)
			b.AwaitLog(`publication \"sequin\" was dropped`)
			if err := b.Stop(); err != nil {
				t.Fatal(err)
			}
			if isAcceptedBefore {
				db.Exec(`select sequin.accept_gap('local')`)
			}
			db.Exec(`alter publication x rename to sequin`)
			db.Exec(`insert into t values (3)`)
			b = pgtest.BridgeProcess(t, db.URL)
			want := []string{"1", "4"}
			switch {
			case isAcceptedBefore:
				b.AwaitLog("going on after a gap")
			case db.Major() < 18:
				awaitHealth(t, db, "error source local changes after")
				db.Exec(`select sequin.accept_gap('local')`)
				b.AwaitLog("going on after a gap")
			default: // it has what came after
				want = []string{"1", "3", "4"}
			}
			pgtest.Eventually(t, 20*time.Second, func() error {
				if strings.LastIndex(b.Log(), "msg=capturing") < strings.Index(b.Log(), "going on after a gap") {
					return fmt.Errorf("it does not go on: %s", b.Log())
				}
				return nil
			})
			b.AwaitLog("msg=capturing")
			db.Exec(`insert into t values (4)`)
			awaitKeys(t, db, want...)
			db.Exec(`select sequin.accept_gap('local')`)
			if n := pgtest.Value[int](db, `select count(*) from sequin.gap where to_lsn is null or to_lsn <= from_lsn`); n != 0 {
				t.Errorf("%d gaps are empty, or have no end", n)
			}
			if bad := pgtest.Column[string](db, `select name || ' ' || detail from sequin.health() where status = 'error'`); len(bad) > 0 {
				t.Errorf("health() says %q", bad)
			}
		})
	}
}

// What writes a publication anew, or its tables, and keeps nothing back is no gap.
func TestPublicationKept(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	owner := db.Name + "_owner"
	db.Exec(`create table t (id int primary key); create table u (id int primary key); select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`create role ` + owner + ` superuser`)
	t.Cleanup(func() { db.Exec(`alter publication sequin owner to current_user; drop role ` + owner) })
	for _, statement := range []string{
		`select sequin.create_stream('u', '{u}')`, `select sequin.drop_stream('u')`, `vacuum full pg_publication`, `vacuum freeze pg_publication`,
		`comment on publication sequin is 'Sequin''s'`, `alter publication sequin add table u`, `alter publication sequin owner to ` + owner,
	} {
		db.Exec(statement)
		if fault := pgtest.Value[string](db, `select coalesce(sequin.bridge_publication(id), '') from sequin.source`); fault != "" {
			t.Errorf("%s: %s", statement, fault)
		}
		if gaps := pgtest.Column[string](db, `select reason from sequin.gap`); len(gaps) > 0 {
			t.Fatalf("%s: the gaps are %q", statement, gaps)
		}
	}
	db.Exec(`insert into t values (1)`)
	awaitKeys(t, db, "1")
}

// A slot that is there when a bridge first starts has what was committed since a bridge made it that was killed at once.
func TestSlotMadeBefore(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); select sequin.create_stream('t', '{t}')`)
	db.Exec(`select pg_create_logical_replication_slot('sequin_' || d.oid, 'pgoutput') from pg_database d where d.datname = current_database()`)
	db.Exec(`insert into t values (1)`)
	pgtest.StartBridge(t, db.URL)
	awaitKeys(t, db, "1")
}

// A slot that an earlier installation has left is older than the publication. Where the server cannot get past that, it is a gap.
func TestSlotLeft(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	gapped(t, db)
	db.Exec(`drop schema sequin cascade; drop publication sequin`)
	db.Exec(`insert into t values (2)`)
	if err := schema.Up(t.Context(), db.URL, pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
	db.Exec(`select sequin.create_stream('t', '{t}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	if db.Major() < 18 {
		b.AwaitLog("select sequin.accept_gap('local');")
		db.Exec(`select sequin.accept_gap('local')`)
		b.AwaitLog("going on after a gap")
		pgtest.Eventually(t, time.Minute, func() error {
			if bad := pgtest.Column[string](db, `select detail from sequin.health() where status = 'error'`); len(bad) > 0 {
				return fmt.Errorf("health() says %q", bad)
			}
			return nil
		})
	} else {
		b.AwaitLog("msg=capturing")
	}
	db.Exec(`insert into t values (3)`)
	awaitKeys(t, db, "3")
	if bad := pgtest.Column[string](db, `select name || ' ' || detail from sequin.health() where status = 'error'`); len(bad) > 0 {
		t.Errorf("health() says %q", bad)
	}
}

// A table that was in the publication before it was in a stream is captured from when it is.
func TestPublishedBefore(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table t (id int primary key); create table u (id int primary key); select sequin.create_stream('u', '{u}')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`alter publication sequin add table t`)
	db.Exec(`insert into t values (1); insert into u values (2)`)
	awaitKeys(t, db, "2")
	db.Exec(`select sequin.create_stream('t', '{t}')`)
	db.Exec(`insert into t values (3)`)
	awaitKeys(t, db, "2", "3")
}

// A transaction that the server cannot send stops capture, is named with all that is lost without it, and only it is lost
// once somebody has said so. Here, one with a value that its type cannot print any more: what the server says of a row
// of more than a gigabyte ends the stream in the same way (TestRowTooLarge).
func TestStuckTransaction(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create type mood as enum ('sad', 'ok');
		create table t (id int primary key, m mood, n int); create table u (id int primary key);
		select sequin.create_stream('t', '{t}'), sequin.create_stream('u', '{u}')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	db.Exec(`insert into t values (1, 'sad')`)
	awaitKeys(t, db, "1")
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	db.Exec(`delete from pg_enum where enumlabel = 'sad' and enumtypid = 'mood'::regtype`)
	db.Exec(`insert into u select generate_series(1000, 1999)`)
	ctx := context.Background()
	var xid string
	err := pgx.BeginFunc(ctx, db.Pool, func(tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, `select (txid_current() & 4294967295)::text`).Scan(&xid); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `insert into u select generate_series(2000, 2999); update t set n = 1 where id = 1; insert into u values (3)`)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	db.Exec(`insert into u values (4)`)
	b = pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("the server cannot send transaction " + xid)
	awaitHealth(t, db, "error source local the server cannot send transaction "+xid, "all its changes, of every table, are missing",
		"leaves that transaction out, and goes on after it")
	if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n != 1001 {
		t.Errorf("%d messages are in the log: everything before the transaction should be", n)
	}
	// Another bridge comes to the same end, and a gap is recorded once.
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	b = pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("the server cannot send transaction " + xid)
	if n := pgtest.Value[int](db, `select sequin.accept_gap('local')`); n != 1 {
		t.Errorf("%d gaps were accepted", n)
	}
	b.AwaitLog("going on without a transaction that the server cannot send")
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where record_pk = '4'`); n != 1 {
			return fmt.Errorf("it does not go on: %s", b.Log())
		}
		return nil
	})
	if n := pgtest.Value[int](db, `select count(*) from sequin.messages`); n != 1002 {
		t.Errorf("%d messages are in the log", n)
	}
	if n := pgtest.Value[int](db, `select count(*) from sequin.health() where status = 'error'`); n != 0 {
		t.Errorf("%d errors are left in health()", n)
	}
}
