package backfill

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"sequin/bridge/changelog"
	"sequin/bridge/quote"
	"sequin/bridge/wal"
)

// table is what a chunk reads, as it is described in the chunk's own transaction.
type table struct {
	*changelog.Table
	schema, name string
	isRoot       bool     // it is partitioned
	columns      []column // those that the publication sends
	order        []column // what its rows are read in the order of: the sort column, and the key
}

type column struct {
	name      string
	typeName  string
	domain    string // of somebody else's, with checks, which is in that type; "": none
	collation string // as SQL has it; "": none, or the database's own
	isNotNull bool
}

// problem is what is wrong with a table, so that waiting does not mend it.
type problem string

func (p problem) Error() string { return string(p) }

// nameOf returns what a relation is called just now.
func nameOf(ctx context.Context, source *pgx.Conn, oid uint32) (schema, name string, err error) {
	err = source.QueryRow(ctx, `select n.nspname::text, c.relname::text
		from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = $1`, oid).Scan(&schema, &name)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", "", problem("the table was dropped")
	}
	if err != nil {
		return "", "", fmt.Errorf("read table: %w", err)
	}
	return schema, name, nil
}

// What pgoutput sends of a row: of generated columns, the stored ones on 18 and newer, where the publication says so; and
// no more than the columns that the publication names, where it names some.
// A type is what it is over, and what it has in it may run checks that are somebody's who has fewer rights than the bridge:
// as sequin._castable_type has it.
const columnsQuery = `
select a.attname::text, a.atttypid, y.name, y.foreign_domain,
       coalesce((select pg_catalog.format('%I.%I', n.nspname, l.collname)
                 from pg_catalog.pg_collation l join pg_catalog.pg_namespace n on n.oid = l.collnamespace
                 where l.oid = a.attcollation and l.collname <> 'default'), ''),
       a.attnotnull,
       coalesce(a.attnum = any (k.columns), false) as is_key,
       coalesce(pg_catalog.array_position(k.columns, a.attnum), 0) as key_position,
       coalesce(a.attnum = any (i.columns), false) as is_identity,
       (a.attgenerated = '' or a.attgenerated = 's' and coalesce(pg_catalog.to_jsonb(p) ->> 'pubgencols', '') = 's')
         and coalesce(a.attnum::text = any (pg_catalog.string_to_array(pg_catalog.to_jsonb(r) ->> 'prattrs', ' ')), true) as is_sent
from pg_catalog.pg_attribute a
cross join lateral (
  with recursive down(oid) as (
    select a.atttypid
    union all
    select t.typbasetype from down d join pg_catalog.pg_type t on t.oid = d.oid and t.typtype = 'd'
  ), base as (
    select d.oid from down d join pg_catalog.pg_type t on t.oid = d.oid and t.typtype <> 'd'
  ), part(oid) as (
    select b.oid from base b
    union
    select n.oid
    from part p
    join pg_catalog.pg_type t on t.oid = p.oid
    cross join lateral (
      select t.typelem where t.typlen = -1
      union all
      select t.typbasetype where t.typtype = 'd'
      union all
      select c.atttypid from pg_catalog.pg_attribute c where t.typtype = 'c' and c.attrelid = t.typrelid and c.attnum > 0 and not c.attisdropped
      union all
      select r.rngsubtype from pg_catalog.pg_range r
      where t.oid in (r.rngtypid, (pg_catalog.to_jsonb(r) ->> 'rngmultitypid')::pg_catalog.oid)) n(oid)
    where n.oid <> 0
  )
  select pg_catalog.format_type(b.oid, -1) as name, coalesce((
           select pg_catalog.format_type(t.oid, null)
           from part p
           join pg_catalog.pg_type t on t.oid = p.oid and t.typtype = 'd'
           where not pg_catalog.pg_has_role(t.typowner, current_user, 'usage')
             and exists (select from pg_catalog.pg_constraint c where c.contypid = t.oid and c.contype = 'c')
           limit 1), '') as foreign_domain
  from base b) y
left join lateral (
  select i.indkey::int2[] as columns from pg_catalog.pg_index i
  where i.indrelid = a.attrelid and (i.indisprimary or i.indisreplident) and i.indislive
  order by i.indisprimary desc
  limit 1) k on true
left join lateral (
  select i.indkey::int2[] as columns
  from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indrelid
  where i.indrelid = a.attrelid and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident else false end
  limit 1) i on true
left join pg_catalog.pg_publication p on p.pubname = $2
left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = a.attrelid
where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
order by a.attnum`

