package sql

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"sequin/tests/pgtest"
)

// source is the table that a log and histories of it are written from, by the test in place of a bridge: every change is
// in the log at once.
type source struct {
	*fixture
	rows    map[int]row
	changed map[int]int64 // the seq of each key's last change
	version int
}

// change inserts, updates or deletes rows.
func (s *source) change(keys ...int) {
	s.Helper()
	var rows []row
	for _, key := range keys {
		s.version++
		was, isThere := s.rows[key]
		r := row{action: "i", key: key, grp: key % 7, note: fmt.Sprint(s.version), hash: hashOf(key)}
		switch {
		case isThere && s.version%5 == 0:
			r = was
			r.action = "d"
		case isThere:
			r.action = "u"
		}
		rows = append(rows, r)
	}
	for i, seq := range s.write(rows...) {
		key := rows[i].key
		s.changed[key] = seq
		delete(s.rows, key)
		if rows[i].action != "d" {
			s.rows[key] = rows[i]
		}
	}
}

func hashOf(key int) int32 { return int32(key+1) * 7919 } // 0 would be none

// begin does the first step of a backfill, if it may.
func (s *source) begin(id int64) bool {
	s.Helper()
	return pgtest.Value[bool](s.DB, `select sequin.bridge_backfill_begin($1)`, id)
}

// cut has the log go on in another segment.
func (s *source) cut() {
	s.Helper()
	if segment := pgtest.Value[*int](s.DB, `select sequin.bridge_backfill_cut(1, 1, pg_current_wal_insert_lsn()::text)`); segment != nil {
		s.lastSeq = int64(*segment) << 32
	}
}

// history is how far a backfill has got.
type history struct {
	ID, LastSeq    int64
	Live, From     *int
	State          string
	IsOpen         bool
	Step, RowsDone int64
	LastKey        []string
	Route          int32
}

func (s *source) history(id int64) history {
	s.Helper()
	var h history
	err := s.Pool.QueryRow(context.Background(), `
		select b.id, coalesce(p.last_seq, b.segment::bigint << 32, 0), b.live_segment, b.from_row::int, b.state, b.cut_at is not null,
		       coalesce(p.step, 0), coalesce(p.rows_done, 0), p.last_key, b.side_routes[1]
		from sequin.backfill b
		left join lateral (select * from sequin.backfill_step s where s.backfill_id = b.id order by s.step desc limit 1) p on true
		where b.id = $1`, id).Scan(&h.ID, &h.LastSeq, &h.Live, &h.From, &h.State, &h.IsOpen, &h.Step, &h.RowsDone, &h.LastKey, &h.Route)
	if err != nil {
		s.Fatal(err)
	}
	return h
}

func (s *source) open(id int64) {
	s.Helper()
	s.Exec(`select sequin.bridge_backfill_open($1)`, *s.history(id).Live)
}

