-- Event log tables: what pipelines write to. They are ordinary tables of the user's, in a schema of the user's.

-- The columns that an event log table has, in order. id and inserted_at fill themselves.
create or replace function sequin._event_columns()
returns table (place int, name text, type regtype, is_written boolean)
language sql
immutable
as $$
  values (1, 'id', 'bigint'::pg_catalog.regtype, false),
         (2, 'seq', 'bigint', true),
         (3, 'source_database_id', 'uuid', true),
         (4, 'source_table_oid', 'bigint', true),
         (5, 'source_table_schema', 'text', true),
         (6, 'source_table_name', 'text', true),
         (7, 'record_pk', 'text', true),
         (8, 'record', 'jsonb', true),
         (9, 'changes', 'jsonb', true),
         (10, 'action', 'text', true),
         (11, 'committed_at', 'timestamptz', true),
         (12, 'inserted_at', 'timestamptz', false)
$$;

-- The statement that makes one. With a retention it is partitioned, so that old events go a partition at a time.
create or replace function sequin._event_table_sql(schema_name text, table_name text, is_partitioned boolean)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select format(
    'create table %I.%I (id bigint generated always as identity, seq bigint not null, source_database_id uuid not null, '
    'source_table_oid bigint not null, source_table_schema text not null, source_table_name text not null, record_pk text, '
    'record jsonb, changes jsonb, action text not null, committed_at timestamptz not null, '
    'inserted_at timestamptz not null default now(), primary key (%s))%s',
    schema_name, table_name, case when is_partitioned then 'id, committed_at' else 'id' end,
    case when is_partitioned then ' partition by range (committed_at)' else '' end)
$$;

-- The columns that a pipeline's events may leave null.
create or replace function sequin._left_null(actions text[], source_relation oid)
returns text[]
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select array_remove(array[
    case when 'truncate' = any (actions) or c.oid is not null and sequin._key_columns(c.oid) = '{}' then 'record_pk' end,
    case when 'truncate' = any (actions) then 'record' end,
    -- Of a partitioned table, the root says what of a partition's old row is sent.
    case when not actions <@ '{update}' or c.relreplident <> 'f' then 'changes' end], null)
  from (select) one
  left join pg_class c on c.oid = source_relation
$$;

