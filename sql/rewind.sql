-- Going back in the kept log.

-- Keeps a source's oldest segment, and so all of its log, until the caller's transaction ends. Its first seq; null:
-- there is none.
create or replace function sequin._hold_log(source_id int)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id int;
begin
  -- One that was being dropped is waited for, and gone.
  loop
    select s.id into v_id from sequin.log_segment s
    where s.id = sequin._oldest_seq(_hold_log.source_id) >> 32
    for key share;
    exit when found or sequin._oldest_seq(source_id) is null;
  end loop;
  return v_id::bigint << 32;
end $$;

-- The first row of some routes from a seq on, and when it was committed.
create or replace function sequin._first_row(routes int[], from_seq bigint, upto bigint, out seq bigint, out committed_at timestamptz)
language sql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
  select l.seq, l.committed_at
  from unnest(routes) r(id)
  cross join lateral (
    select l.seq, l.committed_at from sequin.log l
    where l.route_id = r.id and l.seq >= $2 and l.seq <= $3
    order by l.seq
    limit 1) l
  order by l.seq
  limit 1
$$;

-- The lowest seq of some routes, between these two, that was committed at a time or later; null: there is none. In the
-- order of the log times ascend, but for what passes between taking the time of a commit and writing it: the log is
-- halved to ten seconds before, and read from there.
create or replace function sequin._seq_at(routes int[], oldest bigint, head bigint, at timestamptz)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_low bigint := oldest;
  v_high bigint := head + 1;
  v_mid bigint;
  v_seq bigint;
  v_at timestamptz;
begin
  while v_low < v_high loop
    v_mid := v_low + (v_high - v_low) / 2;
    select f.seq, f.committed_at into v_seq, v_at from sequin._first_row(routes, v_mid, v_high - 1) f;
    if v_seq is null or v_at >= at - interval '10 seconds' then
      v_high := v_mid;
    else
      v_low := v_seq + 1;
    end if;
  end loop;
  return (
    select min(l.seq)
    from unnest(routes) r(id)
    cross join lateral (
      select l.seq from sequin.log l
      where l.route_id = r.id and l.seq >= v_low and l.seq <= head and l.committed_at >= at
      order by l.seq
      limit 1) l);
end $$;

-- The first seq that a rewind delivers again. 22023 where the log does not go back so far, or has not come so far.
create or replace function sequin._rewind_target(c sequin.consumer, to_seq bigint, to_time timestamptz)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source_id int := (select s.source_id from sequin.stream s where s.id = c.stream_id);
  v_oldest bigint := sequin._hold_log(v_source_id);
  v_head bigint;
  v_first bigint;
  v_oldest_at timestamptz;
  v_first_at timestamptz;
begin
  -- A history that was written for it alone may be the last there is.
  v_head := sequin._head(c);
  select greatest(p.last_seq, v_head) into v_head
  from sequin.progress p where p.source_id = v_source_id order by p.step desc limit 1;
  if v_oldest is null or v_head is null then
    raise object_not_in_prerequisite_state using
      message = format('consumer "%s" cannot go back: the log is empty, as no bridge has run yet', c.name),
      hint = 'sequin bridge --database-url …';
  end if;
  select f.seq, least(f.committed_at, s.opened_at), f.committed_at into v_first, v_oldest_at, v_first_at
  from sequin.log_segment s
  left join sequin._first_row(sequin._with_side(c.routes, '{}'), v_oldest, v_head) f on true
  where s.id = v_oldest >> 32;
  if to_seq < v_oldest or to_time < v_oldest_at then
    raise invalid_parameter_value using
      message = format('consumer "%s": %s is older than the log is kept: ', c.name, coalesce('seq ' || to_seq, to_time::text))
        || case when v_first is null then format('it begins at %s, and has no message of its stream yet', v_oldest_at)
                else format('the oldest message is seq %s, of %s', v_first, v_first_at) end,
      hint = format('Go back in the table instead: select sequin.rewind(%L, to_row => …); or deliver its rows beside what '
        'goes on: select sequin.backfill(%L);', c.name, c.name);
  elsif to_seq > v_head then
    raise invalid_parameter_value using
      message = format('consumer "%s": seq %s is not in the log yet, which ends at %s', c.name, to_seq, v_head),
      hint = format('select max(seq) from sequin.messages where stream = %L;',
        (select s.name from sequin.stream s where s.id = c.stream_id));
  elsif to_time > clock_timestamp() then
    raise invalid_parameter_value using
      message = format('consumer "%s": %s has not come yet', c.name, to_time),
      hint = 'to_time is when the first message to be delivered again was committed.';
  end if;
  return coalesce(to_seq, sequin._seq_at(c.routes, v_oldest, v_head, to_time), v_head + 1);
