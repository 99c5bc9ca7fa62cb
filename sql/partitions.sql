-- Partitions of event log tables with a retention: made where events come, dropped whole when all in them is old.

-- How long a partition is, in seconds: an eighth of the retention, or somewhat less, so that it divides a day; a day where
-- there is none, or none any more.
create or replace function sequin._partition_width(retention interval)
returns bigint
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select max(w.seconds)
  from unnest('{1,5,10,60,300,600,3600,21600,86400,604800,2592000}'::bigint[]) w(seconds)
  where w.seconds <= greatest(date_part('epoch', coalesce(retention, '8 days')) / 8, 1)
$$;

-- The partitions of a table by range of a time, and what each holds; without a default partition.
create or replace function sequin._partitions(relation oid)
returns table (partition oid, from_at timestamptz, to_at timestamptz)
language sql
stable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
set timezone = 'UTC'
set datestyle = 'ISO'
as $$
  select i.inhrelid,
         case when m.bounds[1] = 'MINVALUE' then '-infinity' else btrim(m.bounds[1], '''') end::timestamptz,
         case when m.bounds[2] = 'MAXVALUE' then 'infinity' else btrim(m.bounds[2], '''') end::timestamptz
  from pg_inherits i
  join pg_class c on c.oid = i.inhrelid
  cross join lateral (
    select regexp_match(pg_get_expr(c.relpartbound, c.oid), '^FOR VALUES FROM \((.+)\) TO \((.+)\)$') as bounds) m
  where i.inhparent = relation and m.bounds is not null
$$;

-- Makes the partitions for these times, where there are none; the table's owner's, as the table is. Attached, not created in place:
-- that takes a lock that nobody who reads or writes the table notices.
create or replace function sequin._make_partitions(relation oid, width bigint, times timestamptz[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
as $$
declare
  v_table text := sequin._table_name(relation);
  v_schema name;
  v_class pg_class;
  v_at timestamptz;
  v_from timestamptz;
  v_to timestamptz;
  v_base text;
  v_suffix text;
  v_name text;
begin
  select * into v_class from pg_class c where c.oid = relation;
  select n.nspname into v_schema from pg_namespace n where n.oid = v_class.relnamespace;
  foreach v_at in array times loop
    continue when exists (select from sequin._partitions(relation) p where v_at >= p.from_at and v_at < p.to_at);
    v_from := to_timestamp(floor(date_part('epoch', v_at) / width) * width);
    v_to := v_from + make_interval(secs => width);
    -- Partitions of another width, or of the user's own, are as they are.
    select greatest(v_from, max(p.to_at) filter (where p.to_at <= v_at)), least(v_to, min(p.from_at) filter (where p.from_at > v_at))
      into v_from, v_to
    from sequin._partitions(relation) p;
    v_suffix := to_char(v_from, '"_"YYYYMMDD"_"HH24MISS');
    v_base := v_class.relname;
    while octet_length(v_base || v_suffix) > 60 loop
      v_base := left(v_base, -1);
    end loop;
    v_name := v_base || v_suffix;
    for v_try in 2..99 loop
      exit when to_regclass(format('%I.%I', v_schema, v_name)) is null;
      v_name := v_base || v_suffix || '_' || v_try;
    end loop;
    v_name := format('%I.%I', v_schema, v_name);
    execute format('create table %s (like %s including defaults including generated including constraints including storage)', v_name, v_table);
    execute format('alter table %s owner to %I', v_name, pg_get_userbyid(v_class.relowner));
    execute format('alter table %s attach partition %s for values from (%L) to (%L)', v_table, v_name, v_from, v_to);
  end loop;
end $$;

-- Ends partitions that are open, or yet to come, where those of a width do: what comes later is not to be kept as long as the
-- longest of them. Not those that hold something beyond it. 55P03 where somebody has the table for more than a second.
create or replace function sequin._shorten_partitions(relation oid, width bigint)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set lock_timeout = '1s'
as $$
declare
  v_table text := sequin._table_name(relation);
  v_name text;
  p record;
  v_has_later boolean;
begin
  for p in
    select o.*
    from (
      select o.*, to_timestamp((floor(date_part('epoch', greatest(o.from_at, now())) / width) + 1) * width) as end_at
      from sequin._partitions(relation) o) o
    where o.to_at > o.end_at
    order by o.from_at
  loop
    v_name := sequin._table_name(p.partition);
    execute format('lock table %s in access exclusive mode', v_table);
    execute format('select exists (select from %s e where e.committed_at >= $1)', v_name) into v_has_later using p.end_at;
    continue when v_has_later;
    execute format('alter table %s detach partition %s', v_table, v_name);
    execute format('alter table %s attach partition %s for values from (%s) to (%L)', v_table, v_name,
      case when p.from_at = '-infinity' then 'minvalue' else quote_literal(p.from_at) end, p.end_at);
  end loop;
exception when lock_not_available then
  raise lock_not_available using
    message = format('event table %s is locked, and partitions of it have to end earlier for this retention', v_table),
    hint = format('Try again. Who has it locked: select pid, mode from pg_locks where relation = %L::regclass;', v_table);
end $$;