// chunk writes the next rows of a history. Whether there were any.
func (s *source) chunk(id int64, size int) bool {
	s.Helper()
	h := s.history(id)
	last := -1
	if h.LastKey != nil {
		fmt.Sscan(h.LastKey[0], &last)
	}
	var keys []int
	for key := range s.rows {
		if key > last && (h.From == nil || key >= *h.From) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	keys = keys[:min(len(keys), size)]
	if len(keys) == 0 {
		return false
	}
	tx, err := s.Pool.Begin(context.Background())
	if err != nil {
		s.Fatal(err)
	}
	defer tx.Rollback(context.Background()) //nolint:errcheck // after the commit it does nothing
	seq := h.LastSeq
	for _, key := range keys {
		if s.changed[key] > int64(*h.Live)<<32 {
			continue // it comes as a change
		}
		seq++
		r := s.rows[key]
		if _, err := tx.Exec(context.Background(), `
			insert into sequin.log (seq, committed_at, route_id, group_hash, lane, action, table_schema, table_name, record_pk, record, metadata)
			values ($1, clock_timestamp(), $2, $3, $3 & 63, 'r', 'public', 'item', $4, $5, jsonb_build_object('commit_lsn', pg_current_wal_insert_lsn()))`,
			seq, h.Route, r.hash, fmt.Sprint(key), fmt.Sprintf(`{"id": %d, "grp": %d, "note": "%s"}`, key, r.grp, r.note)); err != nil {
			s.Fatal(err)
		}
	}
	if _, err := tx.Exec(context.Background(), `select sequin.bridge_backfill_step($1, $2, 1, array[$3], null, $4, $5, $6)`,
		id, h.Step, fmt.Sprint(keys[len(keys)-1]), seq, h.RowsDone+int64(len(keys)), seq-h.LastSeq); err != nil {
		s.Fatal(err)
	}
	if err := tx.Commit(context.Background()); err != nil {
		s.Fatal(err)
	}
	s.feed()
	return true
}

// feed brings feeds up, as a bridge does.
func (s *source) feed() {
	s.Helper()
	s.Exec(`select sequin.bridge_feed(c.consumer_id, 100000) from sequin.bridge_consumers() c where c.has_feed`)
}

// advance brings the first backfill that is not over a step on. Whether there is one.
func (s *source) advance(size int) bool {
	s.Helper()
	id := pgtest.Value[*int64](s.DB, `select min(id) from sequin.backfill where state in ('waiting', 'running')`)
	if id == nil {
		s.feed()
		s.Exec(`select sequin.bridge_backfill_leave(1), sequin.bridge_backfill_clear(1)`)
		return false
	}
	h := s.history(*id)
	switch {
	case h.State == "waiting":
		s.begin(*id)
	case h.Live == nil:
		s.cut()
	case !h.IsOpen:
		s.open(*id)
	case !s.chunk(*id, size):
		s.Exec(`select sequin.bridge_backfill_end($1, null)`, *id)
		s.feed()
	}
	return true
}

// fold is what a worker's messages come to.
type fold struct {
	*source
	rows map[int]string // its note, by key
	last map[int]int64  // its seq
	had  map[int]int    // when it came last
	n    int

	asked []again
}

// again is something that was asked for: what must come after a message, for the first time or again.
type again struct {
	n    int   // the message
	seq  int64 // the last change of each key, from there on,
	row  int   // or rows of the table; -1: none
	what string
}

// take receives and acknowledges a batch of the consumer c.
func (w *fold) take(size int) int {
	w.Helper()
	got := w.receive(fmt.Sprintf(`'c', %d`, size))
	if len(got) == 0 {
		return 0
	}
	w.call("ack", ids(got), int64(len(got)))
	for _, m := range got {
		w.n++
		key := atoi(w.TB.(*testing.T), m.Key)
		if m.Seq <= w.last[key] {
			w.Fatalf("%+v came after seq %d", m, w.last[key])
		}
		w.last[key], w.had[key] = m.Seq, w.n
		w.rows[key] = m.Note
		if m.Action == "delete" {
			delete(w.rows, key)
		}
	}
	return len(got)
}

// ask asks for something in the log, which may come from anywhere, or for rows.
func (w *fold) ask(sql string, seq int64, row int) {
	w.Helper()
	if row < 0 {
		clear(w.last)
	}
	w.asked = append(w.asked, again{n: w.n, seq: seq, row: row, what: sql})
	w.Exec(`select sequin.` + sql)
}

// rest brings everything to its end, and compares.
func (w *fold) rest() {
	w.Helper()
	w.Exec(`select sequin.resume_consumer('c')`)
	for empty := 0; empty < 3; {
		isMore := w.advance(30)
		w.tend()
		w.feed()
		if w.take(100) == 0 && !isMore {
			empty++
		} else {
			empty = 0
		}
	}
	for key, r := range w.source.rows {
		if got := w.rows[key]; got != r.note {
			w.Errorf("row %d is %q, and in the table %q", key, got, r.note)
		}
	}
	for key := range w.rows {
		if _, ok := w.source.rows[key]; !ok {
			w.Errorf("row %d is there, and not in the table", key)
		}
	}
	for _, a := range w.asked {
		for key, seq := range w.changed {
			if a.row < 0 && seq >= a.seq && w.had[key] <= a.n {
				w.Errorf("key %d, seq %d came last as message %d, before %d: %s", key, seq, w.had[key], a.n, a.what)
			}
		}
		for key := range w.source.rows {
			if a.row >= 0 && key >= a.row && w.had[key] <= a.n {
				w.Errorf("row %d came last as message %d, before %d: %s", key, w.had[key], a.n, a.what)
			}
		}
	}
}

// A consumer is taken back, altered and paused at any step of a history, the one that it begins with and others: what it
// has had is the table, each row in order, and nothing is left.
func TestHistoryUnderWay(t *testing.T) {
	seed := pgtest.Seed(t)
	for round := range pgtest.Rounds(t, 1) {
		for i, kind := range append(kinds, "filter => 'coalesce(new.id, old.id) >= 0', transform => 'to_jsonb(coalesce(new, old))'") {
			seed := seed + uint64(round)
			t.Run(fmt.Sprintf("%s, seed %d", kind, seed), func(t *testing.T) { testHistoryUnderWay(t, kind, seed<<3+uint64(i)) })
		}
	}
}

func testHistoryUnderWay(t *testing.T, kind string, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	s := &source{fixture: setup(t, "rows"), rows: map[int]row{}, changed: map[int]int64{}}
	// Each consumer reads what a message that comes before its beginning was, so all keys are in the log.
	keys := random.Perm(60)
	s.change(keys...)
	options := []string{"start_at => 'beginning'"}
	if kind != "" {
		options = append(options, kind)
	}
	s.consumer("c", options...)
	s.consumer("quiet", options...)
	w := &fold{source: s, rows: map[int]string{}, last: map[int]int64{}, had: map[int]int{}}
	var did []string
	defer func() {
		if t.Failed() {
			t.Logf("it did: %s", strings.Join(did, "; "))
		}
	}()
	ask := func(sql string, seq int64, row int) {
		did = append(did, sql)
		w.ask(sql, seq, row)
	}
	do := func(sql string) {
		did = append(did, sql)
		s.Exec(`select sequin.` + sql)
	}
	for range 60 {
		switch random.IntN(24) {
		case 0, 1, 2, 3, 4:
			var keys []int
			for range 1 + random.IntN(6) {
				keys = append(keys, random.IntN(70))
			}
			s.change(keys...)
		case 5, 6, 7, 8, 9, 10, 11:
			did = append(did, "advance")
			s.advance(1 + random.IntN(30))
		case 12, 13, 14, 15, 16:
			did = append(did, "take")
			w.take(1 + random.IntN(30))
		case 17, 18:
			var at int64
			switch had := slices.Sorted(maps.Values(w.last)); {
			case random.IntN(3) == 0:
				at = random.Int64N(30)
			case random.IntN(2) == 0 && len(had) > 0:
				at = had[random.IntN(len(had))]
			default:
				at = pgtest.Value[int64](s.DB, `select greatest(max(last_seq) - $1, 0) from sequin.progress`, random.Int64N(20))
			}
			ask(fmt.Sprintf(`rewind('c', to_seq => %d)`, at), at, -1)
		case 19:
			at := pgtest.Value[string](s.DB, `select (clock_timestamp() - $1 * (clock_timestamp() - min(committed_at)))::text from sequin.messages`, random.Float64())
			ask(fmt.Sprintf(`rewind('c', to_time => '%s')`, at), pgtest.Value[int64](s.DB, `
				select coalesce(min(seq), 9223372036854775807) from sequin.messages where committed_at >= $1::text::timestamptz`, at), -1)
		case 20:
			from := random.IntN(60)
			ask(fmt.Sprintf([]string{`backfill('c', '%d')`, `rewind('c', to_row => '%d')`}[random.IntN(2)], from), 0, from)
		case 21:
			do(fmt.Sprintf(`alter_consumer('c', %s)`, []string{
				"group_by => '{grp}'", "group_by => '{}'", "group_by => '{id}'", "filter => 'coalesce(new.id, old.id) > -1'", "filter => ''", "transform => 'to_jsonb(coalesce(new, old))'", "transform => ''",
			}[random.IntN(7)]))
		case 22:
			do(`pause_consumer('c')`)
		case 23:
			do(`resume_consumer('c')`)
		}
	}
	w.rest()
	// Who asked for nothing had each row once, and then what changed.
	other := map[string]int64{}
	for _, m := range s.pop(`'quiet', 10000`) {
		if m.Seq <= other[m.Key] {
			t.Fatalf("quiet: %+v came after %d", m, other[m.Key])
		}
		other[m.Key] = m.Seq
	}
	for key := range s.rows {
		if other[fmt.Sprint(key)] == 0 {
			t.Errorf("quiet: row %d is missing", key)
		}
	}
	s.wantClean()
}

// A consumer, and its stream, are dropped at any step of a history, whose reader does not know yet: what it does after
// that does nothing, and nothing is left of it.
func TestDropUnderWay(t *testing.T) {
	for i, kind := range kinds {
		for steps := i; steps < 7; steps += len(kinds) - 1 {
			t.Run(fmt.Sprintf("%s after %d", kind, steps), func(t *testing.T) {
				s := &source{fixture: setup(t, "rows"), rows: map[int]row{}, changed: map[int]int64{}}
				s.change(1, 2, 3, 4, 5)
				options := []string{"start_at => 'beginning'"}
				if kind != "" {
					options = append(options, kind)
				}
				s.consumer("c", options...)
				s.Exec(`select sequin.backfill('c')`)
				for range steps {
					s.advance(2)
				}
				h := s.history(1)
				s.receive(`'c', 3`)
				s.Exec(`select sequin.drop_consumer('c'), sequin.drop_stream('s')`)
				if s.begin(1) {
					t.Error("what was dropped begins")
				}
				s.cut()
				if h.Live != nil {
					s.Exec(`select sequin.bridge_backfill_open($1)`, *h.Live)
				}
				e := s.Error(`select sequin.bridge_backfill_step(1, $1, 1, '{9}', null, $2, 9, 1)`, h.Step, h.LastSeq+1)
				if e.Code != "55000" {
					t.Errorf("a chunk of what was dropped: %s %s", e.Code, e.Message)
				}
				s.Exec(`select sequin.bridge_backfill_end(1, null), sequin.bridge_backfill_leave(1)`)
				for pgtest.Value[*int](s.DB, `select sequin.bridge_backfill_clear(1)`) != nil {
				}
				left := pgtest.Value[string](s.DB, `
					select concat_ws(', ',
					  (select format('%s backfills', count(*)) from sequin.backfill having count(*) > 0),
					  (select format('%s steps', count(*)) from sequin.backfill_step having count(*) > 0),
					  (select format('%s side routes', count(*)) from sequin.side_route having count(*) > 0),
					  (select format('%s tallies', count(*)) from sequin.tally where route_id < 0 having count(*) > 0),
					  (select format('%s segments', count(*)) from sequin.log_segment where backfill_id is not null having count(*) > 0),
					  (select format('%s rows', count(*)) from sequin.log where route_id < 0 having count(*) > 0))`)
				// Of a history that had not its segment yet nothing comes by, to take the side route along.
				if left != "" && !(h.LastSeq == 0 && left == "1 side routes") {
					t.Errorf("left over: %s", left)
				}
			})
		}
	}
}

// How far the log goes back is said of the log, whatever histories are older or younger than it.
func TestRewindBesideHistories(t *testing.T) {
	s := &source{fixture: setup(t, "rows"), rows: map[int]row{}, changed: map[int]int64{}}
	s.change(1, 2, 3)
	s.consumer("c", "start_at => 'beginning'")
	s.consumer("other", "start_at => 'beginning'")
	for s.advance(10) {
	}
	s.pop(`'c', 100`)
	s.pop(`'other', 100`)
	s.change(4, 5)
	s.Exec(`select sequin.backfill('c')`) // its history is the oldest segment there is, once the log's are gone
	for range 4 {
		s.advance(10)
	}
	s.change(6)
	live := pgtest.Column[int](s.DB, `select id from sequin.log_segment where backfill_id is null order by id`)
	for _, name := range []string{"c", "other"} {
		for len(s.pop(`'`+name+`', 100`)) > 0 {
		}
	}
	s.tend()
	s.Exec(`update sequin.setting set keep = '0'`)
	s.Exec(`update sequin.log_segment set closed_at = now() - interval '1 hour' where backfill_id is null and id < $1`, live[len(live)-1])
	for pgtest.Value[*int](s.DB, `select sequin.bridge_retain(1)`) != nil {
	}
	kept := pgtest.Value[string](s.DB, `select string_agg(id || case when backfill_id is null then '' else ' history' end, ', ' order by id) from sequin.log_segment`)
	t.Logf("segments: %s", kept)
	oldest := pgtest.Value[int64](s.DB, `select min(seq) from sequin.messages`)
	for _, target := range []string{"to_seq => 1", "to_time => '2001-01-01'"} {
		e := s.Error(`select sequin.rewind('c', ` + target + `)`)
		if e.Code != "22023" || !strings.Contains(e.Message, fmt.Sprintf("seq %d, of 20", oldest)) ||
			!strings.Contains(e.Hint, "sequin.rewind('c', to_row") || !strings.Contains(e.Hint, "sequin.backfill('c')") {
			t.Errorf("%s, oldest %d: %s %s, hint %s", target, oldest, e.Code, e.Message, e.Hint)
		}
	}
}

// A rewind never takes a consumer past what it has still to get: here, the history that it begins with, at any step of it.
func TestRewindOfOneThatBegins(t *testing.T) {
	for i, target := range []string{"to_time => clock_timestamp()", "to_seq => (select max(seq) from sequin.messages)"} {
		for steps := range 6 {
			kind := kinds[(steps+i)%len(kinds)]
			t.Run(fmt.Sprintf("%s after %d, %s", target, steps, kind), func(t *testing.T) {
				s := &source{fixture: setup(t, "rows"), rows: map[int]row{}, changed: map[int]int64{}}
				s.change(1, 2, 3, 4, 5, 6, 7)
				options := []string{"start_at => 'beginning'"}
				if kind != "" {
					options = append(options, kind)
				}
				s.consumer("c", options...)
				w := &fold{source: s, rows: map[int]string{}, last: map[int]int64{}, had: map[int]int{}}
				for range steps {
					s.advance(3)
					s.change(8 + s.version%3)
				}
				s.Exec(`select sequin.rewind('c', ` + target + `)`)
				w.rest()
				s.wantClean()
			})
		}
	}
}
