-- Messages that are followed one by one, because something happened to them that happened to their neighbours in the
-- lane not: a nack, an expiry, a longer lease, a worker so slow that others must overtake it. Rows of
-- sequin.delivery; as long as a group has one, its lane passes the group by (sequin.held_group).
--
-- What decides which group goes on happens under the lane's lock, in a receive. An ack, a nack or an extend does not
-- wait for it: each changes its own deliveries' rows and no other. So a worker that sits in an open transaction keeps
-- what it has, and never another worker's call.
--
-- may_leave: whether the caller's transaction ends with this call, as the bridge's do. Of a worker's that is not
-- known. What it does here nobody else sees until it commits, and a worker whose lane's row it has replaced waits for
-- that with its ack. So it does only what it hands out at once, and what hinders nobody, and leaves the rest to the bridge;
-- or does that, too, where the bridge seems not to. at is when the call began to look: what it hands out itself has not
-- run out by then, however long it takes.
--
-- A message is looked for by its place, or by its lane and group as well as by its seq: one index, the primary key, serves
-- all of it. The table is mostly empty, plans that were made then are kept, and to a planner that expects one row all
-- indexes with any of the columns are the same: one that has the consumer alone in common with what is asked for would be
-- taken where it has fewer pages, and that is all that the consumer has tracked, every time. Nor are many looked for in a
-- join: of two sides with a row each, each of one is compared with all of the other. Hence offset 0, which is a look in
-- the index for each.

-- The delay before the next delivery after so many: backoff, doubled each time, up to a fifth more, never above
-- max_backoff.
create or replace function sequin._backoff(c sequin.consumer, deliver_count int)
returns interval
language plpgsql
volatile
set search_path = pg_catalog, pg_temp
as $$
begin
  return least(
    c.max_backoff,
    make_interval(secs => least(
      extract(epoch from c.max_backoff)::float8,
      extract(epoch from c.backoff)::float8 * 2 ^ least(deliver_count - 1, 40) * (1 + 0.2 * random()))));
end $$;

-- Which places of a lease are not settled yet.
create or replace function sequin._unsettled(s sequin.lane)
returns int[]
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if s.picks is null and s.settled is null then
    return array(select generate_series(s.settled_to, s.settled_to + s.out_count - 1));
  end if;
  return array(
    select unnest(coalesce(
      s.picks,
      array(select generate_series(s.settled_to, s.settled_to + coalesce(cardinality(s.settled), 0) + s.out_count - 1))))
    except
    select unnest(s.settled)
    order by 1);
end $$;

-- A lane's state once these unsettled places of its lease are settled. With the last of them the lease ends.
create or replace function sequin._settle(c sequin.consumer, s sequin.lane, places int[])
returns sequin.lane
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  s.out_count := s.out_count - cardinality(places);
  if s.out_count = 0 then
    s.cursor_seq := s.upto_seq;
    s.lease := null;
    s.leased_at := null;
    s.leased_until := null;
    s.picks := null;
    s.settled := null;
    s.settled_to := 0;
  else
    s.settled := array(select p.place from unnest(s.settled || places) p(place) order by p.place);
    -- Settled in order, a lease of ten thousand needs no list: the beginning of it is a number.
    if s.picks is null then
      s.settled_to := s.settled_to + (
        select count(*) from unnest(s.settled) with ordinality p(place, position)
        where p.place = s.settled_to + p.position - 1);
      s.settled := nullif(array(select p.place from unnest(s.settled) p(place) where p.place >= s.settled_to order by p.place), '{}');
    end if;
  end if;
  s.permits := sequin._fit_permits(c, s);
  return s;
end $$;

