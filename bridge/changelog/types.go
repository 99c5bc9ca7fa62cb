package changelog

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"sequin/bridge/wal"
)

// form is how a type's text becomes JSON: as to_jsonb would have it, where text is enough to tell.
type form struct {
	kind  formKind
	elem  *form // of an array
	delim byte  // of an array
	// Of asJSON: the database cannot hold every character, and refuses an escape (é) of one that it cannot.
	isNarrow bool
}

type formKind byte

const (
	asString      formKind = iota
	asBool                 // t, f
	asNumber               // but for NaN and the infinities, which JSON does not have
	asJSON                 // as it is, where jsonb can hold it
	asJSONB                // as it is
	asTimestamp            // ISO 8601
	asTimestamptz          // ISO 8601, with minutes in the offset
	asArray
)

var builtinForms = map[uint32]*form{
	pgtype.BoolOID:        {kind: asBool},
	pgtype.Int2OID:        {kind: asNumber},
	pgtype.Int4OID:        {kind: asNumber},
	pgtype.Int8OID:        {kind: asNumber},
	pgtype.Float4OID:      {kind: asNumber},
	pgtype.Float8OID:      {kind: asNumber},
	pgtype.NumericOID:     {kind: asNumber},
	pgtype.JSONOID:        {kind: asJSON},
	pgtype.JSONBOID:       {kind: asJSONB},
	pgtype.TimestampOID:   {kind: asTimestamp},
	pgtype.TimestamptzOID: {kind: asTimestamptz},
	pgtype.TextOID:        {kind: asString},
	pgtype.VarcharOID:     {kind: asString},
	pgtype.BPCharOID:      {kind: asString},
	pgtype.UUIDOID:        {kind: asString},
	pgtype.DateOID:        {kind: asString},
	pgtype.ByteaOID:       {kind: asString},
}

// Queryer is a connection, or a pool of them, to the database that the types are of.
type Queryer interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// Types knows what kinds of value a source's types are. It asks the source for those that are not built in, once.
type Types struct {
	known  map[uint32]*form
	isUTF8 bool
}

// NewTypes returns a Types that knows the built-in ones, for a log in a database whose encoding is UTF-8 or another.
func NewTypes(isUTF8 bool) *Types {
	t := &Types{known: make(map[uint32]*form, 2*len(builtinForms)), isUTF8: isUTF8}
	for oid, f := range builtinForms {
		t.known[oid] = f
	}
	t.known[pgtype.JSONOID] = &form{kind: asJSON, isNarrow: !isUTF8}
	return t
}

// A domain is what it is over; an array is told by how it is read; whatever else there is travels as its text.
const typesQuery = `
with recursive wanted(oid, base) as (
  select w.oid, w.oid from unnest($1::oid[]) w(oid)
  union all
  select w.oid, t.typbasetype from wanted w join pg_catalog.pg_type t on t.oid = w.base and t.typtype = 'd'
), base as (
  select w.oid, t.oid as base, t.typelem, t.typdelim, t.typinput = 'pg_catalog.array_in'::pg_catalog.regproc as is_array
  from wanted w join pg_catalog.pg_type t on t.oid = w.base
  where t.typtype <> 'd'
)
select b.oid, b.base, case when b.is_array then b.typelem else 0::oid end, coalesce(e.typdelim, ',')
from base b left join pg_catalog.pg_type e on e.oid = b.typelem and b.is_array`

// Know finds out about the types of a relation's columns that are not known yet. Whether all of them are there: one that is
// not was dropped since, or cannot be seen yet, and its values travel as text.
func (t *Types) Know(ctx context.Context, db Queryer, rel *wal.Relation) (bool, error) {
	oids := make([]uint32, len(rel.Columns))
	for i, c := range rel.Columns {
		oids[i] = c.TypeOID
	}
	if err := t.load(ctx, db, oids); err != nil {
		return false, err
	}
	return !slices.ContainsFunc(oids, func(oid uint32) bool { return t.known[oid] == nil }), nil
}

// load finds out about types that are not known yet, and are there.
func (t *Types) load(ctx context.Context, db Queryer, oids []uint32) error {
	type found struct {
		oid, base, elem uint32
		delim           string
	}
	for range 4 { // an array of a domain over an array of a domain is as deep as it gets
		var unknown []uint32
		for _, oid := range oids {
			if t.known[oid] == nil {
				unknown = append(unknown, oid)
			}
		}
		if len(unknown) == 0 {
			return nil
		}
		rows, err := db.Query(ctx, typesQuery, unknown)
		if err != nil {
			return fmt.Errorf("read types: %w", err)
		}
		all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (f found, err error) {
			err = row.Scan(&f.oid, &f.base, &f.elem, &f.delim)
			return f, err
		})
		if err != nil {
			return fmt.Errorf("read types: %w", err)
		}
		var elems, arrays []uint32
		for _, f := range all {
			switch {
			case f.elem != 0 && t.known[f.elem] == nil:
				elems, arrays = append(elems, f.elem), append(arrays, f.oid)
			case f.elem != 0:
				t.known[f.oid] = &form{kind: asArray, elem: t.known[f.elem], delim: f.delim[0]}
			case t.known[f.base] != nil:
				t.known[f.oid] = t.known[f.base]
			default:
				t.known[f.oid] = &form{kind: asString}
			}
		}
		oids = append(elems, arrays...)
	}
	return nil
}

func (t *Types) form(oid uint32) *form {
	if f := t.known[oid]; f != nil {
		return f
	}
	return &form{kind: asString}
}
