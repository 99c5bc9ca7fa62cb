package e2e

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// history is everything that workers were told, with the times between which it was true. What can be said of it for
// certain, whatever happened in between, is checked when all is over.
type history struct {
	mu          sync.Mutex
	deliveries  []*delivery
	settlements []*settlement
}

// isEventful tells whether enough has happened to prove something.
func (h *history) isEventful() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.deliveries) > 100 && len(h.settlements) > 100
}

// transaction is a worker's. A call outside of one is a transaction of its own.
type transaction struct {
	isStrict    bool // repeatable read or serializable
	isCommitted bool
	ending      time.Time // commit, rollback or the end of the connection was asked for
	ended       time.Time // and is over
}

// failed takes note that the server has ended a transaction, with a statement that was asked for then.
func (tx *transaction) failed(asked time.Time) {
	if !tx.isCommitted {
		tx.ending = asked
	}
}

// delivery is a message handed to a worker.
type delivery struct {
	seq   int64
	group string
	ackID int64
	count int

	action, table, pk string
	record, changes   map[string]any

	tx    *transaction
	batch *batch
	asked time.Time // receive was called
	given time.Time // receive returned
	lease time.Time // it cannot have run out before
}

// batch is what one call returned.
type batch struct{ deliveries []*delivery }

type settlementKind string

const (
	acked    settlementKind = "ack"
	nacked   settlementKind = "nack"
	extended settlementKind = "extend"
	popped   settlementKind = "pop"
)

// settlement is what a worker said of deliveries, and how many of them that counted for.
type settlement struct {
	kind       settlementKind
	deliveries []*delivery
	count      int64
	tx         *transaction
	asked      time.Time
	answered   time.Time
	until      time.Time // of an extend
}

func (h *history) give(b *batch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.deliveries = append(h.deliveries, b.deliveries...)
}

func (h *history) settle(s *settlement) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settlements = append(h.settlements, s)
}

// message is what the log says of a message, and what happened to it.
type message struct {
	seq   int64
	group string
	row   string // table and key: whose versions may be skipped
	isNew bool   // the newest of its row

	deliveries  []*delivery
	settlements []*settlement
}

// check holds everything against what is promised.
type check struct {
	t        testing.TB
	messages []*message
	bySeq    map[int64]*message
	dead     map[int64]bool // have been dead letters
	isRows   bool
	limit    int // max_ack_pending
	maxTries int // max_deliver; 0: without end

	of       map[*delivery][]*settlement
	failures int
}

func (c *check) fail(format string, args ...any) {
	c.t.Helper()
	if c.failures++; c.failures <= 20 {
		c.t.Errorf(format, args...)
	}
}

func (c *check) run(h *history) {
	c.t.Helper()
	c.of = map[*delivery][]*settlement{}
	for _, d := range h.deliveries {
		m := c.bySeq[d.seq]
		if m == nil {
			c.fail("message %d was delivered and is not in the log", d.seq)
			continue
		}
		if m.group != d.group {
			c.fail("message %d was delivered as of group %s, and is of %s", d.seq, d.group, m.group)
		}
		m.deliveries = append(m.deliveries, d)
	}
	for _, s := range h.settlements {
		for _, d := range s.deliveries {
			c.of[d] = append(c.of[d], s)
			if m := c.bySeq[d.seq]; m != nil {
				m.settlements = append(m.settlements, s)
			}
		}
	}
	for _, m := range c.messages {
		slices.SortFunc(m.deliveries, func(a, b *delivery) int { return a.asked.Compare(b.asked) })
	}
	c.nothingLost()
	c.oneAtATime()
	c.inOrder()
	c.counts(h)
	c.limited(h)
}

// nothingLost: each message was acknowledged, or passed over for a newer version of its row; and never came back.
func (c *check) nothingLost() {
	for _, m := range c.messages {
		var done []*settlement
		maybe := false
		for _, s := range m.settlements {
			if (s.kind == acked || s.kind == popped) && s.tx.isCommitted && s.count > 0 {
				maybe = true
				if s.count == int64(len(s.deliveries)) {
					done = append(done, s)
				}
			}
		}
		if !maybe && !(c.isRows && !m.isNew && !m.wasDelivered()) {
			c.fail("message %d of group %s was lost: %s", m.seq, m.group, m.story())
		}
		if len(done) > 1 {
			c.fail("message %d was acknowledged %d times: %s", m.seq, len(done), m.story())
		}
		counts := map[int]bool{}
		for _, d := range m.deliveries {
			if !d.tx.isCommitted || c.dead[m.seq] {
				continue
			}
			if counts[d.count] {
				c.fail("message %d was delivered twice as the same delivery: %s", m.seq, m.story())
			}
			counts[d.count] = true
			for _, s := range done {
				if i := slices.IndexFunc(s.deliveries, func(of *delivery) bool { return of.seq == m.seq }); d.count > s.deliveries[i].count {
					c.fail("message %d came again after it was acknowledged: %s", m.seq, m.story())
				}
			}
		}
	}
}

