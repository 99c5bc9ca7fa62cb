package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// worker consumes at random: it acknowledges, gives back, extends, forgets, rolls back, and dies.
type worker struct {
	t        testing.TB
	db       *pgtest.DB
	consumer string
	groupOf  func(table, pk string, record map[string]any) string
	history  *history
	random   *rand.Rand
	ackWait  time.Duration

	conn *pgx.Conn
	late []*delivery // let expire, to be spoken of too late
}

const query = `select %s seq, deliver_count, action, table_name, record_pk, record, changes from sequin.%s($1, $2%s)`

func (w *worker) run(ctx context.Context) {
	defer func() {
		if w.conn != nil {
			_ = w.conn.Close(context.Background())
		}
	}()
	for ctx.Err() == nil {
		if w.conn == nil {
			conn, err := pgx.Connect(context.Background(), w.db.URL)
			if err != nil {
				w.t.Errorf("connect: %v", err)
				return
			}
			w.conn = conn
		}
		switch n := w.random.IntN(100); {
		case n < 55:
			w.consume()
		case n < 85:
			w.transact()
		case n < 93:
			tx := &transaction{}
			_ = w.receive(tx, "pop", true)
			tx.isCommitted, tx.ending, tx.ended = true, time.Now(), time.Now()
		default:
			w.speakLate()
		}
	}
}

// drain acknowledges all there is, until nothing is left.
func (w *worker) drain(left func() bool) {
	for left() {
		tx := w.alone()
		b := w.receive(tx, "receive", true)
		if b != nil && len(b.deliveries) > 0 {
			w.settle(tx, acked, b.deliveries)
		} else {
			w.pause(10 * time.Millisecond) // the others need the processor
		}
	}
}

func (w *worker) pick(n int) bool { return w.random.IntN(100) < n }

func (w *worker) pause(most time.Duration) {
	time.Sleep(time.Duration(w.random.Int64N(int64(most)))) // work, of some length
}

// alone is a call's own transaction.
func (w *worker) alone() *transaction {
	now := time.Now()
	return &transaction{isCommitted: true, ending: now, ended: now}
}

// consume receives a batch, and says of its messages one thing or another, each in a call of its own.
func (w *worker) consume() {
	tx := w.alone()
	b := w.receive(tx, "receive", true)
	if b == nil || len(b.deliveries) == 0 {
		return
	}
	tx.ended = time.Now()
	w.pause(20 * time.Millisecond)
	w.speak(b.deliveries, w.alone)
}

// transact does the same in a transaction, and commits it, or not.
func (w *worker) transact() {
	begin := "begin"
	if w.pick(20) {
		begin = "begin isolation level repeatable read"
	} else if w.pick(10) {
		begin = "begin isolation level serializable"
	}
	if _, err := w.conn.Exec(context.Background(), begin); err != nil {
		w.fail(err)
		return
	}
	tx := &transaction{isStrict: begin != "begin"}
	same := func() *transaction { return tx }
	for range 1 + w.random.IntN(2) {
		name := "receive"
		if w.pick(30) {
			name = "pop"
		}
		b := w.receive(tx, name, !tx.isStrict)
		if b == nil {
			break
		}
		w.pause(20 * time.Millisecond)
		if name == "receive" && len(b.deliveries) > 0 && w.pick(80) {
			w.speak(b.deliveries, same)
		}
		if w.conn == nil {
			break // 40001, in a stricter isolation level
		}
	}
	if w.conn == nil {
		tx.ended = time.Now() // it began to end with what failed
		return
	}
	tx.ending = time.Now()
	switch n := w.random.IntN(100); {
	case n < 60:
		tag, err := w.conn.Exec(context.Background(), "commit")
		if err != nil && !isRetry(err) {
			w.fail(err)
		}
		tx.isCommitted = err == nil && tag.String() == "COMMIT"
	case n < 80:
		if _, err := w.conn.Exec(context.Background(), "rollback"); err != nil {
			w.fail(err)
		}
	case n < 90:
		// Gone without a word.
		_ = w.conn.PgConn().Conn().Close()
		w.conn = nil
	default:
		w.db.Exec(`select pg_terminate_backend($1)`, w.conn.PgConn().PID())
		_ = w.conn.Close(context.Background())
		w.conn = nil
	}
	tx.ended = time.Now()
}