-- The first thing that keeps a relation from being an event log table, with the statement that mends it; no row where
-- nothing does. pipeline: the one that writes to it already.
create or replace function sequin._event_table_problem(relation oid, is_partitioned boolean, left_null text[], pipeline text)
returns table (code text, message text, hint text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text := sequin._table_name(relation);
  v_class pg_class;
  v_missing record;
  v_column record;
begin
  select * into v_class from pg_class c where c.oid = relation;
  if v_class.relkind not in ('r', 'p') or v_class.relispartition then
    return query select '22023', format('event table %s is %s', v_name,
        case when v_class.relispartition then 'a partition' when v_class.relkind = 'v' then 'a view'
             when v_class.relkind = 'm' then 'a materialized view' when v_class.relkind = 'f' then 'a foreign table'
             else 'not a table' end),
      'Name a table, or one that does not exist: it is made then.';
    return;
  elsif v_class.relnamespace in ('sequin'::regnamespace, 'pg_catalog'::regnamespace, 'information_schema'::regnamespace) then
    return query select '22023', format('event table %s would be in a schema that is not yours', v_name), 'Name a table of your own.';
    return;
  elsif v_class.relpersistence = 't' then
    return query select '55000', format('event table %s is a temporary table', v_name),
      'The bridge is another session, and does not see it. Name one that stays.';
    return;
  elsif v_class.relpersistence = 'u' then
    return query select '55000', format('event table %s is unlogged, and would be empty after a crash', v_name),
      format('alter table %s set logged;', v_name);
    return;
  end if;

  select min(e.name) filter (where e.place = m.place) as first,
         string_agg(format('add column %I %s', e.name, case e.name
           when 'id' then 'bigint generated always as identity'
           when 'inserted_at' then 'timestamptz not null default now()'
           else e.type::text end), ', ' order by e.place) as mend
    into v_missing
  from (select e.*, min(e.place) over () as first_place from sequin._event_columns() e
        where not exists (
          select from pg_attribute a
          where a.attrelid = relation and a.attname = e.name and a.attnum > 0 and not a.attisdropped)) e
  cross join lateral (select e.first_place as place) m;
  if v_missing.first is not null then
    return query select '42703', format('event table %s has no column "%s"', v_name, v_missing.first),
      format('alter table %s %s;', v_name, v_missing.mend);
    return;
  end if;

  for v_column in
    select e.*, a.atttypid, a.attnotnull, a.attidentity, a.attgenerated, a.atthasdef
    from sequin._event_columns() e
    join pg_attribute a on a.attrelid = relation and a.attname = e.name and not a.attisdropped
    order by e.place
  loop
    if v_column.atttypid <> v_column.type then
      return query select '42804',
        format('column "%s" of event table %s is of type %s, not %s', v_column.name, v_name,
          format_type(v_column.atttypid, null), v_column.type),
        format('alter table %s alter column %I type %s using %2$I::%3$s;', v_name, v_column.name, v_column.type);
      return;
    elsif v_column.attgenerated <> '' then
      return query select '42804', format('column "%s" of event table %s is generated', v_column.name, v_name),
        format('alter table %s drop column %I, add column %2$I %s;', v_name, v_column.name, v_column.type);
      return;
    elsif v_column.is_written and v_column.attidentity = 'a' then
      return query select '42804', format('column "%s" of event table %s is an identity', v_column.name, v_name),
        format('alter table %s alter column %I drop identity;', v_name, v_column.name);
      return;
    elsif not v_column.is_written and v_column.attidentity = '' and not v_column.atthasdef then
      return query select '55000', format('column "%s" of event table %s does not fill itself', v_column.name, v_name),
        case v_column.name
          when 'id' then format('alter table %s alter column id set not null, alter column id add generated always as identity;', v_name)
          else format('alter table %s alter column inserted_at set default now();', v_name) end;
      return;
    elsif v_column.attnotnull and v_column.name = any (left_null) then
      return query select '55000',
        format('column "%s" of event table %s must not be null, and there are events that leave it so', v_column.name, v_name),
        format('alter table %s alter column %I drop not null;', v_name, v_column.name);
      return;
    end if;
  end loop;

  select a.attname into v_column
  from pg_attribute a
  where a.attrelid = relation and a.attnum > 0 and not a.attisdropped and a.attnotnull and not a.atthasdef and a.attidentity = ''
    and not a.attname in (select e.name from sequin._event_columns() e)
  order by a.attnum
  limit 1;
  if found then
    return query select '55000',
      format('column "%s" of event table %s must not be null, and a pipeline has nothing to put there', v_column.attname, v_name),
      format('alter table %s alter column %I drop not null;', v_name, v_column.attname);
    return;
  end if;

  if is_partitioned and not sequin._is_by_time(relation) then
    return query select '55000',
      format('event table %s is not partitioned by range (committed_at), and a retention drops old partitions', v_name),
      case when pipeline is null then 'Leave retention out, or give another event table'
           else format('select sequin.drop_pipeline(%L); and make it anew with another event table', pipeline) end || ': one that does not exist yet is made as it must be.';
  elsif is_partitioned and exists (select from pg_partitioned_table t where t.partrelid = relation and t.partdefid <> 0) then
    return query select '55000',
      format('event table %s has a default partition, which takes what a partition of its own would be made for', v_name),
      (select format('alter table %s detach partition %s;', v_name, sequin._table_name(t.partdefid))
       from pg_partitioned_table t where t.partrelid = relation);
  end if;
end $$;

-- Whether a table is partitioned by range (committed_at).
create or replace function sequin._is_by_time(relation oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select exists (
    select from pg_partitioned_table t
    join pg_attribute a on a.attrelid = t.partrelid and a.attnum = t.partattrs[0]
    where t.partrelid = relation and t.partstrat = 'r' and t.partnatts = 1 and a.attname = 'committed_at')
$$;

-- What of its owner's own an insert into a table would run; null: nothing.
--
-- A pipeline inserts with the rights of this schema's owner. Triggers, defaults and the like run with them, and to
-- become the table's owner first would be no fence: what a trigger runs may say reset role. So where the table's
-- owner is somebody who does not have those rights anyway, the table must run nothing of theirs. The caller holds a lock
-- that keeps this so. Types, operators and functions of the system's own are known; others may be anything.
create or replace function sequin._event_table_code(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
set quote_all_identifiers = off
as $$
  with recursive tree(oid) as (
    select relation
    union
    select i.inhrelid from tree join pg_inherits i on i.inhparent = tree.oid
  )
  select p.what
  from tree
  join pg_class c on c.oid = tree.oid
  cross join lateral (
    select format('trigger "%s"', t.tgname) as what from pg_trigger t where t.tgrelid = c.oid and not t.tgisinternal
    union all
    select format('rule "%s"', r.rulename) from pg_rewrite r where r.ev_class = c.oid
    union all
    select 'a forced row level security policy' where c.relforcerowsecurity
    union all
    select format('foreign table %s', sequin._table_name(c.oid)) where c.relkind not in ('r', 'p')
    union all
    select format('constraint "%s"', o.conname) from pg_constraint o
    where o.conrelid = c.oid and o.contype not in ('p', 'u', 'f', 'n', 't')
    union all
    select format('the type of column "%s"', a.attname) from pg_attribute a
    where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.atttypid >= 16384
    union all
    select format('the default of column "%s"', a.attname)
    from pg_attrdef d join pg_attribute a on a.attrelid = d.adrelid and a.attnum = d.adnum
    where d.adrelid = c.oid
      and (a.attgenerated <> '' or not pg_get_expr(d.adbin, d.adrelid) ~
        '^(now\(\)|CURRENT_TIMESTAMP|clock_timestamp\(\)|gen_random_uuid\(\)|nextval\(''[^'']+''::regclass\)|-?[0-9.]+|true|false|''[^'']*''::[a-z ]+)$')
    union all
    select format('index %s', x.indexrelid::regclass) from pg_index x
    where x.indrelid = c.oid
      and (x.indexprs is not null or x.indpred is not null
           or exists (select from unnest(x.indclass::oid[]) o(oid) where o.oid >= 16384))
    union all
    select 'its partition key' from pg_partitioned_table t
    where t.partrelid = c.oid
      and (t.partexprs is not null or exists (select from unnest(t.partclass::oid[]) o(oid) where o.oid >= 16384))
  ) p
  order by p.what
  limit 1
$$;

-- 42501 unless a pipeline may write to a table: the owner here must have the rights of the table's owner, and the table
-- must not run what somebody with fewer rights has put there. Takes the lock of an insert, and keeps it.
create or replace function sequin._check_event_rights(relation oid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name text;
  v_class pg_class;
  v_code text;
begin
  select * into v_class from pg_class c where c.oid = relation;
  if pg_has_role(current_user, v_class.relowner, 'usage') and pg_has_role(v_class.relowner, current_user, 'usage') then
    return;
  end if;
  v_name := sequin._table_name(relation);
  if not pg_has_role(current_user, v_class.relowner, 'usage') then
    raise insufficient_privilege using
      message = format('event table %s belongs to %I, whose rights %I does not have', v_name,
        pg_get_userbyid(v_class.relowner), current_user),
      hint = format('grant %I to %I;', pg_get_userbyid(v_class.relowner), current_user);
  end if;
  execute format('lock table %s in row exclusive mode', v_name);
  if v_class.relkind = 'p' then
    -- No other partition either.
    execute format('lock table only %s in share update exclusive mode', v_name);
  end if;
  v_code := sequin._event_table_code(relation);
  if v_code is not null then
    raise insufficient_privilege using
      message = format('event table %s belongs to %I, and %s would run with the rights of %I', v_name,
        pg_get_userbyid(v_class.relowner), v_code, current_user),
      hint = format('Drop it, or: alter table %s owner to %I;', v_name, current_user);
  end if;
end $$;
