-- Where a consumer's next messages are, when that is not obvious: it is nearly caught up, or its lanes are busy.

-- What a survey found. lanes have messages to hand out, in the order of their first one, so many each; first those that
-- hold the next ones, then the rest; expired ones hold a lease that ran out; stuck ones keep others waiting behind a
-- lease that has not. is_all: what can be handed out is those, and no more than was asked for. seen: nothing is
-- waiting, and so there is something again once the log goes on after it, or a delivery is due.
do $$
begin
  if to_regtype('sequin._survey') is null then
    create type sequin._survey as (lanes smallint[], limits int[], expired smallint[], stuck smallint[], is_all boolean, seen bigint);
  elsif not exists (
    select from pg_attribute a where a.attrelid = 'sequin._survey'::regclass and a.attname = 'seen') then
    alter type sequin._survey add attribute is_all boolean, add attribute seen bigint;
  end if;
end $$;

-- Writes a consumer's floor down, after the one of this step.
create or replace function sequin._raise_floor(c sequin.consumer, after bigint, seq bigint, busy smallint[], is_deep boolean)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  -- One writer: a row that is not committed yet would have to be waited for.
  if pg_try_advisory_xact_lock(hashtextextended(c.name, 7190236)) then
    insert into sequin.floor (consumer_id, step, seq, busy, is_deep)
    values (c.id, after + 1, _raise_floor.seq, _raise_floor.busy, _raise_floor.is_deep)
    on conflict do nothing;
  end if;
end $$;

-- Looks at the lanes that may have something, and at nothing else: those that were busy when last looked, and those
-- with messages since. Chooses the next max_rows messages in seq order, lane by lane. What it learns it writes down
-- in sequin.floor, when that saves the next one work. Up to 256 messages behind the order over all lanes is seq
-- order; further behind ("deep") any busy lane will do, and receive takes one without a survey.
create or replace function sequin._survey(c sequin.consumer, max_rows int, may_write boolean)
returns sequin._survey
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
declare
  v_depth constant int := 256;
  v_look int;                      -- rows to look at, a lane
  v_far int;                       -- half of them with so many, and it is deep
  v_floor sequin.floor;
  v_head bigint;
  v_fresh int := 0;                -- messages since the floor, or so
  v_lanes smallint[];
  v_survey sequin._survey;
  v_busy smallint[];
  v_waiting bigint;
  v_is_deep boolean;
  v_is_light boolean := false;      -- the first of two ways has found all there is
