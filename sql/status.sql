-- How things stand: lag, pending, in flight. From counters and differences, never from counting rows of the log.

-- How far a consumer is behind. One row: a view that asks this of each of the consumers that the planner expects would look
-- dear, and be compiled (jit).
create or replace function sequin._standing(c sequin.consumer)
returns table (
  pending bigint, in_flight bigint, waiting bigint, dead_letters bigint, handed_out bigint,
  oldest_unacked_seq bigint, oldest_unacked_at timestamptz, oldest_unacked_lsn pg_lsn
)
language plpgsql
stable
rows 1
security definer
set search_path = pg_catalog, pg_temp
set jit = off
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_progress sequin.feed_progress;
  v_total bigint;
  v_unsorted bigint := 0;            -- of a feed: what the log has after it, of which some may not be this consumer's
begin
  if c.start_seq is null then
    return query select 0::bigint, 0::bigint, 0::bigint, 0::bigint, 0::bigint, null::bigint, null::timestamptz, null::pg_lsn;
    return;
  end if;
  if c.reads = 'feed' then
    select * into v_progress from sequin.feed_progress p where p.feed_id = c.feed_id order by p.step desc limit 1;
    v_total := v_progress.total;
    select count(*) into v_unsorted
    from (
      select
      from unnest(c.routes) r(id)
      cross join lateral (
        select from sequin.log l where l.route_id = r.id and l.seq > v_progress.seq order by l.seq limit 10000) l
      limit 10000) l;
  else
    select coalesce(sum(t.total), 0) - c.start_total into v_total
    from unnest(c.routes) r(id)
    cross join lateral (
      select t.total from sequin.tally t where t.route_id = r.id order by t.seq desc limit 1) t;
  end if;
  return query
    with lane as materialized (
      select s.* from generate_series(0, c.lane_count - 1) n(lane)
      cross join lateral (
        select s.* from sequin.lane s where s.consumer_id = c.id and s.lane = n.lane::smallint order by s.prev desc limit 1) s
    ), tracked as (
      select count(*) filter (where d.is_out) as n_out, count(*) filter (where not d.is_out) as n_waiting,
             count(*) filter (where d.deliver_count = 0) as n_new
      from sequin.delivery d where d.consumer_id = c.id and not d.is_done
    ), oldest as (
      select o.seq, o.committed_at, o.metadata
      from (
        select r.seq, r.committed_at, r.metadata
        from lane s
        cross join lateral sequin._rows(c, s.lane, s.cursor_seq, 9223372036854775807, 1) r
        union all
        select d.seq, d.committed_at, d.metadata from sequin.delivery d where d.consumer_id = c.id and not d.is_done
        union all
        -- What was passed by is younger than what its group has waiting here.
        select p.seq, p.committed_at, p.metadata
        from sequin.held_group g
        join lane s on s.lane = g.lane
        cross join lateral sequin._passed_by(c, g, s.upto_seq, 1) p
        where g.consumer_id = c.id and g.held_back > 0 and not exists (
          select from sequin.delivery d
          where d.consumer_id = c.id and d.lane = g.lane and d.group_hash = g.group_hash and not d.is_done and d.seq <= g.after_seq offset 0)
        union all
        select l.seq, l.committed_at, l.metadata
        from unnest(c.routes) r(id)
        cross join lateral (
          select * from sequin.log l where l.route_id = r.id and l.seq > v_progress.seq order by l.seq limit 1) l
        where v_unsorted > 0) o
      order by o.seq
      limit 1
    )
    select greatest(v_total - sum(s.passed) + sum(s.held_back), 0)::bigint + v_unsorted + t.n_waiting,
           sum(s.out_count)::bigint + t.n_out, t.n_waiting,
           (select count(*) from sequin.dead_letter d where d.consumer_id = c.id),
           (sum(s.passed) - sum(s.held_back))::bigint,
           o.seq, o.committed_at, (o.metadata ->> 'commit_lsn')::pg_lsn
    from tracked t
    left join oldest o on true
    cross join lane s
    group by t.n_waiting, t.n_out, t.n_new, o.seq, o.committed_at, o.metadata;
