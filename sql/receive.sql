-- Handing out messages.

-- 22023 for a batch or a wait that is out of bounds, 55000 for one that would be in vain. call says whose it is.
create or replace function sequin._refuse_wait(call text, batch_size int, wait interval)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if batch_size is null or batch_size not between 1 and 10000 then
    raise invalid_parameter_value using
      message = format('%s: batch_size is %s', call, coalesce(batch_size::text, 'null')),
      hint = 'It is 1 to 10000.';
  elsif wait is null or wait < '0' or wait > '60 seconds' then
    raise invalid_parameter_value using
      message = format('%s: wait is %s', call, coalesce(wait::text, 'null')),
      hint = 'It is an interval of 0 to 60 seconds; call again to wait longer.';
  elsif wait > '0' and current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    raise object_not_in_prerequisite_state using
      message = format('%s: wait needs read committed: a %s transaction never sees what commits while it waits', call,
        current_setting('transaction_isolation')),
      hint = 'Leave wait out, or wait in a transaction of its own.';
  end if;
end $$;

-- Refuses what receive and pop cannot do, and says why. Called only when something is wrong.
create or replace function sequin._refuse_receive(verb text, consumer text, batch_size int, wait interval, ack_wait interval)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_call text := verb || coalesce(' from consumer "' || consumer || '"', '');
begin
  perform sequin._refuse_write(verb);
  perform sequin._refuse_wait(v_call, batch_size, wait);
  perform sequin._refuse_ack_wait(v_call, ack_wait);
end $$;

-- 22023 for a lease that is over at once, or would end beyond what a timestamp holds.
create or replace function sequin._refuse_ack_wait(call text, ack_wait interval)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if ack_wait <= '0' or ack_wait > '100 years' then
    raise invalid_parameter_value using
      message = format('%s: ack_wait is %s', call, ack_wait),
      hint = 'It is an interval above 0, of 100 years at most; leave it out for the consumer''s own.';
  end if;
end $$;

-- Which of so many lanes a turn begins with: workers that ask at the same time meet in none, and whoever has each second
-- turn, or each nth, comes to all of them.
create or replace function sequin._nth(turn bigint, lanes int)
returns int
language sql
immutable
as $$
  select ((turn / 2 + turn / 2 / greatest(lanes, 1)) % greatest(lanes, 1))::int
$$;

create or replace function sequin.receive(
  consumer text default null,
  batch_size int default 1,
  wait interval default '0',
  ack_wait interval default null
)
returns table (
  ack_id bigint,
  seq bigint,
  action text,
  table_schema text,
  table_name text,
  record_pk text,
  record jsonb,
  changes jsonb,
  committed_at timestamptz,
  deliver_count int,
  metadata jsonb
)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_consumer sequin.consumer;        -- read whole only off the fast path
  v_id int;
  v_route int;                       -- of a consumer that reads one table by key; null: any other
  v_quota int;
  v_is_tight boolean;
  v_is_rows boolean;
  v_ack_wait interval;
  v_is_ready boolean;
  v_is_mine boolean;
  v_busy smallint[];
  v_is_deep boolean;
  v_survey sequin._survey;
  v_lanes smallint[];
  v_limits int[];
  v_lane smallint;
  v_limit int;
  v_left int;
  v_wanted int;                      -- what was left when lanes were last chosen
  v_size int;                        -- a permit is good for so many messages, in a lane that has its quota
  v_permits smallint[];
  v_room int;                        -- so much more may be out of the lane, with the permits that it has
  v_more smallint[];                 -- and these are for the rest
  v_is_dry boolean;                  -- there are no more to be had
  v_needed int;
  v_prev bigint;
  v_from bigint;
  v_to bigint;
  v_passed bigint;
  v_is_plain boolean;
  v_turn bigint;
  v_ack_id bigint;
  v_count int;
  v_misses int;
  v_has_moved boolean;               -- in this round a lane was
  v_has_freed boolean;               -- this call has settled what others left behind: its messages may be due now
  v_is_strict boolean;
  v_at timestamptz;                  -- what has run out, has by then: never what this call hands out
  v_is_waiting boolean;              -- the caller is _receive_waiting, and is told by an error that there is nothing
