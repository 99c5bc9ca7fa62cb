package changelog

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"

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
}

type column struct {
	label []byte // "name":
	form  *form
}

// NewTable describes a relation. keyColumns are those of the catalog now: the relation's own say which they were when
// the change was made, wherever its replica identity does.
func NewTable(ctx context.Context, db Queryer, types *Types, rel *wal.Relation, route int32, keyColumns []string) (*Table, error) {
	t := &Table{Route: route, group: route, relation: rel, schema: []byte(rel.Schema), name: []byte(rel.Name)}
	oids := make([]uint32, len(rel.Columns))
	for i, c := range rel.Columns {
		oids[i] = c.TypeOID
	}
	if err := types.load(ctx, db, oids); err != nil {
		return nil, fmt.Errorf("describe table %s.%s: %w", rel.Schema, rel.Name, err)
	}
	var identity []int
	for i, c := range rel.Columns {
		t.columns = append(t.columns, column{
			label: append(appendString(nil, []byte(c.Name)), ':'),
			form:  types.form(c.TypeOID),
		})
		t.sorted = append(t.sorted, i)
		if c.IsKey && rel.ReplicaIdentity != 'f' {
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
	if rel.ReplicaIdentity == 'd' || rel.ReplicaIdentity == 'i' {
		sorted := slices.Clone(t.key)
		slices.Sort(sorted)
		if !slices.Equal(sorted, identity) {
			t.key = identity
		}
	}
	return t, nil
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

// value returns a column of a new row, which an unchanged TOASTed one has from the old row where that has it.
func value(i int, tuple, old wal.Tuple) wal.Value {
	v := tuple[i]
	if v.Kind == wal.Unchanged && i < len(old) && old[i].Kind == wal.Text {
		return old[i]
	}
	return v
}

// appendKey appends a row's key as text: a single column's value, or the values of several, separated by commas and
// quoted as in CSV where they have to be. Whether there is one.
func (t *Table) appendKey(b []byte, tuple, old wal.Tuple) ([]byte, bool) {
	start := len(b)
	for n, i := range t.key {
		v := value(i, tuple, old)
		if v.Kind != wal.Text {
			return b[:start], false
		}
		if len(t.key) == 1 {
			return append(b, v.Text...), true
		}
		if n > 0 {
			b = append(b, ',')
		}
		if len(v.Text) > 0 && !bytes.ContainsAny(v.Text, "\",\r\n") {
			b = append(b, v.Text...)
			continue
		}
		b = append(b, '"')
		for _, c := range v.Text {
			if c == '"' {
				b = append(b, '"')
			}
			b = append(b, c)
		}
		b = append(b, '"')
	}
	return b, len(t.key) > 0
}

// isKeyChanged tells whether an update gave its row another key.
func (t *Table) isKeyChanged(u *wal.Update) bool {
	if u.OldKind == 0 {
		return false
	}
	for _, i := range t.key {
		if v := value(i, u.New, u.Old); v.Kind != u.Old[i].Kind || !bytes.Equal(v.Text, u.Old[i].Text) {
			return true
		}
	}
	return false
}

// appendRecord appends a row as a JSON object. What was not sent is not in it.
func (t *Table) appendRecord(b []byte, tuple, old wal.Tuple) []byte {
	b = append(b, '{')
	start := len(b)
	for _, i := range t.sorted {
		v := value(i, tuple, old)
		if v.Kind == wal.Unchanged {
			continue
		}
		if len(b) > start {
			b = append(b, ',')
		}
		b = t.appendColumn(b, i, v)
	}
	return append(b, '}')
}

// appendOldKey appends the columns of an old key as a JSON object: the others are sent as null, and are not.
func (t *Table) appendOldKey(b []byte, old wal.Tuple) []byte {
	b = append(b, '{')
	start := len(b)
	for i, c := range t.relation.Columns {
		if !c.IsKey {
			continue
		}
		if len(b) > start {
			b = append(b, ',')
		}
		b = t.appendColumn(b, i, old[i])
	}
	return append(b, '}')
}

// appendChanges appends the old values of the columns that an update changed, as far as they were sent.
func (t *Table) appendChanges(b []byte, u *wal.Update) []byte {
	b = append(b, '{')
	start := len(b)
	for i, c := range t.relation.Columns {
		if u.OldKind == 'K' && !c.IsKey {
			continue
		}
		v := value(i, u.New, u.Old)
		if v.Kind == u.Old[i].Kind && bytes.Equal(v.Text, u.Old[i].Text) {
			continue
		}
		if len(b) > start {
			b = append(b, ',')
		}
		b = t.appendColumn(b, i, u.Old[i])
	}
	return append(b, '}')
}

func (t *Table) appendColumn(b []byte, i int, v wal.Value) []byte {
	b = append(b, t.columns[i].label...)
	if v.Kind != wal.Text {
		return append(b, "null"...)
	}
	return appendValue(b, t.columns[i].form, v.Text)
}

// appendUnchanged appends the names of TOASTed columns that an update did not touch and nothing else has, as a JSON array.
// Nothing, where there are none.
func (t *Table) appendUnchanged(b []byte, tuple, old wal.Tuple) []byte {
	start := len(b)
	for i := range t.columns {
		if value(i, tuple, old).Kind != wal.Unchanged {
			continue
		}
		if len(b) == start {
			b = append(b, '[')
		} else {
			b = append(b, ',')
		}
		label := t.columns[i].label
		b = append(b, label[:len(label)-1]...)
	}
	if len(b) > start {
		b = append(b, ']')
	}
	return b
}

// fits tells whether a tuple has the columns of its relation.
func (t *Table) fits(tuple wal.Tuple) bool { return len(tuple) == len(t.columns) }
