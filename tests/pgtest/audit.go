package pgtest

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// The table that an Audit watches, and the trigger that writes each of its changes down in the same transaction. What
// it is made of is compared with the log as it is, so that the log's JSON is to_jsonb's to the letter.
const auditSQL = `
create table item (
  id      int primary key,
  writer  int not null,
  step    int not null,
  amount  numeric(20, 4),
  note    text,
  tags    text[],
  doc     jsonb,
  at      timestamp
);
create table audit (id bigserial primary key, xid bigint not null, action text not null, pk text not null, record jsonb);
create function audit() returns trigger language plpgsql as $$
begin
  insert into audit (xid, action, pk, record)
  values (txid_current() & 4294967295, lower(tg_op), case tg_op when 'DELETE' then old.id else new.id end,
          case tg_op when 'DELETE' then jsonb_build_object('id', old.id) else to_jsonb(new) end);
  return null;
end $$;
create trigger audit after insert or update or delete on item for each row execute function audit();`

// Audit is an oracle: a table under random change, and what a trigger says of it.
type Audit struct {
	db     *DB
	home   *DB    // where the log is
	source string // what db is called there
	seed   uint64

	stop    chan struct{}
	writers sync.WaitGroup
	Commits atomic.Int64

	running sync.RWMutex // a writer holds it while a transaction is open
	isHeld  bool
	large   int
}

// NewAudit makes the table, its trigger and a stream of it, called items.
func NewAudit(db *DB, seed uint64) *Audit {
	db.Helper()
	db.Logf("seed %d", seed)
	db.Exec(auditSQL + `select sequin.create_stream('items', '{item}')`)
	return &Audit{db: db, home: db, source: "local", seed: seed}
}

// NewFarAudit makes the table and its trigger in another database than the log's, that is a source there, and a stream
// of it, called items_ and the source's name. It waits until the stream is captured.
func NewFarAudit(home, far *DB, source string, seed uint64) *Audit {
	home.Helper()
	home.Logf("seed %d", seed)
	far.Exec(auditSQL)
	home.Exec(`select sequin.create_stream('items_' || $1, '{public.item}', source => $1)`, source)
	Eventually(home.TB, 30*time.Second, func() error {
		state := Value[string](home, `select state || coalesce(': ' || error, '') from sequin.streams where name = 'items_' || $1`, source)
		if state != "active" {
			return fmt.Errorf("the stream of %s is %s", source, state)
		}
		return nil
	})
	home.Exec(`create table audit_` + source + ` (id bigint, xid bigint, action text, pk text, record jsonb)`)
	return &Audit{db: far, home: home, source: source, seed: seed}
}

// Start has a number of writers change the table until Stop. A writer goes on through whatever happens to the server.
func (a *Audit) Start(writers int, pause time.Duration) {
	a.stop = make(chan struct{})
	for w := range writers {
		a.writers.Go(func() { a.write(w, pause) })
	}
}

// Stop ends the writers.
func (a *Audit) Stop() {
	a.Resume()
	close(a.stop)
	a.writers.Wait()
}

// Pause has the writers wait, once what they are at is over.
func (a *Audit) Pause() {
	if !a.isHeld {
		a.running.Lock()
		a.isHeld = true
	}
}

// Resume has them go on.
func (a *Audit) Resume() {
	if a.isHeld {
		a.isHeld = false
		a.running.Unlock()
	}
}

// Large commits a transaction of so many rows, of keys that no writer has: it waits for the server, if need be.
func (a *Audit) Large(count int) {
	a.db.Helper()
	a.large++
	first := 1_000_000 + a.large*1_000_000
	Eventually(a.db.TB, time.Minute, func() error {
		_, err := a.db.Pool.Exec(context.Background(), `insert into item (id, writer, step, note)
			select $1::int + i, -2, 0, md5(i::text) from generate_series(1, $2::int) i on conflict do nothing`, first, count)
		return err
	})
}

// write is a writer: each has keys of its own, and numbers its transactions.
func (a *Audit) write(writer int, pause time.Duration) {
	ctx := context.Background()
	random := rand.New(rand.NewPCG(a.seed, uint64(writer)))
	var conn *pgx.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close(ctx)
		}
	}()
	for step := 0; ; step++ {
		select {
		case <-a.stop:
			return
		default:
		}
		if conn == nil || conn.IsClosed() {
			var err error
			if conn, err = pgx.Connect(ctx, a.db.URL); err != nil {
				conn = nil
				time.Sleep(10 * time.Millisecond) // the server is away
				continue
			}
		}
		a.running.RLock()
		err := a.transaction(ctx, conn, random, writer, step)
		a.running.RUnlock()
		if err == nil {
			a.Commits.Add(1)
		} else if !conn.IsClosed() && conn.PgConn().TxStatus() != 'I' {
			_, _ = conn.Exec(ctx, "rollback")
		}
		if pause > 0 {
			time.Sleep(time.Duration(random.Int64N(int64(2 * pause))))
		}
	}
}

