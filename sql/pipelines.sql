-- Pipelines: each change of a table, into an event log table of the user's. How they write is in write_pipelines.sql.

-- The pipeline of that name. 42704 if there is none.
create or replace function sequin._pipeline(name text)
returns sequin.pipeline
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_pipeline sequin.pipeline;
begin
  select * into v_pipeline from sequin.pipeline p where p.name = _pipeline.name;
  if not found then
    perform sequin._refuse_unknown('pipeline', name, array(select p.name from sequin.pipeline p),
      'Make it with sequin.create_pipeline(name, source_table, event_table), or list those there are: select * from sequin.pipelines;');
  end if;
  return v_pipeline;
end $$;

-- The advisory lock of a pipeline: whoever writes for it holds it, and whoever changes it.
create or replace function sequin._pipeline_key(pipeline_id int)
returns bigint
language sql
immutable
as $$
  select pg_catalog.hashtextextended(pipeline_id::text, 7190237)
$$;

-- A pipeline as it is, once nobody writes for it; nobody does before the caller commits.
create or replace function sequin._hold_pipeline(name text)
returns sequin.pipeline
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_pipeline sequin.pipeline := sequin._pipeline(name);
  v_void text;
begin
  v_void := pg_advisory_xact_lock(sequin._pipeline_key(v_pipeline.id));
  return sequin._pipeline(name);
end $$;

-- Checks a pipeline's options, whether it is about to be created or altered. 22023 names the bad one.
create or replace function sequin._check_pipeline(p sequin.pipeline)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if p.actions is null or cardinality(p.actions) = 0 or not p.actions <@ '{insert,update,delete,truncate}'::text[] then
    raise invalid_parameter_value using
      message = format('pipeline "%s": actions is %s', p.name, coalesce(p.actions::text, 'null')),
      hint = 'One or more of insert, update, delete, truncate.';
  elsif p.retention < '1 second' or p.retention > '1000 years' then
    raise invalid_parameter_value using
      message = format('pipeline "%s": retention is %s', p.name, p.retention),
      hint = 'An interval of a second to 1000 years: how long events are kept; left out: for good.';
  end if;
end $$;

-- Checks who asks, and what is asked, of the event table: 42501 unless the caller may write to it, and, where old
-- partitions are dropped, owns it.
create or replace function sequin._check_event_table(p sequin.pipeline, source_relation oid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := sequin._caller();
  v_name text := sequin._table_name(p.event_relation);
  v_owner oid := (select c.relowner from pg_class c where c.oid = p.event_relation);
  v_problem record;
begin
  select * into v_problem
  from sequin._event_table_problem(p.event_relation, p.retention is not null, sequin._left_null(p.actions, source_relation),
    case when p.id is not null then p.name end);
  if found then
    raise exception using errcode = v_problem.code, message = v_problem.message, hint = v_problem.hint;
  end if;
  if not has_table_privilege(v_caller, p.event_relation, 'insert') then
    raise insufficient_privilege using
      message = format('role %I may not insert into event table %s', v_caller, v_name),
      hint = format('grant insert on %s to %I;', v_name, v_caller);
  elsif p.retention is not null and not pg_has_role(v_caller, v_owner, 'usage') then
    raise insufficient_privilege using
      message = format('event table %s is not owned by %I, and a retention drops its old partitions', v_name, v_caller),
      hint = format('Leave retention out, or let %I make the pipeline.', pg_get_userbyid(v_owner));
  end if;
  perform sequin._check_event_rights(p.event_relation);
end $$;

-- 22023 if what a pipeline writes would come back to it, by itself or by way of others.
create or replace function sequin._check_circle(p sequin.pipeline, source_relation oid)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
       with recursive onward(relation) as (
         select p.event_relation
         union
         select n.event_relation
         from onward o
         join sequin.source_table t on t.relation_oid = o.relation
         join sequin.source s on s.id = t.source_id and s.conninfo is null
         join sequin.pipeline n on n.table_id = t.id
       )
       select from onward o where o.relation = source_relation) then
    raise invalid_parameter_value using
      message = format('pipeline "%s" would capture what it writes itself', p.name),
      hint = 'Give it another event table.';
  end if;
end $$;

