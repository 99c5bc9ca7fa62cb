-- Tracked messages that are due: handed out again, swept away, or given up. may_leave and at are as in deliveries.sql.

-- Whether the message of a group that is next, after this one and those that are done, is in no transaction's hands, nor
-- in a worker's while the caller's transaction goes on: one of them would have to wait for the other.
create or replace function sequin._is_next_free(
  c sequin.consumer, lane smallint, group_hash int, after bigint, may_leave boolean
)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_next bigint;
  v_is_out boolean;
begin
  select d.seq, d.is_out and d.not_before > clock_timestamp() into v_next, v_is_out from sequin.delivery d
  where d.consumer_id = c.id and d.lane = _is_next_free.lane and d.group_hash = _is_next_free.group_hash
    and d.seq > after and not d.is_done
  order by d.seq
  limit 1;
  if not found then
    return true;
  elsif v_is_out and not may_leave then
    return false;
  end if;
  perform from sequin.delivery d
  where d.consumer_id = c.id and d.lane = _is_next_free.lane and d.group_hash = _is_next_free.group_hash and d.seq = v_next
  for update skip locked;
  return found;
end $$;

-- Whether a lane's row may be replaced by one that has no delivery of it: no worker has a lease on it, or it is not
-- kept waiting.
create or replace function sequin._is_free(c sequin.consumer, lane smallint, may_leave boolean)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
begin
  return may_leave or (
    select s.lease is null from sequin.lane s where s.consumer_id = c.id and s.lane = _is_free.lane order by s.prev desc limit 1);
end $$;

-- Whether something can be done about a tracked message that is due: handed out, or, where may_leave, taken back.
create or replace function sequin._is_ready(c sequin.consumer, d sequin.delivery, may_leave boolean, at timestamptz)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
  if d.deliver_count >= c.max_deliver or d.deliver_count = 0 then
    if not sequin._is_free(c, d.lane, may_leave) then
      return false;
    end if;
  elsif d.is_out and may_leave then
    return true;
  elsif d.is_out and d.not_before + sequin._backoff(c, d.deliver_count) > at then
    return false;
  end if;
  -- One batch of a group at a time, and in order: some of it may still be with the lane's lease, even if that has run out;
  -- or later messages out than one that was redriven.
  return not exists (
      select from sequin.held_group g
      where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash
        and g.behind_lease = (
          select s.lease from sequin.lane s where s.consumer_id = c.id and s.lane = d.lane order by s.prev desc limit 1))
    and not exists (
      select from sequin.delivery g
      where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash and g.seq <> d.seq
        and g.is_out and g.not_before > at);
end $$;

-- Removes the acknowledged messages of these groups of a lane, and goes on with the groups, if it is in nobody else's
-- hands. How many. (By due_at they would be found among those of all lanes.)
create or replace function sequin._sweep(c sequin.consumer, lane smallint, groups int[], may_leave boolean)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_count int := 0;
  v_groups int[];
begin
  if not sequin._is_free(c, lane, may_leave) or not pg_try_advisory_xact_lock(sequin._lane_key(c.name, lane))
     or not sequin._is_free(c, lane, may_leave) then
    return 0;
  end if;
  -- As in _overtake: what was passed by meanwhile may be a history.
  select * into c from sequin.consumer t where t.id = c.id;
  if not found then
    return 0;  -- dropped
  end if;
  v_groups := array(
    select g.group_hash from unnest(groups) g(group_hash)
    where sequin._is_next_free(c, _sweep.lane, g.group_hash, -1, may_leave));
  if v_groups <> '{}' then
    delete from sequin.delivery d
    where d.consumer_id = c.id and d.lane = _sweep.lane and d.group_hash = any (v_groups) and d.is_done;
    get diagnostics v_count = row_count;
    perform sequin._advance_groups(c, lane, v_groups, v_count);
  end if;
  return v_count;
exception when lock_not_available then
  return 0;  -- as in _expire
end $$;

