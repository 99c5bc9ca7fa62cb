-- Permits: how max_ack_pending is kept, however many workers ask at once.

-- How a consumer's max_ack_pending is shared out: each lane may have so many pending without a look at the others, and
-- the rest are permits, which a lane takes and gives back. However many workers ask at once, the sum is never exceeded.
create or replace function sequin._share(c sequin.consumer)
returns sequin.consumer
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rest int;
begin
  c.lane_quota := case when c.lane_count = 1 then c.max_ack_pending else c.max_ack_pending / 100 end;
  v_rest := c.max_ack_pending - c.lane_count * c.lane_quota;
  -- A permit is an advisory lock while it changes hands: there must not be too many.
  c.permit_size := case when v_rest <= 128 then 1 else (v_rest + 63) / 64 end;
  c.permit_count := v_rest / c.permit_size;
  return c;
end $$;

-- How many permits a lane needs to have so many messages pending: handed out and not acknowledged, or backing off.
create or replace function sequin._permits_for(c sequin.consumer, pending int)
returns int
language sql
immutable
as $$
  select greatest(0, (pending - c.lane_quota + c.permit_size - 1) / c.permit_size)
$$;

-- A lane's state without the permits that it no longer needs.
create or replace function sequin._fit_permits(c sequin.consumer, s sequin.lane)
returns smallint[]
language sql
immutable
as $$
  select case when s.permits is not null then nullif(s.permits[1:sequin._permits_for(c, s.out_count + s.tracked - s.fresh)], '{}') end
$$;

-- Permits of a consumer, so many at most: of those that no lane holds and no transaction is about to hold. However many
-- workers ask at once, none is given twice, and none of them waits for another. (Under a snapshot older than this call,
-- in a stricter isolation level, those that others have been given since cannot be seen: max_ack_pending is kept then as
-- it was when the transaction began.)
create or replace function sequin._permits(c sequin.consumer, max_count int)
returns smallint[]
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_used smallint[] := '{}';
  v_got smallint[] := '{}';
  v_permit smallint;
  v_start int := floor(random() * c.permit_count);
begin
  -- Where there is little to go round, it is worth a look not to lock what is in use: it may come free meanwhile.
  for v_round in (case when c.lane_quota = 0 then 0 else 1 end)..2 loop
    exit when cardinality(v_got) >= least(max_count, c.permit_count);
    for v_i in 0..c.permit_count - 1 loop
      exit when v_round = 0 or cardinality(v_got) >= max_count;
      v_permit := (v_start + v_i) % c.permit_count;
      if not v_permit = any (v_used || v_got)
         and pg_try_advisory_xact_lock(hashtextextended(c.name, 7190237) & -128::bigint | v_permit) then
        v_got := v_got || v_permit;
      end if;
    end loop;
    exit when v_round > 0 and v_got = '{}';
    -- A new statement, and so a snapshot newer than the locks.
    v_used := array(
      select unnest(s.permits)
      from generate_series(0, c.lane_count - 1) n(lane)
      cross join lateral (
        select s.permits from sequin.lane s
        where s.consumer_id = c.id and s.lane = n.lane::smallint
        order by s.prev desc
        limit 1) s);
    v_got := array(select unnest(v_got) except select unnest(v_used));
  end loop;
  return v_got;
end $$;

-- Gives out permits anew to what is pending, after a change of max_ack_pending or of lanes. Where that is more than may
-- be, nobody gets one until it is less. The caller holds every lane's lock.
create or replace function sequin._renew_permits(c sequin.consumer)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  s sequin.lane;
  v_next int := 0;
  v_count int;
  v_is_put boolean;
begin
  for v_lane in 0..c.lane_count - 1 loop
    loop
      s := sequin._lane(c.id, v_lane::smallint);
      v_count := least(sequin._permits_for(c, s.out_count + s.tracked - s.fresh), c.permit_count - v_next);
      exit when s.lane is null or v_count = 0 and s.permits is null;
      s.permits := nullif(array(select generate_series(v_next, v_next + v_count - 1)::smallint), '{}');
      v_is_put := sequin._put_lane(s);
      exit when v_is_put;
    end loop;
    v_next := v_next + coalesce(v_count, 0);
  end loop;
end $$;
