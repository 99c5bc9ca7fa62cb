-- Receive and ack in one, for work in the same database: exactly once.

create or replace function sequin.pop(
  consumer text default null,
  batch_size int default 1,
  wait interval default '0'
)
returns table (
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
  v_id int;
  v_route int;
  v_is_rows boolean;
  v_busy smallint[];
  v_lane smallint;
  v_prev bigint;
  v_from bigint;
  v_passed bigint;
  v_to bigint;
  v_count bigint;
  v_left int := batch_size;
  v_misses int := 0;
begin
  unlisten "sequin.";  -- see _refuse_restricted
  if consumer is null then
    consumer := (sequin._my_consumer(null)).name;
  end if;
  -- Far behind, a lane needs no lease to be popped from: its cursor moves, and that is all. Anything else, and
  -- whatever is wrong, is for receive; and now and then all is, as there it is found what was left behind.
  select c.id, c.routes[1], c.is_rows, f.busy into v_id, v_route, v_is_rows, v_busy
  from sequin.consumer c
  cross join lateral (
    select f.busy, f.is_deep from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1) f
  where c.name = consumer and f.is_deep and c.reads = 'key' and cardinality(c.routes) = 1 and c.paused_at is null
    and c.start_seq is not null and batch_size between 2 and 10000
    and wait >= '0' and wait <= '60 seconds' and not sequin._is_strict()
    and current_setting('transaction_read_only') = 'off'
    and (sequin._caller() = current_user or sequin._may_consume(c.id))
    and not exists (select from sequin.delivery d where d.consumer_id = c.id and d.due_at <= (select clock_timestamp()))
    and random() > 0.01;
  while v_id is not null and v_left > 0 and v_misses < 3 loop
    v_misses := v_misses + 1;
    v_lane := v_busy[1 + floor(random() * cardinality(v_busy))];
    select s.turn, s.upto_seq, s.passed into v_prev, v_from, v_passed
    from (select * from sequin.lane s where s.consumer_id = v_id and s.lane = v_lane order by s.prev desc limit 1) s
    where s.lease is null and s.held = 0 and s.tracked = 0;
    continue when not found;
    select max(l.seq), count(*) into v_to, v_count
    from (
      select l.seq, l.action, l.group_hash from sequin.log l
      where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq < sequin._segment_end(v_from)
      order by l.seq
      limit v_left) l
    having bool_and(l.action in ('i', 'u', 'd', 'r')) and (not v_is_rows or count(distinct l.group_hash) filter (where v_is_rows) = count(*));
    continue when not found or not pg_try_advisory_xact_lock(sequin._lane_key(consumer, v_lane));
    insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq, passed)
    select v_id, v_lane, v_prev, nextval('sequin.turn'), v_to, v_to, v_passed + v_count
    from (
      -- Locked, and looked at again: as in receive.
      select s.turn from sequin.lane s where s.consumer_id = v_id and s.lane = v_lane order by s.prev desc limit 1) s
    where s.turn = v_prev and exists (
      select from sequin.consumer c where c.id = v_id and c.reads = 'key' and cardinality(c.routes) = 1)
    on conflict do nothing;
    continue when not found;
    return query
      select l.seq, sequin._action(l.action), l.table_schema, l.table_name, l.record_pk, l.record,
             case when not v_is_rows then l.changes end, l.committed_at, 1, l.metadata
      from sequin.log l
      where l.route_id = v_route and l.lane = v_lane and l.seq > v_from and l.seq <= v_to
      order by l.seq;
    v_left := v_left - v_count;
    v_misses := 0;
  end loop;
  if v_left = 0 and batch_size > 0 then
    return;
  end if;
  if (batch_size between 1 and 10000 and wait between '0' and '60 seconds' and current_setting('transaction_read_only') = 'off'
      and (wait = '0' or not sequin._is_strict())) is not true then
    perform sequin._refuse_receive('pop', consumer, batch_size, wait, null);
  end if;
  -- The lease is seen by nobody but the ack: both are in the caller's transaction.
  return query
    with received as materialized (
      select * from sequin.receive(consumer, v_left, case when v_left < batch_size then '0' else wait end)
    ), acknowledged as materialized (
      select sequin.ack(consumer, array(select r.ack_id from received r)) as n
    )
    select r.seq, r.action, r.table_schema, r.table_name, r.record_pk, r.record, r.changes, r.committed_at,
           r.deliver_count, r.metadata
    from acknowledged
    cross join received r;
end $$;
comment on function sequin.pop(text, int, interval) is
'Receive and ack in one. In the transaction that does the work, in this database, that is exactly once: a rollback
gives the messages back.

  begin;
    insert into totals select … from sequin.pop(''totals'', 100);
  commit;

consumer    may be left out where there is exactly one
batch_size  1 to 10000: at most so many
wait        0 to 60 seconds: where there is nothing, wait so long for something

Returns what receive does, less ack_id. Errors: as receive.';