begin
  select * into v_floor from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1;
  if not found then
    return v_survey;  -- dropped
  end if;
  -- The head first: the lanes are looked at later, so whatever is at or before it is seen.
  if c.reads = 'feed' then
    select p.seq into v_head from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1;
  else
    -- And what it reads of the log: a backfill may have begun since the caller looked.
    select t.routes, sequin._head(t) into c.routes, v_head from sequin.consumer t where t.id = c.id;
    if not found then
      return v_survey;
    end if;
  end if;

  perform sequin._see_segments();

  if c.lane_count = 1 then
    v_lanes := '{0}';
  elsif c.reads = 'feed' then
    select greatest(max(p.total) - min(p.total), count(*)),
           array(select b.lane::smallint from generate_series(0, 63) b(lane) where (bit_or(p.lanes) >> b.lane) & 1 = 1)
      into v_fresh, v_lanes
    from sequin.feed_progress p
    where p.feed_id = c.feed_id and p.seq > v_floor.seq;
    v_lanes := array(select unnest(v_floor.busy) union select unnest(v_lanes));
  else
    select count(*), array_agg(distinct l.lane) into v_fresh, v_lanes
    from (
      select l.lane
      from unnest(c.routes) r(id)
      cross join lateral (
        select l.lane, l.seq from sequin.log l
        where l.route_id = r.id and l.seq > v_floor.seq and l.seq <= v_head
        order by l.seq
        limit v_depth + 1) l
      order by l.seq
      limit v_depth + 1) l;
    v_lanes := array(select unnest(v_floor.busy) union select unnest(v_lanes));
  end if;
  if v_fresh > v_depth then
    v_lanes := array(select generate_series(0, c.lane_count - 1)::smallint);
  elsif v_lanes = '{}' then
    -- Nothing, in a log that goes on for others: what it is past may be dropped.
    if may_write and sequin._segment_end(v_floor.seq) < sequin._segment_end(v_head) then
      perform sequin._raise_floor(c, v_floor.step, v_head, '{}', false);
    end if;
    v_survey.seen := v_head;
    return v_survey;
  end if;
  -- Few lanes, all of them in the hands of workers that get on: nothing to look for.
  if cardinality(v_lanes) <= 16 and not exists (
    select from unnest(v_lanes) n(lane)
    cross join lateral (
      select s.lease, s.leased_at, s.leased_until from sequin.lane s
      where s.consumer_id = c.id and s.lane = n.lane
      order by s.prev desc
      limit 1) s
    where s.lease is null or s.leased_until <= clock_timestamp() or s.leased_at < clock_timestamp() - interval '100 milliseconds'
  ) then
    return v_survey;
  end if;
  v_look := greatest(8, least(max_rows, 2 * v_depth / cardinality(v_lanes)));
  v_far := 2 * v_depth / cardinality(v_lanes);

  -- Of one table, in a statement a fifth as heavy as the next: nearly caught up, where all there is goes along; and as far
  -- behind as before, where it is enough to know of most lanes that they have more. Now and then that is counted anew.
  v_is_deep := v_floor.is_deep and random() > 0.1;
  if c.reads = 'key' and cardinality(c.routes) = 1 and c.lane_count > 1 and v_fresh <= v_depth
     and (v_is_deep or not v_floor.is_deep) then
    select array_agg(s.lane order by l.first_seq) filter (where s.lease is null and l.n > 0),
           array_agg(least(l.n, max_rows) order by l.first_seq) filter (where s.lease is null and l.n > 0),
           array_agg(s.lane) filter (where s.leased_until <= clock_timestamp()),
           array_agg(s.lane) filter (
             where s.leased_until > clock_timestamp() and s.leased_at < clock_timestamp() - interval '100 milliseconds' and l.n > 0),
           coalesce(array_agg(s.lane order by s.lane) filter (where s.lease is not null or l.n > 0), '{}'),
           sum(l.n),
           coalesce(case when v_is_deep then sum(l.n) * 2 > cardinality(v_lanes)
                         else bool_and(l.n < v_look) and sum(l.n) < v_depth
                              and (max_rows = 1 or sum(l.n) filter (where s.lease is null) <= max_rows) is not false end, true)
      into v_survey.lanes, v_survey.limits, v_survey.expired, v_survey.stuck, v_busy, v_waiting, v_is_light
    from unnest(v_lanes) n(lane)
    cross join lateral (
      select s.lane, s.upto_seq, s.lease, s.leased_at, s.leased_until
      from sequin.lane s
      where s.consumer_id = c.id and s.lane = n.lane
      order by s.prev desc
      limit 1) s
    cross join lateral (
      select count(*)::int as n, min(l.seq) as first_seq
      from (
        select l.seq from sequin.log l
        where l.route_id = c.routes[1] and l.lane = s.lane and l.seq > s.upto_seq and l.seq <= v_head
        order by l.seq
        limit case when v_is_deep then 1 else v_look end) l) l;
    v_survey.is_all := max_rows > 1 and not v_is_deep;
    v_survey.seen := case when v_waiting = 0 then v_head end;
    if v_is_deep and v_is_light then
      v_waiting := v_depth;
      v_lanes := (select array_agg(n.lane order by random()) from unnest(v_survey.lanes) n(lane));
    end if;
  end if;
  if not v_is_light then
    with lane as materialized (
      select s.*
      from unnest(v_lanes) n(lane)
      cross join lateral (
        select s.lane, s.upto_seq, s.lease, s.leased_at, s.leased_until, s.tracked, s.held
        from sequin.lane s
        where s.consumer_id = c.id and s.lane = n.lane
        order by s.prev desc
        limit 1) s
    ), next as materialized (
      select s.lane, s.lease is null and (s.held = 0 or c.lane_count > 1) as is_free, n.seq
      from lane s
      cross join lateral (
        select l.seq
        from unnest(case when c.reads = 'key' then c.routes end) r(id)
        cross join lateral (
          select l.seq from sequin.log l
          where l.route_id = r.id and l.lane = s.lane and l.seq > s.upto_seq and l.seq <= v_head
          order by l.seq
          limit v_look) l
        union all
        select l.seq
        from unnest(case when c.reads = 'total' then c.routes end) r(id)
        cross join lateral (
          select l.seq from sequin.log l
          where l.route_id = r.id and l.seq > s.upto_seq and l.seq <= v_head
          order by l.seq
          limit v_look) l
        union all
        (select f.seq from sequin.feed f
         where c.reads = 'feed' and f.feed_id = c.feed_id and f.lane = s.lane and f.seq > s.upto_seq
         order by f.seq
         limit v_look)
      ) n
    ), waiting as materialized (
      select n.lane, min(n.seq) as first_seq, count(*) as row_count from next n where n.is_free group by n.lane
    ), chosen as (
      select n.lane, min(n.seq) as first_seq, count(*) as row_count, true as is_next
      from (select * from next n where n.is_free order by n.seq limit max_rows) n
      group by n.lane
      -- The others after them: one of these may be in the hands of a transaction that goes on.
      union all
      select w.lane, w.first_seq, w.row_count, false
      from waiting w
      where not exists (
        select from (select * from next n where n.is_free order by n.seq limit max_rows) n where n.lane = w.lane)
    )
    select
      (select array_agg(h.lane order by h.is_next desc, h.first_seq) from chosen h),
      (select array_agg(case when h.row_count < v_look then h.row_count::int else max_rows end order by h.is_next desc, h.first_seq)
       from chosen h),
      (select array_agg(s.lane) from lane s where s.leased_until <= clock_timestamp()),
      (select array_agg(s.lane) from lane s
       where s.leased_until > clock_timestamp() and s.leased_at < clock_timestamp() - interval '100 milliseconds'
         and exists (select from next n where n.lane = s.lane)),
      array(select s.lane from lane s
            where s.lease is not null or exists (select from next n where n.lane = s.lane)
            order by s.lane),
      case when v_look < v_far and c.reads <> 'total' then v_far * (
        select count(*) from lane s
        where exists (
          select from unnest(case when c.reads = 'key' then c.routes end) r(id)
          cross join lateral (
            select from sequin.log l
            where l.route_id = r.id and l.lane = s.lane and l.seq > s.upto_seq and l.seq <= v_head
            order by l.seq
            offset v_far - 1 limit 1) l
          union all
          (select from sequin.feed f
           where c.reads = 'feed' and f.feed_id = c.feed_id and f.lane = s.lane and f.seq > s.upto_seq
           order by f.seq
           offset v_far - 1 limit 1)))
      else (select count(*) from next n) end,
      (select array_agg(w.lane order by random()) from waiting w),
      (select bool_and(w.row_count < v_look) and sum(w.row_count) <= max_rows from waiting w),
      case when not exists (select from next) then v_head end
    into v_survey.lanes, v_survey.limits, v_survey.expired, v_survey.stuck, v_busy, v_waiting, v_lanes,
         v_survey.is_all, v_survey.seen;
  end if;

  -- Far behind, a batch comes from as few lanes as hold it, so that others find lanes free.
  v_is_deep := v_waiting >= v_depth;
  if v_is_deep and v_lanes is not null then
    v_survey.lanes := v_lanes;
    v_survey.limits := array_fill(max_rows, array[cardinality(v_lanes)]);
  end if;
  if c.lane_count > 1
     and (v_fresh >= 8 or v_is_deep <> v_floor.is_deep or v_survey.lanes is null and (v_fresh > 0 or v_busy <> v_floor.busy)
          or sequin._segment_end(v_floor.seq) < sequin._segment_end(v_head))
     -- Not by one that goes on waiting: what it has written is nobody's until it returns.
     and (may_write or v_survey.lanes is not null) then
    perform sequin._raise_floor(c, v_floor.step, v_head, v_busy, v_is_deep);
  end if;
  return v_survey;
end $$;
