-- How long the log is kept: as long as its slowest consumer or pipeline needs it, and as the retention says, whichever is longer.
-- Only an explicit max_bytes cuts that short, and each consumer that loses messages by it has that on record.

create or replace function sequin.set_retention(keep interval, max_bytes bigint default null)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if (keep >= '0' and keep <= '1000 years') is not true then
    raise invalid_parameter_value using
      message = format('retention of the log: keep is %s', coalesce(keep::text, 'null')),
      hint = 'It is an interval of 0 to 1000 years: how long the log is kept at least.';
  elsif max_bytes < 16777216 then
    raise invalid_parameter_value using
      message = format('retention of the log: max_bytes is %s', max_bytes),
      hint = 'It is at least 16777216 (16 MB); null: as much as the slowest consumer needs.';
  end if;
  update sequin.setting s
  set keep = set_retention.keep, max_bytes = set_retention.max_bytes
  where (s.keep, s.max_bytes) is distinct from (set_retention.keep, set_retention.max_bytes);
  return case when found then 'set' else 'unchanged' end;
end $$;
comment on function sequin.set_retention(interval, bigint) is
'How long the change log is kept. Default: one day, and no limit of size.

keep       at least so long (0 to 1000 years), and until the slowest consumer is past it
max_bytes  at most so much (16777216, 16 MB, or more), whoever still needs it: a consumer that loses messages by it has the
           gap on record, an error in health(), and goes on after it; null: no limit. Each call sets both: one that leaves
           max_bytes out takes away the limit that was set before

Returns set or unchanged. Space comes back a segment at a time, while a bridge runs. Errors: 22023 bad argument.';

-- The seq up to which a consumer needs nothing of the log any more.
create or replace function sequin._position(c sequin.consumer)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_floor sequin.floor;
  s sequin.lane;
  v_position bigint;
begin
  if c.start_seq is null then
    return c.start_base;
  end if;
  if c.lane_count = 1 then
    s := sequin._lane(c.id, 0::smallint);
    if s.lease is null and not exists (select from sequin._rows(c, 0::smallint, s.upto_seq, 9223372036854775807, 1)) then
      v_position := sequin._head(c);
    else
      v_position := s.cursor_seq;
    end if;
  else
    select * into v_floor from sequin.floor f where f.consumer_id = c.id order by f.step desc limit 1;
    select least(v_floor.seq, min((sequin._lane(c.id, b.lane)).cursor_seq)) into v_position from unnest(v_floor.busy) b(lane);
  end if;
  if c.reads = 'feed' then
    v_position := least(v_position, (
      select p.seq from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1));
  end if;
  -- Of a held group that the lane has passed nothing by of, nothing is left in the log.
  return least(v_position, (select min(g.after_seq) from sequin.held_group g where g.consumer_id = c.id and g.held_back > 0));
end $$;

-- How many bytes the log's segments take, each.
create or replace function sequin._segment_bytes(id int)
returns bigint
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(pg_total_relation_size(to_regclass('sequin.log_' || id)), 0)
       + coalesce(pg_total_relation_size(to_regclass('sequin.feed_' || id)), 0)
$$;

-- The segment that a source's next rows go to: a new one when the current one is large, beside what is kept, or old.
-- A dozen segments at most hold any backlog, as each is half of what is kept when it begins; a quiet log moves on
-- with time, so that what is past the retention can go, and where more is kept, in longer steps: who reads the log opens each.
create or replace function sequin.bridge_rotate(source_id int, last_seq bigint)
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_setting sequin.setting;
  v_current sequin.log_segment;
  v_before int;
  v_rows bigint;
  v_bytes bigint;
  v_kept bigint;
  v_since timestamptz;
begin
  update sequin.log_segment s
  set closed_at = clock_timestamp()
  where s.source_id = bridge_rotate.source_id and s.closed_at is null and s.id < bridge_rotate.last_seq >> 32
    and s.backfill_id is null;
  -- A backfill's history is to come between two segments: nothing goes beyond the first before the cut.
  select min(b.segment) into v_before
  from sequin.backfill b join sequin.log_segment s on s.id = b.segment
  where s.source_id = bridge_rotate.source_id and b.state = 'running' and b.cut_at is null;
  select * into v_current from sequin.log_segment s
  where s.source_id = bridge_rotate.source_id and s.closed_at is null and s.backfill_id is null
    and (v_before is null or s.id < v_before)
  order by s.id desc
  limit 1;
  if v_before is not null then
    return v_current.id;
  end if;
  -- The next one is open already, or the current one is empty.
  if v_current.id > last_seq >> 32 or last_seq & 4294967295 = 0 then
    return v_current.id;
  end if;
  select * into v_setting from sequin.setting;
  v_rows := last_seq & 4294967295;
  v_bytes := sequin._segment_bytes(v_current.id);
  select coalesce(sum(sequin._segment_bytes(s.id)), 0), min(s.opened_at) into v_kept, v_since
  from sequin.log_segment s where s.source_id = bridge_rotate.source_id and s.backfill_id is null;
  if v_rows >= 1048576 and v_bytes >= v_kept / 2
     or v_bytes >= greatest(536870912, v_kept / 2)
     or v_bytes >= v_setting.max_bytes / 8
     or v_current.opened_at < clock_timestamp() - greatest(
       v_setting.keep / 4, (clock_timestamp() - v_since) / 8, interval '1 second') then
    return sequin._open_segment(source_id);
  end if;
  return v_current.id;
