package capture

import (
	"slices"

	"sequin/bridge/wal"
)

// columnsQuery returns the names of a relation's columns that are sent, in order, and for each how many before it were
// dropped, and may have been sent then.
const columnsQuery = `
	select coalesce(pg_catalog.array_agg(c.name order by c.attnum), '{}'), coalesce(pg_catalog.array_agg(c.dropped order by c.attnum), '{}')
	from (
	  select a.attnum, a.attname::text as name, a.attisdropped, pg_catalog.count(*) filter (where a.attisdropped) over (order by a.attnum) as dropped
	  from pg_catalog.pg_attribute a
	  where a.attrelid = $1::bigint::oid and a.attnum > 0 and case when pg_catalog.current_setting('server_version_num')::int < 180000
	    then a.attgenerated = '' else a.attgenerated <> 'v' end) c
	where not c.attisdropped`

// keyThen returns the columns that named a relation's rows when it was what the stream says it is. key are those of the
// catalog now: their names may have been other columns', and the key another. last is what it was before that, and columns
// and dropped are what columnsQuery returns. isSame: the catalog has the relation as the stream does, but for columns at its end.
func keyThen(rel *wal.Relation, key, last, columns []string, dropped []int64) (then []string, isSame bool) {
	isSame = rel.IsIdentity(key)
	for i := range min(len(columns), len(rel.Columns)) {
		isSame = isSame && columns[i] == rel.Columns[i].Name
	}
	fits := func(key []string) bool { return rel.Has(key) && rel.IsIdentity(key) }
	switch placed := atPlaces(rel, key, columns, dropped); {
	case isSame && rel.Has(key):
		return key, true
	case fits(last):
		return last, isSame
	case fits(placed):
		return placed, isSame
	}
	return key, isSame
}

// atPlaces returns what a key's columns were called, by their places; nil, where these may have been others.
func atPlaces(rel *wal.Relation, key, columns []string, dropped []int64) (names []string) {
	for _, name := range key {
		i := slices.Index(columns, name)
		if i < 0 || i >= len(rel.Columns) || dropped[i] > 0 && len(columns) != len(rel.Columns) {
			return nil
		}
		names = append(names, rel.Columns[i].Name)
	}
	return names
}