-- The same with all lanes.
create or replace function sequin._sweep_all(c sequin.consumer, may_leave boolean)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
begin
  return (
    select coalesce(sum(sequin._sweep(c, n.lane, n.groups, may_leave)), 0)::bigint
    from (
      select d.lane, array_agg(distinct d.group_hash) as groups
      from sequin.delivery d
      where d.consumer_id = c.id and d.due_at = 'epoch'
      group by d.lane
      order by d.lane) n);
end $$;

-- Gives a tracked message up: it is a dead letter, and its group goes on. The caller holds its lane's lock, and its row.
create or replace function sequin._give_up(c sequin.consumer, d sequin.delivery)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  -- As in _sweep.
  select * into c from sequin.consumer t where t.id = c.id;
  if not found then
    return;  -- dropped
  end if;
  perform sequin._bury(d, d.error);
  delete from sequin.delivery t
  where t.consumer_id = c.id and t.lane = d.lane and t.group_hash = d.group_hash and t.seq = d.seq;
  perform sequin._advance_groups(c, d.lane, array[d.group_hash], 1);
end $$;

-- Looks after tracked messages, and hands out max_rows (0: none) of those that are due: the first of a group, and those
-- behind it that may go along. Acknowledged ones are removed, expired ones back off or are given up. In other hands'
-- lanes nothing is done.
create or replace function sequin._take_due(
  consumer_id int, max_rows int, ack_wait interval, may_leave boolean, at timestamptz
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
  d sequin.delivery;
  s sequin.lane;
  v_skip smallint[] := '{}';         -- lanes in other hands
  v_full smallint[] := '{}';         -- lanes without room for what was never handed out
  v_has_freed boolean;
  v_until timestamptz;
  v_seqs bigint[];
  v_ids tid[];                       -- where they are, locked
  v_fresh int;
  v_waiting int;
  v_room int;
  v_permits smallint[];
  v_turn bigint;
  v_left int := max_rows;
  v_count int;
begin
  select * into c from sequin.consumer c where c.id = _take_due.consumer_id;
  if not found then
    return;  -- dropped
  end if;
  for v_pass in 1..2 loop
    v_has_freed := sequin._sweep_all(c, may_leave) > 0;
    for d in
      -- Those that were never handed out come last: for lack of room they may have to wait, and others not.
      (select d.* from sequin.delivery d
       where d.consumer_id = c.id and d.due_at > 'epoch' and d.due_at <= at
         and (max_rows > 0 or d.is_out or d.deliver_count >= c.max_deliver)
       order by d.due_at
       limit 1000)
      union all
      (select d.* from sequin.delivery d
       where d.consumer_id = c.id and d.due_at = '-infinity' and max_rows > 0
       limit 1000)
    loop
      exit when v_left <= 0 and max_rows > 0;
      continue when d.lane = any (v_skip) or d.deliver_count = 0 and d.lane = any (v_full);
      -- A lock is kept to the end of the transaction: not taken for nothing.
      continue when not sequin._is_ready(c, d, may_leave, at);
      if not pg_try_advisory_xact_lock(sequin._lane_key(c.name, d.lane)) then
        v_skip := v_skip || d.lane;
        continue;
      end if;
      -- Its worker may be acknowledging it after all. (It is not looked for among all that is due.)
      select * into d from sequin.delivery t
      where t.consumer_id = c.id and t.lane = d.lane and t.group_hash = d.group_hash and t.seq = d.seq
        and coalesce(t.due_at, 'infinity') <= at and not t.is_done
      for update skip locked;
      continue when not found or not sequin._is_ready(c, d, may_leave, at);
      s := sequin._lane(c.id, d.lane);

      if d.deliver_count >= c.max_deliver then
        continue when not sequin._is_next_free(c, d.lane, d.group_hash, d.seq, may_leave);
        if d.is_out then
          d.error := 'not acknowledged within its ack_wait';
        end if;
        begin
          perform sequin._give_up(c, d);
          v_has_freed := true;
        exception when lock_not_available then
          null;  -- as in _expire
        end;
        continue;
      elsif d.is_out then
        v_until := d.not_before + sequin._backoff(c, d.deliver_count);
        update sequin.delivery t
        set is_out = false, error = 'not acknowledged within its ack_wait', not_before = v_until, due_at = v_until
        where t.consumer_id = c.id and t.lane = d.lane and t.group_hash = d.group_hash and t.seq = d.seq;
        continue when v_until > at;
      end if;
      continue when max_rows = 0;

      select coalesce(array_agg(g.seq order by g.seq), '{}'), array_agg(g.id order by g.seq) into v_seqs, v_ids
      from (
        select g.seq, g.ctid as id from sequin.delivery g
        where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash
          and not g.is_out and not g.is_done and g.not_before <= at
          and (g.deliver_count < c.max_deliver) is not false
        order by g.seq
        limit v_left
        for update skip locked) g;
      -- The first of the group, as far as they may all go.
      v_seqs := array(
        select p.seq
        from (
          select p.seq, p.place, bool_and(coalesce(p.seq = p.next, false)) over (order by p.place) as may_go
          from unnest(v_seqs, array(
            select g.seq from sequin.delivery g
            where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash and not g.is_done
            order by g.seq
            limit v_left)) with ordinality p(seq, next, place)) p
        where p.may_go
        order by p.place);
      -- What was never handed out changes the lane's row, which its worker may be about to: it waits until the lane is free.
      if not may_leave and s.lease is not null and d.deliver_count > 0 then
        v_seqs := v_seqs[1:coalesce(array_position(v_seqs, (
          select min(g.seq) from sequin.delivery g
          where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash and not g.is_done and g.deliver_count = 0
            and g.seq = any (v_seqs))) - 1, cardinality(v_seqs))];
        continue when v_seqs = '{}';
      end if;
      -- What was never handed out is pending from now on. It may have the room of what was given back and waits behind it.
      select count(*) filter (where g.deliver_count = 0 and g.seq <= v_seqs[cardinality(v_seqs)]), count(*) filter (where g.deliver_count > 0)
        into v_fresh, v_waiting
      from sequin.delivery g
      where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash and not g.is_out and not g.is_done;
      if v_fresh > 0 then
        v_count := s.out_count + s.tracked - s.fresh - v_waiting;
        v_room := c.lane_quota + c.permit_size * coalesce(cardinality(s.permits), 0) - v_count;
        v_permits := null;
        if v_room < cardinality(v_seqs) then
          v_permits := sequin._permits(
            c, sequin._permits_for(c, v_count + cardinality(v_seqs)) - coalesce(cardinality(s.permits), 0));
          v_room := v_room + c.permit_size * cardinality(v_permits);
        end if;
        if v_room < cardinality(v_seqs) then
          v_full := v_full || d.lane;
          v_seqs := v_seqs[1:greatest(v_room, 0)];
          continue when v_seqs = '{}';
          select count(*) into v_fresh from sequin.delivery g
          where g.consumer_id = c.id and g.lane = d.lane and g.group_hash = d.group_hash
            and g.seq <= v_seqs[cardinality(v_seqs)] and not g.is_done and g.deliver_count = 0;
        end if;
        perform sequin._count_lane(c, d.lane, 0, -v_fresh, 0, 0, v_permits);
      end if;

      v_turn := nextval('sequin.turn');
      update sequin.delivery t
      set lease = v_turn, pick = p.place - 1, is_out = true, deliver_count = t.deliver_count + 1,
          leased_at = clock_timestamp(), not_before = clock_timestamp() + ack_wait,
          due_at = case when p.place = 1 then clock_timestamp() + ack_wait end
      from unnest(v_ids[1:cardinality(v_seqs)]) with ordinality p(id, place)
      where t.ctid = p.id;
      get diagnostics v_count = row_count;
      v_left := v_left - v_count;
      return query
        select sequin._ack_id(v_turn, t.lane, t.pick), t.seq, sequin._action(t.action), t.table_schema, t.table_name,
               t.record_pk, t.record, case when not c.is_rows then t.changes end, t.committed_at, t.deliver_count, t.metadata
        from sequin.delivery t
        where t.consumer_id = c.id and t.lane = d.lane and t.group_hash = d.group_hash and t.lease = v_turn
        order by t.seq;
    end loop;
    exit when not v_has_freed or v_left <= 0;
  end loop;
end $$;
