-- What of a source of this database is not well beside the slot's being read: what holds the server back, what is about to
-- lose changes, and what makes users' own statements fail.

-- Minor releases from which on the server does not lose or misplace changes that it once did: tables added to a publication
-- beside writers, WAL removed too early, confirmed positions that went back. 12 had its last release before that.
create or replace function sequin._needed_minor(major int)
returns int
language sql
immutable
as $$
  select case major when 13 then 21 when 14 then 18 when 15 then 14 when 16 then 10 when 17 then 6 else 0 end
$$;

create or replace function sequin._capture_health(source sequin.source)
returns table (name text, status text, detail text, hint text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_number int := current_setting('server_version_num')::int;
  v_slot record;
  v_held numeric;
  v_holder text;
  v_fault text := sequin._publication_fault(source);
begin
  if v_number % 10000 < sequin._needed_minor(v_number / 10000) then
    return query select 'server'::text, 'warning', format('PostgreSQL %s can lose changes: adding a table to a publication beside '
        'writers, and removing WAL that a slot needs, were mended in %s.%s', current_setting('server_version'), v_number / 10000,
        sequin._needed_minor(v_number / 10000)),
      format('Upgrade the server to PostgreSQL %s.%s or newer.', v_number / 10000, sequin._needed_minor(v_number / 10000));
  end if;

  if v_fault is not null and source.error is null then
    return query select format('publication %s', source.publication_name), 'error', v_fault || ': changes since are lost',
      'Start the bridge: it records the gap, and makes the publication again once that is accepted.'::text;
  end if;

  select r.slot_name, r.active, r.restart_lsn, r.confirmed_flush_lsn, age(r.catalog_xmin) as catalog_age,
         coalesce((to_jsonb(r) ->> 'two_phase')::boolean, false) as is_two_phase,
         coalesce((to_jsonb(r) ->> 'failover')::boolean, false) as is_failover
    into v_slot
  from pg_replication_slots r where r.slot_name = source.slot_name;

  -- Confirmed, and kept all the same: an open transaction began before it.
  v_held := pg_wal_lsn_diff(v_slot.confirmed_flush_lsn, v_slot.restart_lsn);
  if v_held > 1073741824 or v_slot.catalog_age > 100000000 then
    select string_agg(h.holder, ', ' order by h.since) into v_holder
    from (
      select format('process %s (database %s)', a.pid, a.datname) as holder, a.xact_start as since
      from pg_stat_activity a where a.backend_xid is not null and a.pid <> pg_backend_pid()
      union all
      select format('prepared transaction %L (database %s)', p.gid, p.database), p.prepared from pg_prepared_xacts p
      order by since
      limit 3) h;
  end if;
  if v_held > 1073741824 then
    return query select format('slot %s restart', source.slot_name), 'warning',
      format('%s of WAL is kept that has been read already: an open transaction began before it (restart_lsn %s, confirmed %s)',
        sequin._size(v_held), v_slot.restart_lsn, v_slot.confirmed_flush_lsn),
      coalesce('End the oldest: ' || v_holder || '.', 'It goes when the server has written a checkpoint.');
  end if;
  if v_slot.catalog_age > 100000000 then
    return query select format('slot %s catalog', source.slot_name), 'warning',
      format('the slot keeps rows of the system catalogs that have been dead for %s transactions: they cannot be vacuumed', v_slot.catalog_age),
      coalesce('End the oldest: ' || v_holder || '.', 'A bridge that keeps up moves it on: see source_status.');
  end if;
  if v_slot.is_two_phase then
    return query select format('slot %s two_phase', source.slot_name), 'error',
      'another reader has made the slot two-phase: it cannot be read on'::text,
      'Start the bridge anew: it records the gap, and makes a slot of its own once that is accepted.'::text;
  end if;

  -- What a failover slot waits for (17 and newer).
  if v_slot.is_failover and coalesce(current_setting('synchronized_standby_slots', true), '') <> '' then
    return query
      select format('slot %s standby', source.slot_name), 'error',
             format('nothing is sent to the bridge: standby slot %s, named in synchronized_standby_slots, %s', n.name,
               case when r.slot_name is null then 'does not exist' else 'is not connected' end),
             'Bring the standby back; or take it out: alter system set synchronized_standby_slots = …; select pg_reload_conf();'
      from (select btrim(s, ' "') as name
            from unnest(string_to_array(current_setting('synchronized_standby_slots', true), ',')) s) n
      left join pg_replication_slots r on r.slot_name = n.name
      where not coalesce(r.active, false);
  end if;

  return query
    select format('table %I.%I', t.schema_name, t.table_name), 'error', f.detail, f.hint
    from sequin.source_table t
    join pg_class c on c.oid = t.relation_oid
    cross join lateral sequin._table_name(c.oid) n(name)
    -- Its changes come under the uppermost table that is published, and that may be itself.
    left join lateral (
      select sequin._table_name(a.relid::oid) as name
      from pg_partition_ancestors(c.oid) with ordinality a(relid, depth)
      join pg_publication_rel r on r.prrelid = a.relid
      join pg_publication p on p.oid = r.prpubid and p.pubname = source.publication_name
      where a.relid <> c.oid
      order by a.depth desc
      limit 1) u on true
    cross join lateral (
      select v.detail, v.hint
      from (values
        (1, u.name is not null,
         format('the table is a partition of %s now: its changes come under that table', u.name), format('Stream %s instead.', u.name)),
        (2, c.relkind = 'r' and not sequin._has_replica_identity(c.oid),
         'the table has no primary key or replica identity any more: its updates and deletes fail',
         sequin._no_identity_mend(c.oid)),
        (3, c.relkind = 'r' and c.relreplident = 'f' and sequin._has_virtual(c.oid),
         'the table has replica identity full and a virtual generated column: its updates and deletes fail',
         format('alter table %s replica identity default; where it has no primary key, add one first.', n.name))
      ) v(n, is_so, detail, hint)
      where v.is_so
      order by v.n
      limit 1) f
    where t.source_id = source.id and sequin._is_captured(t.id)
    order by t.id;

  -- Partitions are made, attached and altered without anybody's asking; the first of each table is named.
  return query
    select format('table %I.%I', t.schema_name, t.table_name), 'error', format(l.detail, l.name), l.hint
    from sequin.source_table t
    join pg_class c on c.oid = t.relation_oid and c.relkind = 'p'
    cross join lateral (
      select f.detail, f.hint, n.name
      from pg_partition_tree(c.oid) d
      join pg_class r on r.oid = d.relid
      cross join lateral sequin._table_name(d.relid) n(name)
      cross join lateral (values
        (1, sequin._is_outside_wal(d.relid),
         'its partition %s is unlogged or foreign: what is written there is not captured',
         format('alter table %1$s set logged; or, of a foreign one: alter table … detach partition %1$s;', n.name)),
        (2, not sequin._has_replica_identity(d.relid),
         'its partition %s has no primary key or replica identity: updates and deletes of its rows fail',
         sequin._no_identity_mend(d.relid)),
        (3, r.relreplident = 'f' and sequin._has_virtual(d.relid),
         'its partition %s has replica identity full and a virtual generated column: updates and deletes of its rows fail',
         format('alter table %s replica identity default;', n.name)),
        (4, sequin._identity_mend(c.oid, d.relid) is not null,
         'the replica identity of its partition %s lacks columns of its key: updates and deletes of its rows come without it',
         sequin._identity_mend(c.oid, d.relid))
      ) f(n, is_so, detail, hint)
      where d.isleaf and d.relid <> c.oid and f.is_so
      order by f.n, d.relid
      limit 1) l
    where t.source_id = source.id and sequin._is_captured(t.id)
    order by t.id;
end $$;
