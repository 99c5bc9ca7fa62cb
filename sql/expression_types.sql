-- What the columns of a table are in an expression.

-- The type that a column is given as in an expression: one whose values come to be without running anybody's code, now
-- and later. A domain is what it is over; a composite, a range over a domain, a type with a cast of somebody's own, or one
-- whose name somebody else may give to another, is its text.
create or replace function sequin._plain_type(type oid)
returns oid
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  t pg_type;
  v_element oid;
  v_subtype oid;
begin
  select * into t from pg_type y where y.oid = type;
  if t.typtype = 'd' then
    return sequin._plain_type(t.typbasetype);
  elsif t.typinput = 'array_in'::regproc then
    v_element := sequin._plain_type(t.typelem);
    if v_element = t.typelem then
      return type;
    end if;
    return coalesce(nullif((select e.typarray from pg_type e where e.oid = v_element), 0), 'text'::regtype);
  elsif t.typtype in ('r', 'm') then
    v_subtype := (
      select r.rngsubtype from pg_range r
      where r.rngtypid = type or (to_jsonb(r) ->> 'rngmultitypid')::oid = type);
    if v_subtype is distinct from sequin._plain_type(v_subtype) or exists (
         select from pg_range r
         join pg_proc p on p.oid = r.rngcanonical
         join pg_language l on l.oid = p.prolang
         where r.rngsubtype = v_subtype and l.lanname not in ('c', 'internal')
           and (r.rngtypid = type or (to_jsonb(r) ->> 'rngmultitypid')::oid = type)) then
      return 'text'::regtype;
    end if;
  elsif t.typtype not in ('b', 'e') then
    return 'text'::regtype;
  end if;
  if t.typnamespace = 'pg_catalog'::regnamespace then
    return type;
  elsif exists (
       select from pg_cast k
       join pg_proc p on p.oid = k.castfunc
       join pg_language l on l.oid = p.prolang
       where type in (k.castsource, k.casttarget) and l.lanname not in ('c', 'internal'))
     or not sequin._is_trusted_owner(t.typowner)
     or exists (
       select from pg_namespace n
       where n.oid = t.typnamespace and (n.nspname ~ '^pg_(toast_)?temp_' or not sequin._is_trusted_owner(n.nspowner))) then
    return 'text'::regtype;
  end if;
  return type;
end $$;

-- The columns of a table that its messages carry, each with the type it is given as.
create or replace function sequin._expression_columns(relation oid)
returns table (attnum int2, name text, type oid)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select a.attnum, a.attname::text, case when a.atttypid < 16384 then a.atttypid else sequin._plain_type(a.atttypid) end
  from pg_attribute a
  where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
    -- A generated column is in the write-ahead log from PostgreSQL 18 on, and if it is stored.
    and (a.attgenerated = '' or a.attgenerated = 's' and current_setting('server_version_num')::int >= 180000)
$$;

-- A type's name, wherever it is written.
create or replace function sequin._type_name(type oid)
returns text
language sql
stable
set search_path = ''
set quote_all_identifiers = off
as $$
  select case when e.typnamespace operator(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace
              then pg_catalog.format('pg_catalog.%I', e.typname) else pg_catalog.format_type(e.oid, -1) end
         operator(pg_catalog.||) case when e.oid operator(pg_catalog.<>) t.oid then '[]' else '' end
  from pg_catalog.pg_type t
  join pg_catalog.pg_type e on e.oid operator(pg_catalog.=) case
    when t.typinput operator(pg_catalog.=) 'pg_catalog.array_in'::pg_catalog.regproc then t.typelem else t.oid end
  where t.oid operator(pg_catalog.=) type
$$;

-- A select whose one column, _sequin_value, is an expression over the names it may have. The same FROM, in effect, is
-- what it is evaluated in. A relation of 0 is a table of another database.
create or replace function sequin._probe(relation oid, value text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format($sql$select _sequin_f._sequin_value
from (select null::pg_catalog.jsonb as _sequin_record, null::pg_catalog.bool as _sequin_new, null::pg_catalog.bool as _sequin_old,
             null::pg_catalog.text as _sequin_action, null::pg_catalog.text as _sequin_table,
             null::pg_catalog.timestamptz as _sequin_at) _sequin_m%s
cross join lateral (
  select %s as _sequin_value
  from (
    select %s_sequin_m._sequin_action as action, _sequin_m._sequin_table as table_name,
           _sequin_m._sequin_at as committed_at) _sequin) _sequin_f$sql$,
    case when relation <> 0 then (
      select format($sql$
left join lateral pg_catalog.jsonb_to_record(_sequin_m._sequin_record) as new (%1$s) on _sequin_m._sequin_new
left join lateral pg_catalog.jsonb_to_record(_sequin_m._sequin_record) as old (%1$s) on _sequin_m._sequin_old$sql$,
        coalesce(string_agg(format('%I %s', k.name, sequin._type_name(k.type)), ', ' order by k.attnum), '_sequin_none pg_catalog.text'))
      from sequin._expression_columns(relation) k) end,
    value,
    case when relation = 0 then '_sequin_m._sequin_record as new, _sequin_m._sequin_record as old, ' end)
$$;
