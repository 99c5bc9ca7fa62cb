-- What the bridge calls to do backfills: see history.sql. It reads the tables, and writes the rows with COPY; each step
-- is a short transaction, and any of them may be the last before a crash.

-- The backfills of a source that are not over, and how far each is.
create or replace function sequin.bridge_backfills(source_id int)
returns table (
  backfill_id bigint, consumer_name text, is_waiting boolean, segment int, live_segment int, cut_lsn text, cut_xmin bigint,
  is_open boolean, relations bigint[], routes int[], side_routes int[], sort_column text, from_row text, conditions text[],
  step bigint, place int, last_key text[], row_order text, last_seq bigint, rows_done bigint
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select b.id, c.name, b.state = 'waiting', b.segment, b.live_segment, b.cut_lsn::text, b.cut_xmin, b.cut_at is not null,
         (select array_agg(coalesce(t.relation_oid::bigint, 0) order by array_position(b.table_ids, t.id))
          from sequin.source_table t where t.id = any (b.table_ids)),
         b.table_ids, b.side_routes, b.sort_column, b.from_row, b.conditions,
         coalesce(p.step, 0), coalesce(p.place, 1), p.last_key, p.row_order, coalesce(p.last_seq, b.segment::bigint << 32),
         coalesce(p.rows_done, 0)
  from sequin.backfill b
  join sequin.consumer c on c.id = b.consumer_id
  join sequin.stream m on m.id = c.stream_id
  left join lateral (
    select * from sequin.backfill_step s where s.backfill_id = b.id order by s.step desc limit 1) p on true
  where m.source_id = $1 and b.state in ('waiting', 'running')
  order by b.id
$$;
comment on function sequin.bridge_backfills(int) is 'For the bridge: the backfills of a source that are not over.';

-- Cuts that the log may not have come to yet: from which LSN on it goes on in which segment.
create or replace function sequin.bridge_cuts(source_id int)
returns table (lsn text, segment int)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select b.cut_lsn::text, b.live_segment
  from sequin.backfill b
  join sequin.log_segment g on g.id = b.live_segment
  where g.source_id = $1
    and b.live_segment > (
      select p.last_seq >> 32 from sequin.progress p where p.source_id = $1 order by p.step desc limit 1)
  order by b.live_segment
$$;
comment on function sequin.bridge_cuts(int) is
'For the bridge, before it reads: where the log goes on in another segment, for a backfill.';

-- Makes the segment of a backfill, and puts its consumer behind it: from here on the consumer reads no further than the
-- cut, wherever that will be. A worker that has read what the consumer is made of, and not yet acted on it, finds its
-- lane moved on. Whether it could: not while another one of the consumer is running, or before it has started.
create or replace function sequin.bridge_backfill_begin(backfill_id bigint)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
set enable_seqscan = off
as $$
declare
  b sequin.backfill;
  c sequin.consumer;
  s sequin.lane;
  v_void text;
  v_source_id int;
  v_segment int;
  v_is_started boolean;
begin
  select * into b from sequin.backfill t where t.id = backfill_id;
  select * into c from sequin.consumer t where t.id = b.consumer_id;
  v_is_started := c.start_seq is not null;
  if not v_is_started and not b.is_start or exists (
       select from sequin.backfill o where o.consumer_id = b.consumer_id and o.state = 'running')
     -- Of another source's table, only what follows its publication is in the log.
     or exists (
       select from sequin.source_table t join sequin.source o on o.id = t.source_id
       where t.id = any (b.table_ids) and o.conninfo is not null and t.published_at is null) then
    return false;
  end if;
  if v_is_started then
    -- Whoever works in long transactions is waited for the longer the longer they have kept it: what is locked meanwhile, others
    -- do not get.
    perform set_config('lock_timeout', ceil(least(greatest(
      extract(epoch from clock_timestamp() - b.created_at) * 50, 100), 1600))::text, true);
    for v_lane in 0..63 loop
      v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane::smallint));
    end loop;
    -- Nor may a survey that began before be written down any more.
    v_void := pg_advisory_xact_lock(hashtextextended(c.name, 7190236));
  end if;
  select * into c from sequin.consumer t where t.id = b.consumer_id for no key update;
  select * into b from sequin.backfill t where t.id = backfill_id for update;
  -- A rewind may have begun with it meanwhile: next time, with the locks.
  if c.id is null or b.id is null or b.state <> 'waiting' or v_is_started <> (c.start_seq is not null) then
    return false;
  end if;
  select m.source_id into v_source_id from sequin.stream m where m.id = c.stream_id;
  -- The live log must not open a segment after this one before the cut.
  lock table sequin.log_segment in share row exclusive mode;
  v_segment := sequin._open_segment(v_source_id);
  update sequin.log_segment g set backfill_id = b.id where g.id = v_segment;
  update sequin.backfill t set state = 'running', segment = v_segment, started_at = clock_timestamp() where t.id = b.id;
  if c.start_seq is not null then
    update sequin.consumer t
    set history_id = b.id, routes = sequin._with_side(t.routes, b.side_routes),
        start_total = t.start_total + (
          select coalesce(sum(sequin._side_total(r.id)), 0) from unnest(b.side_routes) r(id) where not r.id = any (t.routes))
    where t.id = c.id;
    for v_lane in 0..c.lane_count - 1 loop
      loop
        s := sequin._lane(c.id, v_lane::smallint);
        exit when sequin._put_lane(s);
      end loop;
    end loop;
    insert into sequin.floor (consumer_id, step, seq, busy, is_deep)
    select f.consumer_id, f.step + 1, f.seq, f.busy, f.is_deep
    from sequin.floor f where f.consumer_id = c.id
    order by f.step desc
    limit 1;
  end if;
  return true;
