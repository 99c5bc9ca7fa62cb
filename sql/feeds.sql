-- Feeds: the index of its own that a consumer has when it groups, or chooses, in its own way.

-- The group of a message: its values of some columns, in whatever table. A column that is not in the row counts as
-- null.
create or replace function sequin._group_hash(record jsonb, columns text[])
returns int
language sql
immutable
as $$
  select pg_catalog.hashtext((
    select pg_catalog.string_agg(coalesce(record -> k.name, 'null'::jsonb)::text, ',' order by k.position)
    from unnest(columns) with ordinality k(name, position)))
$$;

-- Whether a message is one of this consumer's.
create or replace function sequin._is_chosen(c sequin.consumer, action "char")
returns boolean
language sql
immutable
as $$
  select case action
    when 'i' then 'insert' = any (c.actions)
    when 'u' then 'update' = any (c.actions)
    when 'd' then 'delete' = any (c.actions)
    when 'x' then c.is_rows and 'delete' = any (c.actions)
    when 't' then 'truncate' = any (c.actions)
    else true
  end
$$;

-- Adds the next messages of the log to a feed, at most max_rows rows of the log a call. How many rows it looked at:
-- fewer than max_rows, and it has caught up.
create or replace function sequin._feed(c sequin.consumer, max_rows int)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_last sequin.feed_progress;
  v_head bigint;
  v_upto bigint;
  v_count bigint;
begin
  select * into v_last from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1;
  v_head := sequin._head(c);
  if v_last.seq >= v_head then
    return 0;
  end if;
  perform sequin._see_segments();
  select count(*), max(l.seq) into v_count, v_upto
  from (
    select l.seq
    from unnest(c.routes) r(id)
    cross join lateral (
      select l.seq from sequin.log l
      where l.route_id = r.id and l.seq > v_last.seq and l.seq <= v_head
      order by l.seq
      limit max_rows) l
    order by l.seq
    limit max_rows) l;
  -- Rows of other tables are behind it, too.
  if v_count < max_rows then v_upto := v_head; end if;
  if v_count = 0 and sequin._segment_end(v_last.seq) = sequin._segment_end(v_head) then
    return 0;
  end if;
  if c.filter is not null or c.transform is not null then
    return sequin._feed_decided(c, v_last, v_upto, v_count);
  end if;
  with added as (
    insert into sequin.feed (feed_id, seq, route_id, group_hash, lane)
    select c.feed_id, g.seq, g.route_id, g.group_hash, g.group_hash & (c.lane_count - 1)
    from (
      select l.seq, l.route_id, case when c.group_by is null then l.group_hash
                                     when c.group_by = '{}' then 0
                                     else sequin._group_hash(l.record, c.group_by) end as group_hash
      from sequin.log l
      where l.route_id = any (c.routes) and l.seq > v_last.seq and l.seq <= v_upto and sequin._is_chosen(c, l.action)) g
    order by g.seq
    returning lane
  )
  insert into sequin.feed_progress (feed_id, step, seq, lanes, total)
  select c.feed_id, v_last.step + 1, v_upto, coalesce(bit_or(1::bigint << a.lane), 0), v_last.total + count(*)
  from added a
  on conflict do nothing;
  if not found then
    raise serialization_failure using
      message = format('the feed of consumer "%s" is being written by another', c.name),
      hint = 'Try again.';
  end if;
  return v_count;
end $$;

-- Gives a consumer the new shape that alter_consumer asks for: what it has not settled yet is sorted into the lanes of
-- a new feed, whatever lanes it was in. What is out stays out, and what backs off backs off; both are followed one by
-- one from here on. The caller holds every lane's lock.
create or replace function sequin._reshape(old sequin.consumer, new sequin.consumer)
returns sequin.consumer
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_head bigint;
  s sequin.lane;
  v_void text;
