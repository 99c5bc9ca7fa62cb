-- What workers say of the messages they were handed: done, not done, not done yet.

-- ack_ids by lease: which places of it, and in which lane.
create or replace function sequin._leases(ack_ids bigint[])
returns table (lease bigint, lane smallint, places int[])
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select a.id >> 21, ((a.id >> 14) & 63)::smallint, array_agg(distinct (a.id & 16383)::int)
  from unnest(ack_ids) a(id)
  where a.id > 0
  group by 1, 2
  order by 2, 1
$$;

-- Settles some places of a lease, wherever its messages are now: in the lane, or followed one by one. How many were
-- still the caller's to settle.
create or replace function sequin._ack_some(c sequin.consumer, lease bigint, lane smallint, places int[])
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  s sequin.lane;
  v_void text;
  v_done int[] := '{}';
  v_total bigint := 0;
  v_lane smallint;
  d sequin.delivery;
begin
  loop
    s := sequin._lane(c.id, lane);
    exit when s.lease is distinct from _ack_some.lease;
    v_done := array(select unnest(sequin._unsettled(s)) intersect select unnest(places));
    exit when v_done = '{}' or sequin._put_lane(sequin._settle(s, v_done));
    v_done := '{}';
  end loop;
  v_total := cardinality(v_done);
  if s.lease = _ack_some.lease and s.out_count = v_total and s.held > 0 then
    -- The lease that held groups waited for is over.
    v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, lane));
    update sequin.held_group g set behind_lease = null
    where g.consumer_id = c.id and g.lane = _ack_some.lane and g.behind_lease = _ack_some.lease;
  end if;
  if v_total < cardinality(places) and exists (
       select from sequin.delivery t where t.consumer_id = c.id and t.lease = _ack_some.lease) then
    -- alter_consumer may have moved it to another lane.
    for v_lane in
      select distinct t.lane from sequin.delivery t
      where t.consumer_id = c.id and t.lease = _ack_some.lease and t.pick = any (places)
      order by t.lane
    loop
      v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
    end loop;
    for d in
      select t.* from sequin.delivery t
      where t.consumer_id = c.id and t.lease = _ack_some.lease and t.pick = any (places)
      order by t.seq
    loop
      perform sequin._drop_tracked(c, d, false);
      v_total := v_total + 1;
    end loop;
  end if;
  return v_total;
end $$;

create or replace function sequin.ack(consumer text, ack_ids bigint[])
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
declare
  v_count bigint := cardinality(ack_ids);
  v_is_whole boolean := v_count = 1;
  v_consumer sequin.consumer;
  v_lease record;
begin
  -- The usual case: all of one lease, in the order it was handed out, and nothing else.
  if v_count > 1 then
    v_is_whole := ack_ids = array(select generate_series(ack_ids[1], ack_ids[1] + v_count - 1));
  end if;
  if v_is_whole then
    -- The lock keeps others from a lane that this transaction is about to free, and is not waited for: the row decides.
    -- The row's turn is odd, as no lease's is, and so costs no step of the sequence.
    insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed)
    select c.id, s.lane, s.turn, s.turn + 1, s.upto_seq, s.upto_seq, s.passed
    from sequin.consumer c
    cross join lateral (
      select * from sequin.lane s
      where s.consumer_id = c.id and s.lane = ((ack_ids[1] >> 14) & 63)::smallint
      order by s.prev desc
      limit 1) s
    where c.name = consumer
      and ack_ids[1] & 1064959 = 0 and s.lease = ack_ids[1] >> 21 and s.out_count = v_count
      and s.picks is null and s.settled_to = 0 and s.settled is null and s.tracked = 0 and s.held = 0
      and (sequin._caller() = current_user or sequin._may_consume(c.id))
      and pg_try_advisory_xact_lock(sequin._lane_key(consumer, s.lane)) is not null
    on conflict do nothing;
    if found then
      return v_count;
    end if;
  end if;

  perform sequin._refuse_write('ack');
  v_consumer := sequin._my_consumer(consumer);
  v_count := 0;
  if cardinality(ack_ids) > 1 then
    -- The same for several lanes at once.
    with lease as materialized (
      select a.id >> 21 as lease, ((a.id >> 14) & 63)::smallint as lane, count(distinct a.id) as n, max(a.id & 16383) as last_place
      from unnest(ack_ids) a(id)
      where a.id > 0 and a.id & 1048576 = 0
      group by 1, 2
    ), whole as materialized (
      select s.lane, s.turn, s.upto_seq, s.passed, a.n
      from lease a
      cross join lateral (
        select * from sequin.lane s
        where s.consumer_id = v_consumer.id and s.lane = a.lane
        order by s.prev desc
        limit 1) s
      where s.lease = a.lease and s.out_count = a.n and a.last_place = a.n - 1
        and s.picks is null and s.settled_to = 0 and s.settled is null and s.tracked = 0 and s.held = 0
    ), settled as (
      insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed)
      select v_consumer.id, w.lane, w.turn, w.turn + 1, w.upto_seq, w.upto_seq, w.passed
      from whole w
      where pg_try_advisory_xact_lock(sequin._lane_key(v_consumer.name, w.lane)) is not null
      on conflict do nothing
      returning lane
    )
    select coalesce(sum(w.n), 0) into v_count from settled join whole w using (lane);
    if v_count = cardinality(ack_ids) then
      return v_count;
    end if;
  end if;

  for v_lease in select * from sequin._leases(ack_ids) loop
    -- What has just been settled is not the caller's any more, and is not found again.
    perform pg_try_advisory_xact_lock(sequin._lane_key(v_consumer.name, v_lease.lane));
    v_count := v_count + sequin._ack_some(v_consumer, v_lease.lease, v_lease.lane, v_lease.places);
  end loop;
  return v_count;
