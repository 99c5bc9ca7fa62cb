-- Waiting for the log to go on.
--
-- A step of a source's progress has a bell: an advisory lock, which the bridge's writer holds from before that step can
-- be seen until the next one can be. Who has seen nothing at a step waits for its bell, and is woken by the commit that
-- brings more. Polling was measured beside it, every half millisecond, rising to ten: at 200 commits a second a message
-- arrived 2.8 ms after its commit in the median and 8 to 42 ms at the 99th percentile, where by the bell it is 1.5 and 6;
-- and a worker that waits in vain took 4 % of a processor, where it takes 0.4 %. Where no bridge has the bell, there is still
-- polling.

create or replace function sequin._bell(source_id int, step bigint)
returns bigint
language sql
immutable
as $$
  select pg_catalog.hashint8extended(step, 7190239 + source_id::bigint)
$$;

-- Whether a bell is held. If so, only once it has been rung, or after so many milliseconds: too few for the server to
-- look for a deadlock, or to log a wait.
create or replace function sequin._await_bell(source_id int, step bigint, ms int)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = 0
as $$
declare
  v_bell bigint := sequin._bell(source_id, step);
begin
  if pg_try_advisory_lock_shared(v_bell) then
    perform pg_advisory_unlock_shared(v_bell);
    return false;
  end if;
  perform set_config('lock_timeout', ms::text, true);
  begin
    perform pg_advisory_lock_shared(v_bell);
    perform pg_advisory_unlock_shared(v_bell);
  exception when lock_not_available then
    null;
  end;
  return true;
end $$;

-- Whether a consumer that reads this has something after a seq.
create or replace function sequin._is_after(reads text, routes int[], feed_id int, seq bigint)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if reads = 'feed' then
    return exists (
      select from sequin.feed_progress p where p.feed_id = _is_after.feed_id and p.seq > _is_after.seq and p.lanes <> 0);
  end if;
  return exists (
    select from unnest(routes) r(id)
    cross join lateral (select from sequin.log l where l.route_id = r.id and l.seq > _is_after.seq limit 1) l);
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
  v_due timestamptz;
  v_left double precision;
  v_pause double precision := 0.0005;
begin
  loop
    -- The step first: what has been written by then is found by what is asked after it.
    v_last := v_step;
    select p.step into v_step from sequin.progress p where p.source_id = v_source_id order by p.step desc limit 1;
    perform sequin._see_segments();
    if sequin._is_after(c.reads, c.routes, c.feed_id, seen) then
      return true;
    end if;
    select d.due_at into v_due from sequin.delivery d
    where d.consumer_id = c.id and d.due_at is not null order by d.due_at limit 1;
    if v_due <= clock_timestamp() then
      return true;
    end if;
    v_left := extract(epoch from least(until, v_due) - clock_timestamp());
    if v_left <= 0 then
      return false;
    end if;
    -- It was rung for others, or there is none, or what it was rung for has yet to be sorted into the feed.
    if v_last <> v_step
       or c.reads = 'feed' and sequin._is_after('total', c.routes, null, (
            select p.seq from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1))
       or not sequin._await_bell(v_source_id, v_step, ceil(v_left * 1000)::int) then
      perform pg_sleep(least(v_pause, v_left));
      v_pause := least(v_pause * 1.1, 0.01);
    end if;
  end loop;
end $$;
