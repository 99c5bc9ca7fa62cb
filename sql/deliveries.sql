-- Messages that are followed one by one, because something happened to them that happened to their neighbours in the
-- lane not: a nack, an expiry, a longer lease, a worker so slow that others must overtake it. Rows of
-- sequin.delivery; as long as a group has one, its lane passes the group by (sequin.held_group).
--
-- Everything here happens under the lane's lock.

-- The delay before the next delivery after so many: backoff, doubled each time, up to a fifth more, never above
-- max_backoff.
create or replace function sequin._backoff(c sequin.consumer, deliver_count int)
returns interval
language sql
volatile
set search_path = pg_catalog, pg_temp
as $$
  select least(
    c.max_backoff,
    make_interval(secs => least(
      extract(epoch from c.max_backoff)::float8,
      extract(epoch from c.backoff)::float8 * 2 ^ least(deliver_count - 1, 40) * (1 + 0.2 * random()))))
$$;

-- Which places of a lease are not settled yet.
create or replace function sequin._unsettled(s sequin.lane)
returns int[]
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select array(
    select p.place
    from unnest(coalesce(
      s.picks,
      array(select generate_series(s.settled_to, s.settled_to + coalesce(cardinality(s.settled), 0) + s.out_count - 1)))) p(place)
    where not p.place = any (coalesce(s.settled, '{}'))
    order by p.place)
$$;

-- A lane's state once these unsettled places of its lease are settled. With the last of them the lease ends.
create or replace function sequin._settle(s sequin.lane, places int[])
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
  s.permits := s.permits[1:s.out_count + s.tracked];
  return s;
end $$;

-- Makes the first message of a group the one that is waited for: when it may be handed out, or when its lease ends.
create or replace function sequin._arm(consumer_id int, lane smallint, group_hash int)
returns void
language sql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  update sequin.delivery d
  set due_at = case when d.seq = f.seq then d.not_before end
  from (
    select min(d.seq) as seq from sequin.delivery d
    where d.consumer_id = $1 and d.lane = $2 and d.group_hash = $3) f
  where d.consumer_id = $1 and d.lane = $2 and d.group_hash = $3
    and d.due_at is distinct from case when d.seq = f.seq then d.not_before end
$$;

-- Takes unsettled messages out of a lane's lease, to be followed one by one from here on. until is when they may be
-- handed out again, or, where they stay out (an extended or overtaken lease), the end of it. A message that has been
-- delivered often enough becomes a dead letter. How many: 0 where another has moved the lane on.
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
  v_is_dead boolean := not stays_out and c.max_deliver <= 1;
  v_rest int[];
  v_rows sequin.delivery[];
  v_groups int[];
  v_behind int[];
  v_group int;
begin
  v_is_dead := coalesce(v_is_dead, false);
  v_rest := array(select unnest(sequin._unsettled(s)) except select unnest(places));
  select array_agg(
           (c.id, r.seq, s.lane, r.group_hash, 1, until, null, case when not is_given_back then v_lease end, r.place,
            stays_out, v_leased_at, error, r.route_id, r.committed_at, r.action, r.table_schema, r.table_name,
            r.record_pk, r.record, r.changes, r.metadata)::sequin.delivery order by r.seq) filter (where r.place = any (places)),
         array_agg(distinct r.group_hash) filter (where r.place = any (places)),
         array_agg(distinct r.group_hash) filter (where r.place = any (v_rest))
    into v_rows, v_groups, v_behind
  from (
    select r.*, (row_number() over (order by r.seq) - 1)::int as place
    from sequin._rows(c, s.lane, s.cursor_seq, s.upto_seq, 2147483647) r) r;

  if v_is_dead then
    v_groups := '{}';
  else
    s.tracked := s.tracked + cardinality(places);
    s.held := s.held + (
      select count(*) from unnest(v_groups) n(group_hash)
      where not exists (
        select from sequin.held_group g
        where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = n.group_hash));
  end if;
  if not sequin._put_lane(sequin._settle(s, places)) then
    return 0;
  end if;

  if v_is_dead then
    perform sequin._bury(d, error) from unnest(v_rows) d;
  else
    insert into sequin.held_group (consumer_id, lane, group_hash, after_seq, behind_lease)
    select c.id, s.lane, n.group_hash, s.upto_seq, case when n.group_hash = any (v_behind) then v_lease end
    from unnest(v_groups) n(group_hash)
    on conflict (consumer_id, lane, group_hash) do update set behind_lease = excluded.behind_lease;
    insert into sequin.delivery select d.* from unnest(v_rows) d;
    foreach v_group in array v_groups loop
      perform sequin._arm(c.id, s.lane, v_group);
    end loop;
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