// describe describes a relation for rows that go under a side route.
func (r *run) describe(ctx context.Context, source *pgx.Conn, place int32) (*table, error) {
	oid := uint32(r.Relations[place-1])
	t := &table{}
	rel := &wal.Relation{OID: oid}
	var identity string
	err := source.QueryRow(ctx, `select n.nspname::text, c.relname::text, c.relreplident::text, c.relkind = 'p'
		from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = $1`, oid).
		Scan(&rel.Schema, &rel.Name, &identity, &t.isRoot)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, problem("the table was dropped")
	}
	if err != nil {
		return nil, fmt.Errorf("read table: %w", err)
	}
	rel.ReplicaIdentity = identity[0]
	t.schema, t.name = rel.Schema, rel.Name
	rows, err := source.Query(ctx, columnsQuery, oid, r.config.Publication)
	if err != nil {
		return nil, fmt.Errorf("read columns: %w", err)
	}
	defer rows.Close()
	key := map[int]column{}
	var sort *column
	for rows.Next() {
		var c column
		var typeOID uint32
		var isKey, isIdentity, isSent bool
		var position int
		if err := rows.Scan(&c.name, &typeOID, &c.typeName, &c.domain, &c.collation, &c.isNotNull, &isKey, &position, &isIdentity, &isSent); err != nil {
			return nil, fmt.Errorf("read columns: %w", err)
		}
		if isKey {
			// indkey counts from 0, and so do the places of its array.
			key[position] = c
		}
		if r.SortColumn != nil && c.name == *r.SortColumn {
			sort = &c
		}
		if isSent {
			t.columns = append(t.columns, c)
			rel.Columns = append(rel.Columns, wal.RelationColumn{Name: c.name, TypeOID: typeOID, IsKey: isIdentity})
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read columns: %w", err)
	}
	if len(key) == 0 {
		return nil, problem(fmt.Sprintf("table %s.%s has no primary key", t.schema, t.name))
	}
	if r.SortColumn != nil && sort == nil {
		return nil, problem(fmt.Sprintf("table %s.%s has no column %q any more, by which its rows are sorted", t.schema, t.name, *r.SortColumn))
	}
	if sort != nil {
		t.order = append(t.order, *sort)
	}
	var names []string
	for position := 0; len(names) < len(key); position++ {
		c, ok := key[position]
		if !ok {
			continue
		}
		names = append(names, c.name)
		if sort == nil || c.name != sort.name {
			t.order = append(t.order, c)
		}
	}
	for _, c := range t.order {
		if c.domain != "" {
			return nil, problem(fmt.Sprintf("column %q of table %s.%s has in it domain %s, whose checks are somebody else's, and would run with the bridge's rights",
				c.name, t.schema, t.name, c.domain))
		}
	}
	if _, err := r.types.Know(ctx, source, rel); err != nil {
		return nil, fmt.Errorf("describe table %s.%s: %w", t.schema, t.name, err)
	}
	t.Table = changelog.NewTable(r.types, rel, r.Routes[place-1], names, t.isRoot).Beside(r.SideRoutes[place-1])
	return t, nil
}

// condition returns what sequin.backfill was asked to choose of a table's rows, as SQL compiled it.
func (r *run) condition(place int32) string {
	if len(r.Conditions) == 0 || r.config.Connect != nil { // then see choose
		return ""
	}
	return r.Conditions[place-1]
}

// part says which rows are read: of a column that may be null, those where it is not come first, then the others.
type part struct {
	nulls bool
	after []*string // the last row's values of order; nil: from the beginning
	order string    // what that is in; "": not known yet
}

// orderText says what a table's rows are read in the order of, so that another order is told from it.
func (t *table) orderText() string {
	var list []string
	for _, c := range t.order {
		text := quote.Identifier(c.name) + " " + c.typeName
		if c.collation != "" {
			text += " collate " + c.collation
		}
		list = append(list, text)
	}
	return strings.Join(list, ", ")
}

// query returns the statement that reads a table's rows in order, with its arguments, each as text. A row is followed by
// whether it may have changed since the cut, and its values of order.
func (t *table) query(p part, fromRow *string, condition, doubt string, limit int) (string, []string) {
	var args []string
	value := func(c column, text string) string {
		args = append(args, text)
		v := "$" + strconv.Itoa(len(args)) + "::" + c.typeName
		if c.collation != "" {
			v += " collate " + c.collation
		}
		return v
	}
	var list, where, by []string
	for _, c := range t.columns {
		list = append(list, "new."+quote.Identifier(c.name))
	}
	list = append(list, "("+doubt+")")
	for _, c := range t.order {
		list = append(list, "new."+quote.Identifier(c.name))
		by = append(by, "new."+quote.Identifier(c.name))
	}
	order := t.order
	after := p.after
	switch {
	case p.nulls:
		where = append(where, by[0]+" is null")
		order, by = order[1:], by[1:]
		if after != nil {
			after = after[1:]
		}
	case !order[0].isNotNull:
		where = append(where, by[0]+" is not null")
	}
	if after != nil {
		values := make([]string, len(order))
		for i, c := range order {
			values[i] = value(c, *after[i])
		}
		where = append(where, "("+strings.Join(by, ", ")+") > ("+strings.Join(values, ", ")+")")
	} else if fromRow != nil {
		where = append(where, by[0]+" >= "+value(order[0], *fromRow))
	}
	if condition != "" {
		where = append(where, condition)
	}
	if len(where) == 0 {
		where = append(where, "true")
	}
	from := " from only " // those that inherit from it are tables of their own
	if t.isRoot {
		from = " from "
	}
	return "select " + strings.Join(list, ", ") + from + quote.Identifier(t.schema) + "." + quote.Identifier(t.name) + " as new" +
		" where " + strings.Join(where, " and ") + " order by " + strings.Join(by, ", ") + " limit " + strconv.Itoa(limit), args
}
