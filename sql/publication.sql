-- The publication: what the server sends is decided by it, and by what it was at the time. So whether it, and each table
-- in it, is still the one that was made has to be looked at again and again: 12 to 17 end the stream where it is gone,
-- 18 leaves the changes out with a warning, and where it is made anew, or a table is put back, all looks well again.

-- Whether a table's changes are wanted: a stream or a pipeline has it.
create or replace function sequin._is_captured(table_id int)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select exists (select from sequin.stream_table t where t.table_id = $1)
      or exists (select from sequin.pipeline p where p.table_id = $1)
$$;

-- What is wrong with the publication of a source of this database; null: nothing.
create or replace function sequin._publication_fault(source sequin.source)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case
    when source.conninfo is not null then null
    when p.oid is null then format('publication "%s" was dropped', source.publication_name)
    when p.oid <> source.publication_oid then format('publication "%s" was dropped, and made anew', source.publication_name)
  end
  from (select) one
  left join pg_publication p on p.pubname = source.publication_name
$$;

-- A publication of this database as the catalog has it, its xmin with it: that is another with each alteration but of which
-- tables are in it, and no vacuum changes it.
create or replace function sequin._publication_row(name text)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select to_jsonb(p) || jsonb_build_object('xmin', p.xmin::text) from pg_publication p where p.pubname = $1
$$;

-- Takes note of what a source's publication is now. One that looks as before, and was written anew, was altered and put back, or
-- renamed and renamed back: a gap. What is not as before is seen where tables are looked at. Returns why capture cannot go on;
-- null: it can.
create or replace function sequin._note_altered(source sequin.source, publication_row jsonb, lsn pg_lsn)
returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_applied pg_lsn := (select p.applied_lsn from sequin.progress p where p.source_id = source.id order by p.step desc limit 1);
  v_accepted text;
  v_is_put_back boolean := publication_row <> source.publication_row and publication_row - 'xmin' = source.publication_row - 'xmin';
begin
  if source.is_unreadable then
    return format('publication "%s" was not there, by that name, when changes were made that the server has still to send', source.publication_name);
  end if;
  -- It was away when the bridge looked, and that was accepted before it was back: there is no going on from before, and it is
  -- still that gap.
  select g.reason into v_accepted from sequin.gap g
  where v_is_put_back and g.source_id = source.id and g.consumer_id is null and g.pipeline_id is null
    and g.to_lsn is null and g.from_lsn = v_applied and g.accepted_at is not null and g.reason like 'publication %'
  order by g.id desc
  limit 1;
  if found then
    return v_accepted;
  end if;
  -- One bridge at a time gets through here with what it has seen.
  update sequin.source s set publication_row = _note_altered.publication_row
  where s.id = source.id and s.publication_row is not distinct from source.publication_row
    and s.publication_row is distinct from _note_altered.publication_row;
  if not found or not coalesce(v_is_put_back, false) or not exists (
       select from sequin.source_table t
       where t.source_id = source.id and t.unpublished_lsn is null and sequin._is_captured(t.id)
         and (source.conninfo is null or t.published_at is not null)) then
    return null;
  end if;
  update sequin.gap g set to_lsn = lsn
  where g.source_id = source.id and g.consumer_id is null and g.pipeline_id is null
    and g.to_lsn is null and g.from_lsn = v_applied and g.accepted_at is null;
  if not found then
    insert into sequin.gap (source_id, from_lsn, to_lsn, reason)
    values (source.id, coalesce(v_applied, lsn), lsn,
      format('publication "%s" was altered or renamed, and put back: what it kept back meanwhile is missing', source.publication_name));
  end if;
  return null;
end $$;

-- What the publication of a source of this database keeps back of a table's changes, and the statement that mends it; no row:
-- nothing. Columns that not every version has are asked for by name.
create or replace function sequin._kept_back(source sequin.source, relation oid, out detail text, out mend text)
returns setof record
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select k.detail, k.mend
  from pg_class c
  join pg_namespace n on n.oid = c.relnamespace
  cross join lateral format('alter publication %I', source.publication_name) a(alter)
  left join pg_publication p on p.pubname = source.publication_name
  left join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = c.oid
  cross join lateral (values
    (1, r.oid is null,
     format('the table is not in publication %s any more: its changes are not captured', source.publication_name),
     format('%s add table only %I.%I;', a.alter, n.nspname, c.relname)),
    (2, to_jsonb(r) ->> 'prqual' is not null or to_jsonb(r) ->> 'prattrs' is not null,
     format('publication %s has a row filter or a column list for the table: the rest is not captured', source.publication_name),
     format('%s drop table only %I.%I; %1$s add table only %2$I.%3$I;', a.alter, n.nspname, c.relname)),
    (3, not (p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate),
     format('publication %s publishes some kinds of changes only: the others are not captured', source.publication_name),
     format('%s set (publish = %L);', a.alter, 'insert, update, delete, truncate')),
    (4, c.relkind = 'p' and not coalesce((to_jsonb(p) ->> 'pubviaroot')::boolean, true),
     format('publication %s publishes partitions under their own names: they are not captured', source.publication_name),
     format('%s set (publish_via_partition_root = true);', a.alter)),
    (5, to_jsonb(p) ->> 'pubgencols' = 'n' and exists (
       select from pg_attribute g where g.attrelid = c.oid and g.attgenerated = 's' and not g.attisdropped),
     format('publication %s publishes no generated columns: they are not captured', source.publication_name),
     format('%s set (publish_generated_columns = stored);', a.alter))
  ) k(n, is_so, detail, mend)
  where c.oid = relation and k.is_so
  order by k.n
  limit 1
