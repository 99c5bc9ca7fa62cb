-- Consumers: named, durable readers of a stream.

-- Checks a consumer's options, whether they are about to be created or altered. 22023 names the bad one.
create or replace function sequin._check_consumer(c sequin.consumer)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text;
  v_hint text;
begin
  if c.actions is null or cardinality(c.actions) = 0
     or not c.actions <@ '{insert,update,delete,truncate}'::text[] then
    v_problem := format('actions is %s', coalesce(c.actions::text, 'null'));
    v_hint := 'One or more of insert, update, delete, truncate.';
  elsif (c.ack_wait > '0' and c.ack_wait <= '100 years') is not true then
    v_problem := format('ack_wait is %s', coalesce(c.ack_wait::text, 'null'));
    v_hint := 'An interval above 0, of 100 years at most: how long a worker has for a delivery before it is taken from it.';
  elsif c.max_deliver < 1 then
    v_problem := format('max_deliver is %s', c.max_deliver);
    v_hint := 'At least 1; null: without end.';
  elsif c.max_ack_pending is null or c.max_ack_pending < 1 then
    v_problem := format('max_ack_pending is %s', coalesce(c.max_ack_pending::text, 'null'));
    v_hint := 'At least 1: how many messages may be out, unacknowledged, at a time.';
  elsif (c.backoff >= '0' and c.backoff <= '100 years') is not true then
    v_problem := format('backoff is %s', coalesce(c.backoff::text, 'null'));
    v_hint := 'An interval of 0 to 100 years: the first delay after a nack or an expiry.';
  elsif (c.max_backoff >= c.backoff and c.max_backoff <= '100 years') is not true then
    v_problem := format('max_backoff is %s, and backoff %s', coalesce(c.max_backoff::text, 'null'), c.backoff);
    v_hint := 'An interval that is not below backoff, of 100 years at most: where its doubling ends.';
  end if;
  if v_problem is not null then
    raise invalid_parameter_value using
      message = format('consumer "%s": %s', c.name, v_problem),
      hint = v_hint;
  end if;
end $$;

-- Checks group_by against the stream's tables. 42703 names a column that is missing from one; a WARNING says which changes
-- will not carry it.
create or replace function sequin._check_group_by(c sequin.consumer)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_column text;
  v_problem text;
  v_table sequin.source_table;
  v_sent text[];
  v_without text;
  v_is_far boolean := exists (
    select from sequin.stream m join sequin.source s on s.id = m.source_id where m.id = c.stream_id and s.conninfo is not null);
begin
  if array_ndims(c.group_by) > 1 then
    v_problem := format('group_by is an array of arrays: %s', c.group_by);
  elsif array_position(c.group_by, null) is not null then
    v_problem := 'group_by has a null in it';
  else
    select format('group_by has "%s" twice', g.name) into v_problem
    from unnest(c.group_by) g(name) group by g.name having count(*) > 1 order by g.name limit 1;
  end if;
  if v_problem is not null then
    raise invalid_parameter_value using
      message = format('consumer "%s": %s', c.name, v_problem),
      hint = 'Name columns; leave group_by out to group by primary key; ''{}'' is one group, in total order.';
  end if;
  foreach v_column in array coalesce(c.group_by, '{}') loop
    for v_table in select t.* from sequin.source_table t where t.id = any (c.routes) loop
      -- Of another source's table there is no catalog here: only what the bridge has found, once it has.
      if v_is_far then
        if not v_column = any (v_table.column_names) then
          raise undefined_column using
            message = format('consumer "%s": group_by: table %I.%I has no column "%s"', c.name, v_table.schema_name, v_table.table_name, v_column),
            hint = sequin._did_you_mean(v_column, v_table.column_names, 'Each table of the stream must have it.');
        end if;
        continue;
      end if;
      v_sent := array(select a.name from sequin._expression_columns(v_table.relation_oid) a order by a.attnum);
      if not v_column = any (v_sent) then
        raise undefined_column using
          message = format('consumer "%s": group_by: table %I.%I has no column "%s"%s', c.name, v_table.schema_name, v_table.table_name, v_column,
            case when exists (
              select from pg_attribute a where a.attrelid = v_table.relation_oid and a.attname = v_column and a.attgenerated <> '')
              then ' in its messages: it is generated, and the server does not send it' else '' end),
          hint = sequin._did_you_mean(v_column, v_sent, 'Each table of the stream must have it.');
      end if;
      v_without := concat_ws(' and ',
        case when 'delete' = any (c.actions) then 'deletes' end,
        case when c.actions && '{update}' and exists (
          select from pg_attribute a
          where a.attrelid = v_table.relation_oid and a.attname = v_column and a.attlen = -1 and a.attstorage <> 'p')
          then 'updates that leave a large value as it was' end);
      if v_without <> '' and not v_column = any (v_table.key_columns) and exists (
           select from pg_class k where k.oid = v_table.relation_oid and k.relreplident <> 'f') then
        raise warning using
          message = format('of %I.%I, %s do not carry "%s": they are a group of their own', v_table.schema_name,
            v_table.table_name, v_without, v_column),
          hint = sequin._old_values_hint(v_table.relation_oid);
      end if;
    end loop;
  end loop;
