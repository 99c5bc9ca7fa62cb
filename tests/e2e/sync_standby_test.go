package e2e

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

// A hot standby is read as the primary is: from the first row to the end of what it has, while the table moves; and a
// cursor of the one goes on at the other, once that has come as far. A read-only transaction will do anywhere.
func TestSyncOnStandby(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it takes a primary and a standby")
	}
	primary := pgtest.NewCluster(t, map[string]string{"hot_standby_feedback": "on"})
	db := pgtest.NewOn(t, primary)
	db.Exec(`create table moving (id int primary key, step int not null, at int, note text);
		insert into moving select n, 0, n % 100, 'x' from generate_series(1, 2000) n; select sequin.create_stream('s', '{moving}', sort_column => 'at')`)
	replica := pgtest.Attach(t, startReplica(t, db, primary, nil), db.Name)
	pgtest.StartBridge(t, db.URL)
	awaitRow(t, db, "moving", -1)
	caughtUp := func() {
		t.Helper()
		lsn := pgtest.Value[string](db, `select pg_current_wal_insert_lsn()::text`)
		pgtest.Eventually(t, 30*time.Second, func() error {
			if !pgtest.Value[bool](replica, `select pg_last_wal_replay_lsn() >= $1::text::pg_lsn`, lsn) {
				return fmt.Errorf("the standby is behind %s", lsn)
			}
			return nil
		})
	}
	caughtUp()

	atStandby, atPrimary := replica.Connect(), db.Connect()
	s := newSyncer(t, "s")
	for step := 1; s.reads < 1000; step++ {
		s.page(atStandby, 150, "1 s")
		db.Exec(fmt.Sprintf(`update moving set step = %d where id %% 10 = %[1]d %% 10; delete from moving where id = %[1]d * 7;
			insert into moving values (3000 + %[1]d, %[1]d, %[1]d, 'new')`, step))
	}
	// The cursor of a page of the standby's, at the primary; and back.
	p := s.clone()
	p.page(atPrimary, 150, "1 s")
	back := p.clone()
	for i, other := range []*syncer{p, back, s} {
		conn := atStandby
		if other == p {
			conn = atPrimary
		}
		awaitRow(t, db, "moving", 10_000+i)
		caughtUp()
		pgtest.Eventually(t, 60*time.Second, func() error {
			for other.page(conn, 500, "0") > 0 {
			}
			rows := pgtest.Value[int](db, `select count(*) from moving`)
			if len(other.rows) != rows {
				return fmt.Errorf("%d rows, want %d", len(other.rows), rows)
			}
			return nil
		})
		other.wantTable(db, map[string]string{"moving": "id::text"})
	}

	// A cut that the standby has not come to.
	replica.Exec(`select pg_wal_replay_pause()`)
	pgtest.Eventually(t, 10*time.Second, func() error {
		if !pgtest.Value[bool](replica, `select pg_is_wal_replay_paused()`) {
			return errors.New("it is not paused")
		}
		return nil
	})
	db.Exec(`update moving set step = 1000`)
	got, err := syncCall(t.Context(), atPrimary, "s", nil, 10, "5 s")
	if err != nil || len(got) != 10 {
		t.Fatalf("%d rows, %v", len(got), err)
	}
	_, err = syncCall(t.Context(), atStandby, "s", &got[9].Cursor, 10, "0")
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != pgerrcode.ObjectNotInPrerequisiteState || pgErr.Hint == "" {
		t.Errorf("a standby that is behind gives %v", err)
	}
	replica.Exec(`select pg_wal_replay_resume()`)
	caughtUp()
	if got, err := syncCall(t.Context(), atStandby, "s", &got[9].Cursor, 10, "1 s"); err != nil || len(got) != 10 {
		t.Errorf("once it is there: %d rows, %v", len(got), err)
	}

	// In a transaction that may not write, at either: all of it, from the first row.
	for _, conn := range []*pgx.Conn{atPrimary, atStandby} {
		all := newSyncer(t, "s")
		err := pgx.BeginTxFunc(context.Background(), conn, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(pgx.Tx) error {
			for all.page(conn, 400, "0") > 0 {
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		all.wantTable(db, map[string]string{"moving": "id::text"})
	}
}