end $$;

create or replace view sequin.source_status as
select s.name,
       case when s.error is not null then 'error' when r.active then 'capturing'
            when s.conninfo is not null and not sequin._is_served(s.id) then 'no bridge'
            when s.conninfo is not null and s.slot_name is not null then 'capturing' when r.slot_name is null then 'no slot'
            else 'no bridge' end as state,
       p.applied_lsn::text as applied_lsn,
       case when s.conninfo is null then r.confirmed_flush_lsn else n.confirmed_lsn end::text as confirmed_lsn,
       case when s.conninfo is not null then pg_wal_lsn_diff(n.current_lsn, n.confirmed_lsn)::bigint
            when not pg_is_in_recovery() then pg_wal_lsn_diff(pg_current_wal_lsn(), r.confirmed_flush_lsn)::bigint end as lag_bytes,
       case when s.conninfo is not null then pg_wal_lsn_diff(n.current_lsn, n.restart_lsn)::bigint
            when not pg_is_in_recovery() then pg_wal_lsn_diff(pg_current_wal_lsn(), r.restart_lsn)::bigint end as retained_bytes,
       p.last_seq, p.written_at as last_change_at,
       g.segment_count, g.log_bytes, g.oldest_seq,
       case when s.conninfo is null and pg_is_in_recovery() or n.sampled_at is null then null
            when s.conninfo is null and pg_current_wal_lsn() = r.confirmed_flush_lsn then 0
            -- Who confirms is there: as old as the oldest place that was noted and is not confirmed.
            when case when s.conninfo is null then r.active else sequin._is_served(s.id) end then coalesce((
              select extract(epoch from clock_timestamp() - min(m.sampled_at))
              from sequin.source_sample m
              where m.source_id = s.id and m.current_lsn > case when s.conninfo is null then r.confirmed_flush_lsn else n.confirmed_lsn end), 0)
            else extract(epoch from clock_timestamp() - greatest(n.sampled_at, p.written_at)) end::float8 as lag_seconds
from sequin.source s
left join lateral (
  select * from sequin.progress p where p.source_id = s.id order by p.step desc limit 1) p on true
left join pg_replication_slots r on r.slot_name = s.slot_name and s.conninfo is null
left join lateral (
  select * from sequin.source_sample n where n.source_id = s.id order by n.sampled_at desc limit 1) n on true
left join lateral (
  select count(*) as segment_count, sum(sequin._segment_bytes(g.id))::bigint as log_bytes, min(g.id)::bigint << 32 as oldest_seq
  from sequin.log_segment g where g.source_id = s.id) g on true
where s.dropped_at is null;
comment on view sequin.source_status is
'How far capture is: lag_bytes is the WAL it has not confirmed yet, lag_seconds how old that is (to ten seconds; where no bridge
is at work, since one is last known to have been), retained_bytes the WAL the slot holds on to, log_bytes what the kept log
takes. Of another source than this database the two in bytes are as the bridge last saw them.';

create or replace view sequin.consumer_status as
select c.name, s.name as stream,
       case when c.paused_at is not null then 'paused' when sequin._consumer_error(c) is not null then 'error'
            when c.start_seq is null then 'starting' else 'active' end as state,
       case when o.conninfo is not null
              then case when p.current_lsn is not null
                then greatest(pg_wal_lsn_diff(p.current_lsn, coalesce(d.oldest_unacked_lsn, p.confirmed_lsn, p.applied_lsn)), 0)::bigint end
            when pg_is_in_recovery() then null
            else greatest(pg_wal_lsn_diff(pg_current_wal_lsn(), coalesce(d.oldest_unacked_lsn, p.confirmed_flush_lsn, p.applied_lsn)), 0)::bigint
       end as lag_bytes,
       coalesce(extract(epoch from clock_timestamp() - d.oldest_unacked_at), 0)::float8 as lag_seconds,
       d.pending, d.in_flight, d.waiting, d.dead_letters,
       d.oldest_unacked_seq, d.oldest_unacked_at,
       -- What is counted begins anew where the consumer is altered. One at rest is not sampled: an older sample is where it was a
       -- minute ago.
       greatest(round((d.handed_out - m.handed_out) * 60
           / case when m.age > 75 then 60 else greatest(m.age, 1) end::numeric), 0)::bigint
         as deliveries_per_minute