end $$;

-- Which way a consumer with these options reads the log.
create or replace function sequin._shape(c sequin.consumer)
returns sequin.consumer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  c.lane_count := case when c.group_by = '{}' then 1 else 64 end;
  c := sequin._share(c);
  c.reads := case
    when c.filter is not null or c.transform is not null or not c.actions @> '{insert,update,delete}' or 'truncate' = any (c.actions)
      or cardinality(c.group_by) > 0 then 'feed'
    when c.group_by = '{}' then 'total'
    else 'key'
  end;
  c.feed_id := case when c.reads = 'feed' then nextval('sequin.feed_id') end;
  return c;
end $$;

-- The seq before the first row of these routes that was committed from an LSN on: the first after base, the log's head when
-- the LSN was taken, or else where the log is now. Null: the log has not passed that LSN yet. Rows that committed before it
-- are in the log only after it, however far the bridge is behind, and are told by their commit's LSN.
create or replace function sequin._start_by_lsn(source_id int, routes int[], base bigint, lsn pg_lsn)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_applied pg_lsn;
  v_head bigint;
begin
  select greatest(p.applied_lsn, p.horizon_lsn), p.last_seq into v_applied, v_head
  from sequin.progress p where p.source_id = _start_by_lsn.source_id order by p.step desc limit 1;
  if v_applied is null or v_applied <= lsn then
    return null;
  end if;
  return (
    select coalesce(min(l.seq) - 1, v_head)
    from unnest(routes) r(id)
    cross join lateral (
      select l.seq from sequin.log l
      where l.route_id = r.id and l.seq > base and (l.metadata ->> 'commit_lsn')::pg_lsn >= lsn
      order by l.seq
      limit 1) l);
end $$;

-- Where a consumer begins, once the log has passed the moment it was made: gives it its lanes. Whether it has them.
create or replace function sequin._start(consumer_id int)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer;
  v_start bigint;
  v_total bigint;
begin
  -- Somebody else starting it is as good as not yet.
  select * into v_consumer from sequin.consumer c
  where c.id = consumer_id and (c.start_time is null or c.start_seq is not null or sequin._start_by_time(c) is not null)
  for update skip locked;
  if not found then
    return false;
  elsif v_consumer.start_seq is not null then
    return true;
  elsif v_consumer.history_id is not null then
    return false; -- it begins with its history: see _start_history
  end if;
  if v_consumer.start_time is not null then
    v_start := sequin._start_by_time(v_consumer);
  else
    v_start := sequin._start_by_lsn(
      (select s.source_id from sequin.stream s where s.id = v_consumer.stream_id), v_consumer.routes, v_consumer.start_base,
      v_consumer.start_lsn);
  end if;
  if v_start is null then
    return false;
  end if;
  perform sequin._see_segments();
  select sum(sequin._total(r.id, v_start)) into v_total from unnest(v_consumer.routes) r(id);
  update sequin.consumer c set start_seq = v_start, start_total = v_total where c.id = consumer_id;
  insert into sequin.lane (consumer_id, lane, prev, turn, cursor_seq, upto_seq)
  select consumer_id, l.lane, 0, nextval('sequin.turn'), v_start, v_start
  from generate_series(0, v_consumer.lane_count - 1) l(lane);
  insert into sequin.floor (consumer_id, step, seq, busy) values (consumer_id, 1, v_start, '{}');
  if v_consumer.reads = 'feed' then
    insert into sequin.feed_progress (feed_id, step, seq, lanes, total) values (v_consumer.feed_id, 1, v_start, 0, 0);
  end if;
  return true;
end $$;

