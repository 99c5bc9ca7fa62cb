-- Sources: other databases whose tables are streamed. What reaches them is the bridge; here is what it is told, and
-- what it has found.

-- Which advisory lock the bridge that serves a source holds in this database: beside the source's id.
create or replace function sequin._source_lock()
returns int
language sql
immutable
as $$
  select 7190235
$$;

-- Whether a bridge serves another source.
create or replace function sequin._is_served(source_id int)
returns boolean
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select exists (
    select from pg_locks l
    where l.locktype = 'advisory' and l.granted and l.objsubid = 2
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.classid = sequin._source_lock()::oid and l.objid = $1::oid)
$$;

-- Whether a bridge is at work on this database: it takes a source on within a second.
create or replace function sequin._has_bridge()
returns boolean
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select exists (
           select from sequin.source s join pg_replication_slots r on r.slot_name = s.slot_name and r.active where s.conninfo is null)
      or exists (select from sequin.source s where s.conninfo is not null and sequin._is_served(s.id))
$$;

-- The source of that name. 42704 if there is none.
create or replace function sequin._source(name text)
returns sequin.source
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
begin
  select * into v_source from sequin.source s where s.name = _source.name and s.dropped_at is null;
  if not found then
    perform sequin._refuse_unknown('source', name, array(select s.name from sequin.source s where s.dropped_at is null),
      'Make it with sequin.create_source(name, conninfo), or list those there are: select * from sequin.sources;');
  end if;
  return v_source;
end $$;

-- 22023 unless the text may be what a source is reached by. It is never quoted: it may hold a password.
create or replace function sequin._check_conninfo(name text, conninfo text)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
begin
  if conninfo is null or conninfo !~ '^(postgres(ql)?://\S+|env:[A-Za-z_][A-Za-z0-9_]*|(\s*[a-z_]+\s*=\s*(''([^''\\]|\\.)*''|([^''\\\s]|\\.)([^\\\s]|\\.)*))+\s*)$' then
    raise invalid_parameter_value using
      message = format('source "%s": conninfo is none', name),
      hint = 'It is a URL (postgres://user@host/database), libpq''s key=value pairs (host=… dbname=…), or env:NAME, which the '
        || 'bridge reads from its environment.';
  end if;
end $$;

create or replace function sequin.create_source(name text, conninfo text)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform sequin._require_owner('make a source');
  perform sequin._check_name('source', name);
  perform sequin._check_conninfo(name, conninfo);
  perform pg_advisory_xact_lock(hashtextextended('sequin.create_source', 7190235));
  if exists (select from sequin.source s where s.name = create_source.name) then
    raise duplicate_object using
      message = format('source "%s" exists already', name),
      hint = case when name = 'local' then 'It is this database. Give the other one another name.'
        else format('sequin.alter_source(%L, conninfo) has it reached in another way; sequin.drop_source(%1$L) drops it.', name) end;
  end if;
  insert into sequin.source (name, conninfo, database_id, altered_at)
  values (name, conninfo, md5(random()::text || clock_timestamp()::text)::uuid, clock_timestamp());
  update sequin.source s set publication_name = sequin._source_slot(s.id) where s.name = create_source.name;
  return 'created';
end $$;
comment on function sequin.create_source(text, text) is
'Makes another database a source, whose tables can be streamed: create_stream(…, source => name). The bridge connects
to it, makes a publication and a replication slot there, and captures it beside the others.

name      1 to 48 bytes, kept as given
conninfo  a URL, or libpq''s key=value pairs; env:NAME, as a whole or for a value in it (password=env:NAME), is read by the
          bridge from its environment, and is the way to keep a password out of this database, its dumps and its log

It needs PostgreSQL 12 or newer with wal_level = logical, and a role that may replicate, create in the database, and owns
the tables. What the bridge finds is in sequin.sources and sequin.health().

Returns created. Errors: 42710 the name is taken, 22023 bad name or conninfo, 42501 the caller is not the owner.';

create or replace function sequin.alter_source(name text, conninfo text)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
begin
  perform sequin._require_owner('alter a source');
  v_source := sequin._source(name);
  perform sequin._check_conninfo(name, conninfo);
  if v_source.conninfo is null then
    raise object_not_in_prerequisite_state using
      message = format('source "%s" is this database', name),
      hint = 'The bridge is told how to reach it: sequin bridge --database-url …';
  end if;
  update sequin.source s
  set conninfo = alter_source.conninfo, altered_at = clock_timestamp()
  where s.id = v_source.id and s.conninfo <> alter_source.conninfo;
  return case when found then 'altered' else 'unchanged' end;
end $$;
comment on function sequin.alter_source(text, text) is
'Has a source reached in another way: at another address, or with another password. It goes on where it is: the bridge
refuses a server that is not the one it has captured.

Returns altered or unchanged. Errors: 42704 unknown source, 22023 bad conninfo, 55000 it is this database, 42501 the
caller is not the owner.';