end $$;
comment on function sequin.bridge_backfill_begin(bigint) is
'For the bridge: a backfill that waits begins, if it may. Takes the locks of the consumer''s lanes; 55P03: try again.';

-- Routes with side routes before them.
create or replace function sequin._with_side(routes int[], side_routes int[])
returns int[]
language sql
immutable
as $$
  select side_routes || array(select r.id from unnest(routes) with ordinality r(id, n) where r.id > 0 order by r.n)
$$;

-- How many messages a side route has had.
create or replace function sequin._side_total(route_id int)
returns bigint
language sql
stable
as $$
  select coalesce((select t.total from sequin.tally t where t.route_id = $1 order by t.seq desc limit 1), 0)
$$;

-- Makes the segment in which the log goes on after the histories that have begun, from this LSN on: their cut. The
-- snapshot with this xmin was taken before the LSN was read. Null where none has begun.
create or replace function sequin.bridge_backfill_cut(source_id int, cut_xmin bigint, cut_lsn text)
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_ids bigint[];
  v_segment int;
begin
  lock table sequin.log_segment in share row exclusive mode;
  v_ids := array(
    select b.id from sequin.backfill b join sequin.log_segment g on g.id = b.segment
    where g.source_id = bridge_backfill_cut.source_id and b.state = 'running' and b.live_segment is null
    for update of b);
  if v_ids = '{}' then
    return null;
  end if;
  v_segment := sequin._open_segment(source_id);
  update sequin.backfill b
  set live_segment = v_segment, cut_lsn = bridge_backfill_cut.cut_lsn::pg_lsn, cut_xmin = bridge_backfill_cut.cut_xmin
  where b.id = any (v_ids);
  return v_segment;
end $$;
comment on function sequin.bridge_backfill_cut(int, bigint, text) is
'For the bridge: where the live log is cut for the backfills that have begun. Returns the segment it goes on in.';

-- The transactions whose changes of these tables are in the log before a segment, the last ones of each.
create or replace function sequin.bridge_recent(source_id int, max_rows int)
returns table (xid bigint, segment int)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select distinct (l.metadata ->> 'xid')::bigint, (l.seq >> 32)::int
  from sequin.source_table t
  cross join lateral (
    select l.metadata, l.seq, l.committed_at from sequin.log l where l.route_id = t.id order by l.seq desc limit max_rows) l
  where t.source_id = $1 and l.committed_at > clock_timestamp() - interval '1 day'
$$;
comment on function sequin.bridge_recent(int, int) is
'For the bridge, when it begins to read: the transactions that are at the end of the log.';

-- The log is past the cut, and its readers see what is before it: histories can be read. Consumers that begin with one
-- begin. How many.
create or replace function sequin.bridge_backfill_open(live_segment int)
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  b sequin.backfill;
  v_count int := 0;
