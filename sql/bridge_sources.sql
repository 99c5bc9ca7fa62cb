-- What the bridge calls for other sources than this database, beside what it calls for each.

create or replace function sequin.bridge_sources()
returns table (source_id int, name text, altered_at timestamptz, is_dropped boolean, may_give_up boolean)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select s.id, s.name, s.altered_at, s.dropped_at is not null,
         s.dropped_at is not null and (s.slot_name is null or s.dropped_at < clock_timestamp() - interval '1 day')
  from sequin.source s
  where s.conninfo is not null
  order by s.id
$$;
comment on function sequin.bridge_sources() is
'For the bridge, every second: the other sources that there are, and those that were dropped and are not cleared away yet;
may_give_up: it does not matter, or not any more, that one of those cannot be reached.';

-- The one way to a source's conninfo. It goes nowhere but into the connection.
create or replace function sequin.bridge_conninfo(source_id int)
returns text
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select s.conninfo from sequin.source s where s.id = $1
$$;
comment on function sequin.bridge_conninfo(int) is 'For the bridge: what a source is reached by; null for this database.';

-- Takes on a source, for as long as this session lasts: one bridge at a time.
create or replace function sequin.bridge_serve(source_id int)
returns boolean
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
  select pg_try_advisory_lock(sequin._source_lock(), $1)
$$;
comment on function sequin.bridge_serve(int) is
'For the bridge: takes another source on until its session ends. False where another bridge has it.';