end $$;

-- How many rows a lane has between two seqs, messages or not, where it reads the log itself.
create or replace function sequin._count_rows(c sequin.consumer, lane smallint, after bigint, upto bigint)
returns bigint
language sql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select count(*)
  from unnest(c.routes) r(id)
  cross join lateral (
    select from sequin.log l
    where c.reads = 'key' and l.route_id = r.id and l.lane = $2 and l.seq > $3 and l.seq <= $4
    union all
    select from sequin.log l
    where c.reads = 'total' and l.route_id = r.id and l.seq > $3 and l.seq <= $4) l
$$;

-- Gives a consumer that waits for its beginning one, in the log as it is. A history that it was to begin with, and whose
-- place in the log is known already, is on its way from there.
create or replace function sequin._start_after(c sequin.consumer, after bigint)
returns sequin.consumer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  b sequin.backfill;
begin
  select * into b from sequin.backfill t where t.id = c.history_id and t.segment is not null;
  -- It begins with that at the latest, though the log may be further.
  after := least(after, b.segment::bigint << 32);
  c.start_seq := after;
  select sum(sequin._total(r.id, after)) into c.start_total from unnest(c.routes) r(id);
  if b.id is not null then
    c.routes := sequin._with_side(c.routes, b.side_routes);
  end if;
  insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq)
  select c.id, l.lane, 0, nextval('sequin.turn'), after, after
  from generate_series(0, c.lane_count - 1) l(lane);
  insert into sequin.floor (consumer_id, step, seq, busy) values (c.id, 1, after, '{}');
  if c.reads = 'feed' then
    insert into sequin.feed_progress (feed_id, step, seq, lanes, total) values (c.feed_id, 1, after, 0, 0);
  end if;
  return c;
end $$;

-- Gives a consumer with a feed a new one, to be filled anew after a seq. What it has left to do up to there is copied.
create or replace function sequin._refeed(c sequin.consumer, after bigint)
returns sequin.consumer
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_feed_id int := nextval('sequin.feed_id');
  v_old sequin.feed_progress;
begin
  select * into v_old from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1;
  after := least(after, v_old.seq);
  insert into sequin.feed (feed_id, seq, route_id, group_hash, lane, record)
  select v_feed_id, f.seq, f.route_id, f.group_hash, f.lane, f.record
  from generate_series(0, c.lane_count - 1) n(lane)
  cross join lateral sequin._lane(c.id, n.lane::smallint) s
  left join lateral (
    select min(g.after_seq) as seq from sequin.held_group g where g.consumer_id = c.id and g.lane = s.lane) g on true
  join sequin.feed f
    on f.feed_id = c.feed_id and f.lane = s.lane and f.seq > least(s.cursor_seq, g.seq) and f.seq <= _refeed.after
  order by f.seq;
  insert into sequin.feed_progress (feed_id, step, seq, lanes, total)
  select v_feed_id, v_old.step + 1, after, 0, sum(s.passed + (
    select count(*) from sequin.feed f
    where f.feed_id = c.feed_id and f.lane = s.lane and f.seq > s.upto_seq and f.seq <= _refeed.after))
  from generate_series(0, c.lane_count - 1) n(lane)
  cross join lateral sequin._lane(c.id, n.lane::smallint) s;
  c.feed_id := v_feed_id;
  return c;