begin
  for b in
    update sequin.backfill t set cut_at = clock_timestamp()
    where t.live_segment = bridge_backfill_open.live_segment and t.state = 'running' and t.cut_at is null
    returning *
  loop
    v_count := v_count + 1;
    perform sequin._start_history(b) where b.is_start;
  end loop;
  return v_count;
end $$;
comment on function sequin.bridge_backfill_open(int) is
'For the bridge: everything before the cut is in the log, and can be read in the tables.';

-- A consumer begins with its history: gives it its lanes, as _start does.
create or replace function sequin._start_history(b sequin.backfill)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  c sequin.consumer;
  v_start bigint := b.segment::bigint << 32;
begin
  select * into c from sequin.consumer t where t.id = b.consumer_id for update;
  if c.start_seq is not null then
    return;
  end if;
  update sequin.consumer t
  set start_seq = v_start, routes = sequin._with_side(c.routes, b.side_routes),
      start_total = (select sum(sequin._total(r.id, v_start)) from unnest(c.routes) r(id) where r.id > 0)
  where t.id = c.id;
  insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq)
  select c.id, l.lane, 0, nextval('sequin.turn'), v_start, v_start from generate_series(0, c.lane_count - 1) l(lane);
  insert into sequin.floor (consumer_id, step, seq, busy) values (c.id, 1, v_start, '{}');
  if c.reads = 'feed' then
    insert into sequin.feed_progress (feed_id, step, seq, lanes, total) values (c.feed_id, 1, v_start, 0, 0);
  end if;
end $$;

-- About how many rows a backfill has to read.
create or replace function sequin.bridge_backfill_total(backfill_id bigint, rows_total bigint)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.backfill b set rows_total = $2 where b.id = $1 and b.rows_total is distinct from $2 returning true
$$;
comment on function sequin.bridge_backfill_total(bigint, bigint) is
'For the bridge: the estimate that sequin.backfills shows.';

-- Of these rows, those that changes after the cut bring whole: they need not be in the history. Rows of which the
-- changes bring a part only (a value that was too large to be repeated) are.
create or replace function sequin.bridge_backfill_changed(route_id int, live_segment int, record_pks text[])
returns text[]
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select array(
    select k.record_pk
    from unnest(record_pks) k(record_pk)
    where exists (
      select from sequin.log l
      where l.record_pk = k.record_pk collate "C" and l.route_id = $1 and l.seq > $2::bigint << 32
        and l.action in ('i', 'u') and not l.metadata ? 'unchanged'))
$$;
comment on function sequin.bridge_backfill_changed(int, int, text[]) is
'For the bridge: which of these rows the log has from after the cut.';

-- Of these rows of another source's table, those that the backfill's filter lets through, by their places. On the source
-- nothing is known of it.
create or replace function sequin.bridge_backfill_chosen(backfill_id bigint, place int, records jsonb[])
returns int[]
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
-- As _evaluate.
set standard_conforming_strings = on
set transform_null_equals = off
set array_nulls = on
set xmloption = content
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set intervalstyle = 'postgres'
set extra_float_digits = 1
set bytea_output = 'hex'
set lc_monetary = 'C'
set jit = off
as $$
declare
  v_condition text := (select b.conditions[bridge_backfill_chosen.place] from sequin.backfill b where b.id = backfill_id);
  v_chosen int[];
begin
  execute format(
    'select array_agg(_sequin_r.place::int order by _sequin_r.place) from unnest($1) with ordinality _sequin_r(record, place) where %s',
    coalesce(v_condition, 'true')) into v_chosen using records;
  return coalesce(v_chosen, '{}');
end $$;
comment on function sequin.bridge_backfill_chosen(bigint, int, jsonb[]) is
'For the bridge: which of these rows of another source a backfill''s filter chooses, counted from 1.';