$$;

-- Remembers a table's place in the publication, unless it is captured already: then the place it had is what counts.
create or replace function sequin._note_published(source sequin.source, relation oid)
returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source_table t
  set unpublished_lsn = null, publication_rel_oid = (
    select r.oid from pg_publication p join pg_publication_rel r on r.prpubid = p.oid
    where p.pubname = source.publication_name and r.prrelid = relation)
  where t.source_id = source.id and t.relation_oid = relation
    and not sequin._is_captured(t.id)
$$;

-- Takes the tables of a source that nothing needs any more out of its publication.
create or replace function sequin._unpublish(source_id int)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table record;
begin
  for v_table in
    select t.relation_oid, p.pubname
    from sequin.source_table t
    join sequin.source s on s.id = t.source_id and s.conninfo is null
    join pg_publication p on p.pubname = s.publication_name
    join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = t.relation_oid
    where t.source_id = _unpublish.source_id and not sequin._is_captured(t.id)
  loop
    execute format('alter publication %I drop table only %s', v_table.pubname, sequin._table_name(v_table.relation_oid));
  end loop;
end $$;

-- The bridge looks every few seconds, and before it begins. Tables that are out of the publication, or that it keeps some of
-- back, are taken note of, and become gaps when they are back: no other table waits for that.
create or replace function sequin.bridge_publication(source_id int)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
  v_fault text;
  v_table record;
begin
  select * into v_source from sequin.source s where s.id = source_id;
  if v_source.conninfo is not null then
    return null;
  end if;
  v_fault := coalesce(sequin._publication_fault(v_source),
    sequin._note_altered(v_source, sequin._publication_row(v_source.publication_name), pg_current_wal_insert_lsn()));
  if v_fault is not null then
    return v_fault;
  end if;
  for v_table in
    select t.id, t.schema_name, t.table_name, t.publication_rel_oid, t.unpublished_lsn, r.oid as rel_oid, b.is_kept_back
    from sequin.source_table t
    join pg_class c on c.oid = t.relation_oid
    cross join lateral (select exists (select from sequin._kept_back(v_source, c.oid)) as is_kept_back) b
    left join pg_publication_rel r on r.prpubid = v_source.publication_oid and r.prrelid = t.relation_oid
    where t.source_id = v_source.id
      and sequin._is_captured(t.id)
      and (b.is_kept_back or r.oid is distinct from t.publication_rel_oid or t.unpublished_lsn is not null)
    order by t.id
  loop
    if v_table.is_kept_back then
      update sequin.source_table t set unpublished_lsn = pg_current_wal_insert_lsn()
      where t.id = v_table.id and t.unpublished_lsn is null;
      continue;
    end if;
    if v_table.publication_rel_oid is not null then
      insert into sequin.gap (source_id, from_lsn, to_lsn, reason)
      values (v_source.id,
        coalesce(v_table.unpublished_lsn,
          (select p.applied_lsn from sequin.progress p where p.source_id = v_source.id order by p.step desc limit 1),
          pg_current_wal_insert_lsn()),
        pg_current_wal_insert_lsn(),
        format(case when v_table.rel_oid = v_table.publication_rel_oid
            then 'table %I.%I was published in part by publication "%s" for a while: only changes of its own from then are missing'
            else 'table %I.%I was out of publication "%s" for a while: only its changes from then are missing' end,
          v_table.schema_name, v_table.table_name, v_source.publication_name));
    end if;
    update sequin.source_table t set publication_rel_oid = v_table.rel_oid, unpublished_lsn = null where t.id = v_table.id;
  end loop;
  return null;
end $$;
comment on function sequin.bridge_publication(int) is
'For the bridge: looks whether the publication, and each table in it, is still the one that was made. Returns what is
wrong with the publication; null: nothing. A table that was out of it for a while, or published in part, becomes a gap, and so
does a publication that was altered and put back.';

