package backfill

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"sequin/tests/pgtest"
)

// standby is a synchronous standby that has written everything at once, and applied it when it is told to.
type standby struct {
	mayApply atomic.Bool
	isSlow   atomic.Pointer[rand.Rand] // it applies now and then
}

// beSlow has it apply what it has at random moments.
func (s *standby) beSlow(random *rand.Rand) { s.isSlow.Store(random) }

func startStandby(t *testing.T, url, name string) *standby {
	t.Helper()
	config, err := pgconn.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	config.RuntimeParams["replication"] = "true"
	config.RuntimeParams["application_name"] = name
	ctx, cancel := context.WithCancel(context.Background())
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	id, err := pglogrepl.IdentifySystem(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	if err := pglogrepl.StartReplication(ctx, conn, name, id.XLogPos, pglogrepl.StartReplicationOptions{Mode: pglogrepl.PhysicalReplication}); err != nil {
		t.Fatal(err)
	}
	s := &standby{}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.follow(ctx, conn, id.XLogPos)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		_ = conn.Close(context.Background())
	})
	return s
}

func (s *standby) follow(ctx context.Context, conn *pgconn.PgConn, at pglogrepl.LSN) {
	applied, next := pglogrepl.LSN(1), time.Now()
	for ctx.Err() == nil {
		random := s.isSlow.Load()
		switch {
		case random == nil && !s.mayApply.Load():
			applied = 1
		case random == nil:
			applied = at
		case time.Now().After(next):
			applied, next = at, time.Now().Add(time.Duration(random.IntN(400))*time.Millisecond)
		}
		if err := pglogrepl.SendStandbyStatusUpdate(ctx, conn, pglogrepl.StandbyStatusUpdate{
			WALWritePosition: at, WALFlushPosition: at, WALApplyPosition: applied,
		}); err != nil {
			return
		}
		_ = conn.Conn().SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		m, err := conn.ReceiveMessage(context.WithoutCancel(ctx))
		if err != nil {
			if pgconn.Timeout(err) {
				continue
			}
			return
		}
		if data, ok := m.(*pgproto3.CopyData); ok && data.Data[0] == pglogrepl.XLogDataByteID {
			if x, err := pglogrepl.ParseXLogData(data.Data[1:]); err == nil {
				at = max(at, x.WALStart+pglogrepl.LSN(len(x.WALData)))
			}
		}
	}
}

// A transaction that waits for a synchronous standby is committed, and decoded, and not visible yet: a history whose cut
// is after it must not be read before it is. The bridge that has read it may have been another.
func TestSynchronousStandby(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, nil))
	ctx := context.Background()
	db.Exec(`create table item (id int primary key, note text); insert into item select n, 'old' from generate_series(1, 500) n`)
	db.Exec(`select sequin.create_stream('s', '{item}')`)
	db.Exec(`select pg_create_physical_replication_slot('slow')`)
	s := startStandby(t, db.URL, "slow")
	db.Exec(`alter system set synchronous_standby_names = 'slow'`)
	db.Exec(`select pg_reload_conf()`)
	pgtest.Eventually(t, 10*time.Second, func() error {
		if state := pgtest.Value[string](db, `select coalesce(max(sync_state), 'none') from pg_stat_replication where application_name = 'slow'`); state != "sync" {
			return fmt.Errorf("the standby is %s", state)
		}
		return nil
	})
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	for i, isKilled := range []bool{false, true} {
		name := fmt.Sprintf("c%d", i)
		s.mayApply.Store(false)
		writer := db.Connect()
		if _, err := writer.Exec(ctx, `set synchronous_commit = remote_apply`); err != nil {
			t.Fatal(err)
		}
		committed := make(chan error, 1)
		go func() {
			_, err := writer.Exec(ctx, `update item set note = $1 where id = 5`, name)
			committed <- err
		}()
		pgtest.Eventually(t, 30*time.Second, func() error {
			if !pgtest.Value[bool](db, `select exists (select from sequin.messages where stream = 's' and record_pk = '5' and record ->> 'note' = $1)`, name) {
				return fmt.Errorf("it is not in the log: %s", b.Log())
			}
			return nil
		})
		if got := pgtest.Value[string](db, `select note from item where id = 5`); got == name {
			t.Fatal("it is visible: nothing is proved")
		}
		db.Exec(`select sequin.create_consumer($1, 's', start_at => 'beginning')`, name)
		pgtest.Eventually(t, 30*time.Second, func() error {
			if pgtest.Value[int](db, `select count(*) from sequin.backfill where live_segment is not null and cut_at is null`) == 0 {
				return fmt.Errorf("the log is not cut: %s", b.Log())
			}
			return nil
		})
		if isKilled {
			b.Kill()
			b = pgtest.BridgeProcess(t, db.URL)
			b.AwaitLog("msg=capturing")
		}
		b.AwaitLog("it may be waiting for a synchronous standby")
		if n := pgtest.Value[int](db, `select count(*) from sequin.backfill where cut_at is not null`); n != i {
			t.Fatal("the table was read before it could be seen")
		}
		s.mayApply.Store(true)
		if err := <-committed; err != nil {
			t.Fatal(err)
		}
		for _, m := range drain(t, db, name, 500) {
			if want := fmt.Sprintf(`{"id": 5, "note": "%s"}`, name); m.Key == "5" && m.Record != want {
				t.Errorf("got %s, want %s", m.Record, want)
			}
		}
	}
	db.Exec(`alter system reset synchronous_standby_names`)
	db.Exec(`select pg_reload_conf()`)
}
