-- Changing a consumer's options while it is at work.

-- Gives what a consumer has pending the shape that alter_consumer asks for. The caller holds every lane's lock; an ack
-- under way, which does not wait for it, may be waiting for a lane's row that is written here, and has written another:
-- 55P03 then, and the caller lets it go first.
create or replace function sequin._rearrange(old sequin.consumer, new sequin.consumer)
returns sequin.consumer
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '200ms'
as $$
begin
  if (new.actions, new.group_by, new.filter, new.transform) is distinct from
     (old.actions, old.group_by, old.filter, old.transform) then
    return sequin._reshape(old, sequin._shape(new));
  elsif new.max_ack_pending <> old.max_ack_pending then
    new := sequin._share(new);
    perform sequin._renew_permits(new);
  end if;
  return new;
end $$;

-- Changes the consumer. See alter_consumer, which has parsed filter and transform as its caller.
create or replace function sequin._alter_consumer(
  name text,
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
  filter_views oid[],
  transform_views oid[]
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set jit = off
as $$
declare
  v_old sequin.consumer;
  v_new sequin.consumer;
  v_void text;
  v_is_another boolean := false;
begin
  v_old := sequin._consumer(name);
  perform sequin._require_reader(v_old.stream_id);
  if start_at is not null or start_row is not null then
    raise invalid_parameter_value using
      message = format('consumer "%s" has started already', name),
      hint = 'sequin.rewind(consumer, …) goes back; a new consumer starts where it is told.';
  end if;

  -- No worker may be between reading how the consumer is made and acting on it.
  for v_lane in 0..63 loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(v_old.name, v_lane::smallint));
  end loop;
  select * into v_old from sequin.consumer c where c.id = v_old.id for no key update;
  if not found then
    v_old := sequin._consumer(name);
  end if;
  v_new := v_old;
  if actions is not null then
    v_new.actions := array(select distinct a.action from unnest(actions) a(action) order by a.action);
  end if;
  v_new.filter := nullif(coalesce(filter, v_old.filter), '');
  v_new.transform := nullif(coalesce(transform, v_old.transform), '');
  v_new.group_by := coalesce(group_by, v_old.group_by);
  v_new.ack_wait := coalesce(ack_wait, v_old.ack_wait);
  v_new.max_deliver := case when max_deliver = 0 then null else coalesce(max_deliver, v_old.max_deliver) end;
  v_new.max_ack_pending := coalesce(max_ack_pending, v_old.max_ack_pending);
  v_new.backoff := coalesce(backoff, v_old.backoff);
  v_new.max_backoff := coalesce(max_backoff, v_old.max_backoff);
  perform sequin._check_consumer(v_new);
  if filter is not null then
    v_is_another := sequin._keep_expression(v_new, 'filter', v_new.filter, filter_views);
  end if;
  if transform is not null then
    v_is_another := sequin._keep_expression(v_new, 'transform', v_new.transform, transform_views) or v_is_another;
  end if;
  if v_new is not distinct from v_old then
    return case when v_is_another then 'altered' else 'unchanged' end;
  end if;
  if v_new.group_by is distinct from v_old.group_by then
    perform sequin._check_group_by(v_new);
  end if;
  loop
    begin
      v_new := sequin._rearrange(v_old, v_new);
      exit;
    exception when lock_not_available or deadlock_detected then
      null;
    end;
  end loop;
  update sequin.consumer c
  set filter = v_new.filter, transform = v_new.transform, actions = v_new.actions, group_by = v_new.group_by, ack_wait = v_new.ack_wait, max_deliver = v_new.max_deliver,
      max_ack_pending = v_new.max_ack_pending, backoff = v_new.backoff, max_backoff = v_new.max_backoff,
      reads = v_new.reads, lane_count = v_new.lane_count, lane_quota = v_new.lane_quota,
      permit_count = v_new.permit_count, permit_size = v_new.permit_size, feed_id = v_new.feed_id,
      start_seq = v_new.start_seq, start_total = v_new.start_total
  where c.id = v_old.id;
  return 'altered';
end $$;
create or replace function sequin.alter_consumer(
  name text,
  filter text default null,
  transform text default null,
  actions text[] default null,
  group_by text[] default null,
  start_at text default null,
  start_row text default null,
  ack_wait interval default null,
  max_deliver int default null,
  max_ack_pending int default null,
  backoff interval default null,
  max_backoff interval default null
)
returns text
language plpgsql
as $$
-- As create_consumer.
declare
  v_filter_views pg_catalog.oid[];
  v_transform_views pg_catalog.oid[];
  v_result text;
begin
  if name is not null and (filter operator(pg_catalog.<>) '' or transform operator(pg_catalog.<>) '') then
    v_filter_views := sequin._parse(
      pg_catalog.format('consumer "%s": filter', name), sequin._stream_relations(null, name), 'filter', nullif(filter, ''));
    v_transform_views := sequin._parse(
      pg_catalog.format('consumer "%s": transform', name), sequin._stream_relations(null, name), 'transform', nullif(transform, ''));
  end if;
  v_result := sequin._alter_consumer(
    name, filter, transform, actions, group_by, start_at, start_row, ack_wait, max_deliver, max_ack_pending, backoff,
    max_backoff, v_filter_views, v_transform_views);
  perform sequin._drop_views(v_filter_views);
  perform sequin._drop_views(v_transform_views);
  return v_result;
end $$;
comment on function sequin.alter_consumer(text, text, text, text[], text[], text, text, interval, int, int, interval, interval) is
'Changes a consumer''s options; what is null stays as it is. filter => '''' and transform => '''' mean none any more, and
max_deliver => 0 means without end. Where it stands is kept: nothing is lost and nothing comes twice. Waits for workers
that are receiving or acknowledging; a change of filter, transform, actions or group_by decides on what is pending anew,
and sorts it, which takes time in proportion. What is out, or backs off, stays as it was handed out, and what an earlier
filter has left out stays out.

The arguments are create_consumer''s; start_at and start_row are refused, as it has started: see rewind.

Returns altered or unchanged.
Errors: 42704 unknown consumer, 22023 bad argument, 42703 unknown column in group_by, filter or transform, 42601 a filter
or transform that is no plain expression, 42804 one of another type, 42501 no right.';