end $$;
comment on function sequin.bridge_rotate(int, bigint) is
'For the bridge, every few seconds: the segment of the log that the next rows go to. May open one.';

-- Moves a consumer past a seq that is about to be dropped, and puts the loss on record. What is out stays out.
create or replace function sequin._skip(c sequin.consumer, upto bigint, reason text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_void text;
  s sequin.lane;
  v_from bigint;
  v_count bigint;
  v_lost bigint := 0;
  v_is_unsorted boolean := false;    -- a feed's: there are more, of which some may not be this consumer's
begin
  -- Its feed gets nothing meanwhile.
  perform from sequin.consumer t where t.id = c.id for no key update;
  for v_lane in 0..c.lane_count - 1 loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane::smallint));
  end loop;
  v_from := sequin._position(c);
  if v_from >= upto then
    return;
  end if;
  if c.start_seq is null then
    update sequin.consumer t set start_base = upto where t.id = c.id;
  end if;
  for v_lane in 0..c.lane_count - 1 loop
    s := sequin._lane(c.id, v_lane::smallint);
    continue when s.lane is null or s.cursor_seq >= upto;
    if s.lease is not null then
      perform sequin._untie(c, s, sequin._unsettled(s), true, false, s.leased_until, null);
      s := sequin._lane(c.id, v_lane::smallint);
    end if;
    select count(*) into v_count from sequin._rows(c, s.lane, s.upto_seq, upto, 9223372036854775807);
    v_lost := v_lost + v_count;
    s.cursor_seq := greatest(s.cursor_seq, upto);
    s.upto_seq := greatest(s.upto_seq, upto);
    perform sequin._put_lane(s);
  end loop;
  -- What is lost is not pending any more, nor was it handed out: it is taken off what there was.
  if c.reads = 'feed' then
    select exists (
        select from unnest(c.routes) r(id)
        join sequin.log l on l.route_id = r.id and l.seq > p.seq and l.seq <= upto and sequin._is_chosen(c, l.action))
      into v_is_unsorted
    from (select * from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1) p;
    insert into sequin.feed_progress (feed_id, step, seq, lanes, total)
    select p.feed_id, p.step + 1, greatest(p.seq, upto), 0, p.total - v_lost
    from (select * from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1) p
    where p.seq < upto or v_lost > 0;
  else
    update sequin.consumer t set start_total = t.start_total + v_lost where t.id = c.id and v_lost > 0;
  end if;
  v_lost := v_lost + (
    select coalesce(sum((sequin._lane(c.id, h.lane)).held_back), 0)
    from (select distinct g.lane from sequin.held_group g where g.consumer_id = c.id and g.after_seq < upto) h);
  update sequin.held_group g set after_seq = upto where g.consumer_id = c.id and g.after_seq < upto;
  -- Its position is a lower bound: it may have had all of it.
  if v_lost > 0 or v_is_unsorted then
    -- One gap, as long as it goes on.
    update sequin.gap g
    set to_seq = upto
    where g.consumer_id = c.id and g.accepted_at is null and g.reason = _skip.reason and g.to_seq = v_from;
    if not found then
      insert into sequin.gap (source_id, consumer_id, from_seq, to_seq, reason)
      select t.source_id, c.id, v_from + 1, upto, reason from sequin.stream t where t.id = c.stream_id;
    end if;
  end if;
end $$;

-- Drops the oldest segment of a source, if nobody needs it any more or the log is above its limit. Its id; null: none.
-- A lock that is not had at once is not waited for: the next call tries again. Who reads the log waits meanwhile, and so the one
-- on the log itself is waited for only as long as patience says.
create or replace function sequin.bridge_retain(source_id int, patience interval default '100 milliseconds')
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
  v_setting sequin.setting;
  v_oldest sequin.log_segment;
  v_end bigint;
  v_is_full boolean;
  c sequin.consumer;
  p sequin.pipeline;
