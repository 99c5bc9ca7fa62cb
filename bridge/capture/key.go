package capture

import (
	"slices"

	"sequin/bridge/wal"
)

// known is what named a relation's rows when it had these columns; none: they are not known.
type known struct {
	key, columns []string
}

// present is what the catalog has of a relation now: the columns that name its rows, and the transaction that made that so;
// those that are sent, in order, and for each how many before it were dropped, and may have been sent then; and how many were at all.
type present struct {
	key          []string
	madeBy       *int64
	columns      []string
	dropped      []int64
	droppedCount int64
}

// presentQuery returns a present, but for its key.
const presentQuery = `
	select coalesce(pg_catalog.array_agg(c.name order by c.attnum) filter (where not c.attisdropped), '{}'),
	  coalesce(pg_catalog.array_agg(c.dropped order by c.attnum) filter (where not c.attisdropped), '{}'),
	  pg_catalog.count(*) filter (where c.attisdropped),
	  (select case when pg_catalog.age(i.xmin) >= 0 then i.xmin::text::bigint end
	   from pg_catalog.pg_index i
	   where i.indrelid = $1::bigint::oid and (i.indisprimary or i.indisreplident) and i.indislive
	   order by i.indisprimary desc
	   limit 1)
	from (
	  select a.attnum, a.attname::text as name, a.attisdropped, pg_catalog.count(*) filter (where a.attisdropped) over (order by a.attnum) as dropped
	  from pg_catalog.pg_attribute a
	  where a.attrelid = $1::bigint::oid and a.attnum > 0 and case when pg_catalog.current_setting('server_version_num')::int < 180000
	    then a.attgenerated = '' else a.attgenerated <> 'v' end) c`

// keyThen returns the columns that named a relation's rows when it was what the stream says it is. The names of those of now may
// have been other columns', and the key another: isLater, where it was made after that. last is what it was before.
func keyThen(rel *wal.Relation, now present, last known, isLater bool) []string {
	placed, isSure := now.at(rel)
	before := last.at(rel, now.droppedCount == 0)
	fits := func(key []string) bool { return rel.Has(key) && rel.IsIdentity(key) }
	switch {
	case isLater && last.columns != nil && len(last.key) == 0 && rel.IsIdentity(nil):
		return nil
	case isLater && fits(before):
		return before
	case isSure && fits(placed):
		return placed
	case now.isSame(rel) && rel.Has(now.key):
		return now.key
	case fits(before):
		return before
	case fits(placed):
		return placed
	}
	return now.key
}

// isSame tells whether the catalog has a relation as the stream does, but for columns at its end.
func (p *present) isSame(rel *wal.Relation) bool {
	for i := range min(len(p.columns), len(rel.Columns)) {
		if p.columns[i] != rel.Columns[i].Name {
			return false
		}
	}
	return rel.IsIdentity(p.key)
}

// at returns what the key's columns were called, by their places; nil, where these may have been others. isSure: no column
// before them was dropped.
func (p *present) at(rel *wal.Relation) (names []string, isSure bool) {
	isSure = true
	for _, name := range p.key {
		i := slices.Index(p.columns, name)
		if i < 0 || i >= len(rel.Columns) || p.dropped[i] > 0 && len(p.columns) != len(rel.Columns) {
			return nil, false
		}
		isSure = isSure && p.dropped[i] == 0
		names = append(names, rel.Columns[i].Name)
	}
	return names, isSure
}

// at returns what the key's columns are called in a relation that came later; nil, where that cannot be told. Where columns may
// have been dropped meanwhile, they are looked for by name, unless all names are there: then they may have changed places.
func (k *known) at(rel *wal.Relation, isWhole bool) (names []string) {
	if len(k.columns) == 0 {
		return k.key
	}
	isSameNames := len(k.columns) == len(rel.Columns) && rel.Has(k.columns)
	for _, name := range k.key {
		i := slices.Index(k.columns, name)
		isPlaced := isWhole || isSameNames || len(k.columns) == len(rel.Columns) && !rel.Has([]string{name})
		switch {
		case isPlaced && i >= 0 && i < len(rel.Columns):
			names = append(names, rel.Columns[i].Name)
		case !isPlaced && rel.Has([]string{name}):
			names = append(names, name)
		default:
			return nil
		}
	}
	return names
}

// columnNames returns the names of a relation's columns, in order.
func columnNames(rel *wal.Relation) []string {
	names := []string{}
	for _, c := range rel.Columns {
		names = append(names, c.Name)
	}
	return names
}