create or replace function sequin.drop_source(name text, if_exists boolean default false)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
begin
  perform sequin._require_owner('drop a source');
  if if_exists and not exists (select from sequin.source s where s.name = drop_source.name) then
    return 'absent';
  end if;
  v_source := sequin._source(name);
  if v_source.conninfo is null then
    raise object_not_in_prerequisite_state using
      message = format('source "%s" is this database', name),
      hint = 'sequin migrate --uninstall removes Sequin from it.';
  end if;
  perform pg_advisory_xact_lock(hashtextextended('sequin.create_stream', 7190235));
  if exists (select from sequin.stream s where s.source_id = v_source.id) then
    raise object_not_in_prerequisite_state using
      message = format('source "%s" has streams', name),
      hint = (select string_agg(format('select sequin.drop_stream(%L);', s.name), ' ' order by s.name)
              from sequin.stream s where s.source_id = v_source.id);
  end if;
  update sequin.source s
  set name = format('%s (dropped, %s)', v_source.name, v_source.id), dropped_at = clock_timestamp(), altered_at = clock_timestamp(),
      error = null, error_hint = null
  where s.id = v_source.id;
  return 'dropped';
end $$;
comment on function sequin.drop_source(text, boolean) is
'Drops a source that no stream needs any more, with its part of the change log. The name is free at once.

The bridge then drops the replication slot and the publication on the source. While it cannot reach it, health() has a
warning with the statement to run there instead; after a day it gives up, and a slot that is left makes that server keep
its write-ahead log: select pg_drop_replication_slot(''sequin_…''); drop publication sequin_…;

Returns dropped, or absent where if_exists is true and there was none.
Errors: 42704 unknown source, 55000 it has streams, or is this database, 42501 the caller is not the owner.';

-- What the slot and the publication of another source are called there: no other installation's are, not even those of
-- a clone of this database.
create or replace function sequin._source_slot(source_id int)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format('sequin_%s_%s', left(md5(s.database_id::text || d.oid), 8), $1)
  from sequin.source s, pg_database d
  where s.name = 'local' and d.datname = current_database()
$$;

