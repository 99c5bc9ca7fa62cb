-- What workers say of the messages they were handed: done, not done, not done yet.

-- ack_ids by lease: which places of it, and in which lane.
create or replace function sequin._leases(ack_ids bigint[])
returns table (lease bigint, lane smallint, places int[])
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
begin
  return query
    select a.id >> 20, ((a.id >> 14) & 63)::smallint, array_agg(distinct (a.id & 16383)::int)
    from unnest(ack_ids) a(id)
    where a.id > 0
    group by 1, 2
    order by 2, 1;
end $$;

-- Whether a lane is out under this lease, for its worker to settle. The lock, where it is to be had, keeps others from a
-- lane that this transaction may be about to free, and is not waited for: the lane's row decides. But once the time is
-- up, who has the lock may be taking it back, and that is not waited for either.
create or replace function sequin._is_its(c sequin.consumer, s sequin.lane, lease bigint)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  return coalesce(s.lease = _is_its.lease, false)
    and (pg_try_advisory_xact_lock(sequin._lane_key(c.name, s.lane)) or s.leased_until > clock_timestamp());
end $$;

-- Where those of these deliveries are that are followed one by one and still the caller's to settle, locked. One whose time
-- is up may be in another's hands already: that is not waited for. only_out: not those that were taken back. All at once,
-- and then by their places: a planner that has seen the table empty may read all that is tracked at each look.
create or replace function sequin._mine(c sequin.consumer, ack_ids bigint[], only_out boolean)
returns tid[]
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_leases bigint[] := array(select distinct a.id >> 20 from unnest(ack_ids) a(id) where a.id > 0);
  -- Without the lane, which a message may have left.
  v_picks bigint[] := array(select (a.id >> 20 << 14) | (a.id & 16383) from unnest(ack_ids) a(id) where a.id > 0);
begin
  if not exists (select from sequin.delivery d where d.consumer_id = c.id and d.lease = any (v_leases)) then
    return '{}';
  end if;
  return array(
      select d.ctid from sequin.delivery d
      where d.consumer_id = c.id and d.lease = any (v_leases) and (d.lease << 14) | d.pick = any (v_picks) and not d.is_done
        and (d.is_out or not only_out) and d.not_before > v_now
      order by d.lane, d.seq
      for update)
    || array(
      select d.ctid from sequin.delivery d
      where d.consumer_id = c.id and d.lease = any (v_leases) and (d.lease << 14) | d.pick = any (v_picks) and not d.is_done
        and (d.is_out or not only_out) and d.not_before <= v_now
      order by d.lane, d.seq
      for update skip locked);
end $$;

-- Settles some places of a lease, as far as they are in its lane. How many were still the caller's to settle.
create or replace function sequin._ack_in_lane(c sequin.consumer, lease bigint, lane smallint, places int[])
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  s sequin.lane;
  v_done int[];
begin
  loop
    s := sequin._lane(c.id, lane);
    if not sequin._is_its(c, s, lease) then
      return 0;
    end if;
    v_done := array(select unnest(sequin._unsettled(s)) intersect select unnest(places));
    if v_done = '{}' or sequin._put_lane(sequin._settle(c, s, v_done)) then
      return cardinality(v_done);
    end if;
  end loop;
end $$;

-- Settles those of these deliveries that are followed one by one. How many were still the caller's to settle.
create or replace function sequin._ack_tracked(c sequin.consumer, ack_ids bigint[])
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_mine tid[] := sequin._mine(c, ack_ids, false);
  v_lanes smallint[];
  v_groups int[];
begin
  with done as (
    update sequin.delivery d set is_done = true, is_out = false, due_at = 'epoch' where d.ctid = any (v_mine)
    returning d.lane, d.group_hash
  )
  select array_agg(d.lane), array_agg(d.group_hash) into v_lanes, v_groups from done d;
  perform sequin._sweep(c, n.lane, n.groups, false)
  from (
    select n.lane, array_agg(distinct n.group_hash) as groups
    from unnest(v_lanes, v_groups) n(lane, group_hash)
    group by n.lane
    order by n.lane) n;
  return cardinality(v_mine);
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
  v_is_fast boolean;
  v_is_whole boolean;
  v_count bigint := 0;
  v_consumer sequin.consumer;
  v_lease record;
  v_deadline timestamptz;
