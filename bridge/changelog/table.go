package changelog

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"unicode/utf8"

	"sequin/bridge/wal"
)

// Table is a streamed table as the stream describes it just now: what it takes to make its rows log rows.
type Table struct {
	Route    int32
	group    int32 // the route that its groups are of: Route, but for a table beside
	relation *wal.Relation
	columns  []column
	sorted   []int // places of the columns as jsonb orders its keys: it need not sort them again
	key      []int // places of the columns that name a row, in the key's order; none: the table is one group
	schema   []byte
	name     []byte
	isUTF8   bool
	isMixed  bool // what is sent as a whole old row may be its key: see isKeyOnly
}

type column struct {
	label []byte // "name":
	form  *form
}

// NewTable describes a relation, whose types are known as far as they are there. keyColumns are those that named its rows, as
// far as is known: the relation's own say it wherever its replica identity does. isMixed: it may be partitioned.
func NewTable(types *Types, rel *wal.Relation, route int32, keyColumns []string, isMixed bool) *Table {
	t := &Table{
		Route: route, group: route, relation: rel, schema: []byte(rel.Schema), name: []byte(rel.Name),
		isUTF8: types.isUTF8, isMixed: isMixed,
	}
	var identity []int
	for i, c := range rel.Columns {
		t.columns = append(t.columns, column{
			label: append(appendString(nil, []byte(c.Name)), ':'),
			form:  types.form(c.TypeOID),
		})
		t.sorted = append(t.sorted, i)
		if c.IsKey {
			identity = append(identity, i)
		}
	}
	slices.SortFunc(t.sorted, func(i, j int) int {
		a, b := rel.Columns[i].Name, rel.Columns[j].Name
		return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
	})
	for _, name := range keyColumns {
		i := slices.IndexFunc(rel.Columns, func(c wal.RelationColumn) bool { return c.Name == name })
		if i < 0 {
			t.key = nil
			break
		}
		t.key = append(t.key, i)
	}
	if !rel.IsIdentity(keyColumns) {
		t.key = identity
	}
	return t
}

// Name returns schema.table.
func (t *Table) Name() string { return t.relation.Schema + "." + t.relation.Name }

// Beside returns the table under a side route: its rows have the groups that its changes have.
func (t *Table) Beside(route int32) *Table {
	beside := *t
	beside.Route = route
	return &beside
}

// Key returns what record_pk is for a row.
func (t *Table) Key(row wal.Tuple) string {
	key, _ := t.appendKey(nil, row, nil)
	return string(key)
}

// Record returns what record is for a row.
func (t *Table) Record(row wal.Tuple) string {
	return string(t.appendRecord(nil, row, nil, t.omit(row)))
}

// value returns a column of a new row, which an unchanged TOASTed one has from the old row where that has it.
func value(i int, tuple, old wal.Tuple) wal.Value {
	v := tuple[i]
	if v.Kind == wal.Unchanged && i < len(old) && old[i].Kind == wal.Text {
		return old[i]
	}
	return v
}

// maxKey is how long the text of a key may be: an index entry must fit into a third of a page.
const maxKey = 1024

// appendKey appends a row's key as text: a single column's value, or the values of several, separated by commas and
// quoted as in CSV where they have to be. Of one that is too long for an index, the beginning and a digest of the whole.
// Whether there is one.
func (t *Table) appendKey(b []byte, tuple, old wal.Tuple) ([]byte, bool) {
	start := len(b)
	for n, i := range t.key {
		v := value(i, tuple, old)
		if v.Kind != wal.Text {
			return b[:start], false
		}
		text := t.text(v)
		if n > 0 {
			b = append(b, ',')
		}
		if len(t.key) == 1 || len(text) > 0 && !bytes.ContainsAny(text, "\",\r\n") {
			b = append(b, text...)
			continue
		}
		b = append(b, '"')
		for _, c := range text {
			if c == '"' {
				b = append(b, '"')
			}
			b = append(b, c)
		}
		b = append(b, '"')
	}
	if len(b)-start > maxKey {
		digest := sha256.Sum256(b[start:])
		end := start + maxKey - 2*len(digest)
		for end > start && !t.isStart(b[end]) { // not in the middle of a character
			end--
		}
		b = hex.AppendEncode(append(b[:end], "..."...), digest[:])
	}
	return b, len(t.key) > 0
}

// isStart tells whether a byte begins a character: in encodings other than UTF-8, only one of ASCII does so for sure.
func (t *Table) isStart(c byte) bool {
	return c < utf8.RuneSelf || t.isUTF8 && utf8.RuneStart(c)
}

// text is a value's, with what is no text of the database's encoding left out of it: a value of type "char" may be any byte,
// and the log would not take it.
func (t *Table) text(v wal.Value) []byte {
	if t.isUTF8 && !utf8.Valid(v.Text) {
		return bytes.ToValidUTF8(v.Text, []byte("\uFFFD"))
	}
	return v.Text
}

// isKeyChanged tells whether an update gave its row another key.
func (t *Table) isKeyChanged(u *wal.Update) bool {
	if u.OldKind == 0 {
		return false
	}
	for _, i := range t.key {
		// One that was not sent, as a partition's own identity is without it, was not changed.
		if u.Old[i].Kind == wal.Text && !bytes.Equal(value(i, u.New, u.Old).Text, u.Old[i].Text) {
			return true
		}
	}
	return false
}