from sequin.consumer c
join sequin.stream s on s.id = c.stream_id
join sequin.source o on o.id = s.source_id
cross join lateral sequin._standing(c) d
left join lateral (
  select p.applied_lsn, r.confirmed_flush_lsn, n.current_lsn, n.confirmed_lsn
  from sequin.progress p
  join sequin.source o on o.id = p.source_id
  left join pg_replication_slots r on r.slot_name = o.slot_name and o.conninfo is null
  left join lateral (
    select n.current_lsn, n.confirmed_lsn from sequin.source_sample n where n.source_id = o.id order by n.sampled_at desc limit 1) n on true
  where p.source_id = s.source_id
  order by p.step desc
  limit 1) p on true
cross join lateral (
  -- The newest sample that is a minute old, else the oldest there is: when it was made it had handed out nothing.
  select m.handed_out, extract(epoch from clock_timestamp() - m.sampled_at) as age
  from (
    select m.handed_out, m.sampled_at from sequin.consumer_sample m where m.consumer_id = c.id
    union all
    select 0, c.created_at) m
  order by m.sampled_at <= clock_timestamp() - interval '1 minute' desc,
           abs(extract(epoch from m.sampled_at - (clock_timestamp() - interval '1 minute')))
  limit 1) m;
comment on view sequin.consumer_status is
'How each consumer stands. pending: messages it has not been handed, or that wait to be handed again, and with them what a
filter has yet to choose from, or group_by to sort (10,000 of these at most are counted); in_flight: out, not acknowledged;
waiting: of the pending ones, those that were given or taken back; lag_seconds: the age of the oldest message that is not
acknowledged; lag_bytes: the WAL since then; deliveries_per_minute: how many messages were handed out in the last minute, to ten
seconds. One that comes again, after a nack, an expiry, a redrive or a republish, is not counted again.';

create or replace view sequin.stream_status as
select s.name, o.name as source,
       coalesce(sum(t.total), 0)::bigint as message_count,
       max(t.seq) as last_seq,
       (select count(*) from sequin.consumer c where c.stream_id = s.id) as consumer_count,
       d.lag_seconds, d.lag_bytes, d.pending, d.in_flight, d.oldest_unacked_at, d.deliveries_per_minute
from sequin.stream s
join sequin.source o on o.id = s.source_id
join sequin.stream_table st on st.stream_id = s.id
left join lateral (
  select t.seq, t.total from sequin.tally t where t.route_id = st.table_id order by t.seq desc limit 1) t on true
left join lateral (
  select max(d.lag_seconds) as lag_seconds, max(d.lag_bytes) as lag_bytes, max(d.pending) as pending,
         sum(d.in_flight)::bigint as in_flight, min(d.oldest_unacked_at) as oldest_unacked_at,
         sum(d.deliveries_per_minute)::bigint as deliveries_per_minute
  from sequin.consumer_status d where d.stream = s.name) d on true
group by s.id, s.name, o.name, d.lag_seconds, d.lag_bytes, d.pending, d.in_flight, d.oldest_unacked_at, d.deliveries_per_minute;
comment on view sequin.stream_status is
'How many messages each stream has had, and how far its slowest consumer is behind; in_flight and deliveries_per_minute are of
all its consumers.';