-- Makes the first message of each of these groups the one that is waited for: until it may be handed out, or until its
-- lease ends. One that was never handed out waits for room only (-infinity); one that is done, for nothing (epoch).
create or replace function sequin._arm(consumer_id int, lane smallint, groups int[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_is_whole boolean;
begin
  -- What an ack, a nack or an extend changes meanwhile is waited for, and looked at anew.
  loop
    with armed as materialized (
      select n.*
      from (
        select d.ctid as place, d.is_done, d.not_before, d.due_at as was_due_at,
               case when d.is_done then 'epoch'
                    when row_number() over (partition by d.group_hash order by d.is_done, d.seq) > 1 then null
                    when d.deliver_count = 0 then '-infinity'
                    else d.not_before end as due_at
        from sequin.delivery d
        where d.consumer_id = $1 and d.lane = $2 and d.group_hash = any ($3)) n
      where n.was_due_at is distinct from n.due_at
    ), changed as (
      update sequin.delivery d
      set due_at = a.due_at
      from armed a
      where d.ctid = a.place and d.is_done = a.is_done and d.not_before = a.not_before
      returning 1
    )
    select (select count(*) from changed) = (select count(*) from armed) into v_is_whole;
    exit when v_is_whole;
  end loop;
end $$;

-- Takes unsettled messages out of a lane's lease, to be followed one by one from here on. until is when they may be
-- handed out again, or, where they stay out (an extended or overtaken lease), the end of it. A message that has been
-- delivered often enough becomes a dead letter. How many: 0 where another has moved the lane on. The lane's row
-- decides, and not its lock: whatever else changes which groups are held writes one too.
create or replace function sequin._untie(
  c sequin.consumer, s sequin.lane, places int[], stays_out boolean, is_given_back boolean, until timestamptz, error text
)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_lease bigint := s.lease;
  v_leased_at timestamptz := s.leased_at;
  v_is_dead boolean := coalesce(not stays_out and c.max_deliver <= 1, false);
  v_rows sequin.delivery[];
  v_groups int[];
  v_behind int[];
begin
  select array_agg(
           (c.id, r.seq, s.lane, r.group_hash, 1, until, null, case when not is_given_back then v_lease end, r.place,
            stays_out, false, v_leased_at, error, r.route_id, r.committed_at, r.action, r.table_schema, r.table_name,
            r.record_pk, r.record, r.changes, r.metadata)::sequin.delivery order by r.seq) filter (where p.place is not null),
         array_agg(distinct r.group_hash) filter (where p.place is not null),
         array_agg(distinct r.group_hash) filter (where p.place is null)
    into v_rows, v_groups, v_behind
  from (
    select r.*, (row_number() over (order by r.seq) - 1)::int as place
    from sequin._rows(c, s.lane, s.cursor_seq, s.upto_seq, 2147483647) r) r
  join unnest(sequin._unsettled(s)) u(place) on u.place = r.place
  left join unnest(places) p(place) on p.place = r.place;
  -- What is not found would be neither out nor waiting any more: rather an error, again and again.
  if coalesce(cardinality(v_rows), 0) < cardinality(places) then
    raise data_corrupted using
      message = format('consumer "%s": of %s messages that are out of lane %s, %s are in the log: routes %s, seqs %s to %s',
        c.name, cardinality(places), s.lane, coalesce(cardinality(v_rows), 0), c.routes, s.cursor_seq, s.upto_seq),
      hint = format('select * from sequin.deliveries where consumer = %L; select sequin.rewind(%L, to_time => …); delivers them again.',
        c.name, c.name);
  end if;

  if v_is_dead then
    v_groups := '{}';
  else
    s.tracked := s.tracked + cardinality(places);
    s.held := s.held + (
      select count(*) from unnest(v_groups) n(group_hash)
      where not exists (
        select from sequin.held_group g
        where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = n.group_hash offset 0));
  end if;
  if not sequin._put_lane(sequin._settle(c, s, places)) then
    return 0;
  end if;

  if v_is_dead then
    perform sequin._bury(d, _untie.error) from unnest(v_rows) d;
  else
    insert into sequin.held_group as g (consumer_id, lane, group_hash, after_seq, behind_lease, route_id, record_pk, is_mixed)
    select c.id, s.lane, d.group_hash, s.upto_seq, case when d.group_hash = any (v_behind) then v_lease end,
           (array_agg(d.route_id))[1], min(d.record_pk), count(distinct (d.route_id, d.record_pk)) > 1
    from unnest(v_rows) d
    group by d.group_hash
    on conflict (consumer_id, lane, group_hash) do update
      set behind_lease = excluded.behind_lease,
          is_mixed = g.is_mixed or excluded.is_mixed
                     or (g.route_id, g.record_pk) is distinct from (excluded.route_id, excluded.record_pk);
    insert into sequin.delivery select d.* from unnest(v_rows) d;
    perform sequin._arm(c.id, s.lane, v_groups);
  end if;
  return cardinality(places);
end $$;

-- Makes a message a dead letter.
create or replace function sequin._bury(d sequin.delivery, error text)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  insert into sequin.dead_letter (
    consumer_id, seq, group_hash, lane, deliver_count, error, route_id, committed_at, action, table_schema, table_name,
    record_pk, record, changes, metadata)
  values (
    d.consumer_id, d.seq, d.group_hash, d.lane, d.deliver_count, coalesce($2, d.error), d.route_id, d.committed_at,
    d.action, d.table_schema, d.table_name, d.record_pk, d.record, d.changes, d.metadata)
  on conflict (consumer_id, seq) do update
    set deliver_count = excluded.deliver_count, error = excluded.error, dead_at = excluded.dead_at
$$;

-- What a lane has passed by of a held group: its next messages, up to where the lane is. A group by key is found by
-- its key, as the lane may have gone far; unless another row's group has the same hash, and was passed by with it.
create or replace function sequin._passed_by(c sequin.consumer, g sequin.held_group, upto bigint, max_rows int)
returns setof sequin.delivery
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
begin
  perform sequin._see_segments();
  if c.reads = 'key' and g.record_pk is not null and not g.is_mixed then
    return query
      select c.id, l.seq, g.lane, l.group_hash, 0, l.committed_at, null::timestamptz, null::bigint, null::int, false, false,
             null::timestamptz, null::text, l.route_id, l.committed_at, l.action, l.table_schema, l.table_name,
             l.record_pk, l.record, l.changes, l.metadata
      from sequin.log l
      where l.record_pk = g.record_pk and l.route_id = g.route_id and l.seq > g.after_seq and l.seq <= upto
        and (l.action in ('i', 'u', 'd', 'r') or l.action = 'x' and c.is_rows)
      order by l.seq
      limit max_rows;
  elsif c.reads = 'feed' then
    return query
      select c.id, l.seq, g.lane, f.group_hash, 0, l.committed_at, null::timestamptz, null::bigint, null::int, false, false,
             null::timestamptz, null::text, l.route_id, l.committed_at, l.action, l.table_schema, l.table_name,
             l.record_pk, case when c.transform is null then l.record else f.record end, l.changes, l.metadata
      from (
        select f.* from sequin.feed f
        where f.feed_id = c.feed_id and f.lane = g.lane and f.seq > g.after_seq and f.seq <= upto
          and f.group_hash = g.group_hash
        order by f.seq
        limit max_rows
      ) f
      cross join lateral (
        select * from sequin.log l where l.route_id = f.route_id and l.seq = f.seq
      ) l
      order by f.seq;
  else
    return query
      select c.id, l.seq, g.lane, l.group_hash, 0, l.committed_at, null::timestamptz, null::bigint, null::int, false, false,
             null::timestamptz, null::text, l.route_id, l.committed_at, l.action, l.table_schema, l.table_name,
             l.record_pk, l.record, l.changes, l.metadata
      from unnest(c.routes) r(id)
      cross join lateral (
        select * from sequin.log l
        where l.route_id = r.id and l.lane = g.lane and l.seq > g.after_seq and l.seq <= upto
          and l.group_hash = g.group_hash and (l.action in ('i', 'u', 'd', 'r') or l.action = 'x' and c.is_rows)
        order by l.seq
        limit max_rows
      ) l
      order by l.seq
      limit max_rows;
  end if;
end $$;

-- Goes on with groups of a lane, some of whose tracked messages (gone_count of them) have just been removed: with the
-- next of them; else with what the lane has passed by meanwhile, a hundred at a time; else the group is its lane's
-- again. The caller holds the lane's lock.
create or replace function sequin._advance_groups(c sequin.consumer, lane smallint, groups int[], gone_count int)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_max constant int := 100;
  s sequin.lane := sequin._lane(c.id, lane);
  g sequin.held_group;
  v_passed sequin.delivery[];
  v_count int;
  v_loaded int := 0;
  v_released int := 0;
begin
  for g in
    select h.*
    from unnest(groups) n(group_hash)
    cross join lateral (
      select * from sequin.held_group h where h.consumer_id = c.id and h.lane = s.lane and h.group_hash = n.group_hash offset 0) h
    where not exists (
      select from sequin.delivery d
      where d.consumer_id = c.id and d.lane = s.lane and d.group_hash = n.group_hash offset 0)
  loop
    v_count := 0;
    if g.held_back > 0 then
      v_passed := array(select p from sequin._passed_by(c, g, s.upto_seq, v_max) p order by p.seq);
      v_count := cardinality(v_passed);
    end if;
    if v_count = 0 then
      delete from sequin.held_group h
      where h.consumer_id = c.id and h.lane = s.lane and h.group_hash = g.group_hash;
      v_released := v_released + 1;
    else
      update sequin.held_group h
      set after_seq = case when v_count < v_max then s.upto_seq else v_passed[v_count].seq end,
          held_back = case when v_count < v_max then 0 else greatest(h.held_back - v_count, 1) end
      where h.consumer_id = c.id and h.lane = s.lane and h.group_hash = g.group_hash;
      insert into sequin.delivery select p.* from unnest(v_passed) p;
      v_loaded := v_loaded + v_count;
    end if;
  end loop;
  perform sequin._arm(c.id, s.lane, groups);
  perform sequin._count_lane(c, s.lane, v_loaded - gone_count, v_loaded, -v_released, -v_loaded);
end $$;

-- Ends the leases of these lanes that have run out: what was not acknowledged backs off. How many messages. A caller
-- who may not leave it at that takes only what may be handed out at once, or what nobody else seems to look after.
create or replace function sequin._expire(c sequin.consumer, lanes smallint[], may_leave boolean, at timestamptz)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '20ms'
as $$
declare
  v_lane smallint;
  s sequin.lane;
  v_until timestamptz;
  v_total bigint := 0;
begin
  foreach v_lane in array coalesce(lanes, '{}') loop
    s := sequin._lane(c.id, v_lane);
    v_until := s.leased_until + sequin._backoff(c, 1);
    continue when s.leased_until is null or s.leased_until > at
      or not may_leave and v_until > at and s.leased_until > at - interval '3 seconds'
      or not pg_try_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
    -- As in _overtake.
    select * into c from sequin.consumer t where t.id = c.id;
    exit when not found;  -- dropped
    s := sequin._lane(c.id, v_lane);
    if s.leased_until <= at then
      begin
        v_total := v_total + sequin._untie(c, s, sequin._unsettled(s), false, false, v_until, 'not acknowledged within its ack_wait');
      exception when lock_not_available then
        null;  -- it is being acknowledged, by a transaction that goes on: that is not waited for
      end;
    end if;
  end loop;
  return v_total;
end $$;

-- Lets other groups overtake leases that keep their lanes waiting: the messages that are out stay out, but one by
-- one. Worth it only where another group is next in line. A few lanes at a time. How many messages. Their workers'
-- acks wait until the caller commits, so that one whose transaction has begun before this call, and may go on after it,
-- does so only where nobody else seems to.
create or replace function sequin._overtake(c sequin.consumer, lanes smallint[], may_leave boolean)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '20ms'
as $$
declare
  v_lane smallint;
  s sequin.lane;
  v_total bigint := 0;
begin
  foreach v_lane in array coalesce(lanes[1:4], '{}') loop
    s := sequin._lane(c.id, v_lane);
    continue when c.lane_count = 1 or s.lease is null
      or not may_leave and s.leased_at > clock_timestamp() - interval '3 seconds'
      or not exists (
        select from sequin._rows(c, s.lane, s.upto_seq, 9223372036854775807, 64) n
        where not exists (
                select from sequin._rows(c, s.lane, s.cursor_seq, s.upto_seq, 2147483647) o where o.group_hash = n.group_hash)
          and not exists (
                select from sequin.held_group g
                where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = n.group_hash))
      or not pg_try_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
    -- A rewind may have given it another feed, or a backfill another route.
    select * into c from sequin.consumer t where t.id = c.id;
    exit when not found;  -- dropped
    s := sequin._lane(c.id, v_lane);
    if s.leased_until > clock_timestamp() then
      begin
        v_total := v_total + sequin._untie(c, s, sequin._unsettled(s), true, false, s.leased_until, null);
      exception when lock_not_available then
        null;  -- as in _expire
      end;
    end if;
  end loop;
  return v_total;
end $$;
