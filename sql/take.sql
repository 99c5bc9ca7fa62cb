-- Taking messages from lanes for a receive, where that is more than its own few statements.

-- Takes messages from the first of these lanes, so many of each and max_rows in all, where they are free and plain: as
-- receive does from one. The others are left as they are.
create or replace function sequin._take_lanes(
  consumer_id int, consumer text, route int, lanes smallint[], limits int[], max_rows int, quota int, is_rows boolean,
  ack_wait interval
)
returns table (
  ack_id bigint, seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb,
  changes jsonb, committed_at timestamptz, deliver_count int, metadata jsonb
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_lanes smallint[];
  v_prevs bigint[];
  v_froms bigint[];
  v_tos bigint[];
  v_counts int[];
  v_is_mine boolean[];
  v_turns bigint[];
begin
  select array_agg(s.lane order by s.lane), array_agg(s.turn order by s.lane), array_agg(s.upto_seq order by s.lane),
         array_agg(l.last_seq order by s.lane), array_agg(l.n order by s.lane)
    into v_lanes, v_prevs, v_froms, v_tos, v_counts
  from (
    select n.lane, n.max_count, sum(n.max_count) over (order by n.place) as total
    from unnest(lanes, limits) with ordinality n(lane, max_count, place)) n
  cross join lateral (
    select s.lane, s.turn, s.upto_seq, s.lease, s.held, s.tracked
    from sequin.lane s where s.consumer_id = _take_lanes.consumer_id and s.lane = n.lane order by s.prev desc limit 1) s
  cross join lateral (
    select max(l.seq) as last_seq, count(*)::int as n
    from (
      select l.seq, l.action, l.group_hash from sequin.log l
      where l.route_id = route and l.lane = s.lane and l.seq > s.upto_seq and l.seq < sequin._segment_end(s.upto_seq)
      order by l.seq
      limit n.max_count) l
    having bool_and(l.action in ('i', 'u', 'd', 'r')) and (not is_rows or count(distinct l.group_hash) filter (where is_rows) = count(*))) l
  where n.total <= max_rows and n.max_count <= quota and s.lease is null and s.held = 0 and s.tracked = 0;
  if v_lanes is null then
    return;
  end if;
  v_is_mine := array(
    select pg_try_advisory_xact_lock(sequin._lane_key(consumer, n.lane))
    from unnest(v_lanes) with ordinality n(lane, place) order by n.place);
  v_turns := array(select nextval('sequin.turn') from generate_series(1, cardinality(v_lanes)));
  return query
    with taken as (
      insert into sequin.lane (
        consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed, lease, leased_at, leased_until, out_count)
      select _take_lanes.consumer_id, n.lane, n.prev, n.turn, n.from_seq, n.to_seq, s.passed + n.n,
             n.turn, clock_timestamp(), clock_timestamp() + _take_lanes.ack_wait, n.n
      from unnest(v_lanes, v_prevs, v_turns, v_froms, v_tos, v_counts, v_is_mine) n(lane, prev, turn, from_seq, to_seq, n, is_mine)
      cross join lateral (
        select s.turn, s.passed from sequin.lane s
        where s.consumer_id = _take_lanes.consumer_id and s.lane = n.lane order by s.prev desc limit 1) s
      where n.is_mine and s.turn = n.prev and exists (
        select from sequin.consumer c where c.id = _take_lanes.consumer_id and c.reads = 'key' and cardinality(c.routes) = 1)
      on conflict do nothing
      returning lane, turn, cursor_seq, upto_seq
    )
    select sequin._ack_id(t.turn, t.lane, row_number() over (partition by t.lane order by l.seq) - 1), l.seq,
           sequin._action(l.action), l.table_schema, l.table_name, l.record_pk, l.record,
           case when not is_rows then l.changes end, l.committed_at, 1, l.metadata
    from taken t
    cross join lateral (
      select * from sequin.log l
      where l.route_id = route and l.lane = t.lane and l.seq > t.cursor_seq and l.seq <= t.upto_seq
      order by l.seq) l
    order by l.seq;
end $$;

-- Takes messages from a lane that the caller holds the lock of, whatever is in it: rows of held groups are passed by,
-- and so are rows that are no message of this consumer, and versions of a row that a later one in sight has overtaken.
-- permits are those that the lane may have beside its own.
create or replace function sequin._take(
  consumer_id int, lane smallint, max_rows int, ack_wait interval, permits smallint[]
)
returns table (
  ack_id bigint, seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb,
  changes jsonb, committed_at timestamptz, deliver_count int, metadata jsonb
)
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  c sequin.consumer;
  v_state sequin.lane := sequin._lane(_take.consumer_id, _take.lane);
  v_turn bigint := nextval('sequin.turn');
  v_pending int;
  v_limit int;
begin
  select * into c from sequin.consumer c where c.id = _take.consumer_id;
  if not found then
    return;  -- dropped
  end if;
  v_pending := v_state.tracked - v_state.fresh;
  permits := v_state.permits || permits;
  v_limit := least(max_rows, c.lane_quota + c.permit_size * coalesce(cardinality(permits), 0) - v_pending);
  -- The lane's row under an older snapshot: see _put_lane.
  if sequin._is_strict() then
    perform from sequin.lane s
    where s.consumer_id = c.id and s.lane = v_state.lane order by s.prev desc limit 1 for key share;
  end if;
  -- Where there is one group, a held one is the whole lane.
  if v_state.lease is not null or v_limit <= 0 or v_state.held > 0 and c.lane_count = 1 then
    return;
  end if;
  return query
    with range as materialized (
      select r.*, (row_number() over w - 1)::int as place, count(*) filter (where r.is_pick) over w as pick_count
      from (
        select r.*, r.is_message and not r.is_held
                 and (not c.is_rows or r.record_pk is null
                      or r.seq >= max(r.seq) filter (where r.is_message and not r.metadata ? 'unchanged')
                                    over (partition by r.route_id, r.record_pk)) is not false as is_pick
        from (
          select r.*,
                 v_state.held > 0 and exists (
                   select from sequin.held_group g
                   where g.consumer_id = c.id and g.lane = v_state.lane and g.group_hash = r.group_hash) as is_held,
                 r.action in ('i', 'u', 'd', 'r') or r.action = 't' and 'truncate' = any (c.actions)
                   or r.action = 'x' and c.is_rows as is_message
          -- Held groups may have much in the way: as much again as they have had so far, within limits.
          from sequin._rows(c, v_state.lane, v_state.upto_seq, 9223372036854775807,
                            greatest(64, v_limit + least(v_state.held_back, 512)::int)) r
        ) r
      ) r
      window w as (order by r.seq)
    ), picked as materialized (
      select * from range r where r.is_pick and r.pick_count <= v_limit
    ), leased as (
      insert into sequin.lane (
        consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed, held_back,
        lease, leased_at, leased_until, out_count, picks, tracked, fresh, held, permits)
      select c.id, v_state.lane, v_state.turn, v_turn, case when p.n > 0 then v_state.cursor_seq else r.last_seq end,
             r.last_seq, v_state.passed + r.n, v_state.held_back + r.n_held,
             case when p.n > 0 then v_turn end, case when p.n > 0 then clock_timestamp() end,
             case when p.n > 0 then clock_timestamp() + _take.ack_wait end, p.n,
             case when p.n < r.n then p.places end, v_state.tracked, v_state.fresh, v_state.held,
             nullif(_take.permits[1:sequin._permits_for(c, v_pending + p.n)], '{}')
      from (
        select max(r.seq) as last_seq, count(*) as n, count(*) filter (where r.is_held and r.is_message) as n_held
        from range r where r.pick_count <= v_limit) r
      cross join (select count(*)::int as n, array_agg(p.place order by p.place) as places from picked p) p
      where r.n > 0
      on conflict do nothing
      returning turn
    ), passed as (
      update sequin.held_group g
      set held_back = g.held_back + h.n, is_mixed = g.is_mixed or h.is_mixed
      from (
        select r.group_hash, count(*) as n,
               bool_or((r.route_id, r.record_pk) is distinct from (g.route_id, g.record_pk)) as is_mixed
        from range r
        join sequin.held_group g on g.consumer_id = c.id and g.lane = v_state.lane and g.group_hash = r.group_hash
        where r.is_held and r.is_message and r.pick_count <= v_limit
        group by r.group_hash
      ) h
      where g.consumer_id = c.id and g.lane = v_state.lane and g.group_hash = h.group_hash
        and v_state.held > 0 and exists (select from leased)
    )
    select sequin._ack_id(v_turn, v_state.lane, p.place), p.seq, sequin._action(p.action), p.table_schema,
           p.table_name, p.record_pk, p.record, case when not c.is_rows then p.changes end, p.committed_at, 1, p.metadata
    from leased
    cross join picked p
    order by p.seq;
end $$;