// appendRecord appends a row as a JSON object. What was not sent is not in it, nor what it has no room for: see omit.
func (t *Table) appendRecord(b []byte, tuple, old wal.Tuple, omitted []int) []byte {
	b = append(b, '{')
	start := len(b)
	for _, i := range t.sorted {
		v := value(i, tuple, old)
		if v.Kind == wal.Unchanged || slices.Contains(omitted, i) {
			continue
		}
		if len(b) > start {
			b = append(b, ',')
		}
		b = t.appendColumn(b, i, v)
	}
	return append(b, '}')
}

// isKeyOnly tells whether of an old row, whose key was what it was sent for, only the key was sent: the other columns come as
// null, and are not. Changes of a partition come under the root's replica identity, and may have been made under another, which
// nothing says: a whole row that has nothing but its key counts as its key.
func (t *Table) isKeyOnly(kind byte, old wal.Tuple) bool {
	if kind == 'K' || !t.isMixed || len(t.key) == 0 {
		return kind == 'K'
	}
	for i, v := range old {
		if v.Kind == wal.Text && !slices.Contains(t.key, i) {
			return false
		}
	}
	return true
}

// isOldKeyOnly is isKeyOnly of an update. Its old key alone is sent only where that was changed, or is TOASTed.
func (t *Table) isOldKeyOnly(u *wal.Update) bool {
	return t.isKeyOnly(u.OldKind, u.Old) && (u.OldKind == 'K' || t.isKeyChanged(u) ||
		slices.ContainsFunc(t.key, func(i int) bool { return u.New[i].Kind == wal.Unchanged }))
}

// appendOldKey appends the columns of an old key as a JSON object. None of them is ever null.
func (t *Table) appendOldKey(b []byte, old wal.Tuple) []byte {
	b = append(b, '{')
	start := len(b)
	for i, v := range old {
		if v.Kind != wal.Text {
			continue
		}
		if len(b) > start {
			b = append(b, ',')
		}
		b = t.appendColumn(b, i, v)
	}
	return append(b, '}')
}

// changed tells whether an update changed a column, as far as the old row was sent.
func (t *Table) changed(u *wal.Update, i int, isKeyOnly bool) bool {
	if isKeyOnly && u.Old[i].Kind != wal.Text {
		return false
	}
	v := value(i, u.New, u.Old)
	return v.Kind != u.Old[i].Kind || !bytes.Equal(v.Text, u.Old[i].Text)
}

// appendChanges appends the old values of the columns that an update changed, as far as they were sent.
func (t *Table) appendChanges(b []byte, u *wal.Update, omitted []int) []byte {
	isKeyOnly := t.isOldKeyOnly(u)
	b = append(b, '{')
	start := len(b)
	for i := range t.columns {
		if !t.changed(u, i, isKeyOnly) || slices.Contains(omitted, i) {
			continue
		}
		if len(b) > start {
			b = append(b, ',')
		}
		b = t.appendColumn(b, i, u.Old[i])
	}
	return append(b, '}')
}

// omit returns the columns that a JSON object of the log has no room for: the largest, until the others have. Nearly always
// there are none, and that is soon told.
func (t *Table) omit(tuple wal.Tuple) []int {
	if textSize(tuple) <= surelyFits {
		return nil
	}
	var omitted []int
	sizes := make([]int, len(tuple))
	total := 0
	for i, v := range tuple {
		sizes[i] = len(t.columns[i].label) + jsonbSize(t.columns[i].form, v.Text)
		total += sizes[i]
	}
	for total > maxJSONB {
		i := slices.Index(sizes, slices.Max(sizes))
		omitted = append(omitted, i)
		total -= sizes[i]
		sizes[i] = 0
	}
	return omitted
}

func (t *Table) appendColumn(b []byte, i int, v wal.Value) []byte {
	b = append(b, t.columns[i].label...)
	if v.Kind != wal.Text {
		return append(b, "null"...)
	}
	return appendValue(b, t.columns[i].form, t.text(v))
}

// appendUnchanged appends the names of TOASTed columns that an update did not touch and nothing else has, as a JSON array.
// Nothing, where there are none.
func (t *Table) appendUnchanged(b []byte, tuple, old wal.Tuple) []byte {
	start := len(b)
	for i := range t.columns {
		if value(i, tuple, old).Kind == wal.Unchanged {
			b = t.appendName(b, i, start)
		}
	}
	return endNames(b, start)
}

// appendOmitted appends the names of columns that were left out of record, or of changes, as a JSON array.
func (t *Table) appendOmitted(b []byte, omitted ...[]int) []byte {
	start := len(b)
	for i := range t.columns {
		if slices.ContainsFunc(omitted, func(list []int) bool { return slices.Contains(list, i) }) {
			b = t.appendName(b, i, start)
		}
	}
	return endNames(b, start)
}

func (t *Table) appendName(b []byte, i, start int) []byte {
	if len(b) == start {
		b = append(b, '[')
	} else {
		b = append(b, ',')
	}
	label := t.columns[i].label
	return append(b, label[:len(label)-1]...)
}

func endNames(b []byte, start int) []byte {
	if len(b) > start {
		b = append(b, ']')
	}
	return b
}

// fits tells whether a tuple has the columns of its relation.
func (t *Table) fits(tuple wal.Tuple) bool { return len(tuple) == len(t.columns) }