begin
  unlisten "sequin.";  -- see _refuse_restricted
  -- Under an older snapshot a lane's row does not say for sure that it is the newest: the long way makes sure.
  if current_setting('transaction_isolation') = 'read committed' and current_setting('transaction_read_only') = 'off' then
    -- The usual case: all of one lease, in the order it was handed out, and nothing else.
    if cardinality(ack_ids) > 1 then
      v_is_fast := true;
      v_is_whole := ack_ids[1] < 9223372036854775807 - cardinality(ack_ids)
        and ack_ids = array(select generate_series(ack_ids[1], ack_ids[1] + cardinality(ack_ids) - 1));
    end if;
    if v_is_whole is not false then
      -- The lock keeps others from a lane that this transaction is about to free, and is not waited for: the row decides.
      -- The row's turn is odd, as no lease's is, and so costs no step of the sequence.
      insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed)
      select c.id, s.lane, s.turn, s.turn + 1, s.upto_seq, s.upto_seq, s.passed
      from sequin.consumer c
      cross join lateral (
        select s.lane, s.turn, s.upto_seq, s.passed, s.lease, s.leased_until, s.out_count, s.picks, s.settled_to, s.settled,
               s.tracked, s.held
        from sequin.lane s
        where s.consumer_id = c.id and s.lane = ((ack_ids[1] >> 14) & 63)::smallint
        order by s.prev desc
        limit 1) s
      where c.name = consumer
        and ack_ids[1] & 16383 = 0 and s.lease = ack_ids[1] >> 20 and s.out_count = cardinality(ack_ids)
        and s.picks is null and s.settled_to = 0 and s.settled is null and s.tracked = 0 and s.held = 0
        and (sequin._caller() = current_user or sequin._may_consume(c.id))
        and (pg_try_advisory_xact_lock(sequin._lane_key(consumer, s.lane)) or s.leased_until > clock_timestamp())
      on conflict do nothing;
      if found then
        return cardinality(ack_ids);
      end if;
    end if;
  end if;

  perform sequin._refuse_write('ack');
  v_consumer := sequin._my_consumer(consumer);
  if v_is_fast then
    -- The same for several lanes at once, if all of them are so. Else they are settled one after another, in their order: an
    -- insert may have to wait for another's, as of a republish, which goes by it too. After a long wait the next lane is
    -- looked at anew: who replaced its row meanwhile may be trimmed, and would not be met.
    v_deadline := clock_timestamp() + interval '1 second';
    with lease as materialized (
      select a.id >> 20 as lease, ((a.id >> 14) & 63)::smallint as lane, count(distinct a.id) as n, max(a.id & 16383) as last_place
      from unnest(ack_ids) a(id)
      where a.id > 0
      group by 1, 2
    ), whole as materialized (
      select s.lane, s.turn, s.upto_seq, s.passed, s.leased_until, a.n
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
      from (select * from whole order by lane offset 0) w
      where (select count(*) from whole) = (select count(*) from lease)
        and clock_timestamp() < v_deadline
        and (pg_try_advisory_xact_lock(sequin._lane_key(v_consumer.name, w.lane)) or w.leased_until > clock_timestamp())
      on conflict do nothing
      returning lane
    )
    select coalesce(sum(w.n), 0) into v_count from settled join whole w using (lane);
    if v_count = cardinality(ack_ids) then
      return v_count;
    end if;
  end if;

  -- What has just been settled is not the caller's any more, and is not found again.
  for v_lease in select * from sequin._leases(ack_ids) loop
    v_count := v_count + sequin._ack_in_lane(v_consumer, v_lease.lease, v_lease.lane, v_lease.places);
  end loop;
  if v_count < cardinality(ack_ids) then
    v_count := v_count + sequin._ack_tracked(v_consumer, ack_ids);
  end if;
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
set jit = off
set enable_seqscan = off
as $$
declare
  v_consumer sequin.consumer;
  v_lease record;
  s sequin.lane;
  d sequin.delivery;
  v_mine tid[];
  v_tid tid;
  v_places int[];
  v_until timestamptz;
  v_dead tid[] := '{}';              -- have been delivered as often as they may
  v_count bigint := 0;
