package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// synced is a row of sync.
type synced struct {
	Cursor          string
	Seq             int64
	Action, Schema  string
	Table           string
	PK              *string
	Record, Changes map[string]any
	CommittedAt     *time.Time
}

// syncCall reads a page.
func syncCall(ctx context.Context, conn *pgx.Conn, stream string, cursor *string, batch int, wait string) ([]synced, error) {
	rows, err := conn.Query(ctx, `select cursor, seq, action, table_schema, table_name, record_pk, record, changes, committed_at
		from sequin.sync($1, $2, $3, $4::text::interval)`, stream, cursor, batch, wait)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[synced])
}

// syncer is a client of sync: what it has read, folded.
type syncer struct {
	t      testing.TB
	stream string
	cursor *string
	rows   map[string]map[string]any // by table and record_pk
	seq    int64
	reads  int
	isLive bool
	newest map[string]float64 // the highest step of each
}

func newSyncer(t testing.TB, stream string) *syncer {
	return &syncer{t: t, stream: stream, rows: map[string]map[string]any{}, newest: map[string]float64{}}
}

func (s *syncer) clone() *syncer {
	c := *s
	c.rows, c.newest = map[string]map[string]any{}, map[string]float64{}
	for k, v := range s.rows {
		c.rows[k] = v
	}
	for k, v := range s.newest {
		c.newest[k] = v
	}
	return &c
}

// page reads a page and folds it. How many rows.
func (s *syncer) page(conn *pgx.Conn, batch int, wait string) int {
	s.t.Helper()
	got, err := syncCall(context.Background(), conn, s.stream, s.cursor, batch, wait)
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.SerializationFailure {
		s.t.Logf("%s", pgErr.Message)
		return 1 // there is more, only not yet
	}
	if err != nil {
		s.t.Fatalf("sync: %v", err)
	}
	for _, m := range got {
		s.fold(m)
	}
	return len(got)
}

func (s *syncer) fold(m synced) {
	s.t.Helper()
	switch {
	case m.Seq < s.seq || s.isLive && m.Seq == s.seq:
		s.t.Fatalf("seq %d came after %d", m.Seq, s.seq)
	case m.Action == "read" && s.isLive:
		s.t.Fatalf("a row of the table came after the log")
	case m.Action == "read":
		s.reads++
	default:
		s.isLive = true
	}
	s.seq, s.cursor = m.Seq, &m.Cursor
	if m.Action == "truncate" {
		for k := range s.rows {
			if strings.HasPrefix(k, m.Table+" ") {
				delete(s.rows, k)
			}
		}
		return
	}
	key := m.Table + " " + *m.PK
	if step, ok := m.Record["step"].(float64); ok && m.Action != "delete" {
		if step < s.newest[key] {
			s.t.Fatalf("step %v of %s came after %v: %+v", step, key, s.newest[key], m)
		}
		s.newest[key] = step
	}
	if id, ok := m.Changes["id"].(float64); ok { // of a stream of changes: it had another key
		delete(s.rows, fmt.Sprintf("%s %.0f", m.Table, id))
	}
	if m.Action == "delete" {
		delete(s.rows, key)
	} else {
		s.rows[key] = m.Record
	}
}

// wantTable checks that what was read is what is in these tables.
func (s *syncer) wantTable(db *pgtest.DB, tables map[string]string) {
	s.t.Helper()
	count := 0
	for table, key := range tables {
		rows, err := db.Pool.Query(context.Background(), fmt.Sprintf(`select %s, to_jsonb(t) from %s t`, key, table))
		if err != nil {
			s.t.Fatal(err)
		}
		var pk string
		var record map[string]any
		_, err = pgx.ForEachRow(rows, []any{&pk, &record}, func() error {
			count++
			got, ok := s.rows[strings.Trim(table, `"`)+" "+pk]
			if !ok {
				return fmt.Errorf("row %s of %s is missing", pk, table)
			}
			if fmt.Sprint(got) != fmt.Sprint(record) {
				return fmt.Errorf("row %s of %s is %v, want %v", pk, table, got, record)
			}
			record = nil
			return nil
		})
		if err != nil {
			s.t.Error(err)
		}
	}
	if count != len(s.rows) {
		s.t.Errorf("%d rows were read, %d are there", len(s.rows), count)
	}
}