-- What a lane has passed by of a held group, after one seq and up to another. By key it is found by its key: the lane
-- may have gone far.
create or replace function sequin._passed_by(
  c sequin.consumer, lane smallint, group_hash int, route_id int, record_pk text, after bigint, upto bigint, max_rows int
)
returns setof sequin.delivery
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  if c.reads = 'key' and record_pk is not null then
    return query
      select c.id, l.seq, _passed_by.lane, l.group_hash, 0, now(), null::timestamptz, null::bigint, null::int, false,
             null::timestamptz, null::text, l.route_id, l.committed_at, l.action, l.table_schema, l.table_name,
             l.record_pk, l.record, l.changes, l.metadata
      from sequin.log l
      where l.route_id = _passed_by.route_id and l.record_pk = _passed_by.record_pk and l.seq > after and l.seq <= upto
        and l.lane = _passed_by.lane and (l.action in ('i', 'u', 'd', 'r') or l.action = 'x' and c.is_rows)
      order by l.seq
      limit max_rows;
  else
    return query
      select c.id, l.seq, _passed_by.lane, l.group_hash, 0, now(), null::timestamptz, null::bigint, null::int, false,
             null::timestamptz, null::text, l.route_id, l.committed_at, l.action, l.table_schema, l.table_name,
             l.record_pk, l.record, l.changes, l.metadata
      from sequin._rows(c, _passed_by.lane, after, upto, 2147483647) l
      where l.group_hash = _passed_by.group_hash
        and (l.action in ('i', 'u', 'd', 'r') or l.action = 't' and 'truncate' = any (c.actions) or l.action = 'x' and c.is_rows)
      order by l.seq
      limit max_rows;
  end if;
end $$;

