-- Rows of this database's tables, read as the log would have them: the same JSON, the same key, to the letter. Where
-- these are run, what a value's text depends on is set as it is for capture.

-- A key as the log has it in record_pk: a single column's text, or those of several, quoted as in CSV where they have to
-- be.
create or replace function sequin._record_pk("values" text[])
returns text
language sql
immutable
as $$
  select case when pg_catalog.cardinality("values") = 1 then "values"[1] else (
    select pg_catalog.string_agg(
             case when v.value <> '' and v.value !~ '[",\r\n]' then v.value
                  else '"' || pg_catalog.replace(v.value, '"', '""') || '"' end, ',' order by v.position)
    from pg_catalog.unnest("values") with ordinality v(value, position)
  ) end
$$;

-- A row's only value as text that the bridge reads as the same value, whatever its writer has set.
create or replace function sequin._plain_text(value record)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set extra_float_digits = 3
set bytea_output = 'hex'
set lc_monetary = 'C'
as $$
declare
  -- As its type writes it, in parentheses: a cast to text may be somebody's own.
  v_text text := format('%s', value);
begin
  v_text := substr(v_text, 2, length(v_text) - 2);
  if left(v_text, 1) = '"' then
    return replace(replace(substr(v_text, 2, length(v_text) - 2), '""', '"'), E'\\\\', E'\\');
  end if;
  return v_text;
end $$;

-- What a table's rows are selected from: those that inherit from it are tables of their own, but for partitions.
create or replace function sequin._rows_sql(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case when c.relkind = 'p' then '' else 'only ' end || sequin._table_name(c.oid) from pg_class c where c.oid = relation
$$;

-- json that jsonb cannot hold is in the log as its text.
create or replace function sequin._as_jsonb(value json)
returns jsonb
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  return value::jsonb;
exception when data_exception or program_limit_exceeded then
  return to_jsonb(value::text);
end $$;

-- Whether to_jsonb makes something else of a type than its text, where the log has its text.
create or replace function sequin._is_text_in_log(type oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select t.typtype = 'c' or t.oid = 'record'::regtype
         or t.typelem <> 0 and t.typlen = -1 and t.typinput <> 'array_in'::regproc
         or t.oid >= 16384 and exists (select from pg_cast c where c.castsource = t.oid and c.casttarget = 'json'::regtype)
  from pg_type t where t.oid = sequin._base_type(type)
$$;

-- What to select from a table, called t, so that to_jsonb of it is the log's record: without generated columns, but for
-- those that are published.
create or replace function sequin._record_sql(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select string_agg(
           case
             when b.typinput = 'array_in'::regproc then
               format('case when format(''%%s'', t.%1$I) like ''[%%'' then to_jsonb(format(''%%s'', t.%1$I)) else to_jsonb(%2$s) end as %1$I', a.attname,
                 -- Not as a cast makes text of its elements, which may be somebody's own.
                 format(case when sequin._is_text_in_log(b.typelem) then 'nullif(format(''%%s'', t.%I), '''')::text[]' else 't.%I' end, a.attname))
             when b.oid = 'json'::regtype then format('sequin._as_jsonb(t.%1$I) as %1$I', a.attname)
             when sequin._is_text_in_log(b.oid) then
               format('case when t.%1$I is distinct from null then format(''%%s'', t.%1$I) end as %1$I', a.attname)
             else format('t.%I', a.attname)
           end, ', ' order by a.attnum)
  from pg_attribute a
  join pg_type b on b.oid = sequin._base_type(a.atttypid)
  where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
    and (a.attgenerated = '' or a.attgenerated = 's' and current_setting('server_version_num')::int >= 180000)
$$;

-- A column of a table, called t, as text: as its type writes it, which a cast does not always.
create or replace function sequin._text_sql("column" text)
returns text
language sql
immutable
as $$
  select pg_catalog.format('case when t.%1$I is distinct from null then format(''%%s'', t.%1$I) end', "column")
$$;

-- A table's record_pk, in the same way.
create or replace function sequin._record_pk_sql(key_columns text[])
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case when cardinality(key_columns) = 1 then format('format(''%%s'', t.%I)', key_columns[1])
         else format('sequin._record_pk(array[%s])', (
           select string_agg(format('format(''%%s'', t.%I)', k.name), ', ' order by k.position)
           from unnest(key_columns) with ordinality k(name, position))) end
$$;

-- The column's type, as a cast to it is written, and the schema of the operators that its index is ordered by.
create or replace function sequin._column_type(relation oid, "column" text, out type text, out operators text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format_type(sequin._castable_type(a.atttypid), case when t.typtype <> 'd' then a.atttypmod end), coalesce(n.nspname::text, 'pg_catalog')
  from pg_attribute a
  join pg_type t on t.oid = a.atttypid
  left join lateral (
    select o.oprnamespace
    from pg_opclass c
    join pg_amop m on m.amopfamily = c.opcfamily and m.amoplefttype = c.opcintype and m.amoprighttype = c.opcintype and m.amopstrategy = 3
    join pg_operator o on o.oid = m.amopopr
    where c.opcmethod = 403 and c.opcdefault and c.opcintype = sequin._base_type(a.atttypid)) o on true
  left join pg_namespace n on n.oid = o.oprnamespace
  where a.attrelid = relation and a.attname = "column" and a.attnum > 0 and not a.attisdropped
$$;
