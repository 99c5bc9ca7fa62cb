package backfill

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// asker is a consumer with a worker that goes back whenever it likes, and what its messages come to.
type asker struct {
	name, stream string
	options      string // of create_consumer
	isQuiet      bool   // it asks for nothing
	has          func(r row) bool
	since        time.Time // the log goes back so far
	random       *rand.Rand
	conn         *pgx.Conn

	rows     map[int]rowState // by key; those that are deleted too
	count    int              // messages so far
	seqs     []int64          // some that it has had
	requests []request
	left     int           // how often it still asks
	longest  time.Duration // from asking for messages to having them
}

// rowState is what a consumer has last had of a key.
type rowState struct {
	record  string // "": deleted
	seq     int64  // 0: it may come again from anywhere
	version int64
	at      int // which message it was
}

// request is something that was asked for: from then on certain keys have to come, again.
type request struct {
	what string
	at   int
	seq  int64      // from there on in the log,
	time *time.Time // or what was committed then or later,
	row  *int       // or rows of the table from a value of its sort column on,
	keys []int      // or these
}

// rereadBit is set in the seq of a row that republish has read from its table, which may be ahead of the log.
const rereadBit = 1 << 31

func (a *asker) work(db *pgtest.DB, calm, done <-chan struct{}) error {
	ctx := context.Background()
	for {
		isDone, isCalm := isClosed(done), isClosed(calm)
		if !isCalm && a.left > 0 && a.random.IntN(20) == 0 {
			a.left--
			if err := a.ask(ctx); err != nil {
				return fmt.Errorf("%s: %w", a.name, err)
			}
		}
		n, err := a.receive(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", a.name, err)
		}
		if n == 0 && isDone {
			return nil
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (a *asker) receive(ctx context.Context) (int, error) {
	asked := time.Now()
	rows, err := a.conn.Query(ctx, `select ack_id, seq, action, record_pk::int, coalesce(record::text, ''), (changes ->> 'id')::int
		from sequin.receive($1, $2, '200 ms')`, a.name, 1+a.random.IntN(3000))
	if err != nil {
		return 0, err
	}
	type got struct {
		AckID, Seq int64
		Action     string
		Key        int
		Record     string
		OldKey     *int
	}
	messages, err := pgx.CollectRows(rows, pgx.RowToStructByPos[got])
	if err != nil || len(messages) == 0 {
		return 0, err
	}
	a.longest = max(a.longest, time.Since(asked))
	ids := make([]int64, len(messages))
	for i, m := range messages {
		ids[i] = m.AckID
	}
	settle := `select sequin.ack($1, $2)`
	isNack := a.random.IntN(50) == 0
	if isNack {
		settle = `select sequin.nack($1, $2, '0')`
	}
	var n int
	if err := a.conn.QueryRow(ctx, settle, a.name, ids).Scan(&n); err != nil {
		return 0, err
	}
	if n != len(ids) {
		return 0, fmt.Errorf("%s counts %d of %d: %s", settle, n, len(ids), a.leases(ids))
	}
	if isNack {
		return n, nil
	}
	for _, m := range messages {
		if err := a.fold(m.Seq, m.Action, m.Key, m.Record, m.OldKey); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// leases is what there is of the leases of some deliveries: the rows of their lanes, and what is followed one by one.
func (a *asker) leases(ackIDs []int64) string {
	rows, _ := a.conn.Query(context.Background(), `
		with c as (select c.* from sequin.consumer c where c.name = $1),
		a as (select id >> 20 as lease, (id >> 14) & 63 as lane, count(*) as n from unnest($2::bigint[]) id group by 1, 2)
		select a.n || ' of lane ' || a.lane || ', lease ' || a.lease from a where a.lease in (select lease from a limit 100)
		union all select c::text from c
		union all select 'lane ' || s::text from c join sequin.lane s on s.consumer_id = c.id where s.lane in (select lane from a limit 100)
		union all select concat_ws(' ', 'delivery', d.lane, d.group_hash, d.seq, d.lease, d.pick, d.is_out, d.is_done, d.deliver_count, d.not_before, d.due_at, d.leased_at)
			from c join sequin.delivery d on d.consumer_id = c.id
		union all select 'held ' || g::text from c join sequin.held_group g on g.consumer_id = c.id
		union all select 'floor ' || f::text from c join sequin.floor f on f.consumer_id = c.id
		union all select 'backfill ' || b::text from c join sequin.backfill b on b.consumer_id = c.id
		union all select clock_timestamp()::text`, a.name, ackIDs)
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return fmt.Sprint(strings.Join(all, "\n"), err)
}

func (a *asker) fold(seq int64, action string, key int, record string, oldKey *int) error {
	a.count++
	if len(a.seqs) < 1000 {
		a.seqs = append(a.seqs, seq)
	} else if a.random.IntN(100) == 0 {
		a.seqs[a.random.IntN(len(a.seqs))] = seq
	}
	was := a.rows[key]
	if was.seq != 0 && seq <= was.seq {
		return fmt.Errorf("key %d: seq %d came after %d: %s %s", key, seq, was.seq, action, record)
	}
	now := rowState{seq: seq, version: was.version, at: a.count}
	if action != "delete" {
		var r row
		if err := json.Unmarshal([]byte(record), &r); err != nil {
			return err
		}
		// A row of the table that comes again may be as it was.
		if r.Version < was.version || r.Version == was.version && (action != "read" || a.isQuiet) {
			return fmt.Errorf("key %d: %s of version %d, seq %d, came after version %d, seq %d: %s", key, action, r.Version, seq, was.version, was.seq, record)
		}
		now.record, now.version = record, r.Version
		if seq&rereadBit != 0 {
			now.seq, now.version = 0, 0
		}
	}
	a.rows[key] = now
	// The old key is another group: what has become of it since may have come before.
	if oldKey != nil {
		if old, ok := a.rows[*oldKey]; !ok || old.seq < seq {
			a.rows[*oldKey] = rowState{seq: old.seq, version: old.version, at: a.count}
		}
	}
	return nil
}

// ask asks for something that has come to come again. Nothing is out just now.
func (a *asker) ask(ctx context.Context) error {
	r := request{at: a.count}
	var err error
	call := func(sql string, args ...any) {
		var answer any
		r.what = fmt.Sprint(sql, args)
		err = a.conn.QueryRow(ctx, sql, args...).Scan(&answer)
	}
	from := a.random.IntN(100)
	if a.stream != "ranked" {
		from = len(a.rows)/2 + a.random.IntN(len(a.rows)/2+1)
	}
	switch kind := a.random.IntN(6); {
	case kind == 0 && len(a.seqs) > 0:
		r.seq = a.seqs[a.random.IntN(len(a.seqs))]
		call(`select sequin.rewind($1, to_seq => $2)`, a.name, r.seq)
	case kind == 1:
		at := a.since.Add(time.Duration(a.random.Float64() * float64(time.Since(a.since))))
		r.time = &at
		call(`select sequin.rewind($1, to_time => $2)`, a.name, at)
	case kind == 2:
		r.row = &from
		call(`select sequin.rewind($1, to_row => $2)`, a.name, strconv.Itoa(from))
	case kind == 3:
		r.row = &from
		call(`select sequin.backfill($1, $2)`, a.name, strconv.Itoa(from))
	case kind == 4:
		rows, qErr := a.conn.Query(ctx, `select id from item where id between $1 and $1 + 200`, a.random.IntN(len(a.rows)+1))
		if qErr != nil {
			return qErr
		}
		if r.keys, err = pgx.CollectRows(rows, pgx.RowTo[int]); err != nil {
			return err
		}
		call(`select sequin.republish($1, $2)`, a.name, `select id from item where id = any ('{`+join(r.keys)+`}')`)
	default:
		// What is newest before the consumer begins, what it begins after may have overtaken.
		var isStarting bool
		if err = a.conn.QueryRow(ctx, `select state = 'starting' from sequin.consumer_status where name = $1`, a.name).Scan(&isStarting); err != nil || isStarting {
			return err
		}
		// The newest of each: an older one would be what was asked for, and not what the row is.
		rows, qErr := a.conn.Query(ctx, `select record_pk::int, max(seq) from sequin.messages where stream = $1 and seq > (
			select max(seq) from sequin.messages where stream = $1) - $2::int group by record_pk limit 100`, a.stream, a.random.IntN(20000))
		if qErr != nil {
			return qErr
		}
		var seqs []int64
		var key int
		var seq int64
		if _, err = pgx.ForEachRow(rows, []any{&key, &seq}, func() error {
			r.keys, seqs = append(r.keys, key), append(seqs, seq)
			return nil
		}); err != nil {
			return err
		}
		call(`select sequin.republish($1, $2)`, a.name, `select unnest('{`+join(seqs)+`}'::bigint[]) as seq`)
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.ObjectNotInPrerequisiteState && r.keys != nil {
		return nil // it has not begun
	}
	if err != nil {
		return fmt.Errorf("%s: %w", r.what, err)
	}
	switch {
	case r.keys != nil:
		for _, key := range r.keys {
			if s, ok := a.rows[key]; ok {
				s.seq, s.version = 0, 0
				a.rows[key] = s
			}
		}
	case r.row == nil:
		for key, s := range a.rows {
			s.seq, s.version = 0, 0
			a.rows[key] = s
		}
	}
	a.requests = append(a.requests, r)
	return nil
}

func join[T any](values []T) string {
	text := ""
	for i, v := range values {
		if i > 0 {
			text += ","
		}
		text += fmt.Sprint(v)
	}
	return text
}

// check compares what has come with the table at rest, and that what was asked for came. newest is the last message that
// the log has of each key.
func (a *asker) check(db *pgtest.DB, table map[int]string, newest map[int]int64) {
	for key, record := range table {
		var r row
		if err := json.Unmarshal([]byte(record), &r); err != nil {
			db.Fatal(err)
		}
		got, ok := a.rows[key]
		if got.record != record && (ok || a.has != nil && a.has(r)) {
			db.Errorf("%s of %s: row %d is %+v, and in the table %s; it asked for %s", a.name, a.stream, key, got, record, a.asked())
			return
		}
		for _, q := range a.requests {
			value := &r.ID
			if a.stream == "ranked" {
				value = r.Rank
			}
			if q.row != nil && value != nil && *value >= *q.row && got.at <= q.at {
				db.Errorf("%s: row %s came last as message %d, before %d: %s", a.name, record, got.at, q.at, q.what)
				return
			}
		}
	}
	for key, got := range a.rows {
		if table[key] != got.record {
			db.Errorf("%s: row %d is %+v, and in the table %q; it asked for %s", a.name, key, got, table[key], a.asked())
			return
		}
	}
	for _, q := range a.requests {
		seq := q.seq
		if q.time != nil {
			seq = pgtest.Value[int64](db, `select coalesce(min(seq), 9223372036854775807) from sequin.messages where stream = $1 and committed_at >= $2`, a.stream, *q.time)
		}
		for key, last := range newest {
			if seq > 0 && last >= seq && a.rows[key].at <= q.at {
				db.Errorf("%s: key %d, seq %d came last as message %d, before %d: %s", a.name, key, last, a.rows[key].at, q.at, q.what)
				return
			}
		}
		for _, key := range q.keys {
			if a.rows[key].at <= q.at {
				db.Errorf("%s: key %d came last as message %d, before %d: %s", a.name, key, a.rows[key].at, q.at, q.what)
				return
			}
		}
	}
}

func (a *asker) asked() (all []string) {
	for _, r := range a.requests {
		all = append(all, fmt.Sprintf("%d: %.100s", r.at, r.what))
	}
	return all
}

// Twenty consumers that begin and go back at random moments, in every way there is, while the table is written and the
// bridge is killed: what each has had comes to the table, no row comes older than it came before, but where that was
// asked for, and what was asked for came. SEQUIN_ROUNDS asks for the long form, on 200,000 rows.
func TestStorm(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	rows := 3000
	if os.Getenv("SEQUIN_ROUNDS") != "" {
		rows = 200_000
	}
	for round := range pgtest.Rounds(t, 1) {
		began := time.Now()
		storm(t, pgtest.New(t), seed+uint64(round), rows, "local")
		t.Logf("seed %d: %s", seed+uint64(round), time.Since(began).Round(time.Second))
		if t.Failed() {
			t.Fatalf("seed %d", seed+uint64(round))
		}
	}
}

// The same where a commit waits for a synchronous standby: what is in the log cannot be read in the table yet.
func TestStormBesideStandby(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	rows := 2000
	if os.Getenv("SEQUIN_ROUNDS") != "" {
		rows = 200_000
	}
	for round := range pgtest.Rounds(t, 1) {
		began := time.Now()
		db := pgtest.NewOn(t, pgtest.NewCluster(t, nil))
		db.Exec(`select pg_create_physical_replication_slot('slow')`)
		s := startStandby(t, db.URL, "slow")
		s.beSlow(rand.New(rand.NewPCG(seed, 2000)))
		db.Exec(`alter system set synchronous_standby_names = 'slow'`)
		db.Exec(`alter system set synchronous_commit = 'local'`)
		db.Exec(`select pg_reload_conf()`)
		storm(t, db, seed+uint64(round), rows, "remote_apply")
		t.Logf("seed %d: %s", seed+uint64(round), time.Since(began).Round(time.Second))
		if t.Failed() {
			t.Fatalf("seed %d", seed+uint64(round))
		}
		db.Exec(`alter system reset synchronous_standby_names`)
		db.Exec(`select pg_reload_conf()`)
	}
}

func storm(t *testing.T, db *pgtest.DB, seed uint64, rows int, synchronousCommit string) {
	random := rand.New(rand.NewPCG(seed, 1000))
	w := startWriters(db, seed, 3, rows, 6*time.Millisecond, synchronousCommit)
	db.Exec(`select sequin.create_stream('s', '{item}'), sequin.create_stream('ranked', '{item}', sort_column => 'rank'),
		sequin.create_stream('changes', '{item}', mode => 'changes')`)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	pgtest.Eventually(t, 30*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.messages where stream = 's')`) {
			return errors.New("nothing is captured")
		}
		return nil
	})

	since := time.Now()
	askers := make([]*asker, 20)
	for i := range askers {
		a := &asker{
			isQuiet: i%4 == 3,
			random:  rand.New(rand.NewPCG(seed, uint64(3000+i))),
			since:   since,
			conn:    db.Connect(),
			rows:    map[int]rowState{},
			stream:  []string{"s", "s", "ranked", "s", "changes"}[random.IntN(5)],
		}
		if !a.isQuiet {
			a.left = 4
		}
		var start string
		switch random.IntN(4) {
		case 0:
			start = "now"
		case 1:
			from := rows/2 + random.IntN(rows/2)
			sort := func(r row) *int { return &r.ID }
			if a.stream == "ranked" {
				from, sort = random.IntN(100), func(r row) *int { return r.Rank }
			}
			start = fmt.Sprintf("row', start_row => '%d", from)
			a.has = func(r row) bool { v := sort(r); return v != nil && *v >= from }
		default:
			start = "beginning"
			a.has = func(row) bool { return true }
		}
		a.options = "start_at => '" + start + "'"
		switch {
		case a.stream == "changes" || random.IntN(3) == 0:
			a.options += ", group_by => '{}'"
		case random.IntN(2) == 0:
			a.options += ", group_by => '{id}'"
		}
		a.name = fmt.Sprintf("c%d", i)
		askers[i] = a
	}

	var workers sync.WaitGroup
	calm, done := make(chan struct{}), make(chan struct{})
	pause := func(longest time.Duration) { time.Sleep(time.Duration(random.Int64N(int64(longest)))) } // a random moment is the point
	wantWhole := func() {
		if strings.Contains(b.Log(), pgerrcode.DataCorrupted) {
			t.Errorf("the bridge found less in the log than is out: %s", b.Log())
		}
	}
	kill := func() {
		b.Kill()
		wantWhole()
		b = pgtest.BridgeProcess(t, db.URL)
	}
	step := 200 * time.Millisecond
	if rows > 100_000 {
		step = 2 * time.Second
	}
	for i, a := range askers {
		db.Exec(fmt.Sprintf(`select sequin.create_consumer('%s', '%s', %s)`, a.name, a.stream, a.options))
		workers.Go(func() {
			if err := a.work(db, calm, done); err != nil {
				t.Errorf("%v; it is of %s, %s, and asked for %s", err, a.stream, a.options, a.asked())
			}
		})
		pause(step)
		if i%5 == 4 {
			kill()
		}
	}
	for range 4 {
		pause(4 * step)
		kill()
	}
	pause(4 * step)
	close(calm)
	w.end()
	awaitLogged(t, db)
	pgtest.Eventually(t, 5*time.Minute, func() error {
		if t.Failed() {
			return nil
		}
		if n := pgtest.Value[int](db, `select count(*) from sequin.backfills where state <> 'done'`); n > 0 {
			return fmt.Errorf("%s; the bridge: %s", state(db), b.Log())
		}
		if left := pgtest.Value[string](db, `select coalesce(string_agg(s::text, ' '), '') from sequin.consumer_status s where pending > 0 or in_flight > 0`); left != "" {
			return fmt.Errorf("left over: %s", left)
		}
		return nil
	})
	close(done)
	workers.Wait()
	if t.Failed() {
		t.Logf("backfills: %s", state(db))
		return
	}
	t.Logf("at rest after %s", time.Since(since))
	awaitCleared(t, db)
	t.Logf("cleared after %s", time.Since(since))

	table := map[int]string{}
	for _, record := range pgtest.Column[string](db, `select to_jsonb(i)::text from item i`) {
		var r row
		if err := json.Unmarshal([]byte(record), &r); err != nil {
			t.Fatal(err)
		}
		table[r.ID] = record
	}
	newest := map[string]map[int]int64{}
	for _, stream := range []string{"s", "ranked", "changes"} {
		newest[stream] = map[int]int64{}
		rows, err := db.Pool.Query(t.Context(), `select record_pk::int, max(seq) from sequin.messages where stream = $1 group by 1`, stream)
		if err != nil {
			t.Fatal(err)
		}
		var key int
		var seq int64
		if _, err := pgx.ForEachRow(rows, []any{&key, &seq}, func() error { newest[stream][key] = seq; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	messages, requests := 0, 0
	var longest time.Duration
	for _, a := range askers {
		longest = max(longest, a.longest)
		a.check(db, table, newest[a.stream])
		messages, requests = messages+a.count, requests+len(a.requests)
	}
	t.Logf("%d transactions, %d rows, %d messages, %d times back, %d backfills, longest receive %s", w.n.Load(), len(table), messages, requests,
		pgtest.Value[int](db, `select count(*) from sequin.backfills`), longest.Round(time.Millisecond))
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
	wantWhole()
}
