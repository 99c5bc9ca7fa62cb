-- What is well with other sources, and what is not: a part of health().

create or replace function sequin._source_health()
returns table (name text, status text, detail text, hint text)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select format('source %s', s.name),
         case when s.dropped_at is not null then 'warning' when s.error is not null then 'error'
              when not sequin._is_served(s.id) then case when s.slot_name is null then 'warning' else 'error' end
              when s.slot_name is null then 'warning' else 'ok' end,
         case when s.dropped_at is not null then 'the bridge has not cleared away yet what is on the source' || coalesce(': ' || s.error, '')
              when s.error is not null then s.error
              when not sequin._is_served(s.id) then 'no bridge serves it: nothing is captured'
              when s.slot_name is null then 'the bridge has not begun to capture it yet'
              else 'captured' end,
         case when s.dropped_at is not null
                then format('On the source: select pg_drop_replication_slot(%L); drop publication %I;',
                       coalesce(s.slot_name, s.publication_name), s.publication_name)
              when s.error is not null then s.error_hint
              when not sequin._is_served(s.id) then 'sequin bridge --database-url …' end
  from sequin.source s
  where s.conninfo is not null
  union all
  select format('slot %s', s.slot_name), case when pg_wal_lsn_diff(n.current_lsn, n.restart_lsn) > 1073741824 then 'warning' else 'ok' end,
         format('source %s had %s of WAL kept for it at %s', s.name,
           sequin._size(coalesce(pg_wal_lsn_diff(n.current_lsn, n.restart_lsn), 0)), date_trunc('second', n.sampled_at)),
         case when pg_wal_lsn_diff(n.current_lsn, n.restart_lsn) > 1073741824
           then 'A long transaction there, a bridge that is down, or one that cannot keep up: see source_status.' end
  from sequin.source s
  cross join lateral (
    select * from sequin.source_sample n where n.source_id = s.id order by n.sampled_at desc limit 1) n
  where s.conninfo is not null and s.dropped_at is null and s.slot_name is not null
  union all
  select format('stream %s', m.name), case when t.error is null then 'warning' else 'error' end,
         format('table %s of source %s: %s', coalesce(st.given_name, format('%I.%I', t.schema_name, t.table_name)), s.name,
           coalesce(t.error, 'its changes are not captured yet: the bridge has still to find it there')),
         coalesce(t.error_hint, 'See what health() says of the source.')
  from sequin.source_table t
  join sequin.source s on s.id = t.source_id and s.conninfo is not null
  join sequin.stream_table st on st.table_id = t.id
  join sequin.stream m on m.id = st.stream_id
  where t.error is not null or t.published_at is null
$$;
