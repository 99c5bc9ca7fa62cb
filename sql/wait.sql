-- Waiting for the log to go on.
--
-- A step of a source's progress has a bell: an advisory lock, which the bridge's writer holds from before that step can
-- be seen until the next one can be. Who has seen nothing at a step waits for its bell, and is woken by the commit that
-- brings more. Polling was measured beside it, every half millisecond, rising to ten: at 200 commits a second a message
-- arrived 2.8 ms after its commit in the median and 8 to 42 ms at the 99th percentile, where by the bell it is 1.5 and 6;
-- and a worker that waits in vain took 4 % of a processor, where it takes 0.7 %, or 3 % beside a hundred commits a second for
-- others. Where no bridge has the bell, there is still polling.

create or replace function sequin._bell(source_id int, step bigint)
returns bigint
language sql
immutable
as $$
  select pg_catalog.hashint8extended(step, 7190239 + source_id::bigint)
$$;

-- The wait of a receive that looks once for one that waits, and says by an error (SQ000) that there is nothing. As that is
-- caught, all that the look has locked is let go of: the log's segments above all, which nobody could drop while anybody waits.
create or replace function sequin._waiting()
returns interval
language sql
immutable
as $$ select '-1 microseconds'::pg_catalog.interval $$;

-- Whether a bell is held. If so, only once it has been rung, or after so many milliseconds: too few for the server to
-- look for a deadlock, or to log a wait. Whatever ends this, the lock goes with it.
create or replace function sequin._await_bell(source_id int, step bigint, ms int)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = 0
as $$
declare
  v_bell bigint := sequin._bell(source_id, step);
  v_is_held boolean := false;
begin
  if not pg_try_advisory_xact_lock_shared(v_bell) then
    v_is_held := true;
    perform set_config('lock_timeout', ms::text, true);
    perform pg_advisory_xact_lock_shared(v_bell);
  end if;
  raise exception using errcode = 'SQ000', message = 'the bell was rung';
exception when lock_not_available or sqlstate 'SQ000' then
  return v_is_held;
end $$;

-- Waits, for a consumer that had nothing at a seq, until it may have something, or the time has come. Whether it may.
create or replace function sequin._await(c sequin.consumer, seen bigint, until timestamptz)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
declare
  v_source_id int := (select s.source_id from sequin.stream s where s.id = c.stream_id);
  v_step bigint;
  v_last bigint;
  v_is_after boolean;
  v_due timestamptz;
  v_left double precision;
  v_pause double precision := 0.0005;
  v_now timestamptz;
  v_looked timestamptz;
begin
  loop
    -- Without the log, which would be locked: each batch of it has its tally.
    v_last := v_step;
    select p.step,
           case when c.reads = 'feed'
             then exists (select from sequin.feed_progress f where f.feed_id = c.feed_id and f.seq > seen and f.lanes <> 0)
             else exists (
               select from unnest(c.routes) r(id)
               cross join lateral (select from sequin.tally t where t.route_id = r.id and t.seq > seen limit 1) t) end,
           (select d.due_at from sequin.delivery d
            where d.consumer_id = c.id and d.due_at is not null order by d.due_at limit 1)
      into v_step, v_is_after, v_due
    from sequin.progress p
    where p.source_id = v_source_id
    order by p.step desc
    limit 1;
    if v_is_after or v_due <= clock_timestamp() then
      return true;
    end if;
    v_now := clock_timestamp();
    v_left := extract(epoch from least(until, v_due) - v_now);
    if v_left <= 0 then
      return false;
    end if;
    -- It was rung for others, again and again, or there is none, or what it was rung for has yet to be sorted into the feed.
    if v_last <> v_step and v_now < v_looked + interval '5 milliseconds'
       or c.reads = 'feed' and exists (
            select from unnest(c.routes) r(id)
            cross join lateral (
              select from sequin.tally t
              where t.route_id = r.id and t.seq > (
                select f.seq from sequin.feed_progress f where f.feed_id = c.feed_id order by f.step desc limit 1)
              limit 1) t)
       or not sequin._await_bell(v_source_id, v_step, ceil(v_left * 1000)::int) then
      perform pg_sleep(least(v_pause, v_left));
      v_pause := least(v_pause * 1.1, 0.01);
    end if;
    v_looked := v_now;
  end loop;
end $$;

-- A receive that waits: one that does not, again and again, each undone as if it had never been where it has found nothing.
create or replace function sequin._receive_waiting(consumer text, batch_size int, wait interval, ack_wait interval)
returns table (
  ack_id bigint, seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb,
  changes jsonb, committed_at timestamptz, deliver_count int, metadata jsonb
)
language plpgsql
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_deadline timestamptz := clock_timestamp() + wait;
  v_consumer sequin.consumer;
  v_at timestamptz;
  v_found text;
  v_is_dry boolean;                  -- all that may be out is
  v_seen bigint;                     -- nothing was waiting, up to there; null: there is, in others' hands
  v_awaited bigint;                  -- the log has gone on after it, when it was last waited for
  v_pause double precision := 0.001;
  v_patience interval := '50 milliseconds';
begin
  consumer := coalesce(consumer, (sequin._my_consumer(null)).name);
  loop
    v_at := clock_timestamp();
    begin
      return query select * from sequin.receive(consumer, batch_size, sequin._waiting(), ack_wait);
      return;
    exception when sqlstate 'SQ000' then
      get stacked diagnostics v_found = pg_exception_detail;
    end;
    exit when clock_timestamp() >= v_deadline;
    v_is_dry := split_part(v_found, ' ', 1) = 't';
    v_seen := nullif(split_part(v_found, ' ', 2), '');
    -- Where nothing is waiting, until the log goes on; and now and then there is another look anyway: a consumer may be
    -- altered, or sent back. What cannot be had yet is looked for again after a pause, and so is what was in vain.
    if v_seen is null or v_seen = v_awaited then
      v_pause := least(v_pause * 1.1, 0.01);
      -- Where all that may be out is, each look is a long one: most of the time it rests.
      perform pg_sleep(least(
        case when v_is_dry then greatest(v_pause, least(extract(epoch from clock_timestamp() - v_at) * 4, 0.1)) else v_pause end,
        extract(epoch from v_deadline - clock_timestamp())));
    end if;
    v_awaited := null;
    if v_seen is not null then
      select * into v_consumer from sequin.consumer c where c.name = consumer;
      if sequin._await(v_consumer, v_seen, least(v_deadline, v_at + v_patience)) then
        v_awaited := v_seen;
      end if;
    end if;
    v_patience := least(v_patience * 1.2, '200 milliseconds');
  end loop;
end $$;