-- The stream has ended at a change that was made while no publication had the name: it ends there each time.
create or replace function sequin.bridge_unreadable(source_id int)
returns boolean
language sql
security definer
set search_path = pg_catalog, pg_temp
as $$
  update sequin.source s set is_unreadable = true where s.id = $1 and not s.is_unreadable returning true
$$;
comment on function sequin.bridge_unreadable(int) is
'For the bridge: the server cannot send what the slot has next, as there was no publication of the name then.';

-- Makes the publication again, with all tables that are captured, at the first start and after a gap was accepted. A table that
-- cannot be published any more keeps no other from it: health() names it.
create or replace function sequin.bridge_republish(source_id int)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
  v_version int := current_setting('server_version_num')::int;
  v_table record;
  v_count bigint := 0;
begin
  select * into v_source from sequin.source s where s.id = source_id;
  if v_source.conninfo is not null then
    return 0;
  end if;
  if not exists (select from pg_publication p where p.pubname = v_source.publication_name) then
    execute format('create publication %I with (publish = ''insert, update, delete, truncate''%s%s)', v_source.publication_name,
      case when v_version >= 130000 then ', publish_via_partition_root = true' else '' end,
      case when v_version >= 180000 then ', publish_generated_columns = stored' else '' end);
  end if;
  update sequin.source s
  set publication_oid = p.oid, publication_row = sequin._publication_row(p.pubname), is_unreadable = false
  from pg_publication p
  where s.id = v_source.id and p.pubname = s.publication_name
  returning s.* into v_source;
  for v_table in
    select t.id, t.relation_oid
    from sequin.source_table t
    join pg_class c on c.oid = t.relation_oid
    where t.source_id = v_source.id and sequin._is_captured(t.id)
    order by t.id
  loop
    if not exists (
         select from pg_publication_rel r
         where r.prpubid = v_source.publication_oid and r.prrelid = v_table.relation_oid) then
      begin
        perform sequin._check_table(v_table.relation_oid);
        execute format('alter publication %I add table only %s', v_source.publication_name, sequin._table_name(v_table.relation_oid));
        v_count := v_count + 1;
      exception when others then
        raise warning 'table % is not published: %', sequin._table_name(v_table.relation_oid), sqlerrm;
      end;
    end if;
    update sequin.source_table t
    set unpublished_lsn = null, publication_rel_oid = (
      select r.oid from pg_publication_rel r where r.prpubid = v_source.publication_oid and r.prrelid = t.relation_oid)
    where t.id = v_table.id;
  end loop;
  return v_count;
end $$;
comment on function sequin.bridge_republish(int) is
'For the bridge, at the first start and after a gap was accepted: makes the publication again where it is missing, and puts all
tables that are captured into it. Returns how many it has put in.';

-- A transaction that the server cannot send: it fails at the same place again and again, and the slot with it. On record
-- as a gap of that one transaction, to be accepted before the bridge goes past it.
create or replace function sequin.bridge_stuck(source_id int, commit_lsn text, reason text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_gap sequin.gap;
begin
  select * into v_gap from sequin.gap g
  where g.source_id = bridge_stuck.source_id and g.consumer_id is null
    and g.from_lsn = bridge_stuck.commit_lsn::pg_lsn and g.to_lsn = g.from_lsn
  order by g.id desc
  limit 1;
  if not found then
    insert into sequin.gap (source_id, from_lsn, to_lsn, reason)
    values (source_id, commit_lsn::pg_lsn, commit_lsn::pg_lsn, reason);
  end if;
  return v_gap.accepted_at is not null;
end $$;
comment on function sequin.bridge_stuck(int, text, text) is
'For the bridge: the transaction that commits here cannot be sent by the server. Returns whether sequin.accept_gap has said
to go on without it.';

-- Goes past a transaction that was given up: the log has everything before it.
create or replace function sequin.bridge_skip(source_id int, commit_lsn text, next_lsn text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  insert into sequin.progress (source_id, step, applied_lsn, horizon_lsn, last_seq)
  select p.source_id, p.step + 1, bridge_skip.next_lsn::pg_lsn, greatest(bridge_skip.next_lsn::pg_lsn, p.horizon_lsn), p.last_seq
  from sequin.progress p
  where p.source_id = bridge_skip.source_id
    and p.step = (select max(m.step) from sequin.progress m where m.source_id = bridge_skip.source_id)
    and p.applied_lsn <= bridge_skip.commit_lsn::pg_lsn
  on conflict do nothing;
  return found;
end $$;
comment on function sequin.bridge_skip(int, text, text) is
'For the bridge: goes on after the transaction that commits here, which was given up. Returns whether it did.';