-- Ends a chunk, in the transaction that wrote its rows. 55000 where the backfill has been ended or dropped meanwhile,
-- 55006 where another bridge does it.
create or replace function sequin.bridge_backfill_step(
  backfill_id bigint, step bigint, place int, last_key text[], row_order text, last_seq bigint, rows_done bigint,
  rows_written bigint
)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_route int;
begin
  -- Whoever ends it waits for this to commit, so that what it ends with is what there is.
  select b.side_routes[place] into v_route from sequin.backfill b where b.id = backfill_id and b.state = 'running' for share;
  if not found then
    raise object_not_in_prerequisite_state using
      message = format('backfill %s is not running any more', backfill_id),
      hint = 'select * from sequin.backfills;';
  end if;
  insert into sequin.backfill_step (backfill_id, step, place, last_key, row_order, last_seq, rows_done)
  values (backfill_id, step + 1, place, last_key, row_order, last_seq, rows_done)
  on conflict do nothing;
  if not found then
    raise object_in_use using
      message = 'another bridge has taken over',
      hint = 'This one stands by until that one ends.';
  end if;
  if rows_written > 0 then
    insert into sequin.tally (route_id, seq, total)
    values (v_route, last_seq, rows_written + sequin._side_total(v_route));
  end if;
  -- What newer ones have replaced, now and then; a few are kept, for a bridge that was taken over from to meet.
  if step % 32 = 31 then
    delete from sequin.backfill_step s where s.backfill_id = bridge_backfill_step.backfill_id and s.step < bridge_backfill_step.step - 8;
    delete from sequin.tally t where t.route_id = v_route and t.seq < bridge_backfill_step.last_seq;
  end if;
  return step + 1;
end $$;
comment on function sequin.bridge_backfill_step(bigint, bigint, int, text[], text, bigint, bigint, bigint) is
'For the bridge: ends a chunk in the transaction that wrote it. Returns the step to give next time.';

create or replace function sequin.bridge_backfill_end(backfill_id bigint, error text)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  select sequin._end_backfill($1, case when $2 is null then 'done' else 'failed' end, $2)
$$;
comment on function sequin.bridge_backfill_end(bigint, text) is
'For the bridge: a backfill is done, or has failed with this error. Its consumer goes on with what is live.';

-- Takes a history's side routes from a consumer that is past it. A worker that still knows them finds nothing there, as
-- there is nothing. How many consumers.
create or replace function sequin.bridge_backfill_leave(source_id int)
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
set enable_seqscan = off
as $$
declare
  c sequin.consumer;
  v_count int := 0;
begin
  for c in
    select t.* from sequin.consumer t join sequin.stream m on m.id = t.stream_id
    where m.source_id = bridge_backfill_leave.source_id and t.start_seq is not null and t.history_id is null and t.routes[1] < 0
    order by t.id
    for no key update of t skip locked
  loop
    continue when sequin._position(c) < c.history_seq;
    update sequin.consumer t
    set routes = sequin._with_side(t.routes, '{}'),
        start_total = t.start_total - (select coalesce(sum(sequin._side_total(r.id)), 0) from unnest(t.routes) r(id) where r.id < 0)
    where t.id = c.id;
    v_count := v_count + 1;
  end loop;
  return v_count;
end $$;
comment on function sequin.bridge_backfill_leave(int) is
'For the bridge, every few seconds: consumers that have had their history are as if they had none. Returns how many.';

-- Drops a history that nobody reads any more. Which; null: none. A lock that is not had at once is not waited for.
create or replace function sequin.bridge_backfill_clear(source_id int)
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
  v_segment record;
begin
  select g.id, b.id as backfill_id into v_segment
  from sequin.log_segment g
  left join sequin.backfill b on b.id = g.backfill_id
  left join sequin.consumer c on c.id = b.consumer_id
  where g.source_id = bridge_backfill_clear.source_id and g.backfill_id is not null
    and (b.id is null or b.state not in ('waiting', 'running') and c.start_seq is not null and c.routes[1] > 0)
  order by g.id
  limit 1;
  if not found then
    return null;
  end if;
  if v_segment.backfill_id is null then
    delete from sequin.backfill_step s where not exists (select from sequin.backfill b where b.id = s.backfill_id);
    delete from sequin.tally t using sequin.side_route r
    where t.route_id = r.id and not exists (select from sequin.consumer n where n.id = r.consumer_id);
    delete from sequin.side_route r where not exists (select from sequin.consumer n where n.id = r.consumer_id);
  end if;
  perform sequin._drop_segment(v_segment.id);
  return v_segment.id;
end $$;
comment on function sequin.bridge_backfill_clear(int) is
'For the bridge, every few seconds: drops a history that has been delivered. Returns its segment, or null.';