end $$;

-- Takes a consumer back to the place after a seq. The caller holds every lane's lock; an ack under way, which does not
-- wait for it, may be waiting for a lane's row that is written here, and have written another: 55P03 then, and the
-- caller lets it go first.
create or replace function sequin._rewind(c sequin.consumer, after bigint)
returns sequin.consumer
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set lock_timeout = '200ms'
as $$
declare
  s sequin.lane;
  v_old sequin.lane;
  v_again bigint;
  v_groups int[];
  v_void text;
begin
  -- Nor may a survey of the lanes as they were be written down any more.
  v_void := pg_advisory_xact_lock(hashtextextended(c.name, 7190236));
  perform sequin._see_segments();
  if c.start_seq is null then
    return sequin._start_after(c, after);
  end if;
  -- What is out of a lane and comes before stays its worker's; what comes after is in nobody's hands any more.
  for v_lane in 0..c.lane_count - 1 loop
    loop
      s := sequin._lane(c.id, v_lane::smallint);
      exit when s.lease is null or s.upto_seq <= after or s.cursor_seq >= after
        or sequin._untie(c, s, sequin._unsettled(s), true, false, s.leased_until, null) > 0;
    end loop;
  end loop;
  delete from sequin.delivery d where d.consumer_id = c.id and d.seq > after and not sequin._is_reread(d.seq);
  if c.reads = 'feed' then
    c := sequin._refeed(c, after);
  end if;

  for v_lane in 0..c.lane_count - 1 loop
    loop
      s := sequin._lane(c.id, v_lane::smallint);
      v_old := s;
      v_again := 0;
      if s.upto_seq > after then
        v_again := case when c.reads <> 'feed' then sequin._count_rows(c, s.lane, after, s.upto_seq) else 0 end;
        s.cursor_seq := least(s.cursor_seq, after);
        s.upto_seq := after;
        s.lease := null;
        s.leased_at := null;
        s.leased_until := null;
        s.out_count := 0;
        s.picks := null;
        s.settled := null;
        s.settled_to := 0;
      end if;
      select count(*), count(*) filter (where d.deliver_count = 0) into s.tracked, s.fresh
      from sequin.delivery d where d.consumer_id = c.id and d.lane = s.lane;
      if s.held > 0 then
        update sequin.held_group g
        set after_seq = least(g.after_seq, s.upto_seq),
            held_back = case when g.held_back > 0 then (select count(*) from sequin._passed_by(c, g, s.upto_seq, 2147483647)) else 0 end
        where g.consumer_id = c.id and g.lane = s.lane and v_old.upto_seq > s.upto_seq;
        select coalesce(sum(g.held_back), 0), array_agg(g.group_hash) into s.held_back, v_groups
        from sequin.held_group g where g.consumer_id = c.id and g.lane = s.lane;
      end if;
      s.permits := sequin._fit_permits(c, s);
      -- Under an older snapshot the lane's row has to say that it is the newest.
      exit when s is not distinct from v_old and not sequin._is_strict() or sequin._put_lane(s);
    end loop;
    -- What was passed by of a held group, up to here, is all that is left of it, perhaps.
    if s.held > 0 then
      perform sequin._advance_groups(c, s.lane, v_groups, 0);
    end if;
    c.start_total := c.start_total - v_again;
  end loop;
  perform sequin._renew_permits(c);
  c.start_seq := least(c.start_seq, after);
  insert into sequin.floor (consumer_id, step, seq, busy, is_deep)
  select c.id, f.step + 1, least(f.seq, after), array(select generate_series(0, c.lane_count - 1)::smallint), false
  from sequin.floor f where f.consumer_id = c.id
  order by f.step desc
  limit 1
  on conflict do nothing;
  if not found then
    raise serialization_failure using
      message = format('consumer "%s": it has gone on since this transaction began', c.name),
      hint = 'Try again, in a new transaction.';
  end if;
  return c;
