-- What time does by itself, a little at a time, each call a short transaction of the bridge's: leases that run out,
-- floors that rise, feeds that follow, rows that nobody needs any more.

-- The consumers there are, of one source or of all.
create or replace function sequin.bridge_consumers(source_id int default null)
returns table (consumer_id int, has_feed boolean)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  -- After each batch: plpgsql keeps the plan.
  return query
    select c.id, c.reads = 'feed'
    from sequin.consumer c
    join sequin.stream s on s.id = c.stream_id
    where bridge_consumers.source_id is null or s.source_id = bridge_consumers.source_id
    order by c.id;
end $$;
comment on function sequin.bridge_consumers(int) is 'For the bridge: the consumers to tend, of a source or of all.';

-- Starts a consumer that waits to be, ends what has run out, goes on with groups that are free again, brings its floor up.
-- Whether something was there to do; who listens is told then. A lock that is not had at once is not waited for.
create or replace function sequin.bridge_tend(consumer_id int)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
  c sequin.consumer;
  v_survey sequin._survey;
  v_has_freed boolean;
begin
  select * into c from sequin.consumer t where t.id = consumer_id;
  if not found then
    return false;
  elsif c.start_seq is null then
    return sequin._start(c.id);
  end if;
  v_survey := sequin._survey(c, 1, true);
  v_has_freed := sequin._expire(c, v_survey.expired, true, clock_timestamp()) > 0;
  if v_survey.lanes is null then
    v_has_freed := sequin._overtake(c, v_survey.stuck, true) > 0 or v_has_freed;
  end if;
  if exists (
       select from sequin.delivery d
       where d.consumer_id = c.id and d.due_at > '-infinity' and d.due_at <= (select clock_timestamp())
         and (d.is_done or d.is_out or d.deliver_count >= c.max_deliver)) then
    perform sequin._take_due(c.id, 0, c.ack_wait, true, clock_timestamp());
    v_has_freed := true;
  end if;
  if v_has_freed and c.paused_at is null then
    perform pg_notify('sequin.' || c.name, '');
  end if;
  return v_has_freed or sequin._is_feed_behind(c);
end $$;
comment on function sequin.bridge_tend(int) is
'For the bridge, every second or so: starts a consumer, ends leases that have run out. Returns whether it did, or whether
its feed is behind.';

-- Adds the next messages to a consumer's feed. How many rows of the log it looked at.
create or replace function sequin.bridge_feed(consumer_id int, max_rows int)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  c sequin.consumer;
  v_count bigint;
begin
  -- Shared with other work on the consumer, but not with alter_consumer, which changes the feed.
  select * into c from sequin.consumer t where t.id = consumer_id for share skip locked;
  if not found or c.reads <> 'feed' or c.start_seq is null then
    return 0;
  end if;
  v_count := sequin._feed(c, max_rows);
  -- Whoever listens need not hear of what the consumer leaves out, nor while it is far behind.
  if v_count > 0 and c.paused_at is null
     and (select p.lanes <> 0 from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1)
     and (select f.is_deep from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1) is not true then
    perform pg_notify('sequin.' || c.name, '');
  end if;
  return v_count;
end $$;
comment on function sequin.bridge_feed(int, int) is
'For the bridge, after each batch: adds at most max_rows rows of the log to a consumer''s feed, and notifies who listens. Returns
how many it looked at: fewer than max_rows, and the feed has caught up.';

-- Tells whoever listens on "sequin.<consumer>" that there is something, for consumers of these routes that are not far
-- behind; and for those of the source (of all) whose messages have come due since.
create or replace function sequin.bridge_notify(routes int[], source_id int default null)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_count bigint;
begin
  select count(pg_notify('sequin.' || c.name, '')) into v_count
  from sequin.consumer c
  left join lateral (
    select f.is_deep from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1) f on true
  where c.paused_at is null
    and (bridge_notify.source_id is null
         or exists (select from sequin.stream s where s.id = c.stream_id and s.source_id = bridge_notify.source_id))
    -- What its feed has been given, bridge_feed tells.
    and (c.routes && bridge_notify.routes and c.reads <> 'feed' and f.is_deep is not true
         or exists (
           select from sequin.delivery d
           where d.consumer_id = c.id and d.due_at between (select clock_timestamp() - interval '2 seconds') and (select clock_timestamp())));
  return v_count;
end $$;
comment on function sequin.bridge_notify(int[], int) is
'For the bridge, at most every few milliseconds: notifies the consumers of these routes. Returns how many.';

-- Removes rows that newer ones have replaced: of a consumer's lanes, its floor, its feed''s progress. bounds are what
-- the last call returned for the consumer, so that no scan starts among the dead; null at first.
create or replace function sequin.bridge_trim(consumer_id int, bounds bigint[])
returns bigint[]
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  c sequin.consumer;
  s sequin.lane;
  v_step bigint;
  -- Of 64 lanes, the floor, and the feed: rows before these are gone. Then where each lane was at the last call.
  v_bounds bigint[] := coalesce(bounds, array_fill(-1::bigint, array[66 + 64]));