-- Goes on with a group after one of its tracked messages is settled: the next of them; else what the lane has passed
-- by meanwhile, a hundred at a time; else the group is its lane's again.
create or replace function sequin._advance_group(
  c sequin.consumer, lane smallint, group_hash int, route_id int, record_pk text
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  s sequin.lane := sequin._lane(c.id, lane);
  v_after bigint;
  v_passed sequin.delivery[];
  v_max int := least(100, greatest(c.max_ack_pending - s.tracked, 1));
begin
  if exists (
       select from sequin.delivery d
       where d.consumer_id = c.id and d.lane = s.lane and d.group_hash = _advance_group.group_hash) then
    perform sequin._arm(c.id, s.lane, group_hash);
    return;
  end if;
  select g.after_seq into v_after from sequin.held_group g
  where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = _advance_group.group_hash;
  if not found then
    return;
  end if;
  if s.held_back > 0 then
    v_passed := array(
      select p from sequin._passed_by(c, s.lane, group_hash, route_id, record_pk, v_after, s.upto_seq, v_max) p order by p.seq);
  end if;
  if coalesce(cardinality(v_passed), 0) = 0 then
    delete from sequin.held_group g
    where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = _advance_group.group_hash;
    perform sequin._count_lane(c.id, s.lane, 0, -1, 0);
  else
    update sequin.held_group g
    set after_seq = case when cardinality(v_passed) < v_max then s.upto_seq else v_passed[cardinality(v_passed)].seq end
    where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = _advance_group.group_hash;
    insert into sequin.delivery select p.* from unnest(v_passed) p;
    perform sequin._count_lane(c.id, s.lane, cardinality(v_passed), 0, -cardinality(v_passed));
    perform sequin._arm(c.id, s.lane, group_hash);
  end if;
end $$;

-- Ends the leases of these lanes that have run out: what was not acknowledged backs off. Where the caller waits until
-- a deadline, only what it could still hand out by then, because what it does here is nobody's until it returns.
-- How many messages.
create or replace function sequin._expire(c sequin.consumer, lanes smallint[], deadline timestamptz)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
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
    continue when s.leased_until is null or s.leased_until > clock_timestamp() or v_until > deadline
      or not pg_try_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
    s := sequin._lane(c.id, v_lane);
    if s.leased_until <= clock_timestamp() then
      v_total := v_total + sequin._untie(c, s, sequin._unsettled(s), false, false, v_until, 'not acknowledged within its ack_wait');
    end if;
  end loop;
  return v_total;
end $$;

-- Lets other groups overtake leases that keep their lanes waiting: the messages that are out stay out, but one by
-- one. Worth it only where another group is next in line. A few lanes at a time. How many messages.
create or replace function sequin._overtake(c sequin.consumer, lanes smallint[])
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_lane smallint;
  s sequin.lane;
  v_total bigint := 0;
begin
  foreach v_lane in array coalesce(lanes[1:4], '{}') loop
    s := sequin._lane(c.id, v_lane);
    continue when c.lane_count = 1 or s.lease is null
      or not exists (
        select from sequin._rows(c, s.lane, s.upto_seq, 9223372036854775807, 64) n
        where not exists (
                select from sequin._rows(c, s.lane, s.cursor_seq, s.upto_seq, 2147483647) o where o.group_hash = n.group_hash)
          and not exists (
                select from sequin.held_group g
                where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = n.group_hash))
      or not pg_try_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
    s := sequin._lane(c.id, v_lane);
    if s.leased_until > clock_timestamp() then
      v_total := v_total + sequin._untie(c, s, sequin._unsettled(s), true, false, s.leased_until, null);
    end if;
  end loop;
  return v_total;
end $$;

-- Hands out tracked messages that are due: the first of a group, and those behind it that may go along.
create or replace function sequin._take_due(consumer_id int, max_rows int, ack_wait interval)
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
  v_first record;
  d sequin.delivery;
  s sequin.lane;
  v_turn bigint;
  v_left int := max_rows;
  v_count int;
begin
  select * into c from sequin.consumer c where c.id = _take_due.consumer_id;
  for v_first in
    select d.seq, d.lane from sequin.delivery d
    where d.consumer_id = c.id and d.due_at <= clock_timestamp()
    order by d.due_at
    limit max_rows + 16
  loop
    exit when v_left <= 0;
    continue when not pg_try_advisory_xact_lock(sequin._lane_key(c.name, v_first.lane));
    s := sequin._lane(c.id, v_first.lane);
    select * into d from sequin.delivery d
    where d.consumer_id = c.id and d.seq = v_first.seq and d.due_at <= clock_timestamp();
    continue when not found;

    if d.is_out then
      -- Its lease has run out.
      d.error := 'not acknowledged within its ack_wait';
      if d.deliver_count >= c.max_deliver then
        perform sequin._drop_tracked(c, d, true);
        continue;
      end if;
      d.not_before := d.not_before + sequin._backoff(c, d.deliver_count);
      update sequin.delivery t set is_out = false, error = d.error, not_before = d.not_before, due_at = d.not_before
      where t.consumer_id = c.id and t.seq = d.seq;
      continue when d.not_before > clock_timestamp();
    end if;
    -- Some of its group may still be out with the lane's lease: one batch of a group at a time.
    continue when exists (
      select from sequin.held_group g
      where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash
        and g.behind_lease = s.lease and s.leased_until > clock_timestamp());

    v_turn := nextval('sequin.turn');
    update sequin.delivery t
    set lease = v_turn, pick = p.place, is_out = true, deliver_count = t.deliver_count + 1, leased_at = clock_timestamp(),
        not_before = clock_timestamp() + ack_wait,
        due_at = case when t.seq = d.seq then clock_timestamp() + ack_wait end
    from (
      select g.seq, row_number() over (order by g.seq) - 1 as place,
             bool_and(not g.is_out and g.not_before <= clock_timestamp()) over (order by g.seq) as may_go
      from sequin.delivery g
      where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash
      order by g.seq
      limit v_left) p
    where t.consumer_id = c.id and t.seq = p.seq and p.may_go;
    get diagnostics v_count = row_count;
    v_left := v_left - v_count;
    return query
      select sequin._ack_id(v_turn, true, t.lane, t.pick), t.seq, sequin._action(t.action), t.table_schema, t.table_name,
             t.record_pk, t.record, case when not c.is_rows then t.changes end, t.committed_at, t.deliver_count, t.metadata
      from sequin.delivery t
      where t.consumer_id = c.id and t.lease = v_turn
      order by t.seq;
  end loop;
end $$;

-- Settles one tracked message: it is done, or dead, and its group goes on.
create or replace function sequin._drop_tracked(c sequin.consumer, d sequin.delivery, is_dead boolean)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if is_dead then
    perform sequin._bury(d, d.error);
  end if;
  delete from sequin.delivery t where t.consumer_id = c.id and t.seq = d.seq;
  perform sequin._count_lane(c.id, d.lane, -1, 0, 0);
  perform sequin._advance_group(c, d.lane, d.group_hash, d.route_id, d.record_pk);
end $$;