// oneAtATime: no message has two live deliveries.
func (c *check) oneAtATime() {
	for _, m := range c.messages {
		for i, first := range m.deliveries {
			for _, second := range m.deliveries[i+1:] {
				if first.given.Before(second.asked) && c.isLive(first, second.given) {
					c.fail("message %d was handed out twice at once: %s", m.seq, m.story())
				}
			}
		}
	}
}

// isLive reports whether a delivery was certainly its worker's until then.
func (c *check) isLive(d *delivery, until time.Time) bool {
	if !d.tx.isCommitted && d.tx.ending.Before(until) {
		return false
	}
	lease := d.lease
	for _, s := range c.of[d] {
		switch {
		case s.kind == extended:
			// Certain only where it counted for all that it was asked for.
			if s.count == int64(len(s.deliveries)) && s.tx.isCommitted && s.answered.Before(d.lease) && s.until.After(lease) {
				lease = s.until
			}
		case s.asked.Before(until):
			return false
		}
	}
	return lease.After(until)
}

// inOrder: whenever a message is handed out, every earlier one of its group is settled, or comes along before it; or is
// an older version of its row, and never comes.
func (c *check) inOrder() {
	groups := map[string][]*message{}
	for _, m := range c.messages {
		groups[m.group] = append(groups[m.group], m)
	}
	for _, messages := range groups {
		for i, m := range messages {
			for _, d := range m.deliveries {
				if c.dead[m.seq] {
					continue // redriven ones come when they come
				}
				for _, earlier := range messages[:i] {
					if !c.isSettled(earlier, d) {
						c.fail("message %d of group %s was handed out while %d before it was not settled: %s; %s",
							m.seq, m.group, earlier.seq, m.story(), earlier.story())
					}
				}
			}
		}
	}
}

func (c *check) isSettled(m *message, by *delivery) bool {
	// What a transaction has passed by as an older version, and then was rolled back, comes after all.
	if c.dead[m.seq] || c.isRows && !m.isNew && (!m.wasDelivered() || !by.tx.isCommitted) {
		return true
	}
	for _, s := range m.settlements {
		if (s.kind == acked || s.kind == popped) && s.count > 0 && s.asked.Before(by.given) && (s.tx.isCommitted || s.tx == by.tx) {
			return true
		}
	}
	// Given up in a transaction that was rolled back, and that went on before.
	for _, s := range m.settlements {
		if s.kind == nacked && s.count > 0 && s.tx == by.tx && s.asked.Before(by.given) && slices.ContainsFunc(s.deliveries, func(d *delivery) bool {
			return d.seq == m.seq && c.maxTries > 0 && d.count >= c.maxTries
		}) {
			return true
		}
	}
	// An older version of a row, passed over in a transaction that was rolled back.
	if c.isRows && !m.isNew && !by.tx.isCommitted && !slices.ContainsFunc(m.deliveries, func(d *delivery) bool {
		return d.given.Before(by.asked) && (d.tx.isCommitted || by.asked.Before(d.tx.ending))
	}) {
		return true
	}
	for _, d := range by.batch.deliveries {
		if d == by {
			return false
		}
		if d.seq == m.seq {
			return true
		}
	}
	return false
}

// counts: an ack, a nack or an extend counts for what is the worker's, and not for what is not.
func (c *check) counts(h *history) {
	for _, s := range h.settlements {
		if s.kind == popped {
			continue
		}
		var must, mustNot int64
		for _, d := range s.deliveries {
			switch {
			case c.isGone(d, s):
				mustNot++
			case c.isTheirs(d, s):
				must++
			}
		}
		if s.count < must || s.count > int64(len(s.deliveries))-mustNot {
			var of strings.Builder
			for _, d := range s.deliveries {
				fmt.Fprintf(&of, "\n%d: gone %t, theirs %t: %s", d.seq, c.isGone(d, s), c.isTheirs(d, s), c.bySeq[d.seq].story())
			}
			c.fail("%s of %d deliveries at %s counted %d, want %d to %d: %s", s.kind, len(s.deliveries), clock(s.asked), s.count, must,
				int64(len(s.deliveries))-mustNot, of.String())
		}
	}
}