begin
  perform sequin._drop_drafts(source_id, (
    select g.applied_lsn from sequin.progress g where g.source_id = bridge_retain.source_id order by g.step desc limit 1));
  select * into v_setting from sequin.setting;
  select * into v_oldest from sequin.log_segment s
  where s.source_id = bridge_retain.source_id and s.closed_at is not null order by s.id limit 1
  for update; -- not while a rewind goes back to it
  if not found then
    return null;
  end if;
  v_end := ((v_oldest.id::bigint + 1) << 32) - 1;
  v_is_full := coalesce(v_setting.max_bytes < (
    select sum(sequin._segment_bytes(s.id)) from sequin.log_segment s
    where s.source_id = bridge_retain.source_id and s.backfill_id is null), false);
  if not v_is_full and v_oldest.closed_at > clock_timestamp() - v_setting.keep then
    return null;
  end if;
  for c in
    select t.* from sequin.consumer t
    join sequin.stream s on s.id = t.stream_id
    where s.source_id = bridge_retain.source_id
    order by t.id
  loop
    if sequin._position(c) < v_end then
      if not v_is_full then
        return null;
      end if;
      perform sequin._end_backfill(b.id, 'failed', format('the log reached its limit of %s bytes', v_setting.max_bytes))
      from sequin.backfill b where b.consumer_id = c.id and b.state = 'running';
      perform sequin._skip(c, v_end, format('the log reached its limit of %s bytes', v_setting.max_bytes));
    end if;
  end loop;
  for p in
    select n.* from sequin.pipeline n
    join sequin.source_table t on t.id = n.table_id
    where t.source_id = bridge_retain.source_id
    order by n.id
  loop
    if sequin._pipeline_position(p) < v_end then
      if not v_is_full then
        return null;
      end if;
      perform sequin._skip_pipeline(p, v_end, format('the log reached its limit of %s bytes', v_setting.max_bytes));
    end if;
  end loop;
  perform set_config('lock_timeout', ceil(extract(epoch from patience) * 1000)::text, true);
  perform sequin._drop_segment(v_oldest.id);
  return v_oldest.id;
end $$;
comment on function sequin.bridge_retain(int, interval) is
'For the bridge, every few seconds: drops the oldest segment of the log, if it may go. Returns its id, or null. 55P03 where
somebody has the log locked for longer than patience.';

-- Who has the log locked, so that no segment of it can be dropped.
create or replace function sequin._log_holders()
returns table (pid int, virtualtransaction text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select k.pid, k.virtualtransaction
  from pg_locks k
  where k.locktype = 'relation' and k.relation = 'sequin.log'::regclass and k.granted and k.pid <> pg_backend_pid()
    and k.database = (select d.oid from pg_database d where d.datname = current_database())
$$;

create or replace function sequin.bridge_log_holders()
returns text[]
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return array(select h.virtualtransaction from sequin._log_holders() h);
end $$;
comment on function sequin.bridge_log_holders() is
'For the bridge: the transactions that have the log locked, so that no segment of it can be dropped.';

-- Marks the holes in the log, or in a consumer, as known. A source whose slot was lost goes on from a new one then.
create or replace function sequin.accept_gap(source text default 'local', consumer text default null, pipeline text default null)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source := sequin._source(source);
  v_consumer_id int;
  v_pipeline_id int;
  v_count bigint;
begin
  if consumer is not null then
    v_consumer_id := (sequin._consumer(consumer)).id;
  end if;
  if pipeline is not null then
    v_pipeline_id := (sequin._pipeline(pipeline)).id;
  end if;
  update sequin.gap g set accepted_at = clock_timestamp()
  where g.source_id = v_source.id and g.accepted_at is null
    and (num_nulls(consumer, pipeline) = 2 and num_nulls(g.consumer_id, g.pipeline_id) = 2
         or g.consumer_id = v_consumer_id or g.pipeline_id = v_pipeline_id);
  get diagnostics v_count = row_count;
  return v_count;
end $$;
comment on function sequin.accept_gap(text, text, text) is
'Says that a hole is known: changes that were lost and will not come back. Until then health() shows an error, and a
source whose slot was lost, or is not where it was left, is not captured.

source    whose log; default: this database''s
consumer  instead, of this consumer only
pipeline  instead, of this pipeline only

Returns how many gaps were accepted. Errors: 42704 unknown source, consumer or pipeline.';
