-- What is well, what is not, and what to do about it.

create or replace function sequin._size(bytes numeric)
returns text
language sql
immutable
as $$
  select pg_catalog.pg_size_pretty(bytes)
$$;

create or replace function sequin.health()
returns table (name text, status text, detail text, hint text)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
  v_source sequin.source;
  v_slot record;
  v_retained numeric;
  v_holder record;
  v_setting sequin.setting;
  v_kept text;                       -- for who is behind
begin
  select * into v_setting from sequin.setting;
  v_kept := case when v_setting.max_bytes is null then 'the log is kept for it'
                 else 'set_retention''s max_bytes may cut the log before it gets there' end;

  for v_source in select * from sequin.source s where s.conninfo is null order by s.id loop
    -- Generic across versions: a column that is not there is null.
    select r.active, r.active_pid, r.restart_lsn, to_jsonb(r) ->> 'wal_status' as wal_status,
           to_jsonb(r) ->> 'invalidation_reason' as invalidation_reason
      into v_slot
    from pg_replication_slots r where r.slot_name = v_source.slot_name;
    v_retained := case when not pg_is_in_recovery() then pg_wal_lsn_diff(pg_current_wal_lsn(), v_slot.restart_lsn) end;

    if v_source.error is not null then
      return query select format('source %s', v_source.name), 'error', v_source.error, v_source.error_hint;
    elsif v_source.slot_name is null then
      return query select format('source %s', v_source.name), 'warning', 'no bridge has run on this database yet',
        'sequin bridge --database-url …';
    elsif v_slot.active is null then
      return query select format('source %s', v_source.name), 'error',
        format('replication slot %s does not exist: changes are not captured', v_source.slot_name),
        'Start the bridge: it says what was lost, and how to go on.';
    elsif v_slot.wal_status = 'lost' then
      return query select format('source %s', v_source.name), 'error',
        format('replication slot %s was invalidated%s: changes are lost', v_source.slot_name,
          coalesce(' (' || v_slot.invalidation_reason || ')', '')),
        'Start the bridge: it says what was lost, and how to go on.';
    elsif not v_slot.active then
      return query select format('source %s', v_source.name), 'error',
        format('no bridge is running: nothing is captured, and the server keeps %s of WAL for it', sequin._size(v_retained)),
        'sequin bridge --database-url …';
    else
      return query select format('source %s', v_source.name), 'ok', format('captured by process %s', v_slot.active_pid), null::text;
    end if;

    if v_slot.active is not null then
      return query select format('slot %s', v_source.slot_name),
        case when v_slot.wal_status in ('unreserved', 'lost') then 'error'
             when v_retained > 1073741824 then 'warning' else 'ok' end,
        format('%s of WAL kept for it%s', sequin._size(coalesce(v_retained, 0)),
          case when current_setting('max_slot_wal_keep_size', true) not in ('-1', '') then
            format(', of %s allowed (max_slot_wal_keep_size)', current_setting('max_slot_wal_keep_size', true)) else '' end),
        case when v_retained > 1073741824 then
          'A long transaction, a bridge that is down, or one that cannot keep up: see source_status, and pg_stat_activity.' end;
    end if;
    return query select * from sequin._capture_health(v_source);
  end loop;

  return query select * from sequin._source_health();

  return query
    select format('gap in %s', coalesce('consumer ' || c.name, 'pipeline ' || p.name, 'source ' || s.name)), 'error',
           format('lost %s: %s',
             case when g.from_lsn = g.to_lsn then format('the transaction at %s', g.from_lsn)
               when g.from_seq is null
               then format('changes from %s to %s', g.from_lsn, coalesce(g.to_lsn::text, 'now'))
               else format('messages %s to %s', g.from_seq, g.to_seq) end, g.reason),
           case when g.consumer_id is null and g.pipeline_id is null
                  then case when g.to_lsn is null and s.conninfo is not null
                         then format('If the address is wrong: select sequin.alter_source(%L, conninfo); else: ', s.name) else '' end
                    || format('select sequin.accept_gap(%L);', s.name)
                when g.pipeline_id is not null then format('select sequin.accept_gap(%L, pipeline => %L);', s.name, p.name)
                else format('select sequin.accept_gap(%L, %L);', s.name, c.name) end
    from sequin.gap g
    join sequin.source s on s.id = g.source_id
    left join sequin.consumer c on c.id = g.consumer_id
    left join sequin.pipeline p on p.id = g.pipeline_id
    where g.accepted_at is null
    order by g.id;

  return query
    select format('table %I.%I', t.schema_name, t.table_name), 'error',
           format('the table was dropped: stream %s has no more of it', string_agg(format('"%s"', m.name), ', ' order by m.name)),
           'Drop the stream and make it anew, if the table is back.'
    from sequin.source_table t
    join sequin.source s on s.id = t.source_id and s.conninfo is null
    join sequin.stream_table st on st.table_id = t.id
    join sequin.stream m on m.id = st.stream_id
    where not exists (select from pg_class k where k.oid = t.relation_oid)
    group by t.id, t.schema_name, t.table_name;

  return query
    select format('backfill %s', b.id), 'error', format('consumer %s did not get all rows: %s', c.name, b.error),
           format('When that is mended: select sequin.backfill(%L); delivers them anew. select sequin.cancel_backfill(%s); if nobody wants them.',
             c.name, b.id)
    from sequin.backfill b
    join sequin.consumer c on c.id = b.consumer_id
    where b.state = 'failed'
      -- Until one has delivered them after all.
      and not exists (
        select from sequin.backfill n
        where n.consumer_id = b.consumer_id and n.id > b.id and n.state = 'done'
          and coalesce(n.filter = b.filter, n.filter is null) and coalesce(n.from_row = b.from_row, n.from_row is null))
    order by b.id;

  return query
    select format('table %I.%I', t.schema_name, t.table_name), 'error',
           b.detail, b.mend
    from sequin.source_table t
    join sequin.source s on s.id = t.source_id and s.conninfo is null
    cross join lateral sequin._kept_back(s, t.relation_oid) b
    where sequin._is_captured(t.id);

  return query
    select format('consumer %s', c.name),
           case when r.error is not null then 'error'
                when d.dead_letters > 0 or d.lag_seconds > extract(epoch from v_setting.keep) then 'warning' else 'ok' end,
           coalesce(r.error || '; ', '') ||
           format('%s pending, %s in flight, %s waiting, %s dead letters%s', d.pending, d.in_flight, d.waiting,
             d.dead_letters, case when c.paused_at is not null then ', paused' else '' end),
           case when r.error is not null then (
                  select format('select sequin.alter_consumer(%L, %s);', c.name, string_agg(k.kind || ' => …', ', ' order by k.kind))
                  from (values ('filter', c.filter), ('transform', c.transform)) k(kind, text) where k.text is not null)
                when d.dead_letters > 0 then format('select * from sequin.dead_letters where consumer = %L;', c.name)
                when d.lag_seconds > extract(epoch from v_setting.keep)
                  then format('It is %s behind, and %s.', justify_interval(make_interval(secs => round(d.lag_seconds))), v_kept) end
    from sequin.consumer c
    join sequin.consumer_status d on d.name = c.name
    cross join lateral (select sequin._consumer_error(c) as error) r
    order by c.name;

  return query
    select format('pipeline %s', d.name),
           case when d.state = 'error' and d.error_code <> '55P03' or k.oid is null then 'error'
                when d.state = 'error' or d.retention_error is not null or d.lag_seconds > extract(epoch from v_setting.keep) then 'warning'
                else 'ok' end,
           case when d.state = 'error' or k.oid is null then format('%s (%s): %s pending', d.error, d.error_code, d.pending)
                when d.retention_error is not null then format('old partitions are not dropped: %s', d.retention_error)
                else format('%s pending, %s written%s', d.pending, d.rows_written, case when d.state = 'paused' then ', paused' else '' end) end,
           case when d.state = 'error' or k.oid is null then d.error_hint
                when d.retention_error is not null then format('It is tried again every few seconds. Look at event table %s.', d.event_table)
                when d.lag_seconds > extract(epoch from v_setting.keep)
                  then format('It is %s behind, and %s.', justify_interval(make_interval(secs => round(d.lag_seconds))), v_kept) end
    from sequin.pipeline_status d
    join sequin.pipeline p on p.name = d.name
    join sequin.source_table t on t.id = p.table_id
    left join pg_class k on k.oid = t.relation_oid
    order by d.name;

  return query
    select 'log'::text,
           case when o.size > v_setting.max_bytes then 'warning' else 'ok' end,
           format('%s in %s segments', sequin._size(o.size), o.segment_count),
           case when o.size > v_setting.max_bytes then 'A segment above the limit is dropped as soon as nobody has it locked.' end
    from (select coalesce(sum(sequin._segment_bytes(g.id)), 0) as size, count(*) as segment_count from sequin.log_segment g) o;

  for v_holder in
    select a.pid, clock_timestamp() - a.xact_start as age
    from sequin._log_holders() h
    join pg_stat_activity a on a.pid = h.pid
    where a.xact_start < clock_timestamp() - interval '1 minute'
      and exists (select from sequin.log_segment g where g.closed_at < clock_timestamp() - v_setting.keep - interval '1 minute')
    order by a.xact_start
    limit 3
  loop
    return query select 'log'::text, 'warning',
      format('process %s has had it locked for %s, in one transaction: nothing of it can be dropped', v_holder.pid,
        date_trunc('second', v_holder.age)),
      format('select pg_terminate_backend(%s);', v_holder.pid);
  end loop;

  -- What keeps dead rows everywhere from being removed. Nothing here suffers from it; other queues in the database do.
  for v_holder in
    select a.pid, clock_timestamp() - a.xact_start as age
    from pg_stat_activity a
    where a.backend_xmin is not null and a.datname = current_database() and a.pid <> pg_backend_pid()
      and a.xact_start < clock_timestamp() - interval '1 hour'
    order by a.xact_start
    limit 3
  loop
    return query select 'old transaction'::text, 'warning',
      format('process %s has had a transaction open for %s: the server cannot clean up, and keeps WAL', v_holder.pid,
        date_trunc('second', v_holder.age)),
      format('select pg_terminate_backend(%s);', v_holder.pid);
  end loop;
end $$;
comment on function sequin.health() is
'One row for each thing there is: name, status (ok, warning or error), detail, and a hint where something can be done.';