// Two clients read a table that moves, from its first row to its end; one of them starts again half way, from a cursor
// that it had before. Both have the table at rest.
func TestSync(t *testing.T) {
	seed := pgtest.Seed(t)
	for round := range pgtest.Rounds(t, 1) {
		seed := seed + uint64(round)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { testSync(t, seed) })
	}
}

func testSync(t *testing.T, seed uint64) {
	t.Parallel()
	count := 100_000
	if os.Getenv("SEQUIN_ROUNDS") != "" {
		count = 1_000_000
	}
	random := rand.New(rand.NewPCG(seed, 0))
	sort := []string{"null", "'at'"}[random.IntN(2)]
	mode := []string{"rows", "changes"}[random.IntN(2)]
	t.Logf("seed %d: mode %s, sort_column %s", seed, mode, sort)
	db := pgtest.New(t)
	db.Exec(`create table moving (id int primary key, step int not null, at int, note text); create index on moving (at, id)`)
	db.Exec(`insert into moving select n, 0, nullif((n::bigint * 7919 % 1000)::int, 0), repeat('x', n % 50) from generate_series(1, $1::int) n`, count)
	db.Exec(`analyze moving`)
	if mode == "changes" {
		db.Exec(`alter table moving replica identity full`)
	}
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_stream('s', '{moving}', mode => $1, sort_column => `+sort+`)`, mode)

	// Each writer has rows of its own, and numbers its transactions.
	const writers = 4
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var running sync.WaitGroup
	for w := range writers {
		random := rand.New(rand.NewPCG(seed, uint64(w+1)))
		conn := db.Connect()
		running.Go(func() {
			for step := 1; ctx.Err() == nil; step++ {
				if err := moveRows(conn, random, count, writers, w, step); err != nil {
					t.Errorf("writer: %v", err)
					return
				}
				time.Sleep(time.Duration(random.Int64N(int64(4 * time.Millisecond)))) // so many a second
			}
		})
	}
	var readers sync.WaitGroup
	done := make(chan struct{})
	var clients [2]*syncer
	for i := range clients {
		random := rand.New(rand.NewPCG(seed, uint64(100+i)))
		clients[i] = newSyncer(t, "s")
		readers.Go(func() {
			conn := db.Connect()
			s := clients[i]
			var kept *syncer
			for isLast := false; ; {
				select {
				case <-done:
					isLast = true
				default:
				}
				if s.page(conn, 1+random.IntN(4000), "100 ms") == 0 && isLast {
					break
				}
				if i == 1 && kept == nil && s.reads > count/3 {
					kept = s.clone()
				} else if i == 1 && kept != nil && s.reads > count/2 && s != kept {
					s, conn = kept, db.Connect()
					clients[i] = s
				}
				if i == 0 && s.isLive && ctx.Err() == nil {
					cancel() // it has been all over the table
				}
			}
		})
	}
	running.Wait()
	awaitRow(t, db, "moving", -1)
	close(done)
	readers.Wait()
	for i, s := range clients {
		t.Logf("client %d: %d rows of the table, up to seq %d", i, s.reads, s.seq)
		if s.reads < count/10 { // what changes before it is read comes as a change
			t.Errorf("client %d read %d rows of the table only", i, s.reads)
		}
		s.wantTable(db, map[string]string{"moving": "id::text"})
	}
}

// awaitRow inserts a row, and waits until it is in the log.
func awaitRow(t *testing.T, db *pgtest.DB, table string, id int) {
	t.Helper()
	db.Exec(fmt.Sprintf(`insert into %s values (%d, 0)`, table, id))
	pgtest.Eventually(t, 60*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.messages where stream = 's' and record_pk = $1)`, fmt.Sprint(id)) {
			return fmt.Errorf("the last row is not in the log")
		}
		return nil
	})
}