func (a *Audit) transaction(ctx context.Context, conn *pgx.Conn, random *rand.Rand, writer, step int) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	const keys = 1000
	count := 1 + random.IntN(4)
	if random.IntN(50) == 0 {
		count = 500
	}
	for range count {
		id := writer*keys + random.IntN(keys)
		switch random.IntN(10) {
		case 0, 1:
			_, err = tx.Exec(ctx, `delete from item where id = $1`, id)
		case 2:
			// Another key, where it is free.
			_, err = tx.Exec(ctx, `update item set id = $2, step = $3 where id = $1 and not exists (select from item where id = $2)`,
				id, writer*keys+random.IntN(keys), step)
		case 3:
			// A savepoint that is rolled back leaves nothing.
			_, err = tx.Exec(ctx, fmt.Sprintf(`savepoint s; delete from item where id = %d; rollback to s`, id))
		default:
			_, err = tx.Exec(ctx, `insert into item values ($1, $2, $3, $4, $5, $6, $7, $8)
				on conflict (id) do update set step = excluded.step, amount = excluded.amount, note = excluded.note, tags = excluded.tags`,
				id, writer, step, random.Float64()*1e6, randomText(random), []string{randomText(random), `q"\`, "{,}"},
				map[string]any{"n": random.IntN(100), "s": randomText(random)}, time.Unix(random.Int64N(2e9), 0).UTC())
		}
		if err != nil {
			return err
		}
	}
	if random.IntN(20) == 0 {
		return tx.Rollback(ctx)
	}
	return tx.Commit(ctx)
}

func randomText(random *rand.Rand) string {
	const letters = "abc XYZ\"\\\n\t'é☃{}[],:\u0001"
	runes := []rune(letters)
	var b strings.Builder
	for range random.IntN(30) {
		b.WriteRune(runes[random.IntN(len(runes))])
	}
	return b.String()
}

// The log beside the audit, transaction by transaction: the same changes in the same order, in one piece, once; and
// each writer's transactions in its order.
const auditDifference = `
with log as (
  select *
  from (
    select (l.metadata ->> 'xid')::bigint as xid, l.seq, row_number() over (order by l.seq) as place,
           sequin._action(l.action) as action, l.action as code, l.record_pk, l.record, t.table_name as name
    from sequin.log l
    join sequin.source_table t on t.id = l.route_id
    join sequin.source s on s.id = t.source_id
    where s.name = $1) l
  where l.name = 'item'
), logged as (
  select xid, min(seq) as seq, max(place) - min(place) + 1 as span, count(*) as row_count,
         array_agg(array[action, record_pk, record::text] order by seq) filter (where code <> 'x') as changes
  from log group by xid
), audited as (
  select xid, min(id) as id, array_agg(array[action, pk, record::text] order by id) as changes from %s group by xid
)
select coalesce(string_agg(problem, E'\n' order by xid), '')
from (
  select coalesce(a.xid, l.xid) as xid,
         case when l.xid is null then format('transaction %s is missing', a.xid)
              when a.xid is null then format('transaction %s is not one', l.xid)
              when l.changes <> a.changes then format('transaction %s: the log has %s, the audit %s', l.xid, l.changes, a.changes)
              when l.span <> l.row_count then format('transaction %s is not in one piece', l.xid) end as problem
  from logged l
  full join audited a using (xid)
  union all
  select min(xid), format('writer %s: step %s comes after %s', writer, min(step), max(before))
  from (
    select xid, (record ->> 'writer')::int as writer, (record ->> 'step')::int as step,
           lag((record ->> 'step')::int) over (partition by record ->> 'writer' order by seq) as before
    from log where action in ('insert', 'update') and (record ->> 'writer')::int >= 0) s
  where step < before
  group by writer) p
where problem is not null`

// Check waits until the log has everything, and compares it with the audit.
func (a *Audit) Check(t testing.TB, within time.Duration) {
	t.Helper()
	audit := a.bring(t)
	query := strings.Replace(auditDifference, "%s", audit, 1)
	Eventually(t, within, func() error {
		var difference string
		if err := a.home.Pool.QueryRow(context.Background(), query, a.source).Scan(&difference); err != nil {
			return err
		}
		if difference != "" {
			return fmt.Errorf("seed %d: the log differs from the audit:\n%.2000s", a.seed, difference)
		}
		return nil
	})
	var logged, audited int
	err := a.home.Pool.QueryRow(context.Background(), `select (select count(*) from sequin.log l join sequin.source_table t on t.id = l.route_id
			join sequin.source s on s.id = t.source_id where s.name = $1 and l.action <> 'x'), (select count(*) from `+audit+`)`, a.source).
		Scan(&logged, &audited)
	if err != nil || logged != audited || logged == 0 {
		t.Fatalf("seed %d: the log has %d changes, the audit %d (%v)", a.seed, logged, audited, err)
	}
	t.Logf("%d changes in %d transactions are the audit's", logged, a.Commits.Load())
}

// bring has the audit where the log is, and returns what it is called there.
func (a *Audit) bring(t testing.TB) string {
	t.Helper()
	if a.db == a.home {
		return "audit"
	}
	name := "audit_" + a.source
	a.home.Exec(`truncate ` + name)
	var rows bytes.Buffer // as text: what passes through here is not to be read and written
	if _, err := a.db.Connect().PgConn().CopyTo(context.Background(), &rows, `copy audit to stdout`); err != nil {
		t.Fatalf("bring the audit: %v", err)
	}
	if _, err := a.home.Connect().PgConn().CopyFrom(context.Background(), &rows, `copy `+name+` from stdin`); err != nil {
		t.Fatalf("bring the audit: %v", err)
	}
	return name
}