-- How many messages a route had had up to a seq: what the next tally counts, less the rows in between. Not what the last
-- one counts and the rows since: it may be gone, and rows before it with their segment.
create or replace function sequin._total(route_id int, seq bigint)
returns bigint
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(
    (select t.total - (select count(*) from sequin.log l where l.route_id = $1 and l.seq > $2 and l.seq <= t.seq)
     from sequin.tally t where t.route_id = $1 and t.seq >= $2 order by t.seq limit 1),
    (select t.total from sequin.tally t where t.route_id = $1 order by t.seq desc limit 1),
    0)
$$;

-- Makes the consumer. See create_consumer, which has parsed filter and transform as its caller: as filter_views and
-- transform_views.
create or replace function sequin._create_consumer(
  name text,
  stream text,
  filter text,
  transform text,
  actions text[],
  group_by text[],
  start_at text,
  start_row text,
  ack_wait interval,
  max_deliver int,
  max_ack_pending int,
  backoff interval,
  max_backoff interval,
  if_not_exists boolean,
  filter_views oid[],
  transform_views oid[]
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stream sequin.stream;
  v_new sequin.consumer;
  v_old sequin.consumer;
begin
  perform sequin._check_name('consumer', name);
  v_stream := sequin._stream(stream);
  perform sequin._refuse_dropped(v_stream);
  if start_at is null or start_at not in ('now', 'beginning', 'row') then
    raise invalid_parameter_value using
      message = format('consumer "%s": start_at is %s', name, coalesce(quote_literal(start_at), 'null')),
      hint = 'It is ''now'', ''beginning'' or ''row''.';
  elsif start_at = 'row' and start_row is null then
    raise invalid_parameter_value using
      message = format('consumer "%s": start_at => ''row'' needs start_row', name),
      hint = 'start_row is the first value of the stream''s sort_column to deliver.';
  elsif start_at <> 'row' and start_row is not null then
    raise invalid_parameter_value using
      message = format('consumer "%s": start_row goes with start_at => ''row''', name),
      hint = 'Leave start_row out.';
  end if;

  v_new.name := name;
  v_new.stream_id := v_stream.id;
  v_new.is_rows := v_stream.mode = 'rows';
  v_new.filter := filter;
  v_new.transform := transform;
  v_new.actions := case when actions is not null then array(select distinct a.action from unnest(actions) a(action) order by a.action) end;
  v_new.group_by := group_by;
  v_new.start_at := start_at;
  v_new.ack_wait := ack_wait;
  v_new.max_deliver := max_deliver;
  v_new.max_ack_pending := max_ack_pending;
  v_new.backoff := backoff;
  v_new.max_backoff := max_backoff;
  select array_agg(st.table_id order by st.position) into v_new.routes
  from sequin.stream_table st where st.stream_id = v_stream.id;
  perform sequin._check_consumer(v_new);
  perform sequin._require_stream(v_stream.id);
  if exists (select from sequin.source s where s.id = v_stream.source_id and s.conninfo is not null) then
    v_new.start_time := clock_timestamp();
  end if;

  perform pg_advisory_xact_lock(hashtextextended('sequin.create_consumer', 7190235));
  select * into v_old from sequin.consumer c where c.name = _create_consumer.name;
  if found then
    if if_not_exists
       and (v_old.stream_id, v_old.filter, v_old.transform, v_old.actions, v_old.group_by, v_old.start_at,
            v_old.ack_wait, v_old.max_deliver, v_old.max_ack_pending, v_old.backoff, v_old.max_backoff)
         is not distinct from
           (v_new.stream_id, v_new.filter, v_new.transform, v_new.actions, v_new.group_by, v_new.start_at,
            v_new.ack_wait, v_new.max_deliver, v_new.max_ack_pending, v_new.backoff, v_new.max_backoff)
       and exists (
         select from (select) one
         left join sequin.backfill b on b.consumer_id = v_old.id and b.is_start
         where b.from_row is not distinct from start_row or b.from_row = sequin._from_row(name, v_stream, start_row)) then
      return 'unchanged';
    end if;
    raise duplicate_object using
      message = format('consumer "%s" exists already%s', name, case when if_not_exists then ', and is another one' else '' end),
      hint = case when if_not_exists
        then format(case
               when v_old.stream_id = v_new.stream_id and v_old.start_at = v_new.start_at and start_row is null
                 then 'select * from sequin.consumers where name = %1$L; shows it, sequin.alter_consumer(%1$L, …) changes it.'
               else 'It reads another stream, or began elsewhere: select * from sequin.consumers where name = %1$L; shows it. Give this one '
                 'another name, or sequin.drop_consumer(%1$L) first.' end, name)
        else 'if_not_exists => true makes the same definition a no-op.' end;
  end if;
  perform sequin._check_group_by(v_new);
  v_new := sequin._shape(v_new);
  v_new.start_lsn := pg_current_wal_insert_lsn();
  v_new.start_base := coalesce(
    (select p.last_seq from sequin.progress p where p.source_id = v_stream.source_id order by p.step desc limit 1), 0);
  insert into sequin.consumer (
    name, stream_id, routes, is_rows, reads, lane_count, lane_quota, permit_count, permit_size, filter, transform, actions,
    group_by, start_at, ack_wait, max_deliver, max_ack_pending, backoff, max_backoff, start_lsn, start_base, feed_id, start_time)
  values (
    v_new.name, v_new.stream_id, v_new.routes, v_new.is_rows, v_new.reads, v_new.lane_count, v_new.lane_quota,
    v_new.permit_count, v_new.permit_size, v_new.filter, v_new.transform, v_new.actions, v_new.group_by, v_new.start_at, v_new.ack_wait, v_new.max_deliver,
    v_new.max_ack_pending, v_new.backoff, v_new.max_backoff, v_new.start_lsn, v_new.start_base, v_new.feed_id, v_new.start_time)
  returning id into v_new.id;
  perform sequin._keep_expression(v_new, 'filter', filter, filter_views);
  perform sequin._keep_expression(v_new, 'transform', transform, transform_views);
  if start_at <> 'now' then
    perform sequin._backfill(v_new.id, start_row, is_start => true);
  end if;
  return 'created';
end $$;
create or replace function sequin.create_consumer(
  name text,
  stream text,
  filter text default null,
  transform text default null,
  actions text[] default '{insert,update,delete}',
  group_by text[] default null,
  start_at text default 'now',
  start_row text default null,
  ack_wait interval default '30 seconds',
  max_deliver int default null,
  max_ack_pending int default 10000,
  backoff interval default '1 second',
  max_backoff interval default '5 minutes',
  if_not_exists boolean default false
)
returns text
language plpgsql
as $$
-- Not a definer and no search_path of its own: names in filter and transform are looked up as the caller's would be.
declare
  v_filter_views pg_catalog.oid[];
  v_transform_views pg_catalog.oid[];
  v_result text;
begin
  if filter is not null or transform is not null then
    v_filter_views := sequin._parse(
      pg_catalog.format('consumer "%s": filter', name), sequin._stream_relations(stream, null), 'filter', filter);
    v_transform_views := sequin._parse(
      pg_catalog.format('consumer "%s": transform', name), sequin._stream_relations(stream, null), 'transform', transform);
  end if;
  v_result := sequin._create_consumer(
    name, stream, filter, transform, actions, group_by, start_at, start_row, ack_wait, max_deliver, max_ack_pending,
    backoff, max_backoff, coalesce(if_not_exists, false), v_filter_views, v_transform_views);
  perform sequin._drop_views(v_filter_views);
  perform sequin._drop_views(v_transform_views);
  return v_result;
end $$;
comment on function sequin.create_consumer(text, text, text, text, text[], text[], text, text, interval, int, int, interval, interval, boolean) is
'Makes a consumer: a named, durable reader of a stream, whose messages any number of workers share.

name             1 to 48 bytes, kept as given
stream           what it reads
filter           an SQL boolean, as a trigger''s WHEN: only messages of which it is true are this consumer''s
transform        an SQL expression to jsonb: what the messages have as their record
actions          which of insert, update, delete, truncate it gets
group_by         columns: messages with the same values are handed out in order, one batch at a time; default: the
                 primary key; ''{}'': one group, in total order
start_at         ''now'': every change whose commit follows this call, and none before it (on another source: by the clock
                 of that server, and from when its tables have been found); ''beginning'': the rows that exist, by the
                 stream''s sort_column, as they are when a bridge begins to read them, and then what is committed after
                 that; ''row'': the same from start_row on
start_row        with ''row'': the first value of sort_column (without one: of the primary key) to deliver
ack_wait         how long a worker has for a delivery before it is taken from it; like backoff and max_backoff, 100 years
                 at most
max_deliver      after so many deliveries a message becomes a dead letter; null: never
max_ack_pending  at most so many messages out, or backing off, at a time
backoff          the delay after a first nack or expiry; doubles with each, with jitter
max_backoff      where the doubling ends
if_not_exists    the same definition again is a no-op

filter and transform are one expression each over
  new           the row; null for delete and truncate
  old           the row as it was; null for insert, read and truncate. Without REPLICA IDENTITY FULL the server does not
                say what it was: then it has the key, and the rest of its columns are null (to_jsonb(old) is without them)
  action        insert, update, delete, truncate or read
  table_name, committed_at
new and old are rows of the table: new.amount > 100 and old.status is distinct from new.status. A column of a domain is
of the type that this is over, one of a composite type is text; a large value that an update did not touch is null where
the server does not repeat it (metadata has it among unchanged). For a table of another database they are jsonb. They may
call what is immutable or stable of the system''s and of trusted extensions'' functions. The time zone is UTC; now() is
when the message comes to the consumer. Each message is decided on once, then. One that fails (a division by zero) becomes
a dead letter with the error, and the others go on: sequin.redrive() tries again. When a column they name is dropped,
renamed, or given another type, the consumer waits, with the reason in sequin.consumers, until it is altered or the column
is back. Groups are made of the row, not of what transform makes of it.

Returns created or unchanged. Needs SELECT on the stream''s tables, and the right to make temporary tables for filter and
transform.
Errors: 42704 unknown stream, 42710 the name is taken, 22023 bad argument, 42703 unknown column in group_by, filter or
transform, 42601 a filter or transform that is no plain expression, 42804 one of another type, 42501 no right,
55000 start_at for a table without a primary key, or a stream whose tables were all dropped.';

create or replace function sequin.drop_consumer(name text, if_exists boolean default false)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer;
  v_role oid;
begin
  if if_exists and not exists (select from sequin.consumer c where c.name = drop_consumer.name) then
    return 'absent';
  end if;
  v_consumer := sequin._consumer(name);
  perform sequin._require_reader(v_consumer.stream_id);
  for v_role in select g.role from sequin.consumer_grant g where g.consumer_id = v_consumer.id loop
    delete from sequin.consumer_grant g where g.consumer_id = v_consumer.id and g.role = v_role;
    perform sequin._revoke_if_last(v_role);
  end loop;
  delete from sequin.consumer c where c.id = v_consumer.id;
  perform sequin._forget(v_consumer.id);
  return 'dropped';
end $$;
comment on function sequin.drop_consumer(text, boolean) is
'Drops a consumer and all that is kept for it, at once, however far behind it is. Its grants go with it.

Returns dropped, or absent where if_exists is true and there was none. Errors: 42704 unknown consumer, 42501 no right to
read its stream.';

-- Removes what is kept of a consumer that is gone. The rows of its feed go with the log's segments; what a worker's
-- transaction has in its hands is not waited for, and goes when bridge_sample finds it.
create or replace function sequin._forget(consumer_id int)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  delete from sequin.lane l
  using (select n.ctid from sequin.lane n where n.consumer_id = _forget.consumer_id for update skip locked) n
  where l.ctid = n.ctid;
  delete from sequin.floor f where f.consumer_id = _forget.consumer_id;
  delete from sequin.delivery d
  using (select n.ctid from sequin.delivery n where n.consumer_id = _forget.consumer_id for update skip locked) n
  where d.ctid = n.ctid;
  delete from sequin.held_group g
  using (select n.ctid from sequin.held_group n where n.consumer_id = _forget.consumer_id for update skip locked) n
  where g.ctid = n.ctid;
  delete from sequin.consumer_sample s where s.consumer_id = _forget.consumer_id;
end $$;

create or replace function sequin.pause_consumer(name text)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer := sequin._consumer(name);
begin
  update sequin.consumer c set paused_at = clock_timestamp() where c.id = v_consumer.id and c.paused_at is null;
  return case when found then 'paused' else 'unchanged' end;
end $$;
comment on function sequin.pause_consumer(text) is
'From now on receive and pop give no rows of this consumer. What is out may still be acknowledged, and nothing is lost:
the log is kept for it.

Returns paused or unchanged. Errors: 42704 unknown consumer.';

create or replace function sequin.resume_consumer(name text)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer := sequin._consumer(name);
begin
  update sequin.consumer c set paused_at = null where c.id = v_consumer.id and c.paused_at is not null;
  if not found then
    return 'unchanged';
  end if;
  -- It may have got something meanwhile.
  perform pg_notify('sequin.' || v_consumer.name, '');
  return 'resumed';
end $$;
comment on function sequin.resume_consumer(text) is
'Ends a pause. Returns resumed or unchanged. Errors: 42704 unknown consumer.';