end $$;
comment on function sequin.ack(text, bigint[]) is
'Acknowledges deliveries: their messages are done.

consumer  the one they were received from
ack_ids   as receive gave them, in any order, from any number of batches

Returns how many were acknowledged. A delivery that expired and was handed out again, or is acknowledged already, is
not: nothing is done about it, and it is not counted. In the transaction of the work itself: look at the count, and
roll back if it is short.

Errors: 42704 unknown consumer, 42501 not the caller''s, 25006 read only transaction or replica, 40001 try again
(stricter isolation only).';

create or replace function sequin.nack(
  consumer text,
  ack_ids bigint[],
  delay interval default null,
  error text default null
)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_consumer sequin.consumer;
  v_lease record;
  s sequin.lane;
  d sequin.delivery;
  v_places int[];
  v_void text;
  v_count bigint := 0;
begin
  perform sequin._refuse_write('nack');
  if delay < '0' then
    raise invalid_parameter_value using
      message = format('delay is %s', delay),
      hint = 'It is an interval of 0 or more; leave it out for the consumer''s backoff.';
  end if;
  v_consumer := sequin._my_consumer(consumer);
  for v_lease in select * from sequin._leases(ack_ids) loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(v_consumer.name, v_lease.lane));
    loop
      s := sequin._lane(v_consumer.id, v_lease.lane);
      exit when s.lease is distinct from v_lease.lease;
      v_places := array(select unnest(sequin._unsettled(s)) intersect select unnest(v_lease.places) order by 1);
      exit when v_places = '{}';
      if sequin._untie(v_consumer, s, v_places, false, true,
           clock_timestamp() + coalesce(delay, sequin._backoff(v_consumer, 1)), error) > 0 then
        v_count := v_count + cardinality(v_places);
        exit;
      end if;
    end loop;
    for d in
      select t.* from sequin.delivery t
      where t.consumer_id = v_consumer.id and t.lease = v_lease.lease and t.pick = any (v_lease.places) and t.is_out
      order by t.seq
    loop
      d.error := coalesce(nack.error, d.error);
      if d.deliver_count >= v_consumer.max_deliver then
        perform sequin._drop_tracked(v_consumer, d, true);
      else
        update sequin.delivery t
        set is_out = false, lease = null, pick = null, error = d.error,
            not_before = clock_timestamp() + coalesce(delay, sequin._backoff(v_consumer, d.deliver_count))
        where t.consumer_id = v_consumer.id and t.seq = d.seq;
        perform sequin._arm(v_consumer.id, d.lane, d.group_hash);
      end if;
      v_count := v_count + 1;
    end loop;
  end loop;
  return v_count;
end $$;
comment on function sequin.nack(text, bigint[], interval, text) is
'Gives deliveries back: their messages are not done, and come again after a delay. Until then nothing later of their
groups is handed out; other groups go on.

consumer  the one they were received from
ack_ids   as receive gave them
delay     until they may come again; default: the consumer''s backoff, doubled at each delivery
error     why, shown in sequin.deliveries and sequin.dead_letters

Returns how many were given back. At the consumer''s max_deliver a message becomes a dead letter instead.
Errors: as ack, and 22023 bad delay.';

create or replace function sequin.extend(
  consumer text,
  ack_ids bigint[],
  ack_wait interval default null
)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_consumer sequin.consumer;
  v_lease record;
  s sequin.lane;
  d sequin.delivery;
  v_until timestamptz;
  v_places int[];
  v_unsettled int[];
  v_void text;
  v_count bigint := 0;
begin
  perform sequin._refuse_write('extend');
  if ack_wait <= '0' then
    raise invalid_parameter_value using
      message = format('ack_wait is %s', ack_wait),
      hint = 'It is an interval above 0; leave it out for the consumer''s own.';
  end if;
  v_consumer := sequin._my_consumer(consumer);
  v_until := clock_timestamp() + coalesce(ack_wait, v_consumer.ack_wait);
  for v_lease in select * from sequin._leases(ack_ids) loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(v_consumer.name, v_lease.lane));
    v_places := '{}';
    loop
      s := sequin._lane(v_consumer.id, v_lease.lane);
      exit when s.lease is distinct from v_lease.lease;
      v_unsettled := sequin._unsettled(s);
      v_places := array(select unnest(v_unsettled) intersect select unnest(v_lease.places) order by 1);
      exit when v_places = '{}';
      if v_places = v_unsettled then
        s.leased_until := v_until;
        exit when sequin._put_lane(s);
      else
        exit when sequin._untie(v_consumer, s, v_places, true, false, v_until, null) > 0;
      end if;
    end loop;
    if s.lease = v_lease.lease then
      v_count := v_count + cardinality(v_places);
    end if;
    for d in
      select t.* from sequin.delivery t
      where t.consumer_id = v_consumer.id and t.lease = v_lease.lease and t.pick = any (v_lease.places) and t.is_out
        and not (s.lease = v_lease.lease and t.pick = any (v_places))
    loop
      update sequin.delivery t set not_before = v_until where t.consumer_id = v_consumer.id and t.seq = d.seq;
      perform sequin._arm(v_consumer.id, d.lane, d.group_hash);
      v_count := v_count + 1;
    end loop;
  end loop;
  return v_count;
end $$;
comment on function sequin.extend(text, bigint[], interval) is
'Gives a worker more time: the leases of these deliveries end ack_wait from now.

consumer  the one they were received from
ack_ids   as receive gave them
ack_wait  default: the consumer''s

Returns how many were extended: not those that have expired and were handed out again, or are settled.
Errors: as ack, and 22023 bad ack_wait.';