-- Tables of another source that the bridge has something to do for.
create or replace function sequin.bridge_source_tables(source_id int)
returns table (
  table_id int, name text, relation_oid bigint, sort_columns text[], is_wanted boolean, is_captured boolean, error text,
  publication_rel_oid bigint
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select t.id, case when t.column_names is null then w.given_name else format('%I.%I', t.schema_name, t.table_name) end,
         t.relation_oid::bigint, coalesce(w.sort_columns, '{}'), w.is_wanted, t.published_at is not null, t.error,
         t.publication_rel_oid::bigint
  from sequin.source_table t
  cross join lateral (
    select min(st.given_name) as given_name, count(*) > 0 as is_wanted,
           array_agg(m.sort_column) filter (where m.sort_column is not null) as sort_columns
    from sequin.stream_table st
    join sequin.stream m on m.id = st.stream_id
    where st.table_id = t.id) w
  where t.source_id = $1 and (w.is_wanted or t.relation_oid is not null)
  order by t.id
$$;
comment on function sequin.bridge_source_tables(int) is
'For the bridge: the tables of another source that streams are made of, and those it still has to take out of the publication.';

-- A table has been found on its source, and may be streamed: who it is. Where it is one that is known already, under
-- another spelling or by another stream, it becomes that one.
create or replace function sequin.bridge_resolved(
  table_id int, relation_oid bigint, schema_name text, table_name text, key_columns text[], column_names text[],
  identity_columns text[]
)
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table sequin.source_table;
  v_known sequin.source_table;
begin
  -- create_stream, drop_stream and drop_source take it, too.
  perform pg_advisory_xact_lock(hashtextextended('sequin.create_stream', 7190235));
  select * into v_table from sequin.source_table t where t.id = bridge_resolved.table_id;
  select * into v_known from sequin.source_table t
  where t.source_id = v_table.source_id and t.relation_oid = bridge_resolved.relation_oid::oid and t.id <> v_table.id;
  if not found then
    update sequin.source_table t
    set relation_oid = bridge_resolved.relation_oid::oid, schema_name = bridge_resolved.schema_name,
        table_name = bridge_resolved.table_name, key_columns = bridge_resolved.key_columns,
        column_names = bridge_resolved.column_names, identity_columns = bridge_resolved.identity_columns
    where t.id = v_table.id;
    return v_table.id;
  end if;
  if exists (
       select from sequin.stream_table a join sequin.stream_table b on b.stream_id = a.stream_id
       where a.table_id = v_table.id and b.table_id = v_known.id) then
    perform sequin.bridge_table_error(v_table.id, format('the stream names table %I.%I twice', bridge_resolved.schema_name,
      bridge_resolved.table_name), 'Drop the stream, and make it anew with each table once.');
    return null;
  end if;
  -- A reader that has not been told of it while nobody wanted it must be told again.
  if not exists (select from sequin.stream_table st where st.table_id = v_known.id) then
    update sequin.source_table t set published_at = null where t.id = v_known.id;
  end if;
  update sequin.stream_table st set table_id = v_known.id where st.table_id = v_table.id;
  update sequin.consumer c set routes = array_replace(c.routes, v_table.id, v_known.id) where v_table.id = any (c.routes);
  update sequin.consumer_expression e set route_id = v_known.id where e.route_id = v_table.id;
  update sequin.side_route r set table_id = v_known.id where r.table_id = v_table.id;
  update sequin.backfill b set table_ids = array_replace(b.table_ids, v_table.id, v_known.id) where v_table.id = any (b.table_ids);
  delete from sequin.source_table t where t.id = v_table.id;
  return v_known.id;
end $$;
comment on function sequin.bridge_resolved(int, bigint, text, text, text[], text[], text[]) is
'For the bridge: which relation of another source a table is. Returns the id it goes by from here on; null: it is refused.';

-- A table is in its source''s publication: every change that is committed from here on is captured.
create or replace function sequin.bridge_published(table_id int, publication_rel_oid bigint)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source_table t
  set published_at = clock_timestamp(), publication_rel_oid = $2::oid, unpublished_lsn = null, error = null, error_hint = null
  where t.id = $1 and exists (select from sequin.stream_table st where st.table_id = t.id)
  returning true
$$;
comment on function sequin.bridge_published(int, bigint) is
'For the bridge: the changes of a table of another source are captured now. publication_rel_oid is its place there.';

-- As bridge_publication looks at the tables of this database: one that is out of the publication, or that it keeps some of back, is
-- missing changes, and once it is back, that is a gap.
create or replace function sequin.bridge_unpublished_at(table_id int, lsn text)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source_table t set unpublished_lsn = $2::pg_lsn where t.id = $1 and t.unpublished_lsn is null returning true
$$;
comment on function sequin.bridge_unpublished_at(int, text) is
'For the bridge: a table of another source was seen to be out of its publication, or in it in part, at this LSN.';

create or replace function sequin.bridge_republished(table_id int, publication_rel_oid bigint, lsn text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table sequin.source_table;
begin
  select * into v_table from sequin.source_table t
  where t.id = bridge_republished.table_id and t.published_at is not null
    and (t.publication_rel_oid <> bridge_republished.publication_rel_oid::oid or t.unpublished_lsn is not null)
  for update;
  if not found then
    return false;
  end if;
  insert into sequin.gap (source_id, from_lsn, to_lsn, reason)
  select s.id,
         coalesce(v_table.unpublished_lsn,
           (select p.applied_lsn from sequin.progress p where p.source_id = s.id order by p.step desc limit 1), lsn::pg_lsn),
         lsn::pg_lsn,
         format(case when v_table.publication_rel_oid = bridge_republished.publication_rel_oid::oid
             then 'table %I.%I was published in part by publication "%s" for a while: only changes of its own from then are missing'
             else 'table %I.%I was out of publication "%s" for a while: only its changes from then are missing' end,
           v_table.schema_name, v_table.table_name, s.publication_name)
  from sequin.source s where s.id = v_table.source_id;
  update sequin.source_table t
  set publication_rel_oid = bridge_republished.publication_rel_oid::oid, unpublished_lsn = null
  where t.id = v_table.id;
  return true;
end $$;
comment on function sequin.bridge_republished(int, bigint, text) is
'For the bridge: a table of another source is in its publication again, at this place. What it has missed is a gap.';

-- A table is out of its source''s publication. Its rows of the log keep its id.
create or replace function sequin.bridge_unpublished(table_id int)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source_table t
  set relation_oid = null, published_at = null, error = null, error_hint = null
  where t.id = $1 and not exists (select from sequin.stream_table st where st.table_id = t.id)
  returning true
$$;
comment on function sequin.bridge_unpublished(int) is 'For the bridge: a table of another source is not captured any more.';

-- Whether this database is a copy of the one that has captured a source: it must not touch what is that one's there.
create or replace function sequin.bridge_is_copy(source_id int)
returns boolean
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(s.home_oid <> d.oid, false)
  from sequin.source s, pg_database d
  where s.id = $1 and d.datname = current_database()
$$;
comment on function sequin.bridge_is_copy(int) is
'For the bridge: whether another database than this one has captured the source, as far as this one knows.';

create or replace function sequin.bridge_settle(source_id int, publication_row jsonb)
returns jsonb
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
begin
  update sequin.source s
  set home_oid = d.oid, publication_oid = coalesce(s.publication_oid, (bridge_settle.publication_row ->> 'oid')::oid),
      publication_row = coalesce(s.publication_row, bridge_settle.publication_row)
  from pg_database d
  where s.id = bridge_settle.source_id and d.datname = current_database()
    and (s.home_oid is distinct from d.oid or s.publication_oid is null or s.publication_row is null);
  return (select s.publication_row from sequin.source s where s.id = bridge_settle.source_id);
end $$;
comment on function sequin.bridge_settle(int, jsonb) is
'For the bridge, once it captures another source: it is this database that does, and by this publication there, unless it is
known by which. Returns the publication that it is captured by.';

-- As bridge_publication, of another source: what its publication is there is asked of it by the bridge.
create or replace function sequin.bridge_far_publication(source_id int, publication_row jsonb, lsn text)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
begin
  select * into v_source from sequin.source s where s.id = source_id;
  if publication_row is null then
    return format('publication "%s" was dropped', v_source.publication_name);
  elsif (publication_row ->> 'oid')::oid <> v_source.publication_oid then
    return format('publication "%s" was dropped, and made anew', v_source.publication_name);
  end if;
  return sequin._note_altered(v_source, publication_row, lsn::pg_lsn);
end $$;
comment on function sequin.bridge_far_publication(int, jsonb, text) is
'For the bridge: looks whether the publication of another source, as it is there at this LSN, is still the one that was made.
Returns what is wrong with it; null: nothing. One that was altered and put back becomes a gap.';

-- No table of a source is published: its publication is about to be made, or (is_other) it is another server than before,
-- with oids of its own, where each is looked up anew by its name. Which publication it is then is known once it is captured.
create or replace function sequin.bridge_unpublish_source(source_id int, is_other boolean)
returns bigint
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source s set publication_oid = null, publication_row = null, is_unreadable = false where s.id = $1;
  with unpublished as (
    update sequin.source_table t
    set published_at = null, relation_oid = case when not $2 then t.relation_oid end
    where t.source_id = $1 and t.relation_oid is not null
    returning 1)
  select count(*) from unpublished
$$;
comment on function sequin.bridge_unpublish_source(int, boolean) is
'For the bridge: no table of another source is captured any more, until each is published again. Returns how many were.';

create or replace function sequin.bridge_table_error(table_id int, error text, hint text)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source_table t
  set error = $2, error_hint = $3
  where t.id = $1 and (t.error, t.error_hint) is distinct from ($2, $3)
  returning true
$$;
comment on function sequin.bridge_table_error(int, text, text) is
'For the bridge: why a table of another source is not captured, and what to do; null: nothing is wrong.';

-- A relation of another source as the stream describes it now: keeps names and key up with renames and new keys.
create or replace function sequin.bridge_far_relation(
  source_id int, relation_oid bigint, schema_name text, table_name text, key_columns text[], column_names text[],
  identity_columns text[]
)
returns text[]
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table sequin.source_table;
begin
  select * into v_table from sequin.source_table t
  where t.source_id = bridge_far_relation.source_id and t.relation_oid = bridge_far_relation.relation_oid::oid;
  if column_names is null then
    return v_table.key_columns;
  end if;
  update sequin.source_table t
  set schema_name = bridge_far_relation.schema_name, table_name = bridge_far_relation.table_name,
      key_columns = bridge_far_relation.key_columns, column_names = bridge_far_relation.column_names,
      identity_columns = bridge_far_relation.identity_columns
  where t.id = v_table.id
    and (t.schema_name, t.table_name, t.key_columns, t.column_names, t.identity_columns) is distinct from
        (bridge_far_relation.schema_name, bridge_far_relation.table_name, bridge_far_relation.key_columns,
         bridge_far_relation.column_names, bridge_far_relation.identity_columns);
  return key_columns;
end $$;
comment on function sequin.bridge_far_relation(int, bigint, text, text, text[], text[], text[]) is
'For the bridge: a streamed relation of another source has these names now; column_names is null where it has been dropped
since. Returns the columns that name its rows.';

-- Where a source's server and slot stand. Little is not worth a write, which may be on that very server; but that what was noted
-- is confirmed now is, once. What is not confirmed yet is kept: it tells how long that has been so.
create or replace function sequin.bridge_sample_source(source_id int, current_lsn text, confirmed_lsn text, restart_lsn text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_last sequin.source_sample;
begin
  select * into v_last from sequin.source_sample n where n.source_id = bridge_sample_source.source_id order by n.sampled_at desc limit 1;
  if abs(pg_wal_lsn_diff(current_lsn::pg_lsn, v_last.current_lsn)) < 65536
     and abs(pg_wal_lsn_diff(confirmed_lsn::pg_lsn, v_last.confirmed_lsn)) < 65536
     and abs(pg_wal_lsn_diff(restart_lsn::pg_lsn, v_last.restart_lsn)) < 65536 then
    if v_last.current_lsn <= v_last.confirmed_lsn or confirmed_lsn::pg_lsn < v_last.current_lsn then
      return false;
    end if;
    current_lsn := confirmed_lsn; -- the little that came since is nothing to wait for
  end if;
  insert into sequin.source_sample (source_id, current_lsn, confirmed_lsn, restart_lsn)
  values (source_id, current_lsn::pg_lsn, confirmed_lsn::pg_lsn, restart_lsn::pg_lsn);
  delete from sequin.source_sample n
  where n.source_id = bridge_sample_source.source_id and n.sampled_at <= v_last.sampled_at
    and (n.current_lsn <= bridge_sample_source.confirmed_lsn::pg_lsn and n.sampled_at < clock_timestamp() - interval '5 minutes'
         or n.current_lsn > bridge_sample_source.current_lsn::pg_lsn); -- of a server that is no more
  return true;
end $$;
comment on function sequin.bridge_sample_source(int, text, text, text) is
'For the bridge, every few seconds: where the write-ahead log of a source is, and its slot. Returns whether that was worth noting.';

-- Forgets a source that was dropped, once what it had on the source is gone, or given up. A lock that is not had at once
-- is not waited for: false, and to be called again.
create or replace function sequin.bridge_forget_source(source_id int)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
begin
  if not exists (select from sequin.source s where s.id = $1 and s.dropped_at is not null) then
    return true;
  end if;
  perform sequin._drop_drafts(source_id, 'FFFFFFFF/FFFFFFFF');
  if exists (select from sequin.log_draft d where d.source_id = $1) then
    return false;
  end if;
  perform sequin._drop_segment(g.id) from sequin.log_segment g where g.source_id = $1;
  delete from sequin.tally y using sequin.source_table t where t.source_id = $1 and y.route_id = t.id;
  delete from sequin.gap g where g.source_id = $1;
  delete from sequin.progress p where p.source_id = $1;
  delete from sequin.source_sample n where n.source_id = $1;
  delete from sequin.dropped_log d using sequin.source_table t where t.source_id = $1 and d.route_id = t.id;
  perform sequin._forget_side_routes(t.id) from sequin.source_table t where t.source_id = $1;
  delete from sequin.source_table t where t.source_id = $1;
  delete from sequin.source s where s.id = $1;
  return true;
exception when lock_not_available then
  return false;
end $$;
comment on function sequin.bridge_forget_source(int) is
'For the bridge: removes what this database has of a source that was dropped. Returns whether that is done.';