begin
  select * into c from sequin.consumer t where t.id = consumer_id;
  for v_lane in 0..coalesce(c.lane_count, 0) - 1 loop
    if v_bounds[66 + v_lane + 1] > v_bounds[v_lane + 1] then
      delete from sequin.lane l
      where l.consumer_id = bridge_trim.consumer_id and l.lane = v_lane
        and l.prev < v_bounds[66 + v_lane + 1] and l.prev >= v_bounds[v_lane + 1];
      v_bounds[v_lane + 1] := v_bounds[66 + v_lane + 1];
    end if;
    s := sequin._lane(consumer_id, v_lane::smallint);
    v_bounds[66 + v_lane + 1] := coalesce(s.prev, -1);
  end loop;
  select max(f.step) into v_step from sequin.floor f where f.consumer_id = bridge_trim.consumer_id;
  if v_step > v_bounds[65] then
    delete from sequin.floor f
    where f.consumer_id = bridge_trim.consumer_id and f.step < v_step and f.step >= v_bounds[65];
    v_bounds[65] := v_step;
  end if;
  if c.feed_id is not null then
    -- Those from the floor on say which lanes have news.
    select max(p.step) into v_step
    from sequin.feed_progress p
    where p.feed_id = c.feed_id
      and p.seq <= (select f.seq from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1);
    if v_step > v_bounds[66] then
      delete from sequin.feed_progress p where p.feed_id = c.feed_id and p.step < v_step and p.step >= v_bounds[66];
      v_bounds[66] := v_step;
    end if;
  end if;
  return v_bounds;
end $$;
comment on function sequin.bridge_trim(int, bigint[]) is
'For the bridge, every few seconds: removes the replaced rows of a consumer. Returns bounds for the next call.';

-- The same for a source: its progress, and its tables' tallies.
create or replace function sequin.bridge_trim_source(source_id int, bound bigint)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_step bigint;
begin
  -- A few are kept: a bridge that was taken over from must still meet the row that took over.
  select max(p.step) - 8 into v_step from sequin.progress p where p.source_id = bridge_trim_source.source_id;
  if v_step <= coalesce(bound, -1) then
    return bound;
  end if;
  delete from sequin.progress p
  where p.source_id = bridge_trim_source.source_id and p.step < v_step and p.step >= coalesce(bound, -1);
  delete from sequin.tally y
  using (
    select t.id, (select max(y.seq) from sequin.tally y where y.route_id = t.id) as newest
    from sequin.source_table t where t.source_id = bridge_trim_source.source_id) n
  where y.route_id = n.id and y.seq < n.newest
    and not exists (select from sequin.consumer c where c.start_seq is null and c.start_base <= y.seq)
    and not exists (
      select from sequin.pipeline p
      where p.start_base <= y.seq and not exists (select from sequin.pipeline_progress v where v.pipeline_id = p.id));
  return v_step;
end $$;
comment on function sequin.bridge_trim_source(int, bigint) is
'For the bridge, every few seconds: removes the replaced rows of a source. Returns the bound for the next call.';

-- Counters for rates, and what is left of consumers that were dropped while a worker was at it.
create or replace function sequin.bridge_sample(source_id int default null)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_count bigint;
begin
  insert into sequin.consumer_sample (consumer_id, sampled_at, handed_out)
  select c.id, clock_timestamp(), p.total
  from sequin.consumer c
  cross join lateral (
    select coalesce(sum(s.passed - s.held_back), 0) as total
    from generate_series(0, c.lane_count - 1) n(lane)
    cross join lateral (
      select s.passed, s.held_back from sequin.lane s
      where s.consumer_id = c.id and s.lane = n.lane::smallint
      order by s.prev desc
      limit 1) s) p
  left join lateral (
    select m.handed_out from sequin.consumer_sample m
    where m.consumer_id = c.id
    order by m.sampled_at desc
    limit 1) m on true
  -- A consumer at rest writes nothing.
  where p.total is distinct from m.handed_out
    and ($1 is null or exists (select from sequin.stream s where s.id = c.stream_id and s.source_id = $1));
  get diagnostics v_count = row_count;
  delete from sequin.consumer_sample m where m.sampled_at < clock_timestamp() - interval '5 minutes'
    and exists (
      -- After a rest the one before it is what a rate is of, for a minute.
      select from sequin.consumer_sample n
      where n.consumer_id = m.consumer_id and n.sampled_at > m.sampled_at and n.sampled_at < clock_timestamp() - interval '1 minute');
  perform sequin.bridge_sample_source(s.id, pg_current_wal_lsn()::text, r.confirmed_flush_lsn::text, r.restart_lsn::text)
  from sequin.source s
  join pg_replication_slots r on r.slot_name = s.slot_name
  where s.conninfo is null and ($1 is null or s.id = $1);
  -- One id after another: their rows are not looked through.
  if not pg_try_advisory_xact_lock(hashtextextended('sequin.bridge_sample', 7190235)) then
    return v_count; -- for another source just now
  end if;
  perform sequin._forget(l.consumer_id)
  from (
    with recursive id as (
      (select l.consumer_id from sequin.lane l order by l.consumer_id limit 1)
      union all
      select (select l.consumer_id from sequin.lane l where l.consumer_id > id.consumer_id order by l.consumer_id limit 1)
      from id where id.consumer_id is not null
    )
    select id.consumer_id from id where id.consumer_id is not null
    union
    select f.consumer_id from sequin.floor f
    union
    select g.consumer_id from sequin.held_group g
    union
    select d.consumer_id from sequin.delivery d where d.due_at <= clock_timestamp()) l
  where not exists (select from sequin.consumer c where c.id = l.consumer_id);
  return v_count;
end $$;
comment on function sequin.bridge_sample(int) is
'For the bridge, every ten seconds: samples counters for deliveries_per_minute, and where the slot of this database is. Returns
how many consumers moved.';
