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
begin
  select * into v_setting from sequin.setting;

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
  end loop;

  return query select * from sequin._source_health();

  return query
    select format('gap in %s', coalesce('consumer ' || c.name, 'source ' || s.name)), 'error',
           format('lost %s: %s',
             case when g.consumer_id is null
               then format('changes from %s to %s', g.from_lsn, coalesce(g.to_lsn::text, 'now'))
               else format('messages %s to %s', g.from_seq, g.to_seq) end, g.reason),
           case when g.consumer_id is null then format('select sequin.accept_gap(%L);', s.name)
                else format('select sequin.accept_gap(%L, %L);', s.name, c.name) end
    from sequin.gap g
    join sequin.source s on s.id = g.source_id
    left join sequin.consumer c on c.id = g.consumer_id
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
    select format('table %I.%I', t.schema_name, t.table_name), 'error',
           format('the table is not in publication %s any more: its changes are not captured', s.publication_name),
           format('alter publication %I add table %I.%I;', s.publication_name, t.schema_name, t.table_name)
    from sequin.source_table t
    join sequin.source s on s.id = t.source_id and s.conninfo is null
    where exists (select from sequin.stream_table st where st.table_id = t.id)
      and exists (select from pg_class k where k.oid = t.relation_oid)
      and not exists (
        select from pg_publication p join pg_publication_rel r on r.prpubid = p.oid
        where p.pubname = s.publication_name and r.prrelid = t.relation_oid);

  return query
    select format('consumer %s', c.name),
           case when d.dead_letters > 0 or d.lag_seconds > extract(epoch from v_setting.keep) then 'warning' else 'ok' end,
           format('%s pending, %s in flight, %s waiting, %s dead letters%s', d.pending, d.in_flight, d.waiting,
             d.dead_letters, case when c.paused_at is not null then ', paused' else '' end),
           case when d.dead_letters > 0 then format('select * from sequin.dead_letters where consumer = %L;', c.name)
                when d.lag_seconds > extract(epoch from v_setting.keep)
                  then format('It is %s behind, and the log is kept for it.', justify_interval(make_interval(secs => round(d.lag_seconds)))) end
    from sequin.consumer c
    join sequin.consumer_status d on d.name = c.name
    order by c.name;

  return query
    select 'log'::text,
           case when o.size > v_setting.max_bytes then 'warning' else 'ok' end,
           format('%s in %s segments', sequin._size(o.size), o.segment_count),
           case when o.size > v_setting.max_bytes then 'A segment above the limit is dropped as soon as nobody has it locked.' end
    from (select coalesce(sum(sequin._segment_bytes(g.id)), 0) as size, count(*) as segment_count from sequin.log_segment g) o;

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
