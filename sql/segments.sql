-- Segments: the partitions of the log, and of the feeds beside it. A segment belongs to one source and holds the
-- seqs whose high 32 bits are its id.

-- Makes the next segment of a source and returns its id. Attached, not created in place: that takes a share update
-- exclusive lock on the log, which readers and the writer do not notice.
create or replace function sequin._open_segment(source_id int)
returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id int := nextval('sequin.log_segment_id');
begin
  execute format('create table sequin.%I (like sequin.log including defaults)', 'log_' || v_id);
  perform sequin._attach_segment(source_id, v_id);
  return v_id;
end $$;

-- Has the log go on in a table that is there, and makes the feeds' beside it. Segments first, then the log: so are they locked
-- by all who do.
create or replace function sequin._attach_segment(source_id int, id int)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_parent text;
begin
  insert into sequin.log_segment (id, source_id) values (id, source_id);
  execute format('create table sequin.%I (like sequin.feed including defaults)', 'feed_' || id);
  foreach v_parent in array '{log,feed}'::text[] loop
    execute format('alter table sequin.%I attach partition sequin.%I for values from (%s) to (%s)',
      v_parent, v_parent || '_' || id, id::bigint << 32, (id::bigint + 1) << 32);
  end loop;
end $$;

-- Takes note of segments that were made since this transaction began. One that has the log locked already plans with the
-- partitions it knew then, and would see no row of a new one, though the log's head is in it. A lock that is not held
-- yet has a session look at what others have changed: that of a sequence that nothing else here touches, for as long as
-- its size is asked for. To be called between reading the head and looking for what is before it.
create or replace function sequin._see_segments()
returns bigint
language sql
volatile
as $$
  select pg_catalog.pg_relation_size('sequin.log_segment_id'::pg_catalog.regclass)
$$;

-- Drops a segment, and keeps in mind what that was of each route. Takes an access exclusive lock on the log and the feed: the caller sets a lock_timeout.
create or replace function sequin._drop_segment(id int)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into sequin.dropped_log as d (route_id, seq)
  select t.id, l.seq
  from sequin.source_table t
  cross join lateral (
    select l.seq from sequin.log l
    where l.route_id = t.id and l.seq between _drop_segment.id::bigint << 32 and ((_drop_segment.id::bigint + 1) << 32) - 1
    order by l.seq desc
    limit 1) l
  on conflict (route_id) do update set seq = greatest(d.seq, excluded.seq);
  execute format('drop table sequin.%I', 'log_' || id);
  execute format('drop table sequin.%I', 'feed_' || id);
  delete from sequin.log_segment s where s.id = _drop_segment.id;
end $$;

-- The oldest seq that a source's log still has room for: anything below was dropped.
create or replace function sequin._oldest_seq(source_id int)
returns bigint
language sql
stable
as $$
  select min(s.id)::bigint << 32 from sequin.log_segment s where s.source_id = $1 and s.backfill_id is null
$$;