// speak settles a batch's deliveries: all or some, in one call or several, in any order; and forgets others.
func (w *worker) speak(all []*delivery, tx func() *transaction) {
	deliveries := slices.Clone(all)
	switch n := w.random.IntN(100); {
	case n < 45:
		w.settle(tx(), acked, deliveries)
		return
	case n < 55:
		w.late = append(w.late, deliveries...)
		return
	case n < 65:
		w.settle(tx(), extended, w.some(deliveries))
		w.pause(w.ackWait)
	case n < 70:
		w.settle(tx(), nacked, deliveries)
		return
	}
	w.random.Shuffle(len(deliveries), func(i, j int) { deliveries[i], deliveries[j] = deliveries[j], deliveries[i] })
	for len(deliveries) > 0 && w.conn != nil {
		n := 1 + w.random.IntN(len(deliveries))
		part := deliveries[:n]
		deliveries = deliveries[n:]
		switch k := w.random.IntN(100); {
		case k < 60:
			if len(w.late) > 0 && w.pick(20) {
				part = append(slices.Clone(part), w.takeLate()...)
			}
			w.settle(tx(), acked, part)
		case k < 85:
			w.settle(tx(), nacked, part)
		case k < 90:
			w.settle(tx(), extended, part)
			w.settle(tx(), acked, part)
		default:
			w.late = append(w.late, part...)
		}
	}
}

func (w *worker) some(deliveries []*delivery) []*delivery {
	if w.pick(50) {
		return deliveries
	}
	return deliveries[:1+w.random.IntN(len(deliveries))]
}

func (w *worker) takeLate() []*delivery {
	n := min(len(w.late), 1+w.random.IntN(5))
	part := w.late[:n]
	w.late = w.late[n:]
	return part
}

// speakLate speaks of deliveries that were let expire, and may be somebody else's by now.
func (w *worker) speakLate() {
	if len(w.late) == 0 {
		return
	}
	kind := acked
	if w.pick(20) {
		kind = nacked
	} else if w.pick(10) {
		kind = extended
	}
	w.settle(w.alone(), kind, w.takeLate())
}

// receive calls receive or pop, and writes down what it got. nil: the transaction is over.
func (w *worker) receive(tx *transaction, name string, mayWait bool) *batch {
	size := 1 + w.random.IntN(50)
	if w.pick(30) {
		size = 1
	}
	ackID, args, lease := "ack_id,", "", w.ackWait
	params := []any{w.consumer, size}
	if mayWait && w.pick(30) {
		args = fmt.Sprintf(", wait => '%d ms'", w.random.IntN(100))
	}
	if name == "pop" {
		ackID = "0::bigint,"
	} else if w.pick(10) {
		lease = w.ackWait / 2
		args += fmt.Sprintf(", ack_wait => '%d ms'", lease.Milliseconds())
	}
	b := &batch{}
	asked := time.Now()
	rows, err := w.conn.Query(context.Background(), fmt.Sprintf(query, ackID, name, args), params...)
	if err == nil {
		for rows.Next() {
			d := &delivery{tx: tx, batch: b, asked: asked, lease: asked.Add(lease)}
			if err := rows.Scan(&d.ackID, &d.seq, &d.count, &d.action, &d.table, &d.pk, &d.record, &d.changes); err != nil {
				w.t.Errorf("scan: %v", err)
			}
			d.group = w.groupOf(d.table, d.pk, d.record)
			b.deliveries = append(b.deliveries, d)
		}
		err = rows.Err()
	}
	if err != nil {
		tx.failed(asked)
		w.fail(err)
		return nil
	}
	given := time.Now()
	for _, d := range b.deliveries {
		d.given = given
	}
	w.history.give(b)
	if name == "pop" && len(b.deliveries) > 0 {
		w.history.settle(&settlement{kind: popped, deliveries: b.deliveries, count: int64(len(b.deliveries)), tx: tx, asked: asked, answered: given})
	}
	return b
}

// settle calls ack, nack or extend.
func (w *worker) settle(tx *transaction, kind settlementKind, deliveries []*delivery) {
	if w.conn == nil || len(deliveries) == 0 {
		return
	}
	ids := make([]int64, len(deliveries))
	for i, d := range deliveries {
		ids[i] = d.ackID
	}
	s := &settlement{kind: kind, deliveries: slices.Clone(deliveries), tx: tx, asked: time.Now(), until: time.Now().Add(w.ackWait)}
	args := ""
	if kind == nacked && w.pick(50) {
		args = fmt.Sprintf(", delay => '%d ms', error => 'no'", w.random.IntN(50))
	}
	err := w.conn.QueryRow(context.Background(), fmt.Sprintf(`select sequin.%s($1, $2%s)`, kind, args), w.consumer, ids).Scan(&s.count)
	if err != nil {
		tx.failed(s.asked)
		w.fail(err)
		return
	}
	s.answered = time.Now()
	if tx.ended.Before(s.answered) && tx.isCommitted {
		tx.ended = s.answered
	}
	w.history.settle(s)
}

func isRetry(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == pgerrcode.SerializationFailure
}

// fail ends the connection after an error, which only a stricter isolation level may bring.
func (w *worker) fail(err error) {
	if !isRetry(err) {
		w.t.Errorf("worker: %v", err)
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) {
			w.t.Logf("%s %s", pgErr.Detail, pgErr.Where)
		}
	}
	_ = w.conn.Close(context.Background())
	w.conn = nil
}