// moveRows is a transaction of a writer.
func moveRows(conn *pgx.Conn, random *rand.Rand, count, writers, writer, step int) error {
	ctx := context.Background()
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer tx.Rollback(ctx) //nolint:errcheck // after the commit it does nothing
	key := func() int { return random.IntN(count*11/10/writers)*writers + writer }
	for range 1 + random.IntN(5) {
		id := key()
		switch random.IntN(10) {
		case 0, 1:
			_, err = tx.Exec(ctx, `delete from moving where id = $1`, id)
		case 2:
			_, err = tx.Exec(ctx, `update moving set id = $2, step = $3 where id = $1 and not exists (select from moving where id = $2)`, id, key(), step)
		case 3:
			_, err = tx.Exec(ctx, fmt.Sprintf(`savepoint s; delete from moving where id = %d; rollback to s`, id))
		case 4:
			_, err = tx.Exec(ctx, fmt.Sprintf(`savepoint s; update moving set step = %d, at = null where id = %d; release s`, step, id))
		default:
			_, err = tx.Exec(ctx, `insert into moving values ($1, $2, $3, $4) on conflict (id) do update set step = excluded.step, at = excluded.at`,
				id, step, random.IntN(1000), "y")
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

// syncAll reads a stream from a cursor to its end.
func syncAll(t *testing.T, conn *pgx.Conn, stream string, cursor *string, batch int) []synced {
	t.Helper()
	var all []synced
	for {
		got, err := syncCall(context.Background(), conn, stream, cursor, batch, "0")
		if err != nil {
			t.Fatalf("sync of %s: %v", stream, err)
		}
		if len(got) == 0 {
			return all
		}
		all = append(all, got...)
		cursor = &got[len(got)-1].Cursor
	}
}

// Whatever its key, its order and its types, a table's rows come in order, each once, and to the letter as the log has
// them.
func TestSyncTables(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create extension citext`)
	db.Exec(`create type mood as enum ('sad', 'ok', 'happy'); create type pair as (a int, b text);
		create domain code as varchar(10) check (length(value) > 0)`)
	tables := map[string]struct{ definition, rows, sort, order string }{
		"composite":     {`a text collate "C", b int, note text, primary key (b, a)`, `chr(97 + n % 26) || repeat(' ', n % 3), n % 7, n::text`, "", "b, a"},
		`"Odd.Ta""ble"`: {`"a b" char(8) primary key, "it's" int`, `'k,' || chr(34) || n, n`, "", `"a b"`},
		"uuids":         {`id uuid primary key, n int`, `md5(n::text)::uuid, n`, "", "id"},
		"times":         {`at timestamptz, ok bool, f float8, primary key (at, ok)`, `'2026-01-01'::timestamptz + n / 2 * interval '1.000001 s', n % 2 = 0, n / 7.0`, "", "at, ok"},
		"numbers":       {`n numeric primary key, d date`, `n / 8.0 - 20, date '2026-01-01' + n`, "", "n"},
		"enums":         {`m mood, c code, primary key (m, c)`, `(array['happy','sad','ok'])[1 + n % 3]::mood, 'c' || n`, "", "m, c"},
		"insensitive":   {`c citext primary key, n int`, `case when n % 2 = 0 then 'K' else 'k' end || n, n`, "", "c"},
		"moods":         {`c citext, n int, primary key (c, n)`, `case when n % 2 = 0 then 'K' else 'k' end || n % 5, n`, "", "c, n"},
		"sorted":        {`id int primary key, s text, x int`, `n, case when n % 4 > 0 then chr(97 + n % 9) end, n`, "s", "s nulls last, id"},
		"allnull":       {`id int primary key, s int`, `n, null`, "s", "id"},
		"types": {
			`id int primary key, p pair, ps pair[], j json, js jsonb, i interval, b bytea, a int[], r int4range, ts timestamp, nan float8, bp char(5), mo mood[], dc code, x xml, g int generated always as (id * 2) stored`,
			`n, row(n, 'a"b')::pair, array[row(n, null)::pair], case when n % 3 = 0 then '{"b":"\u0000"}' else '{"b":  1, "a": [1.0, 2]}' end::json, '{"z":1}', n * interval '1 hour 1 sec', '\xdead', ('[0:1]={' || n || ',2}')::int[], int4range(n, n + 5), 'infinity', 'NaN', 'ab', '{sad,ok}', 'x', '<a/>'`, "", "id",
		},
		"empty": {`id int primary key`, "", "", "id"},
	}
	if db.Major() >= 13 {
		tables["parts"] = struct{ definition, rows, sort, order string }{`id int, k int, note text, primary key (k, id)) partition by range (k`, `n, n % 10, n::text`, "", "k, id"}
	}
	pgtest.StartBridge(t, db.URL)
	conn := db.Connect()
	for name, table := range tables {
		db.Exec(`create table ` + name + ` (` + table.definition + `)`)
		if name == "parts" {
			db.Exec(`create table part1 partition of parts for values from (0) to (4);
				create table part2 (note text, id int not null, k int not null); alter table parts attach partition part2 for values from (4) to (100)`)
		}
		columns := pgtest.Column[string](db, `select quote_ident(attname) from pg_attribute where attrelid = $1::regclass and attnum > 0 and attgenerated = '' order by attnum`, name)
		if table.rows != "" {
			db.Exec(`insert into ` + name + ` (` + strings.Join(columns, ",") + `) select ` + table.rows + ` from generate_series(1, 120) n`)
		}
		var sort *string
		if table.sort != "" {
			sort = &table.sort
		}
		db.Exec(`select sequin.create_stream($1, array[$2], sort_column => $3)`, name, name, sort)
	}
	for name, table := range tables {
		count := pgtest.Value[int](db, `select count(*) from `+name)
		if got := syncAll(t, conn, name, nil, 7); len(got) != count {
			t.Errorf("%s: %d rows, want %d", name, len(got), count)
		}
		if count == 0 {
			continue
		}
		// In order,
		db.Exec(`create table reads as select row_number() over () as n, s.* from sequin.sync($1, null, 10000) s`, name)
		pk := pgtest.Value[string](db, `select sequin._record_pk_sql(sequin._key_columns($1::regclass))`, name)
		got := pgtest.Column[string](db, `select record_pk from reads order by n`)
		if want := pgtest.Column[string](db, `select `+pk+` from `+name+` t order by `+table.order); !slices.Equal(got, want) {
			t.Errorf("%s: the order is %q, want %q", name, got, want)
		}
		// and as the log has them, once they are updated.
		column, _, _ := strings.Cut(table.order, ",")
		column = strings.TrimSuffix(column, " nulls last")
		db.Exec(`update ` + name + ` set ` + column + ` = ` + column)
		last := pgtest.Value[string](db, `select cursor from reads order by n desc limit 1`)
		pgtest.Eventually(t, 20*time.Second, func() error {
			if logged := syncAll(t, conn, name, &last, 1000); len(logged) != count {
				return fmt.Errorf("%s: the log has %d rows, want %d", name, len(logged), count)
			}
			return nil
		})
		for _, difference := range pgtest.Column[string](db, `
			select format('%s: the table gives %s, the log %s', record_pk, r.record, l.record)
			from reads r
			full join (select m.record_pk, m.record from sequin.messages m where m.stream = $1) l using (record_pk)
			where l.record::text is distinct from r.record::text
			limit 3`, name) {
			t.Errorf("%s: %s", name, difference)
		}
		// A key's group is the log's, too.
		if n := pgtest.Value[int](db, `
			select count(*) from sequin.log l join sequin.source_table t on t.id = l.route_id
			where t.relation_oid = $1::regclass and sequin._key_hash(l.route_id, l.record_pk) <> l.group_hash`, name); n > 0 {
			t.Errorf("%s: %d keys are in another group than the log's", name, n)
		}
		db.Exec(`drop table reads`)
	}
}

// Several tables come one after another, then their changes in one order; a cursor is its stream's only, and is refused
// once the log does not reach back to it.
func TestSyncCursor(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table one (id int primary key, step int); create table two (id int primary key, step int); create table three (id int primary key, step int)`)
	db.Exec(`insert into one select n, 0 from generate_series(1, 10) n; insert into two select n, 0 from generate_series(1, 10) n`)
	db.Exec(`select sequin.set_retention('0')`)
	pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_stream('s', '{two,one}'); select sequin.create_stream('other', '{one}'); select sequin.create_stream('three', '{three}')`)
	conn := db.Connect()
	first := syncAll(t, conn, "s", nil, 3)
	db.Exec(`update one set step = 1 where id <= 2; update two set step = 1 where id <= 2; delete from one where id = 3; truncate two`)
	s := newSyncer(t, "s")
	for _, m := range first {
		s.fold(m)
	}
	if len(first) != 20 || first[0].Table != "two" || first[10].Table != "one" || first[0].CommittedAt != nil {
		t.Fatalf("got %d rows, first %+v", len(first), first[0])
	}
	pgtest.Eventually(t, 20*time.Second, func() error {
		if s.page(conn, 2, "1 s"); len(s.rows) != 9 {
			return fmt.Errorf("%d rows, want 9", len(s.rows))
		}
		return nil
	})
	s.wantTable(db, map[string]string{"one": "id::text", "two": "id::text"})

	// From half way, without the rows that have changed since.
	half := newSyncer(t, "s")
	for _, m := range first[:12] {
		half.fold(m)
	}
	for half.page(conn, 100, "0") > 0 {
	}
	half.wantTable(db, map[string]string{"one": "id::text", "two": "id::text"})
	if half.reads >= 20 {
		t.Errorf("%d rows of the table", half.reads)
	}

	// In a read only transaction, and under one snapshot.
	for _, mode := range []string{"read only", "isolation level repeatable read read only"} {
		tx, err := conn.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), `set transaction `+mode); err != nil {
			t.Fatal(err)
		}
		if got := syncAll(t, conn, "s", s.cursor, 100); len(got) != 0 {
			t.Errorf("%s: %d rows more", mode, len(got))
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	refused := func(stream, cursor, code, hint string) {
		t.Helper()
		e := db.Error(`select * from sequin.sync($1, $2)`, stream, cursor)
		if e.Code != code || !strings.Contains(e.Hint, hint) {
			t.Errorf("sync of %s: %s %s, hint %s", stream, e.Code, e.Message, e.Hint)
		}
	}
	refused("other", first[0].Cursor, "22023", "null")
	refused("s", first[0].Cursor[:len(first[0].Cursor)-2], "22023", "null")
	refused("s", strings.ToUpper(first[0].Cursor), "22023", "null")
	refused("s", "x'; drop table one; --", "22023", "null")

	// The log moves on: a cursor that has missed nothing is good, whatever is gone.
	db.Exec(`insert into one values (100, 2)`)
	old := s.cursor
	for s.page(conn, 100, "5 s") == 0 {
	}
	pgtest.Eventually(t, 60*time.Second, func() error {
		db.Exec(`insert into three select coalesce(max(id), 0) + 1, 0 from three`)
		if n := pgtest.Value[int](db, `select count(*) from sequin.log where table_name = 'one'`); n > 0 {
			return fmt.Errorf("%d rows are kept", n)
		}
		return nil
	})
	if got := syncAll(t, conn, "s", s.cursor, 100); len(got) != 0 {
		t.Errorf("%d rows more", len(got))
	}
	refused("s", *old, "55000", "sequin.sync('s')")
	refused("s", first[0].Cursor, "55000", "sequin.sync('s')")
}

// What was committed before the cut and captured after it, is in the rows and does not come again. An idle server's log is
// soon known to be complete.
func TestSyncCut(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, nil)) // no other transactions: the bridge is not there to say that they are captured
	db.Exec(`create table moving (id int primary key, step int)`)
	db.Exec(`insert into moving select n, 0 from generate_series(1, 10) n`)
	stop := pgtest.StartBridge(t, db.URL)
	db.Exec(`select sequin.create_stream('s', '{moving}')`)
	conn := db.Connect()
	stop()
	long := db.Connect() // a transaction that began before, and goes on
	if _, err := long.Exec(t.Context(), `begin; update moving set step = 1 where id = 10`); err != nil {
		t.Fatal(err)
	}
	for step := 1; step <= 3; step++ {
		db.Exec(`update moving set step = $1 where id < 9`, step)
	}
	s := newSyncer(t, "s")
	s.page(conn, 5, "0")
	if s.reads != 5 || s.rows["moving 1"]["step"] != 3.0 {
		t.Fatalf("%d rows of the table: %v", s.reads, s.rows)
	}
	db.Exec(`update moving set step = 4 where id in (2, 6)`)
	if _, err := long.Exec(t.Context(), `commit`); err != nil {
		t.Fatal(err)
	}
	pgtest.StartBridge(t, db.URL)
	awaitRow(t, db, "moving", 11)
	for s.page(conn, 5, "0") > 0 {
	}
	s.wantTable(db, map[string]string{"moving": "id::text"})
	if s.reads != 8 {
		t.Errorf("%d rows of the table came as such, want 8", s.reads)
	}
}