begin
  unlisten "sequin.";  -- see _refuse_restricted
  if wait > '0' and wait <= '60 seconds' and current_setting('transaction_isolation') in ('read committed', 'read uncommitted') then
    return query select * from sequin._receive_waiting(consumer, batch_size, wait, ack_wait);
    return;
  end if;
  -- Nearly all of a backlog is handed out here: far behind, lanes in turn that are free and plain (each row of the
  -- range is a message, and none an older version of another), in as few statements and expressions as it takes: a
  -- statement costs as much as ten rows. One receive in a hundred goes the long way all the same, to see what is due;
  -- so does one that meets a lane with tracked messages, and what is wrong, to hear what.
  if batch_size between 1 and 10000 and wait in ('0', sequin._waiting()) and (ack_wait > '0' and ack_wait <= '100 years') is not false
     and current_setting('transaction_isolation') = 'read committed' and current_setting('transaction_read_only') = 'off'
     and random() > 0.01 then
    loop
      v_turn := nextval('sequin.turn');
      -- For a single message, in two misses of three, without what the other statement has to look up: what a plan holds
      -- is set up at each call, used or not.
      if batch_size = 1 and coalesce(v_misses, 0) % 3 < 2 then
        select c.id, c.routes[1], c.is_rows, coalesce(receive.ack_wait, c.ack_wait), s.lane, s.turn,
               case when s.lease is null then s.upto_seq end, s.passed
          into v_id, v_route, v_is_rows, v_ack_wait, v_lane, v_prev,
               v_from, v_passed
        from sequin.consumer c
        cross join lateral (
          select f.busy[1 + sequin._nth(v_turn, cardinality(f.busy))] as lane, f.is_deep
          from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1) f
        cross join lateral (
          select s.lane, s.turn, s.upto_seq, s.passed, s.lease, s.held, s.tracked
          from sequin.lane s where s.consumer_id = c.id and s.lane = f.lane order by s.prev desc limit 1) s
        where c.name = consumer and f.is_deep
          and c.reads = 'key' and cardinality(c.routes) = 1
          and c.start_seq is not null and c.paused_at is null
          and c.lane_quota > 0
          and s.held = 0 and s.tracked = 0
          and (sequin._caller() = current_user or sequin._may_consume(c.id));
      else
        select c.id, c.routes[1], c.is_rows, coalesce(receive.ack_wait, c.ack_wait), c.lane_quota,
               s.lane, s.turn,
               case when s.lease is null and (batch_size = 1 or exists (
                 select from sequin.log l
                 where l.route_id = c.routes[1] and l.lane = s.lane and l.seq > s.upto_seq
                   and l.seq < sequin._segment_end(s.upto_seq))) then s.upto_seq end, s.passed
          into v_id, v_route, v_is_rows, v_ack_wait, v_quota,
               v_lane, v_prev, v_from, v_passed
        from sequin.consumer c
        cross join lateral (
          select f.is_deep,
                 -- Where few lanes have it all, one that is free.
                 case when v_misses is null or v_misses < 2 then f.busy[1 + sequin._nth(v_turn, cardinality(f.busy))]
                 else (
                   select b.lane from unnest(f.busy) b(lane)
                   where (select s.lease is null from sequin.lane s
                          where s.consumer_id = c.id and s.lane = b.lane order by s.prev desc limit 1)
                   order by random()
                   limit 1) end as lane
          from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1) f
        cross join lateral (
          select s.lane, s.turn, s.upto_seq, s.passed, s.lease, s.held, s.tracked
          from sequin.lane s where s.consumer_id = c.id and s.lane = f.lane order by s.prev desc limit 1) s
        where c.name = consumer and f.is_deep
          and c.reads = 'key' and cardinality(c.routes) = 1
          and c.start_seq is not null and c.paused_at is null
          and c.lane_quota > 0
          and s.held = 0 and s.tracked = 0
          and (sequin._caller() = current_user or sequin._may_consume(c.id));
      end if;
      if found and batch_size = 1 then
        select l.seq, sequin._action(l.action), l.table_schema, l.table_name, l.record_pk, l.record,
               case when not v_is_rows then l.changes end, l.committed_at, 1, l.metadata,
               sequin._ack_id(v_turn, v_lane, 0), l.action in ('i', 'u', 'd', 'r')
          into seq, action, table_schema, table_name, record_pk, record,
               changes, committed_at, deliver_count, metadata,
               ack_id, v_is_plain
        from sequin.log l
        where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq < sequin._segment_end(v_from)
        order by l.seq
        limit 1;
        -- Locked only now, so that a lane with nothing to take is not kept from others; its row says if it was too late.
        if v_is_plain and pg_try_advisory_xact_lock(sequin._lane_key(consumer, v_lane)) then
          insert into sequin.lane (
            consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed, lease, leased_at, leased_until, out_count)
          select v_id, v_lane, v_prev, v_turn, v_from, seq, v_passed + 1,
                 v_turn, clock_timestamp(), clock_timestamp() + v_ack_wait, 1
          -- The lock is held: nobody can move the lane on from here, and a row that was replaced and trimmed is not found.
          -- And the turn was taken before the row was read, which must not be newer: newest is who replaces the latest.
          where v_prev < v_turn and v_prev = (
            select s.turn from sequin.lane s where s.consumer_id = v_id and s.lane = v_lane order by s.prev desc limit 1);
          if found then
            return next;
            return;
          end if;
        end if;
      elsif not found then
        exit;
      elsif v_from is not null and pg_try_advisory_xact_lock(sequin._lane_key(consumer, v_lane)) then
        v_left := coalesce(v_left, batch_size);
        if v_left > v_quota and v_permits is null then
          select * into v_consumer from sequin.consumer c where c.id = v_id;
          v_size := v_consumer.permit_size;
          v_permits := sequin._permits(v_consumer, sequin._permits_for(v_consumer, v_left));
        end if;
        insert into sequin.lane (
          consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed, lease, leased_at, leased_until, out_count, permits)
        select v_id, v_lane, v_prev, v_turn, v_from, l.last_seq, v_passed + l.n,
               v_turn, clock_timestamp(), clock_timestamp() + v_ack_wait, l.n,
               nullif(v_permits[1:(l.n - v_quota + v_size - 1) / v_size], '{}')
        from (
          -- Locked: nobody can move the lane on from here, and a row that was replaced and trimmed is not found.
          select s.turn from sequin.lane s where s.consumer_id = v_id and s.lane = v_lane order by s.prev desc limit 1) s
        cross join lateral (
          select max(l.seq) as last_seq, count(*) as n, count(distinct l.group_hash) filter (where v_is_rows) as group_count,
                 bool_and(l.action in ('i', 'u', 'd', 'r')) as is_plain
          from (
            select l.seq, l.action, l.group_hash from sequin.log l
            where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq < sequin._segment_end(v_from)
            order by l.seq
            limit least(v_left, v_quota + coalesce(cardinality(v_permits) * v_size, 0))) l) l
        where s.turn = v_prev and v_prev < v_turn and l.is_plain and (not v_is_rows or l.group_count = l.n)
        returning upto_seq, out_count, sequin._ack_id(turn, lane, 0) - 1 into v_to, v_count, v_ack_id;
        if found then
          return query
            select v_ack_id + row_number() over (), l.seq, sequin._action(l.action),
                   l.table_schema, l.table_name, l.record_pk, l.record, case when not v_is_rows then l.changes end,
                   l.committed_at, 1, l.metadata
            from (
              select * from sequin.log l
              where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq <= v_to
              order by l.seq) l;
          v_left := v_left - v_count;
          exit when v_left = 0;
          v_permits := v_permits[greatest((v_count - v_quota + v_size - 1) / v_size, 0) + 1:];
          v_misses := 0;
        end if;
      end if;
      v_misses := coalesce(v_misses, 0) + 1;
      exit when v_misses >= 5;
    end loop;
    -- Nearly dry: the rest is found the long way.
    if v_left = 0 then
      return;
    end if;
  end if;

  v_is_waiting := coalesce(wait = sequin._waiting(), false);
  if (batch_size between 1 and 10000 and (wait = '0' or v_is_waiting) and (ack_wait > '0' and ack_wait <= '100 years') is not false
      and current_setting('transaction_read_only') = 'off') is not true then
    perform sequin._refuse_receive('receive', consumer, batch_size, case when v_is_waiting then '0' else wait end, ack_wait);
  end if;
  v_left := coalesce(v_left, batch_size);
  v_is_strict := sequin._is_strict();
  loop
    v_at := clock_timestamp();
    v_permits := null;
    v_is_dry := false;
    v_survey := null;
    select c.id, case when c.reads = 'key' and cardinality(c.routes) = 1 then c.routes[1] end, c.lane_quota, c.permit_size,
           c.lane_quota = 0, c.is_rows, coalesce(receive.ack_wait, c.ack_wait),
           c.start_seq is not null and c.paused_at is null,
           sequin._caller() = current_user or sequin._may_consume(c.id), f.busy,
           coalesce(f.is_deep, false) and coalesce(v_misses, 0) < 2, 0, false
      into v_id, v_route, v_quota, v_size,
           v_is_tight, v_is_rows, v_ack_wait,
           v_is_ready,
           v_is_mine, v_busy, v_is_deep, v_misses, v_has_freed
    from sequin.consumer c
    left join lateral (
      select f.busy, f.is_deep from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1) f on true
    where c.name = consumer;
    if v_is_mine is not true then
      v_consumer := sequin._my_consumer(consumer);
      consumer := v_consumer.name;
      continue;
    end if;
    if v_is_deep and (v_is_tight or v_left > v_quota) or not v_is_ready then
      select * into v_consumer from sequin.consumer c where c.id = v_id;
    end if;

    -- A consumer gets its lanes from the bridge; without one, from a receive that does not wait, as this is a write.
    if not v_is_ready and not v_is_waiting and v_consumer.start_seq is null and sequin._start(v_id) then
      continue;
    end if;

    for v_round in 1..20 loop
      exit when v_left <= 0 or not v_is_ready;
      -- What was nacked or has expired comes first.
      if v_round = 1 or v_has_freed then
        if exists (select from sequin.delivery d where d.consumer_id = v_id and d.due_at <= v_at) then
          v_permits := null;
          return query select * from sequin._take_due(v_id, v_left, v_ack_wait, false, v_at);
          get diagnostics v_count = row_count;
          v_left := v_left - v_count;
          exit when v_left <= 0;
        end if;
      end if;

      -- Which lanes to try: far behind, a busy one at random; else those that a survey finds. Now and then a survey
      -- anyway, for leases that ran out, and for lanes that had nothing when last looked at.
      if v_is_deep and v_misses < 3 and random() > 0.1 then
        v_lanes := array[v_busy[1 + floor(random() * cardinality(v_busy))]];
        v_limits := array[v_left];
      else
        v_is_deep := false;
        select * into v_consumer from sequin.consumer c where c.id = v_id;
        v_survey := sequin._survey(v_consumer, v_left, not v_is_waiting);
        if sequin._expire(v_consumer, v_survey.expired, false, v_at) > 0
           or v_survey.lanes is null and sequin._overtake(v_consumer, v_survey.stuck,
                statement_timestamp() - transaction_timestamp() < '2 milliseconds' and not (v_is_waiting and v_is_tight)) > 0 then
          exit when v_has_freed;
          v_has_freed := true;
          continue;
        end if;
        exit when v_survey.lanes is null;
        v_lanes := v_survey.lanes;
        v_limits := v_survey.limits;
      end if;
      v_has_moved := v_is_deep;
      v_wanted := v_left;
      -- Nearly caught up, a batch is a few messages of each of several lanes.
      if v_left > 1 and cardinality(v_lanes) > 1 and v_route is not null and not v_is_tight and not v_is_strict then
        return query select * from sequin._take_lanes(v_id, consumer, v_route, v_lanes, v_limits, v_left, v_quota, v_is_rows, v_ack_wait);
        get diagnostics v_count = row_count;
        if v_count > 0 then
          v_left := v_left - v_count;
          v_has_moved := true;
          v_misses := 0;
          exit when v_survey.is_all and v_count >= (select sum(l) from unnest(v_limits) l);
        end if;
      end if;
      if v_permits is null and v_is_tight then
        v_permits := sequin._permits(v_consumer, least(v_left, (select sum(l) from unnest(v_limits) l))::int);
      elsif v_permits is null and v_left > v_quota then
        v_permits := sequin._permits(v_consumer, sequin._permits_for(v_consumer, v_left));
        v_is_dry := v_permits = '{}';
      end if;
      exit when v_is_tight and v_permits = '{}';

      for v_i in 1..cardinality(v_lanes) loop
        v_lane := v_lanes[v_i];
        v_limit := least(v_limits[v_i], v_left, v_quota + v_size * coalesce(cardinality(v_permits), 0));
        exit when v_limit <= 0;
        v_count := 0;
        v_misses := v_misses + 1;
        select s.turn, s.upto_seq, s.passed,
               s.held = 0 and s.tracked = 0 and v_route is not null and not v_is_strict, nextval('sequin.turn'),
               v_quota + v_size * coalesce(cardinality(s.permits), 0) - (s.tracked - s.fresh)
          into v_prev, v_from, v_passed, v_is_plain, v_turn, v_room
        from (select * from sequin.lane s where s.consumer_id = v_id and s.lane = v_lane order by s.prev desc limit 1) s
        where s.lease is null;
        continue when not found or v_is_dry and v_room <= 0;

        -- Plain: each row of the range is a message, and none is an older version of another.
        if v_is_plain and v_limit = 1 then
          select l.seq, l.seq, sequin._action(l.action), l.table_schema, l.table_name, l.record_pk, l.record,
                 case when not v_is_rows then l.changes end, l.committed_at, 1, l.metadata,
                 sequin._ack_id(v_turn, v_lane, 0), 1, l.action in ('i', 'u', 'd', 'r')
            into v_to, seq, action, table_schema, table_name, record_pk, record,
                 changes, committed_at, deliver_count, metadata,
                 ack_id, v_count, v_is_plain
          from sequin.log l
          where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq < sequin._segment_end(v_from)
          order by l.seq
          limit 1;
        elsif v_is_plain then
          select max(l.seq), count(*),
                 bool_and(l.action in ('i', 'u', 'd', 'r')) and (not v_is_rows or count(distinct l.group_hash) filter (where v_is_rows) = count(*))
            into v_to, v_count, v_is_plain
          from (
            select l.seq, l.action, l.group_hash from sequin.log l
            where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq < sequin._segment_end(v_from)
            order by l.seq
            limit v_limit) l;
        end if;
        -- A lane that has come to the end of a segment goes on in a later one.
        if v_is_plain is null then
          continue when not exists (
            select from sequin.log l
            where l.route_id = v_route and l.lane = v_lane and l.seq >= sequin._segment_end(v_from));
        end if;
        -- Locked only now, so that a lane with nothing to take is not kept from others; its row says if it was too late.
        continue when not pg_try_advisory_xact_lock(sequin._lane_key(consumer, v_lane));
        if v_is_plain then
          v_needed := greatest((v_count - v_quota + v_size - 1) / v_size, 0);
          insert into sequin.lane (
            consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed,
            lease, leased_at, leased_until, out_count, permits)
          select v_id, v_lane, v_prev, v_turn, v_from, v_to, v_passed + v_count,
                 v_turn, clock_timestamp(), clock_timestamp() + v_ack_wait, v_count, nullif(v_permits[1:v_needed], '{}')
          from (
            select s.turn from sequin.lane s where s.consumer_id = v_id and s.lane = v_lane order by s.prev desc limit 1) s
          -- As above; and alter_consumer may have given the lanes another meaning before this one was looked at, or a
          -- backfill another route.
          where s.turn = v_prev and exists (
            select from sequin.consumer c where c.id = v_id and c.reads = 'key' and cardinality(c.routes) = 1)
          on conflict do nothing;
          continue when not found;
          v_permits := v_permits[v_needed + 1:];
          v_has_moved := true;
          if v_limit = 1 then
            return next;
          else
            return query
              select sequin._ack_id(v_turn, v_lane, row_number() over () - 1), l.seq, sequin._action(l.action),
                     l.table_schema, l.table_name, l.record_pk, l.record, case when not v_is_rows then l.changes end,
                     l.committed_at, 1, l.metadata
              from (
                select * from sequin.log l
                where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq <= v_to
                order by l.seq) l;
          end if;
        else
          v_more := v_permits;
          if v_permits is null and v_room < v_limit then
            if v_consumer.id is distinct from v_id then
              select * into v_consumer from sequin.consumer c where c.id = v_id;
            end if;
            v_more := case when v_is_dry then '{}'
                           else sequin._permits(v_consumer, (v_limit - v_room + v_size - 1) / v_size) end;
            v_is_dry := v_more = '{}';
            continue when v_is_dry and v_room <= 0;
          end if;
          return query select * from sequin._take(v_id, v_lane, v_limit, v_ack_wait, v_more);
          get diagnostics v_count = row_count;
          v_has_moved := true;
          if v_permits is not null then
            v_permits := array(select unnest(v_permits) except select unnest((sequin._lane(v_id, v_lane)).permits));
          end if;
        end if;
        v_left := v_left - v_count;
        if v_count > 0 then v_misses := 0; end if;
      end loop;
      exit when v_survey.is_all and v_wanted - v_left >= (select sum(l) from unnest(v_limits) l);
      -- Others were quicker, everywhere: what was found is theirs.
      exit when not v_has_moved;
    end loop;
    exit;
  end loop;
  if v_is_waiting and v_left = batch_size then
    raise exception using
      errcode = 'SQ000',
      message = format('receive from consumer "%s": there is nothing', consumer),
      detail = concat_ws(' ', v_is_dry, v_survey.seen);
  end if;
end $$;
comment on function sequin.receive(text, int, interval, interval) is
'Hands out the next messages of a consumer, under a lease: acknowledge each before it runs out.

consumer    may be left out where there is exactly one
batch_size  1 to 10000: at most so many
wait        0 to 60 seconds: where there is nothing, wait so long for something
ack_wait    how long the lease is, 100 years at most; default: the consumer''s

Returns ack_id (names this delivery), seq (names the message, the same at every redelivery: an idempotency key), the
change, how often it was delivered, and metadata: commit_lsn, xid, and unchanged, the TOASTed columns that are not in
record because the WAL did not repeat them. In order within each group. No rows: there is nothing, or the consumer is
paused. Rolled back, it was never received.

Errors: 42704 unknown consumer, 22023 bad argument, 42501 not the caller''s, 25006 read only transaction or replica,
55000 wait above 0 in a stricter isolation level than read committed, 40001 try again (stricter isolation only).';
