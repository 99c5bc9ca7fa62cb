-- Handing out again what was settled: single messages, put back among those that are followed one by one.

-- The rows that republish reads from a table have seqs of their own: in the upper half of the segment before the live
-- one, where no row of the log ever is. So each is newer than what is in older segments and older than what the live
-- one has, or will have, of its row.
create or replace function sequin._is_reread(seq bigint)
returns boolean
language sql
immutable
as $$
  select seq & 2147483648 <> 0
$$;

-- Whether a lane comes to a message by itself: it has not been there yet, or has passed it by with its held group.
create or replace function sequin._is_ahead(c sequin.consumer, s sequin.lane, group_hash int, seq bigint)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  select not sequin._is_reread(seq)
    and (seq > s.upto_seq or exists (
      select from sequin.held_group g
      where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = $3 and $4 > g.after_seq))
    -- A feed that was sorted anew has no more what was settled before.
    and (c.reads <> 'feed'
         or exists (select from sequin.feed f where f.feed_id = c.feed_id and f.lane = s.lane and f.seq = $4)
         or $4 > (select p.seq from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1))
$$;

-- The consumer as it is, for a caller who has locked lanes by what it was. Null where another has altered, sent back or
-- dropped it meanwhile: its lanes may be others.
create or replace function sequin._as_before(c sequin.consumer)
returns sequin.consumer
language sql
volatile
as $$
  select t from sequin.consumer t
  where t.id = c.id
    and (t.lane_count, t.reads, t.feed_id, t.group_by, t.filter, t.transform, t.actions)
        is not distinct from (c.lane_count, c.reads, c.feed_id, c.group_by, c.filter, c.transform, c.actions)
$$;

-- Puts messages of a lane back: they are delivered again, counting from one, each before whatever is left of its group.
-- Those that are out, or on their way anyway, are not doubled. Each at most once. The caller holds the lane's lock.
create or replace function sequin._put_back(c sequin.consumer, lane smallint, messages sequin.delivery[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  s sequin.lane;
  v_out bigint[];
  v_tracked bigint[];
  v_waiting bigint[];                -- of those, the ones that are not acknowledged
  v_messages sequin.delivery[];
begin
  -- An ack or a nack may come between: it does not wait for the lock. The lane's row decides, and comes first.
  loop
    s := sequin._lane(c.id, lane);
    if s.lane is null then
      return;  -- dropped
    end if;
    perform sequin._see_segments();
    v_out := '{}';
    if s.lease is not null and exists (
         select from unnest(messages) m where m.seq > s.cursor_seq and m.seq <= s.upto_seq) then
      v_out := array(
        select r.seq
        from (
          select r.seq, (row_number() over (order by r.seq) - 1)::int as place
          from sequin._rows(c, s.lane, s.cursor_seq, s.upto_seq, 2147483647) r) r
        join unnest(sequin._unsettled(s)) u(place) on u.place = r.place);
    end if;
    select coalesce(array_agg(d.seq), '{}'), coalesce(array_agg(d.seq) filter (where not d.is_done), '{}')
      into v_tracked, v_waiting
    from unnest(messages) m
    cross join lateral (
      select d.seq, d.is_done from sequin.delivery d
      where d.consumer_id = c.id and d.lane = s.lane and d.group_hash = m.group_hash and d.seq = m.seq offset 0) d;
    v_messages := array(
      select m
      from unnest(messages) m
      where not m.seq = any (v_out)
        and not m.seq = any (v_waiting)
        and not sequin._is_ahead(c, s, m.group_hash, m.seq));
    -- Under an older snapshot the lane's row has to say that it is the newest.
    if v_messages = '{}' and not sequin._is_strict() then
      return;
    end if;
    s.tracked := s.tracked + (
      select count(*) from unnest(v_messages) m
      where not m.seq = any (v_tracked));
    s.fresh := s.fresh + cardinality(v_messages);
    s.held := s.held + (
      select count(distinct m.group_hash) from unnest(v_messages) m
      where not exists (
        select from sequin.held_group g
        where g.consumer_id = c.id and g.lane = s.lane and g.group_hash = m.group_hash offset 0));
    exit when sequin._put_lane(s);
  end loop;
  if v_messages = '{}' then
    return;
  end if;

  -- Its group is held back from here on; what of it is out with the lane's lease comes first.
  insert into sequin.held_group as h (consumer_id, lane, group_hash, after_seq, behind_lease, route_id, record_pk, is_mixed)
  select c.id, s.lane, m.group_hash, s.upto_seq, s.lease, min(m.route_id), min(m.record_pk),
         count(distinct (m.route_id, m.record_pk)) > 1
  from unnest(v_messages) m
  group by m.group_hash
  on conflict (consumer_id, lane, group_hash) do update
    set is_mixed = h.is_mixed or excluded.is_mixed
                   or (h.route_id, h.record_pk) is distinct from (excluded.route_id, excluded.record_pk);
  insert into sequin.delivery as d (
    consumer_id, seq, lane, group_hash, deliver_count, not_before, is_out, error, route_id, committed_at, action,
    table_schema, table_name, record_pk, record, changes, metadata)
  select c.id, m.seq, s.lane, m.group_hash, 0, clock_timestamp(), false, m.error, m.route_id, m.committed_at, m.action,
         m.table_schema, m.table_name, m.record_pk, m.record, m.changes, m.metadata
  from unnest(v_messages) m
  -- Acknowledged, and not removed yet.
  on conflict (consumer_id, lane, group_hash, seq) do update
    set deliver_count = 0, not_before = excluded.not_before, lease = null, pick = null, is_out = false, is_done = false,
        leased_at = null, error = excluded.error;
  perform sequin._arm(c.id, s.lane, array(select distinct m.group_hash from unnest(v_messages) m));
end $$;