begin
  if old.start_seq is null then
    return new;
  end if;
  -- Nor may a survey of the old lanes be written down any more.
  v_void := pg_advisory_xact_lock(hashtextextended(old.name, 7190236));
  perform sequin._sweep_all(old, true);
  for v_lane in 0..old.lane_count - 1 loop
    loop
      s := sequin._lane(old.id, v_lane::smallint);
      exit when s.lease is null or sequin._untie(old, s, sequin._unsettled(s), true, false, s.leased_until, null) > 0;
    end loop;
  end loop;

  -- From now on always a feed: the lanes of the log say nothing about rows that were settled in another order.
  new.reads := 'feed';
  new.feed_id := coalesce(new.feed_id, nextval('sequin.feed_id'));
  if old.reads = 'feed' then
    select p.seq into v_head from sequin.feed_progress p where p.feed_id = old.feed_id order by p.step desc limit 1;
  else
    v_head := sequin._head(old);
  end if;
  perform sequin._see_segments();
  with waiting as (
    -- What the lanes have not come to, and what they passed by of held groups.
    select r.seq, r.route_id, r.group_hash, r.record, r.action
    from generate_series(0, old.lane_count - 1) n(lane)
    cross join lateral sequin._lane(old.id, n.lane::smallint) l
    cross join lateral sequin._rows(old, l.lane, l.upto_seq, v_head, 9223372036854775807) r
    union all
    select r.seq, r.route_id, r.group_hash, r.record, r.action
    from (
      select g.lane, min(g.after_seq) as after_seq from sequin.held_group g
      where g.consumer_id = old.id and g.held_back > 0
      group by g.lane) n
    cross join lateral sequin._lane(old.id, n.lane) l
    cross join lateral sequin._rows(old, n.lane, n.after_seq, l.upto_seq, 9223372036854775807) r
    cross join lateral (
      select from sequin.held_group g
      where g.consumer_id = old.id and g.lane = n.lane and g.group_hash = r.group_hash and g.after_seq < r.seq offset 0) g
  ), decided as materialized (
    select w.route_id, d.*
    from (
      select w.route_id, array_agg(w.seq) as seqs
      from (select w.*, row_number() over (partition by w.route_id order by w.seq) / 10000 as part from waiting w) w
      where new.filter is not null or new.transform is not null
      group by w.route_id, w.part) w
    cross join lateral sequin._decide(new, w.route_id, format(
      -- One by one, wherever they are in the log.
      '(select l.* from unnest(%L::bigint[]) w(seq)'
      ' cross join lateral (select * from sequin.log l where l.route_id = %s and l.seq = w.seq offset 0) l offset 0) l',
      w.seqs, w.route_id)) d
  ), buried as materialized (
    select sequin._bury_undecided(new, d.seq, d.route_id, d.group_hash, d.error) from decided d where d.error is not null
  ), sorted as (
    select w.seq, w.route_id, sequin._regroup(new, w.route_id, w.seq, w.group_hash, w.record) as group_hash, null::jsonb as record
    from waiting w
    where new.filter is null and new.transform is null and sequin._is_chosen(new, w.action)
    union all
    select d.seq, d.route_id, d.group_hash, d.record from decided d where d.error is null
  ), added as (
    insert into sequin.feed (feed_id, seq, route_id, group_hash, lane, record)
    select new.feed_id, w.seq, w.route_id, w.group_hash, w.group_hash & (new.lane_count - 1), w.record
    from sorted w
    where (select count(*) from buried) >= 0
    order by w.seq
    returning lane
  )
  insert into sequin.feed_progress (feed_id, step, seq, lanes, total)
  select new.feed_id, 1, v_head, coalesce(bit_or(1::bigint << a.lane), 0), count(*) from added a;

  delete from sequin.held_group g where g.consumer_id = old.id;
  update sequin.delivery t
  set group_hash = r.group_hash, lane = r.group_hash & (new.lane_count - 1), due_at = null
  from (
    select t.ctid as id, sequin._regroup(new, t.route_id, t.seq, t.group_hash, t.record) as group_hash
    from sequin.delivery t where t.consumer_id = old.id) r
  where t.ctid = r.id;
  update sequin.dead_letter t
  set group_hash = r.group_hash, lane = r.group_hash & (new.lane_count - 1)
  from (
    select t.ctid as id, sequin._regroup(new, t.route_id, t.seq, t.group_hash, t.record) as group_hash
    from sequin.dead_letter t where t.consumer_id = old.id) r
  where t.ctid = r.id;

  new.start_seq := 0;
  new.start_total := 0;
  -- Lanes that are no more are left empty, and not removed: a late ack of what they had meets the row that is in its way.
  for v_lane in 0..greatest(old.lane_count, new.lane_count) - 1 loop
    if v_lane >= old.lane_count then
      v_void := pg_advisory_xact_lock(sequin._lane_key(old.name, v_lane::smallint));
    end if;
    s := sequin._lane(old.id, v_lane::smallint);
    if s.lane is null then
      insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq)
      values (old.id, v_lane, 0, nextval('sequin.turn'), 0, 0);
      s := sequin._lane(old.id, v_lane::smallint);
    end if;
    s.cursor_seq := 0;
    s.upto_seq := 0;
    s.passed := 0;
    s.held_back := 0;
    s.permits := null;
    select count(*), count(*) filter (where t.deliver_count = 0), count(distinct t.group_hash) into s.tracked, s.fresh, s.held
    from sequin.delivery t where t.consumer_id = old.id and t.lane = v_lane;
    perform sequin._put_lane(s);
  end loop;
  insert into sequin.held_group (consumer_id, lane, group_hash, after_seq, route_id, record_pk)
  select t.consumer_id, t.lane, t.group_hash, 0, min(t.route_id), min(t.record_pk)
  from sequin.delivery t
  where t.consumer_id = old.id
  group by t.consumer_id, t.lane, t.group_hash;
  perform sequin._arm(old.id, g.lane, array_agg(g.group_hash)) from sequin.held_group g where g.consumer_id = old.id group by g.lane;
  perform sequin._renew_permits(new);
  insert into sequin.floor (consumer_id, step, seq, busy, is_deep)
  select old.id, f.step + 1, 0, array(select generate_series(0, new.lane_count - 1)::smallint), false
  from sequin.floor f where f.consumer_id = old.id
  order by f.step desc
  limit 1;
  return new;
end $$;

-- A message's group under a consumer's new shape. By key it is the log's; by columns, the row's, and not what a transform
-- has made of it, as long as the log has it.
create or replace function sequin._regroup(c sequin.consumer, route_id int, seq bigint, group_hash int, record jsonb)
returns int
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case
    when c.group_by = '{}' then 0
    when c.group_by is not null then sequin._group_hash(
      coalesce((select l.record from sequin.log l where l.route_id = $2 and l.seq = $3), record), c.group_by)
    else coalesce((select l.group_hash from sequin.log l where l.route_id = $2 and l.seq = $3), group_hash)
  end
$$;

-- Whether a consumer's feed has not got to the log's head: it waits for something else than the next change.
create or replace function sequin._is_feed_behind(c sequin.consumer)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select c.reads = 'feed' and (
    select p.seq from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1) < sequin._head(c)
$$;