// isGone reports whether a delivery had certainly ended when it was spoken of.
func (c *check) isGone(d *delivery, by *settlement) bool {
	if !d.tx.isCommitted && d.tx != by.tx {
		return true
	}
	for _, other := range c.bySeq[d.seq].deliveries {
		if other != d && d.given.Before(other.asked) &&
			(other.tx == by.tx && other.given.Before(by.asked) || other.tx.isCommitted && other.tx.ended.Before(by.asked)) {
			return true
		}
	}
	for _, s := range c.of[d] {
		if s != by && s.kind != extended && s.count == int64(len(s.deliveries)) &&
			(s.tx == by.tx && s.answered.Before(by.asked) || s.tx.isCommitted && s.tx.ended.Before(by.asked)) {
			return true
		}
	}
	return false
}

// isTheirs reports whether a delivery was certainly the worker's to speak of.
func (c *check) isTheirs(d *delivery, by *settlement) bool {
	if d.tx != by.tx && !(d.tx.isCommitted && d.tx.ended.Before(by.asked)) || !d.lease.After(by.answered) || c.dead[d.seq] {
		return false
	}
	for _, s := range c.of[d] {
		if s != by && s.asked.Before(by.answered) {
			return false
		}
	}
	return true
}

// limited: no more messages than max_ack_pending are handed out and not acknowledged. A transaction that does not see
// what the others have been given meanwhile cannot know.
func (c *check) limited(h *history) {
	type change struct {
		at    time.Time
		seq   int64
		delta int
	}
	var changes []change
	for _, m := range c.messages {
		if c.dead[m.seq] {
			continue
		}
		// Certainly pending from its first delivery that was not taken back until an acknowledgement is asked for.
		var from, to time.Time
		isStrict := false
		for _, d := range m.deliveries {
			if d.tx.isCommitted && (from.IsZero() || d.given.Before(from)) {
				from, isStrict = d.given, d.tx.isStrict
			}
		}
		// What a transaction has been given that could not know, comes again however many others are pending.
		if isStrict {
			continue
		}
		for _, s := range m.settlements {
			if (s.kind == acked || s.kind == popped) && (to.IsZero() || s.asked.Before(to)) {
				to = s.asked
			}
		}
		if !from.IsZero() && to.After(from) {
			changes = append(changes, change{from, m.seq, 1}, change{to, m.seq, -1})
		}
	}
	slices.SortFunc(changes, func(a, b change) int {
		return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.delta, b.delta))
	})
	pending := map[int64]bool{}
	for _, x := range changes {
		if x.delta < 0 {
			delete(pending, x.seq)
			continue
		}
		pending[x.seq] = true
		if len(pending) <= c.limit {
			continue
		}
		var stories []string
		for _, seq := range slices.Sorted(maps.Keys(pending)) {
			stories = append(stories, c.bySeq[seq].story())
		}
		c.fail("%d messages were pending at once, and max_ack_pending is %d: %s", len(pending), c.limit, strings.Join(stories, "\n"))
		return
	}
}

// fold makes tables of what was delivered: rows by key.
func (c *check) fold() map[string]map[string]any {
	tables := map[string]map[string]any{}
	for _, m := range c.messages {
		i := slices.IndexFunc(m.deliveries, func(d *delivery) bool { return d.tx.isCommitted })
		if i < 0 {
			continue
		}
		d := m.deliveries[i]
		if tables[d.table] == nil {
			tables[d.table] = map[string]any{}
		}
		if id, ok := d.changes["id"]; ok { // its key, as it was
			delete(tables[d.table], fmt.Sprint(id))
		}
		if d.action == "delete" {
			delete(tables[d.table], d.pk)
		} else {
			tables[d.table][d.pk] = d.record
		}
	}
	return tables
}

func (m *message) wasDelivered() bool {
	return slices.ContainsFunc(m.deliveries, func(d *delivery) bool { return d.tx.isCommitted })
}

func clock(at time.Time) string { return at.Format("05.000000") }

// story tells what happened to a message, for a failure.
func (m *message) story() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d {", m.seq)
	for _, d := range m.deliveries {
		fmt.Fprintf(&b, " %d: given %s..%s until %s, strict %t, committed %t %s..%s;", d.count, clock(d.asked), clock(d.given), clock(d.lease),
			d.tx.isStrict, d.tx.isCommitted, clock(d.tx.ending), clock(d.tx.ended))
		for _, s := range m.settlements {
			if slices.Contains(s.deliveries, d) {
				fmt.Fprintf(&b, " %s %s..%s %d of %d, committed %t %s..%s;", s.kind, clock(s.asked), clock(s.answered), s.count, len(s.deliveries),
					s.tx.isCommitted, clock(s.tx.ending), clock(s.tx.ended))
			}
		}
	}
	b.WriteString(" }")
	return b.String()
}