end $$;

create or replace function sequin.rewind(
  consumer text,
  to_seq bigint default null,
  to_time timestamptz default null,
  to_row text default null
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set jit = off
as $$
declare
  c sequin.consumer := sequin._consumer(consumer);
  v_after bigint;
  v_late record;
  v_void text;
begin
  perform sequin._refuse_write('rewind');
  perform sequin._require_reader(c.stream_id);
  if num_nonnulls(to_seq, to_time, to_row) <> 1 then
    raise invalid_parameter_value using
      message = format('consumer "%s": rewind takes one target, and has %s', consumer, num_nonnulls(to_seq, to_time, to_row)),
      hint = 'One of to_seq, to_time and to_row.';
  elsif to_row is not null then
    perform sequin._backfill(c.id, to_row);
    return 'rewound';
  end if;
  -- No worker may be between reading where the consumer is and acting on it.
  for v_lane in 0..63 loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane::smallint));
  end loop;
  select * into c from sequin.consumer t where t.id = c.id for no key update;
  if not found then
    c := sequin._consumer(consumer);
  end if;
  -- It may be about to begin before the place where it is to go on.
  if c.start_seq is null and sequin._start(c.id) then
    select * into c from sequin.consumer t where t.id = c.id;
  end if;
  v_after := sequin._rewind_target(c, to_seq, to_time) - 1;
  loop
    begin
      c := sequin._rewind(c, v_after);
      exit;
    exception when lock_not_available or deadlock_detected then
      null;
    end;
  end loop;
  update sequin.consumer t
  set start_seq = c.start_seq, start_total = c.start_total, feed_id = c.feed_id, routes = c.routes
  where t.id = c.id;
  -- The beginning of its new feed; the bridge does the rest.
  if c.reads = 'feed' then
    perform sequin._feed(c, 1000);
  end if;
  perform pg_notify('sequin.' || c.name, '') where c.paused_at is null;
  -- The log goes back to before it was asked to have all of them.
  select string_agg(format('%I.%I', t.schema_name, t.table_name), ', ' order by t.created_at, t.id) as tables,
         max(t.created_at) as since, count(*) as count
    into v_late
  from sequin.source_table t
  where t.id = any (c.routes) and t.created_at > to_time;
  if v_late.count > 0 then
    raise warning using
      message = format('consumer "%s": what was committed before %s is not all in the log: it is when %s %s first streamed', c.name,
        v_late.since, v_late.tables, case v_late.count when 1 then 'was' else 'were' end),
      hint = format('Go back in the table instead: select sequin.rewind(%L, to_row => …);', c.name);
  end if;
  return 'rewound';
end $$;
comment on function sequin.rewind(text, bigint, timestamptz, text) is
'Takes a consumer back in the kept log: from there on everything is delivered to it again, in order. It may be before the
consumer was made. What comes before is left as it is; deliveries that are out from there on end, and their ack_ids
acknowledge nothing. Dead letters stay. No other consumer notices. Waits for workers that are receiving.

consumer  which
to_seq    delivers messages from this seq on
to_time   delivers messages from the first on that was committed then or later; a warning says so where a table was not
          streamed yet
to_row    goes back in the tables instead: first come the rows whose sort_column (without one: the first column of the
          primary key) is at least this, as they are now, and then everything after; what is pending stays so. A
          bridge reads the rows: see sequin.backfills

Returns rewound. Errors: 42704 unknown consumer, 42501 no right to read its stream, 22023 not exactly one target, one that
the log does not reach (the message names the oldest there is), or no value of that column; 55000 nothing is in the log yet,
or a table without a primary key; 25006 read only transaction or replica.';