-- Makes a pipeline. See create_pipeline, which has resolved the names as its caller sees them. Null: the event table is
-- to be made first, and then it is called again.
create or replace function sequin._create_pipeline(
  name text, source_relation oid, event_relation oid, event_schema text, event_name text, actions text[], filter text,
  retention interval, if_not_exists boolean, filter_views oid[]
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
  v_old sequin.pipeline;
  v_new sequin.pipeline;
  v_relation oid;
  v_has_tables boolean;
begin
  perform sequin._check_name('pipeline', name);
  v_new.name := name;
  v_new.filter := filter;
  v_new.retention := retention;
  v_new.actions := actions;
  perform sequin._check_pipeline(v_new);
  v_new.actions := array(select distinct a.action from unnest(actions) a(action) order by a.action);
  perform sequin._require_select(source_relation);
  select * into v_source from sequin.source s where s.conninfo is null;

  -- Two that make the same pipeline at once: the second waits here, and then finds it made.
  perform pg_advisory_xact_lock(hashtextextended('sequin.create_pipeline', 7190235));
  select * into v_old from sequin.pipeline p where p.name = _create_pipeline.name;
  if found then
    v_has_tables := exists (select from sequin.source_table t
                            where t.id = v_old.table_id and t.source_id = v_source.id and t.relation_oid = source_relation)
      and coalesce(v_old.event_relation = event_relation or (v_old.event_schema, v_old.event_name) = (event_schema, event_name), false);
    if if_not_exists and v_has_tables
       and (v_old.actions, v_old.filter, v_old.retention) is not distinct from (v_new.actions, v_new.filter, v_new.retention) then
      return 'unchanged';
    end if;
    raise duplicate_object using
      message = format('pipeline "%s" exists already%s', name, case when if_not_exists then ', and is another one' else '' end),
      hint = case when if_not_exists and not v_has_tables
        then format('select sequin.drop_pipeline(%L); and make it anew, or give this one another name: what alter_pipeline changes are not '
          'its tables.', name)
        when if_not_exists
        then format('select * from sequin.pipelines where name = %L; shows it, sequin.alter_pipeline(%L, …) changes it.', name, name)
        else 'if_not_exists => true makes the same definition a no-op.' end;
  end if;
  perform sequin._check_table(source_relation);
  if event_relation is null then
    return null;
  end if;
  select c.oid, n.nspname, c.relname into v_new.event_relation, v_new.event_schema, v_new.event_name
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where c.oid = _create_pipeline.event_relation;
  perform sequin._check_circle(v_new, source_relation);
  perform sequin._check_event_table(v_new, source_relation);

  perform sequin._publish(v_source, source_relation);
  insert into sequin.source_table (source_id, relation_oid, schema_name, table_name, key_columns)
  select v_source.id, c.oid, n.nspname, c.relname, sequin._key_columns(c.oid)
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where c.oid = source_relation
  on conflict (source_id, relation_oid) do update
    set schema_name = excluded.schema_name, table_name = excluded.table_name, key_columns = excluded.key_columns
  returning id into v_new.table_id;
  perform sequin._note_published(v_source, source_relation);
  if retention is not null then
    perform sequin._make_partitions(event_relation, sequin._partition_width(retention), array[now()]);
  end if;
  v_new.start_lsn := pg_current_wal_insert_lsn();
  v_new.start_base := coalesce(
    (select p.last_seq from sequin.progress p where p.source_id = v_source.id order by p.step desc limit 1), 0);
  insert into sequin.pipeline (
    name, table_id, event_relation, event_schema, event_name, actions, filter, retention, start_lsn, start_base)
  values (
    v_new.name, v_new.table_id, v_new.event_relation, v_new.event_schema, v_new.event_name, v_new.actions, v_new.filter,
    v_new.retention, v_new.start_lsn, v_new.start_base)
  returning id into v_new.id;
  perform sequin._keep_pipeline_filter(v_new, filter_views);

  if v_new.actions && '{update,delete}' then
    for v_relation in
      with recursive down(oid) as (
        select source_relation
        union all
        select i.inhrelid from down join pg_inherits i on i.inhparent = down.oid
      )
      -- Of a partitioned table, the root says what of a partition's old row is sent.
      select c.oid from down d join pg_class c on c.oid = d.oid
      where c.relreplident <> 'f' and (c.relkind = 'r' or c.oid = source_relation)
      order by c.oid
    loop
      raise warning using
        message = format('old values of %s: only its key, as its replica identity is not full', sequin._table_name(v_relation)),
        hint = sequin._old_values_hint(v_relation);
    end loop;
  end if;
  if not exists (select from pg_replication_slots s where s.slot_name = v_source.slot_name) then
    raise warning using
      message = 'no bridge has run on this database yet: changes are captured from when one first starts',
      hint = 'sequin bridge --database-url …';
  end if;
  return 'created';
end $$;

create or replace function sequin.create_pipeline(
  name text,
  source_table text,
  event_table text,
  actions text[] default '{insert,update,delete}',
  filter text default null,
  retention interval default null,
  if_not_exists boolean default false
)
returns text
language plpgsql
as $$
-- Not a definer and no search_path of its own: names are looked up as the caller's regclass would, and a table that is
-- made is the caller's.
declare
  v_source pg_catalog.oid;
  v_event pg_catalog.oid;
  v_path pg_catalog.text[];
  v_views pg_catalog.oid[];
  v_result pg_catalog.text;
begin
  if source_table is null then
    raise invalid_parameter_value using
      message = pg_catalog.format('pipeline "%s": source_table is null', name),
      hint = 'Name the table whose changes it writes.';
  end if;
  v_source := sequin._relation(pg_catalog.format('pipeline "%s"', name), source_table);
  if event_table is null then
    raise invalid_parameter_value using
      message = pg_catalog.format('pipeline "%s" has no event table', name),
      hint = 'Name one: where there is none of that name, it is made.';
  end if;
  begin
    v_path := pg_catalog.parse_ident(event_table);
  exception when invalid_parameter_value then
    null;
  end;
  if v_path is null or pg_catalog.cardinality(v_path) > 2
     or pg_catalog.octet_length(v_path[pg_catalog.cardinality(v_path)]) > 63 then
    raise invalid_parameter_value using
      message = pg_catalog.format('pipeline "%s": event table "%s": this is no name of a table', name, event_table),
      hint = 'Name it as table or schema.table, each of 63 bytes at most, and quote what is not plain lower case: ''"Odd Table"''.';
  elsif pg_catalog.cardinality(v_path) = 1 then
    v_path := array[pg_catalog.current_schema()::pg_catalog.text, v_path[1]];
  end if;
  v_event := pg_catalog.to_regclass(event_table);
  if v_event is null and v_path[1] in ('sequin', 'pg_catalog', 'information_schema', 'pg_temp') then
    raise invalid_parameter_value using
      message = pg_catalog.format('pipeline "%s": event table "%s" would be in a schema that is not yours', name, event_table),
      hint = 'Name a table of your own.';
  elsif v_event is null and (v_path[1] is null or pg_catalog.to_regnamespace(pg_catalog.quote_ident(v_path[1])) is null) then
    raise undefined_object using
      message = pg_catalog.format('pipeline "%s": event table "%s": %s', name, event_table,
        case when v_path[1] is null then 'no schema of search_path exists' else pg_catalog.format('schema "%s" does not exist', v_path[1]) end),
      hint = case when v_path[1] is null then 'Write schema.table.' else pg_catalog.format('create schema %I;', v_path[1]) end;
  end if;
  v_views := sequin._parse(pg_catalog.format('pipeline "%s": filter', name), array[v_source], 'filter', filter);
  v_result := sequin._create_pipeline(name, v_source, v_event, v_path[1], v_path[2], actions, filter, retention,
    coalesce(if_not_exists, false), v_views);
  if v_result is null then
    -- Meanwhile somebody else may have made it: whoever is here is alone.
    if pg_catalog.to_regclass(pg_catalog.format('%I.%I', v_path[1], v_path[2])) is null then
      execute sequin._event_table_sql(v_path[1], v_path[2], retention is not null);
    end if;
    v_event := pg_catalog.to_regclass(pg_catalog.format('%I.%I', v_path[1], v_path[2]));
    v_result := sequin._create_pipeline(name, v_source, v_event, v_path[1], v_path[2], actions, filter, retention, false, v_views);
  end if;
  perform sequin._drop_views(v_views);
  return v_result;
end $$;
comment on function sequin.create_pipeline(text, text, text, text[], text, interval, boolean) is
'Writes each change of a table into an event log table, exactly once, in commit order: every change whose commit follows
this call, and none before it.

name           1 to 48 bytes, kept as given
source_table   whose changes; looked up by search_path, as regclass does
event_table    where to; made, and the caller''s, if it does not exist; checked column by column if it does, and may have
               more columns, which fill themselves
actions        which of insert, update, delete, truncate are written
filter         an SQL boolean over new, old, action, table_name and committed_at, as create_consumer''s: only changes that it
               lets through are written. One that it fails on holds the pipeline back
retention      how long events are kept at least, a second to 1000 years: the event table is partitioned by committed_at
               then, and old partitions are dropped; null: for good
if_not_exists  the same definition again is a no-op

An event is (id, seq, source_database_id, source_table_oid, source_table_schema, source_table_name, record_pk, record,
changes, action, committed_at, inserted_at). record is the new row, for a delete the old one; changes are the old values
of the columns that an update changed, which takes replica identity full. seq ascends in commit order. Without replica
identity full an update''s record leaves out large (TOASTed) columns that it did not change, as the server does not send
them, and nothing in the event says so; with it they are there.

The bridge writes with the rights of this schema''s owner, who must have those of the event table''s. The table''s triggers
fire, with search_path pg_catalog; where its owner has fewer rights than the schema''s, it must have none, nor anything
else that runs what its owner wrote. What goes wrong holds back only this pipeline: sequin.pipeline_status and
sequin.health() say what it is, and it goes on where it stopped when that is mended.

Returns created or unchanged. Needs SELECT on the source table, INSERT on an event table that exists, and to own it where
there is a retention. Waits for transactions that are writing to a source table that was not published before.

Errors: 42704 unknown table or schema, 42710 the name is taken, 22023 bad argument, or not a table, 42501 no right, 55000
a source table that cannot be streamed, or an event table that does not fit; 42703 an event table without one of the
columns, 42804 with one of another type; 42601, 42703, 42804 a filter that is
none; 0A000 a partitioned source table on PostgreSQL 12. The hint mends it.';

-- Keeps what a pipeline's filter was compiled to.
create or replace function sequin._keep_pipeline_filter(p sequin.pipeline, views oid[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from sequin.pipeline_expression e where e.pipeline_id = p.id;
  if p.filter is not null then
    insert into sequin.pipeline_expression (pipeline_id, compiled, inlined, is_typed, is_whole, uses_new, uses_old, columns, types, others)
    select p.id, e.compiled, e.inlined, e.is_typed, e.is_whole, e.uses_new, e.uses_old, e.columns, e.types, e.others
    from sequin.source_table t
    cross join lateral sequin._compile(format('pipeline "%s": filter', p.name), array[t.relation_oid], 'filter', p.filter, views) e
    where t.id = p.table_id;
  end if;
end $$;

-- The table of a pipeline, as _parse wants it.
create or replace function sequin._pipeline_relations(name text)
returns oid[]
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(select t.relation_oid from sequin.source_table t where t.id = (sequin._pipeline(name)).table_id);
end $$;

-- See alter_pipeline, which has parsed the filter as its caller sees the names in it.
create or replace function sequin._alter_pipeline(
  name text, actions text[], filter text, retention interval, filter_views oid[]
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_old sequin.pipeline := sequin._hold_pipeline(name);
  v_new sequin.pipeline := v_old;
begin
  perform sequin._require_reader(null, t.relation_oid) from sequin.source_table t where t.id = v_old.table_id;
  if actions is not null then
    v_new.actions := array(select distinct a.action from unnest(actions) a(action) order by a.action);
  end if;
  v_new.filter := nullif(coalesce(filter, v_old.filter), '');
  v_new.retention := case when retention = '0' then null else coalesce(retention, v_old.retention) end;
  perform sequin._check_pipeline(v_new);
  if v_new.retention is distinct from v_old.retention and v_new.retention is not null then
    v_new.event_relation := sequin._event_table(v_old);
    perform sequin._check_event_table(v_new, (select t.relation_oid from sequin.source_table t where t.id = v_old.table_id));
  end if;
  -- A filter that is given again is compiled again: what it names may be of another type now.
  if (v_new.actions, v_new.filter, v_new.retention) is not distinct from (v_old.actions, v_old.filter, v_old.retention)
     and coalesce(filter, '') = '' then
    return 'unchanged';
  end if;
  update sequin.pipeline p
  set actions = v_new.actions, filter = v_new.filter, retention = v_new.retention, changed_at = clock_timestamp()
  where p.id = v_old.id;
  if v_new.retention is not null and (v_old.retention is null or v_new.retention < v_old.retention) then
    perform sequin._shorten_partitions(v_new.event_relation, sequin._partition_width(v_new.retention));
  end if;
  if filter is not null then
    perform sequin._keep_pipeline_filter(v_new, filter_views);
  end if;
  return 'altered';
end $$;

create or replace function sequin.alter_pipeline(
  name text, actions text[] default null, filter text default null, retention interval default null
)
returns text
language plpgsql
as $$
-- As create_pipeline.
declare
  v_views pg_catalog.oid[];
  v_result pg_catalog.text;
begin
  if filter operator(pg_catalog.<>) '' then
    v_views := sequin._parse(pg_catalog.format('pipeline "%s": filter', name), sequin._pipeline_relations(name), 'filter', filter);
  end if;
  v_result := sequin._alter_pipeline(name, actions, filter, retention, v_views);
  perform sequin._drop_views(v_views);
  return v_result;
end $$;
comment on function sequin.alter_pipeline(text, text[], text, interval) is
'Changes a pipeline''s options, from the next change that it writes on; what is null stays as it is, filter => '''' takes the
filter away, and retention => ''0'' means that events are kept for good. A retention needs an event table that is partitioned by range (committed_at), and
its owner; where it is given or shortened, partitions that are open end where new ones do, for which the table is locked for a
moment. A pipeline in error is tried again at once.

Returns altered or unchanged.
Errors: 42704 unknown pipeline, 22023 bad argument, 42501 no right, 55000 the event table is not partitioned,
55P03 somebody has it locked, 42601, 42703, 42804 a filter that is none.';

create or replace function sequin.drop_pipeline(name text, if_exists boolean default false)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_pipeline sequin.pipeline;
begin
  if if_exists and not exists (select from sequin.pipeline p where p.name = drop_pipeline.name) then
    return 'absent';
  end if;
  v_pipeline := sequin._hold_pipeline(name);
  perform sequin._require_reader(null, t.relation_oid) from sequin.source_table t where t.id = v_pipeline.table_id;
  delete from sequin.pipeline p where p.id = v_pipeline.id;
  delete from sequin.pipeline_progress p where p.pipeline_id = v_pipeline.id;
  perform sequin._unpublish(t.source_id) from sequin.source_table t where t.id = v_pipeline.table_id;
  return 'dropped';
end $$;
comment on function sequin.drop_pipeline(text, boolean) is
'Drops a pipeline, and keeps its event table as it is. A source table that nothing else needs is not captured any more.

Returns dropped, or absent where if_exists is true and there was none. Errors: 42704 unknown pipeline, 42501 no right to
read its table.';

create or replace function sequin.pause_pipeline(name text)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_pipeline sequin.pipeline := sequin._hold_pipeline(name);
begin
  update sequin.pipeline p set paused_at = clock_timestamp(), changed_at = clock_timestamp()
  where p.id = v_pipeline.id and p.paused_at is null;
  return case when found then 'paused' else 'unchanged' end;
end $$;
comment on function sequin.pause_pipeline(text) is
'From now on nothing is written to the pipeline''s event table, and nothing is lost: the log is kept for it.

Returns paused or unchanged. Errors: 42704 unknown pipeline.';

create or replace function sequin.resume_pipeline(name text)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_pipeline sequin.pipeline := sequin._pipeline(name);
begin
  update sequin.pipeline p set paused_at = null, changed_at = clock_timestamp()
  where p.id = v_pipeline.id and (p.paused_at is not null or p.error is not null);
  return case when found then 'resumed' else 'unchanged' end;
end $$;
comment on function sequin.resume_pipeline(text) is
'Ends a pause; a pipeline in error is tried again at once. It goes on where it stopped.

Returns resumed or unchanged. Errors: 42704 unknown pipeline.';

-- How far a pipeline is behind. One row, as of _standing.
create or replace function sequin._pipeline_standing(p sequin.pipeline)
returns table (
  is_started boolean, pending bigint, written bigint, last_seq bigint, written_at timestamptz, oldest_at timestamptz, oldest_lsn pg_lsn
)
language sql
stable
rows 1
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
  select v.step is not null,
         case when o.seq is null then 0 else greatest(y.total - coalesce(v.passed, sequin._total(p.table_id, p.start_base)), 1) end,
         coalesce(v.written, 0), v.seq, case when v.written > 0 then v.written_at end,
         o.committed_at, (o.metadata ->> 'commit_lsn')::pg_lsn
  from (select) one
  left join lateral (
    select v.* from sequin.pipeline_progress v where v.pipeline_id = p.id order by v.step desc limit 1) v on true
  left join lateral (
    select y.total from sequin.tally y where y.route_id = p.table_id order by y.seq desc limit 1) y on true
  left join lateral (
    select l.seq, l.committed_at, l.metadata from sequin.log l
    where l.route_id = p.table_id and l.seq > coalesce(v.seq, p.start_base)
    order by l.seq
    limit 1) o on true
$$;

create or replace view sequin.pipelines as
select p.name, format('%I.%I', t.schema_name, t.table_name) as source_table,
       coalesce((select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
                 where c.oid = p.event_relation), format('%I.%I', p.event_schema, p.event_name)) as event_table,
       p.actions, p.filter, p.retention,
       case when p.paused_at is not null then 'paused'
            when p.error is not null or not exists (select from pg_class c where c.oid = t.relation_oid) then 'error'
            when not exists (select from sequin.pipeline_progress v where v.pipeline_id = p.id) then 'starting' else 'active' end as state,
       p.paused_at, p.created_at
from sequin.pipeline p
join sequin.source_table t on t.id = p.table_id;
comment on view sequin.pipelines is
'Change capture pipelines and their options. state: starting (it waits for the log to pass the moment it was made), active,
paused, or error: sequin.pipeline_status says which.';

create or replace view sequin.pipeline_status as
select p.name, v.source_table, v.event_table, v.state,
       case when pg_is_in_recovery() then null
            else greatest(pg_wal_lsn_diff(pg_current_wal_lsn(), coalesce(d.oldest_lsn, r.confirmed_flush_lsn, r.applied_lsn)), 0)::bigint
       end as lag_bytes,
       coalesce(extract(epoch from clock_timestamp() - d.oldest_at), 0)::float8 as lag_seconds,
       d.pending, d.written as rows_written, d.last_seq, d.written_at as last_written_at,
       coalesce(p.error, case when k.oid is null then format('table %s was dropped, and the pipeline has no more of it', v.source_table) end)
         as error,
       coalesce(p.error_code, case when k.oid is null then '42P01' end) as error_code,
       coalesce(p.error_hint, case when k.oid is null
         then format('select sequin.drop_pipeline(%L); and make it anew, if the table is back.', p.name) end) as error_hint,
       p.failed_at, p.retention_error, d.oldest_at as oldest_pending_at
from sequin.pipeline p
join sequin.pipelines v on v.name = p.name
join sequin.source_table t on t.id = p.table_id
left join pg_class k on k.oid = t.relation_oid
cross join lateral sequin._pipeline_standing(p) d
left join lateral (
  select g.applied_lsn, s.confirmed_flush_lsn
  from sequin.progress g
  join sequin.source o on o.id = g.source_id
  left join pg_replication_slots s on s.slot_name = o.slot_name and o.conninfo is null
  where g.source_id = t.source_id
  order by g.step desc
  limit 1) r on true;
comment on view sequin.pipeline_status is
'How each pipeline stands. pending: changes of its table that it has yet to come to; lag_seconds: the age of the oldest of
them; lag_bytes: the WAL since then; rows_written: events so far; error, with its SQLSTATE and what to do: why it does not
go on, null while it does; retention_error: why old partitions are not dropped.';