-- Makes a stream of another source's tables. See create_stream. The bridge looks them up.
create or replace function sequin._create_far_stream(
  name text, tables text[], mode text, sort_column text, source text, if_not_exists boolean
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source := sequin._source(source);
  v_old sequin.stream;
  v_old_tables text[];
  v_stream_id int;
  v_table_id int;
  v_ident text[];
begin
  perform sequin._require_owner(format('stream tables of source "%s"', source));
  perform sequin._check_name('stream', name);
  perform sequin._check_mode(name, mode);
  for i in 1..cardinality(tables) loop
    begin
      v_ident := parse_ident(tables[i]);
    exception when invalid_parameter_value then
      v_ident := null;
    end;
    if v_ident is null or cardinality(v_ident) > 2 then
      raise invalid_parameter_value using
        message = format('stream "%s": "%s" is not a table''s name', name, tables[i]),
        hint = 'Write schema.table, and quote mixed case inside: ''{"\"Orders\""}''.';
    elsif tables[i] = any (tables[:i - 1]) then
      raise invalid_parameter_value using
        message = format('stream "%s" names table "%s" twice', name, tables[i]),
        hint = 'Name each table once.';
    end if;
  end loop;

  perform pg_advisory_xact_lock(hashtextextended('sequin.create_stream', 7190235));
  v_source := sequin._source(source); -- it may have been dropped meanwhile
  select * into v_old from sequin.stream s where s.name = _create_far_stream.name;
  if found then
    select array_agg(coalesce(st.given_name, format('%I.%I', t.schema_name, t.table_name)) order by st.position) into v_old_tables
    from sequin.stream_table st join sequin.source_table t on t.id = st.table_id
    where st.stream_id = v_old.id;
    if if_not_exists and v_old_tables = tables and v_old.mode = mode
       and v_old.sort_column is not distinct from sort_column and v_old.source_id = v_source.id then
      return 'unchanged';
    end if;
    raise duplicate_object using
      message = format('stream "%s" exists already%s', name, case when if_not_exists then ', and is another one' else '' end),
      hint = case when if_not_exists
        then format('It is %s of %s of source "%s", sorted by %s. Give this one another name, or sequin.drop_stream(%L) first.', v_old.mode,
               array_to_string(v_old_tables, ', '), (select s.name from sequin.source s where s.id = v_old.source_id),
               coalesce(quote_ident(v_old.sort_column), 'primary key'), name)
        else 'if_not_exists => true makes the same definition a no-op.' end;
  end if;

  insert into sequin.stream (name, source_id, mode, sort_column)
  values (name, v_source.id, mode, sort_column)
  returning id into v_stream_id;
  for i in 1..cardinality(tables) loop
    v_ident := parse_ident(tables[i]);
    insert into sequin.source_table (source_id, schema_name, table_name, key_columns)
    values (v_source.id, case when cardinality(v_ident) = 2 then v_ident[1] else '' end, v_ident[cardinality(v_ident)], '{}')
    returning id into v_table_id;
    insert into sequin.stream_table (stream_id, table_id, position, given_name)
    values (v_stream_id, v_table_id, i, tables[i]);
  end loop;
  raise warning using
    message = format('stream "%s": its changes are captured from when the bridge has found its tables on source "%s"', name, source),
    hint = format('%sselect state, error from sequin.streams where name = %L;',
      case when sequin._has_bridge() then '' else 'No bridge is running: sequin bridge --database-url … Then: ' end, name);
  return 'created';
end $$;

-- What consumers that are gone have had of a table's rows beside its log. The rows go with their segment.
create or replace function sequin._forget_side_routes(table_id int)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  delete from sequin.tally y using sequin.side_route r where r.table_id = $1 and y.route_id = r.id;
  delete from sequin.side_route r where r.table_id = $1
$$;

-- Lets go of tables of another source that no stream needs any more: the bridge takes them out of the publication.
create or replace function sequin._release_tables(source_id int)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  select sequin._forget_side_routes(t.id) from sequin.source_table t
  where t.source_id = $1 and t.column_names is null
    and exists (select from sequin.source s where s.id = $1 and s.conninfo is not null)
    and not exists (select from sequin.stream_table st where st.table_id = t.id);
  delete from sequin.source_table t
  where t.source_id = $1 and t.column_names is null
    and exists (select from sequin.source s where s.id = $1 and s.conninfo is not null)
    and not exists (select from sequin.stream_table st where st.table_id = t.id);
  update sequin.source_table t set published_at = null, error = null, error_hint = null
  where t.source_id = $1 and t.published_at is not null
    and not exists (select from sequin.stream_table st where st.table_id = t.id)
$$;

-- The tables of a stream of this database, where every one was dropped; null: there is one left.
create or replace function sequin._dropped_tables(stream_id int)
returns text
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select string_agg(format('%I.%I', t.schema_name, t.table_name), ', ' order by st.position)
  from sequin.stream_table st
  join sequin.source_table t on t.id = st.table_id
  join sequin.source s on s.id = t.source_id and s.conninfo is null
  left join pg_class c on c.oid = t.relation_oid
  where st.stream_id = $1
  having bool_and(c.oid is null)
$$;

-- 55000 for a stream that has no tables any more.
create or replace function sequin._refuse_dropped(stream sequin.stream)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_tables text := sequin._dropped_tables(stream.id);
begin
  if v_tables is not null then
    raise object_not_in_prerequisite_state using
      message = format('stream "%s" has no table any more: dropped were %s', stream.name, v_tables),
      hint = format('Drop it, with its consumers, and make it anew: select sequin.drop_stream(%1$L); select sequin.create_stream(%1$L, …);',
        stream.name);
  end if;
end $$;

-- How a stream stands: as the worst of its tables of another source. Local ones are active from the start, until the last
-- is dropped.
create or replace function sequin._stream_state(stream_id int, out state text, out error text)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select case when d.tables is not null or bool_or(t.error is not null) then 'error'
              when bool_or(t.id is not null and t.published_at is null) then 'pending' else 'active' end,
         coalesce('it has no table any more: dropped were ' || d.tables, string_agg(t.error, '; ' order by st.position))
  from (select sequin._dropped_tables($1) as tables) d
  left join sequin.stream_table st on st.stream_id = $1
  left join sequin.source_table t
    on t.id = st.table_id and exists (select from sequin.source s where s.id = t.source_id and s.conninfo is not null)
  group by d.tables
$$;

-- Where a consumer of another source's tables begins; null: not known yet. Every change that was committed there after
-- the call that made the consumer, by the source's clock, is its own: commits are logged in the order of their times, and
-- once one that is later than the call is there, all before it are.
create or replace function sequin._start_by_time(c sequin.consumer)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_source_id int := (select s.source_id from sequin.stream s where s.id = c.stream_id);
  v_start bigint;
begin
  if exists (select from sequin.source_table t where t.id = any (c.routes) and t.published_at is null)
     or not exists (
       select from sequin.source_table t
       cross join lateral (
         select l.committed_at from sequin.log l where l.route_id = t.id order by l.seq desc limit 1) l
       where t.source_id = v_source_id and l.committed_at > c.start_time) then
    return null;
  end if;
  select min(l.seq) - 1 into v_start
  from unnest(c.routes) r(id)
  cross join lateral (
    select l.seq from sequin.log l
    where l.route_id = r.id and l.seq > c.start_base and l.committed_at > c.start_time
    order by l.seq
    limit 1) l;
  return coalesce(v_start, (
    select p.last_seq from sequin.progress p where p.source_id = v_source_id order by p.step desc limit 1));
end $$;