begin
  perform sequin._refuse_write('nack');
  if delay < '0' or delay > '100 years' then
    raise invalid_parameter_value using
      message = format('nack to consumer "%s": delay is %s', consumer, delay),
      hint = 'It is an interval of 0 to 100 years; leave it out for the consumer''s backoff.';
  end if;
  v_consumer := sequin._my_consumer(consumer);
  for v_lease in select * from sequin._leases(ack_ids) loop
    loop
      s := sequin._lane(v_consumer.id, v_lease.lane);
      exit when not sequin._is_its(v_consumer, s, v_lease.lease);
      v_places := array(select unnest(sequin._unsettled(s)) intersect select unnest(v_lease.places) order by 1);
      exit when v_places = '{}';
      if sequin._untie(v_consumer, s, v_places, false, true,
           clock_timestamp() + coalesce(delay, sequin._backoff(v_consumer, 1)), error) > 0 then
        v_count := v_count + cardinality(v_places);
        exit;
      end if;
    end loop;
  end loop;
  v_mine := sequin._mine(v_consumer, ack_ids, true);
  foreach v_tid in array v_mine loop
    select t.* into d from sequin.delivery t where t.ctid = v_tid;
    v_until := clock_timestamp()
      + case when d.deliver_count >= v_consumer.max_deliver then '0' else coalesce(delay, sequin._backoff(v_consumer, d.deliver_count)) end;
    update sequin.delivery t
    set is_out = false, lease = null, pick = null, error = coalesce(nack.error, t.error), not_before = v_until,
        due_at = case when t.due_at is not null then v_until end
    where t.ctid = v_tid
    returning t.ctid into v_tid;
    if d.deliver_count >= v_consumer.max_deliver then
      v_dead := v_dead || v_tid;
    end if;
  end loop;
  -- Given up now, unless its lane is in other hands: then by a receive, as soon as it comes to it.
  for d in
    select t.* from sequin.delivery t where t.ctid = any (v_dead) order by t.lane, t.seq
  loop
    if pg_try_advisory_xact_lock(sequin._lane_key(v_consumer.name, d.lane))
       and sequin._is_next_free(v_consumer, d.lane, d.group_hash, d.seq, true) then
      perform sequin._give_up(v_consumer, d);
    end if;
  end loop;
  return v_count + cardinality(v_mine);
end $$;
comment on function sequin.nack(text, bigint[], interval, text) is
'Gives deliveries back: their messages are not done, and come again after a delay. Until then nothing later of their
groups is handed out; other groups go on.

consumer  the one they were received from
ack_ids   as receive gave them
delay     until they may come again, 100 years at most; default: the consumer''s backoff, doubled at each delivery
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
set jit = off
set enable_seqscan = off
as $$
declare
  v_consumer sequin.consumer;
  v_lease record;
  s sequin.lane;
  v_until timestamptz;
  v_places int[];
  v_unsettled int[];
  v_mine tid[];
  v_count bigint := 0;
begin
  perform sequin._refuse_write('extend');
  perform sequin._refuse_ack_wait(format('extend for consumer "%s"', consumer), ack_wait);
  v_consumer := sequin._my_consumer(consumer);
  v_until := clock_timestamp() + coalesce(ack_wait, v_consumer.ack_wait);
  for v_lease in select * from sequin._leases(ack_ids) loop
    loop
      s := sequin._lane(v_consumer.id, v_lease.lane);
      exit when not sequin._is_its(v_consumer, s, v_lease.lease);
      v_unsettled := sequin._unsettled(s);
      v_places := array(select unnest(v_unsettled) intersect select unnest(v_lease.places) order by 1);
      exit when v_places = '{}';
      if v_places = v_unsettled then
        s.leased_until := v_until;
        if sequin._put_lane(s) then
          v_count := v_count + cardinality(v_places);
          exit;
        end if;
      else
        -- From here on it is one of those that are followed one by one.
        exit when sequin._untie(v_consumer, s, v_places, true, false, v_until, null) > 0;
      end if;
    end loop;
  end loop;
  v_mine := sequin._mine(v_consumer, ack_ids, true);
  update sequin.delivery t
  set not_before = v_until, due_at = case when t.due_at is not null then v_until end
  where t.ctid = any (v_mine);
  return v_count + cardinality(v_mine);
end $$;
comment on function sequin.extend(text, bigint[], interval) is
'Gives a worker more time: the leases of these deliveries end ack_wait from now.

consumer  the one they were received from
ack_ids   as receive gave them
ack_wait  100 years at most; default: the consumer''s

Returns how many were extended: not those that have expired and were taken back, or are settled.
Errors: as ack, and 22023 bad ack_wait.';
