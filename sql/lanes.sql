-- How a consumer's messages are shared out among workers without a row a message.
--
-- Each message belongs to a group (its row, unless the consumer says otherwise) and so, by hash, to one of 64 lanes.
-- A receive leases the next messages of a free lane; an ack moves the lane's cursor past them. Either is one row
-- appended to sequin.lane, whatever the batch, and groups keep their order because a lane is in one worker's hands
-- at a time. What is not a whole lease (a nack, an expiry, a slow worker that others must overtake) leaves the lane
-- and is followed message by message, in sequin.delivery, with its group held back.
--
-- Why lanes. Four designs were measured against a queue table (skip locked, set a timeout, delete) of the same
-- payload. A lock on the consumer's row serialises workers. A window of narrow rows, one a message, keeps up with
-- the queue table and no more: 1.1 times as fast at batches of 100. Lanes are as fast at batches of one and three
-- to four times as fast at 100 to 1,000; and, because nothing is updated in place and every scan starts at the
-- newest row, a snapshot held elsewhere costs them nothing, where the queue table falls below a tenth (make bench).
--
-- A lane changes hands under a transaction-scoped advisory lock, so that a receive can skip a lane in use (no row to
-- lock: a locked row would be a dead row's worth of writing) and a stuck transaction blocks nobody else. Each row
-- says which it replaces, and the primary key lets one row only replace another: where a snapshot is older than the
-- lock (repeatable read), the loser gets 40001 and not a second lease.

-- The advisory lock of a lane: 58 bits of the consumer's name, so that keys of applications are not met by chance.
create or replace function sequin._lane_key(consumer text, lane smallint)
returns bigint
language sql
immutable
as $$
  select pg_catalog.hashtextextended(consumer, 7190235) & -64::bigint | lane
$$;

-- A delivery's name: the turn that made it, its lane, its place in the lease.
--   turn (43 bits) | lane (6) | place (14)
create or replace function sequin._ack_id(turn bigint, lane smallint, place bigint)
returns bigint
language sql
immutable
as $$
  select (turn << 20) | (lane::bigint << 14) | place
$$;

-- An action as users read it.
create or replace function sequin._action(code "char")
returns text
language sql
immutable
as $$
  select case code when 'i' then 'insert' when 'u' then 'update' when 't' then 'truncate' when 'r' then 'read' else 'delete' end
$$;

-- The end of the segment that holds a seq: with it as a bound, a scan opens one partition of the log.
create or replace function sequin._segment_end(seq bigint)
returns bigint
language sql
immutable
as $$
  select ((seq >> 32) + 1) << 32
$$;

-- A lane's rows of the log, in seq order, after one seq and up to another: whatever it is that the consumer reads.
-- Which rows these are never changes, so that a row's place among them names it for as long as a lease lasts.
create or replace function sequin._rows(consumer sequin.consumer, lane smallint, after bigint, upto bigint, max_rows bigint)
returns table (
  seq bigint, committed_at timestamptz, route_id int, group_hash int, action "char", table_schema text, table_name text,
  record_pk text, record jsonb, changes jsonb, metadata jsonb
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set jit = off
as $$
#variable_conflict use_column
begin
  perform sequin._see_segments();
  -- While its history is being written, nothing after that is there for it.
  if consumer.history_id is not null then
    upto := least(upto, sequin._head(consumer));
  end if;
  case consumer.reads
  when 'key' then
    return query
      select l.seq, l.committed_at, l.route_id, l.group_hash, l.action, l.table_schema, l.table_name,
             l.record_pk, l.record, l.changes, l.metadata
      from unnest(consumer.routes) r(id)
      cross join lateral (
        select * from sequin.log l
        where l.route_id = r.id and l.lane = _rows.lane and l.seq > after and l.seq <= upto
        order by l.seq
        limit max_rows
      ) l
      order by l.seq
      limit max_rows;
  when 'total' then
    return query
      select l.seq, l.committed_at, l.route_id, 0, l.action, l.table_schema, l.table_name,
             l.record_pk, l.record, l.changes, l.metadata
      from unnest(consumer.routes) r(id)
      cross join lateral (
        select * from sequin.log l
        where l.route_id = r.id and l.seq > after and l.seq <= upto
        order by l.seq
        limit max_rows
      ) l
      order by l.seq
      limit max_rows;
  when 'feed' then
    return query
      select f.seq, l.committed_at, f.route_id, f.group_hash, l.action, l.table_schema, l.table_name,
             l.record_pk, case when consumer.transform is null then l.record else f.record end, l.changes, l.metadata
      from (
        select * from sequin.feed f
        where f.feed_id = consumer.feed_id and f.lane = _rows.lane and f.seq > after and f.seq <= upto
        order by f.seq
        limit max_rows
      ) f
      cross join lateral (
        select * from sequin.log l where l.route_id = f.route_id and l.seq = f.seq
      ) l
      order by f.seq;
  end case;
end $$;

-- The newest row of a lane. The caller holds the lane's lock, or only looks.
create or replace function sequin._lane(consumer_id int, lane smallint)
returns sequin.lane
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
as $$
declare
  v_state sequin.lane;
begin
  select * into v_state from sequin.lane s
  where s.consumer_id = _lane.consumer_id and s.lane = _lane.lane
  order by s.prev desc
  limit 1;
  return v_state;
end $$;

-- Whether this transaction sees what committed when it began, and not what commits meanwhile.
create or replace function sequin._is_strict()
returns boolean
language sql
stable
as $$
  select pg_catalog.current_setting('transaction_isolation') in ('repeatable read', 'serializable')
$$;

-- Puts a lane's new row in place of the one that was read. Whether it could: not where another has moved the lane on
-- meanwhile; under a snapshot older than that, 40001.
create or replace function sequin._put_lane(state sequin.lane)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
begin
  state.prev := state.turn;
  state.turn := nextval('sequin.turn');
  -- The row in the way may have been replaced in its turn, and trimmed: an old snapshot would not meet it. The row that
  -- it saw as the newest is gone as well then, and cannot be locked.
  if sequin._is_strict() then
    perform from sequin.lane s
    where s.consumer_id = state.consumer_id and s.lane = state.lane order by s.prev desc limit 1 for key share;
  end if;
  insert into sequin.lane
  select (state).*
  from (select s.turn from sequin.lane s
        where s.consumer_id = state.consumer_id and s.lane = state.lane order by s.prev desc limit 1) n
  where n.turn = state.prev
  on conflict do nothing;
  return found;
end $$;

-- Adds to what a lane counts: tracked messages, fresh ones among them, held groups, messages held back in the log; and
-- to the permits it holds. The caller holds its lock.
create or replace function sequin._count_lane(
  c sequin.consumer, lane smallint, tracked int, fresh int, held int, held_back bigint, permits smallint[] default null
)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  s sequin.lane;
begin
  -- An ack or a nack may come between: it does not wait for the lock.
  loop
    s := sequin._lane(c.id, lane);
    exit when s.lane is null;  -- dropped
    s.tracked := s.tracked + _count_lane.tracked;
    s.fresh := s.fresh + _count_lane.fresh;
    s.held := s.held + _count_lane.held;
    s.held_back := case when s.held > 0 then greatest(s.held_back + _count_lane.held_back, 0) else 0 end;
    s.permits := s.permits || _count_lane.permits;
    s.permits := sequin._fit_permits(c, s);
    exit when sequin._put_lane(s);
  end loop;
end $$;
