-- What the bridge calls. It reads the slot, and writes the log with COPY; everything else it does here.

-- Where a source stands: where its slot is, how far its log has got, and what start-up compares with the server.
create or replace function sequin.bridge_source(name text)
returns table (
  source_id int, slot_name text, publication_name text, system_identifier text, timeline int, database_oid bigint,
  step bigint, applied_lsn text, horizon_lsn text, last_seq bigint
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select s.id, coalesce(s.slot_name, case when s.conninfo is null then 'sequin_' || d.oid else s.publication_name end), s.publication_name, s.system_identifier, s.timeline,
         s.database_oid::bigint, p.step, p.applied_lsn::text, p.horizon_lsn::text, p.last_seq
  from sequin.source s
  join pg_database d on d.datname = current_database()
  left join lateral (
    select * from sequin.progress p where p.source_id = s.id order by p.step desc limit 1) p on true
  where s.name = $1
$$;
comment on function sequin.bridge_source(text) is
'For the bridge: a source, its slot, and how far its log has got. step is null until a bridge first starts on it.';

-- Takes a source over: from here on the bridge that had it before can commit nothing more. The caller holds the slot.
-- Opens the first segment of the log, and remembers what server and timeline this is.
create or replace function sequin.bridge_claim(
  source_id int, slot_name text, system_identifier text, timeline int, database_oid bigint, start_lsn text
)
returns table (step bigint, applied_lsn text, last_seq bigint, segment int)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_last sequin.progress;
  v_segment int;
begin
  -- One claim at a time; and a batch that the other bridge is committing is waited for, and counts.
  lock table sequin.log_segment in share row exclusive mode;
  loop
    select * into v_last from sequin.progress p where p.source_id = bridge_claim.source_id order by p.step desc limit 1;
    select max(s.id) filter (where s.id <= v_last.last_seq >> 32 or v_last.last_seq is null) into v_segment
    from sequin.log_segment s where s.source_id = bridge_claim.source_id and s.backfill_id is null;
    v_segment := coalesce(v_segment, sequin._open_segment(source_id));
    v_last.step := coalesce(v_last.step, 0) + 1;
    -- A new slot begins where it begins: the first of all, or one after a gap that was accepted.
    update sequin.gap g set to_lsn = start_lsn::pg_lsn
    where g.source_id = bridge_claim.source_id and g.consumer_id is null and g.to_lsn is null
      and g.from_lsn = v_last.applied_lsn and g.accepted_at is not null;
    if found or v_last.applied_lsn is null then
      v_last.applied_lsn := start_lsn::pg_lsn;
      v_last.horizon_lsn := start_lsn::pg_lsn;
    end if;
    v_last.last_seq := greatest(v_last.last_seq, v_segment::bigint << 32);
    insert into sequin.progress (source_id, step, applied_lsn, horizon_lsn, last_seq)
    values (bridge_claim.source_id, v_last.step, v_last.applied_lsn, v_last.horizon_lsn, v_last.last_seq)
    on conflict do nothing;
    exit when found;
  end loop;
  update sequin.source s
  set slot_name = bridge_claim.slot_name, system_identifier = bridge_claim.system_identifier,
      timeline = bridge_claim.timeline, database_oid = bridge_claim.database_oid::oid, error = null, error_hint = null
  where s.id = bridge_claim.source_id
    and (s.slot_name, s.system_identifier, s.timeline, s.database_oid, s.error) is distinct from
        (bridge_claim.slot_name, bridge_claim.system_identifier, bridge_claim.timeline, bridge_claim.database_oid::oid, null);
  return query select v_last.step, v_last.applied_lsn::text, v_last.last_seq, v_segment;
end $$;
comment on function sequin.bridge_claim(int, text, text, int, bigint, text) is
'For the bridge, once it holds the slot: takes the source over from any other bridge.';

-- Ends a batch, in the transaction that wrote its rows: how far the log has got, and how many messages each table has
-- had. 55006 where another bridge has taken over.
create or replace function sequin.bridge_commit(
  source_id int, step bigint, applied_lsn text, last_seq bigint, routes int[], counts bigint[]
)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
begin
  insert into sequin.progress (source_id, step, applied_lsn, horizon_lsn, last_seq)
  values (source_id, step + 1, applied_lsn::pg_lsn, applied_lsn::pg_lsn, last_seq)
  on conflict do nothing;
  if not found then
    raise object_in_use using
      message = 'another bridge has taken over',
      hint = 'This one stands by until that one ends.';
  end if;
  insert into sequin.tally (route_id, seq, total)
  select r.id, bridge_commit.last_seq, r.count + coalesce(
           (select t.total from sequin.tally t where t.route_id = r.id order by t.seq desc limit 1), 0)
  from unnest(routes, counts) r(id, count);
  -- Consumers that were made since the last batch begin now, where this one has passed the moment.
  perform sequin._start(c.id)
  from sequin.consumer c
  join sequin.stream s on s.id = c.stream_id
  where c.start_seq is null and c.history_id is null and s.source_id = bridge_commit.source_id
    and case when c.start_time is null then c.start_lsn < bridge_commit.applied_lsn::pg_lsn
             else sequin._start_by_time(c) is not null end;
  return step + 1;
end $$;
comment on function sequin.bridge_commit(int, bigint, text, bigint, int[], bigint[]) is
'For the bridge: ends a batch of the log in the transaction that wrote it. Returns the step to give next time.';

-- The bell of a step is held by this session, from before the step is committed; and once it is, that of the last one,
-- which woke who waited, is let go. Whoever may have taken it before, nothing waits for that: then there is none. Which
-- are held this session has in settings of its own: two at most, an even one and an odd one.
create or replace function sequin.bridge_hold_bell(source_id int, step bigint)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if not pg_try_advisory_lock(sequin._bell(source_id, step)) then
    return false;
  end if;
  perform set_config('sequin.bell_' || step % 2, step::text, false);
  return true;
end $$;
comment on function sequin.bridge_hold_bell(int, bigint) is
'For the bridge: who has seen nothing at this step waits for this session, until bridge_ring or its end. Returns whether it
has the bell.';

create or replace function sequin.bridge_ring(source_id int, step bigint)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(current_setting('sequin.bell_' || step % 2, true) = step::text, false) and pg_advisory_unlock(sequin._bell(source_id, step));
end $$;
comment on function sequin.bridge_ring(int, bigint) is
'For the bridge, after the commit of the step that follows: who waits for this one''s bell goes on. Returns whether it had
the bell.';

-- Says, before the slot is confirmed so far, that nothing was logged up to there: at start-up a slot that is further
-- than the log has got, and further than this, has lost something.
create or replace function sequin.bridge_horizon(source_id int, step bigint, horizon_lsn text)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into sequin.progress (source_id, step, applied_lsn, horizon_lsn, last_seq)
  select p.source_id, p.step + 1, p.applied_lsn, bridge_horizon.horizon_lsn::pg_lsn, p.last_seq
  from sequin.progress p
  where p.source_id = bridge_horizon.source_id and p.step = bridge_horizon.step
  on conflict do nothing;
  if not found then
    raise object_in_use using
      message = 'another bridge has taken over',
      hint = 'This one stands by until that one ends.';
  end if;
  return step + 1;
end $$;
comment on function sequin.bridge_horizon(int, bigint, text) is
'For the bridge: the slot is about to be confirmed up to here, though nothing was logged. Returns the next step.';

-- Nothing is missing any more of what the last start missed: a wrong address was put right, or a slot is back.
create or replace function sequin.bridge_no_gap(source_id int)
returns bigint
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  -- What a start finds is all that has no end.
  with withdrawn as (
    delete from sequin.gap g
    where g.source_id = $1 and g.consumer_id is null and g.pipeline_id is null
      and g.from_lsn is not null and g.to_lsn is null and g.accepted_at is null
    returning 1)
  select count(*) from withdrawn
$$;
comment on function sequin.bridge_no_gap(int) is
'For the bridge, where a source''s slot has all that the log has not: withdraws the hole that it found before, unless that was
accepted. Returns how many.';

-- A hole in the log: changes from an LSN on are lost. Whether somebody has said that this is known. It is not said of any other
-- hole from there: the log of an idle source stays where it is.
create or replace function sequin.bridge_gap(source_id int, from_lsn text, reason text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_gap sequin.gap;
begin
  select * into v_gap from sequin.gap g
  where g.source_id = bridge_gap.source_id and g.consumer_id is null and g.to_lsn is null
    and g.from_lsn = bridge_gap.from_lsn::pg_lsn and g.reason = bridge_gap.reason
  order by g.id desc
  limit 1;
  if not found then
    perform sequin.bridge_no_gap(source_id);
    insert into sequin.gap (source_id, from_lsn, reason) values (source_id, from_lsn::pg_lsn, reason);
  end if;
  return v_gap.accepted_at is not null;
end $$;
comment on function sequin.bridge_gap(int, text, text) is
'For the bridge: changes after this LSN are lost, for this reason. Returns whether sequin.accept_gap has said to go on.';

-- As bridge_gap, for what the bridge then does at once. Should it be interrupted, the hole looks different next time (its slot is
-- dropped, or made anew), and is not asked about again.
create or replace function sequin.bridge_pass(source_id int, from_lsn text, reason text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
       select from sequin.gap g
       where g.source_id = bridge_pass.source_id and g.from_lsn = bridge_pass.from_lsn::pg_lsn and g.to_lsn is null
         and g.passed_at is not null) then
    return true;
  elsif not sequin.bridge_gap(source_id, from_lsn, reason) then
    return false;
  end if;
  update sequin.gap g set passed_at = clock_timestamp()
  where g.source_id = bridge_pass.source_id and g.from_lsn = bridge_pass.from_lsn::pg_lsn and g.to_lsn is null
    and g.reason = bridge_pass.reason;
  return true;
end $$;
comment on function sequin.bridge_pass(int, text, text) is
'For the bridge: changes after this LSN are lost, for this reason. Returns whether it may go on after them, and takes note that
it does.';

-- Why the bridge does not go on, for health() to say; null clears it.
create or replace function sequin.bridge_error(source_id int, error text, hint text)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source s
  set error = $2, error_hint = $3
  where s.id = $1 and (s.error, s.error_hint) is distinct from ($2, $3)
  returning true
$$;
comment on function sequin.bridge_error(int, text, text) is
'For the bridge: why a source is not captured, and what to do; shown by health().';

-- The tables that are captured from a source: the route of each relation, the columns that name its rows, and those that did
-- where the log ends, with all that it had there.
create or replace function sequin.bridge_tables(source_id int)
returns table (relation_oid bigint, route_id int, key_columns text[], log_key_columns text[], log_column_names text[])
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select t.relation_oid::bigint, t.id, t.key_columns, k.key_columns, k.column_names
  from sequin.source_table t
  left join sequin.source_key k on k.table_id = t.id and k.relation_oid = t.relation_oid
  where t.source_id = $1 and t.relation_oid is not null and sequin._is_captured(t.id)
$$;
comment on function sequin.bridge_tables(int) is
'For the bridge: which relations of a source are captured, under which route, by what key, and by what key where the log ends;
that and its columns there are null where they are not known.';

-- Takes note of what names a table's rows where the log ends, in the transaction that writes it so far.
create or replace function sequin.bridge_key(route_id int, relation_oid bigint, key_columns text[], column_names text[])
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  insert into sequin.source_key as k (table_id, relation_oid, key_columns, column_names)
  select t.id, $2::oid, $3, $4 from sequin.source_table t where t.id = $1
  on conflict (table_id) do update
    set relation_oid = excluded.relation_oid, key_columns = excluded.key_columns, column_names = excluded.column_names
    where (k.relation_oid, k.key_columns, k.column_names) is distinct from (excluded.relation_oid, excluded.key_columns, excluded.column_names)
  returning true
$$;
comment on function sequin.bridge_key(int, bigint, text[], text[]) is
'For the bridge, before bridge_commit: these columns name a table''s rows where the log ends then, and these are all it has.';

-- A relation as the stream describes it now: keeps names and key up with renames and new primary keys. Local tables.
create or replace function sequin.bridge_relation(source_id int, relation_oid bigint, schema_name text, table_name text)
returns text[]
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table sequin.source_table;
  v_key text[] := sequin._key_columns(bridge_relation.relation_oid::oid);
begin
  select * into v_table from sequin.source_table t
  where t.source_id = bridge_relation.source_id and t.relation_oid = bridge_relation.relation_oid::oid;
  if not exists (select from pg_class c where c.oid = bridge_relation.relation_oid::oid) then
    return v_table.key_columns;
  end if;
  update sequin.source_table t
  set schema_name = bridge_relation.schema_name, table_name = bridge_relation.table_name, key_columns = v_key
  where t.id = v_table.id
    and (t.schema_name, t.table_name, t.key_columns) is distinct from
        (bridge_relation.schema_name, bridge_relation.table_name, v_key);
  return v_key;
end $$;
comment on function sequin.bridge_relation(int, bigint, text, text) is
'For the bridge: a streamed relation has these names now. Returns the columns that name its rows.';
