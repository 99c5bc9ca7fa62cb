-- Streams: which tables are captured, and how their changes are looked at.

-- What a table is called in messages: schema-qualified, quoted where it must be.
create or replace function sequin._table_name(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format('%I.%I', n.nspname, c.relname)
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where c.oid = relation
$$;

-- The columns that name a row: the primary key's, else those of the replica identity's index; none where the
-- whole row is its identity.
create or replace function sequin._key_columns(relation oid)
returns text[]
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(
    (select array_agg(a.attname::text order by k.position)
     from (select i.indkey::int2[] as attnums, i.indnkeyatts
           from pg_index i
           where i.indrelid = relation and (i.indisprimary or i.indisreplident) and i.indislive
           order by i.indisprimary desc
           limit 1) i
     cross join lateral unnest(i.attnums) with ordinality k(attnum, position)
     join pg_attribute a on a.attrelid = relation and a.attnum = k.attnum
     where k.position <= i.indnkeyatts),   -- what an index includes names nothing
    '{}')
$$;

-- Whether an update or delete in the table (itself, not its partitions) can name its row when it is published.
create or replace function sequin._has_replica_identity(relation oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case c.relreplident
    when 'f' then true
    when 'd' then exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary and i.indimmediate)
    when 'i' then exists (select from pg_index i where i.indrelid = c.oid and i.indisreplident)
    else false
  end
  from pg_class c where c.oid = relation
$$;

-- Whether a table has a virtual generated column (18 and newer). That is never published, and full replica identity would have
-- it: the server refuses updates and deletes of a published table with both.
create or replace function sequin._has_virtual(relation oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select exists (select from pg_attribute a where a.attrelid = relation and a.attgenerated = 'v' and not a.attisdropped)
$$;

-- What has a table's old values in its changes.
create or replace function sequin._old_values_hint(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case when sequin._has_virtual(relation)
    then 'They cannot be had beside a virtual generated column: with replica identity full its updates and deletes would fail.'
    else format('alter table %s replica identity full;', sequin._table_name(relation)) end
$$;

-- The statement that gives a table without a replica identity one.
create or replace function sequin._no_identity_mend(relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format(case
      when exists (select from pg_index i where i.indrelid = relation and i.indisprimary and i.indimmediate)
        then 'alter table %1$s replica identity default;'
      when sequin._has_virtual(relation) then 'alter table %1$s add primary key (…);'
      else 'alter table %1$s add primary key (…); or, where it has none: alter table %1$s replica identity full;' end,
    sequin._table_name(relation))
$$;

-- The statement that gives a partition its root's replica identity, where its own lacks columns of the root's key: its changes
-- come under the root's name, and their old rows would have none. Null: it has them, or none at all.
create or replace function sequin._identity_mend(root oid, leaf oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format(case when r.relreplident = 'i' and m.name is not null then 'alter table %1$s replica identity using index %2$s;'
                     when r.relreplident = 'd' or sequin._has_virtual(l.oid) then 'alter table %1$s replica identity default;'
                     else 'alter table %1$s replica identity full;' end, sequin._table_name(l.oid), m.name)
  from pg_class r
  join pg_index k on k.indrelid = r.oid and case r.relreplident when 'i' then k.indisreplident else k.indisprimary end
  join pg_class l on l.oid = leaf and l.relkind = 'r' and l.relreplident in ('d', 'i')
  join pg_index o on o.indrelid = l.oid and case l.relreplident when 'i' then o.indisreplident else o.indisprimary end
  left join lateral (
    select quote_ident(n.relname) as name from pg_index i join pg_class n on n.oid = i.indexrelid
    where i.indrelid = l.oid and k.indexrelid in (select a.relid from pg_partition_ancestors(i.indexrelid) a)) m on true
  where r.oid = root and (l.relreplident = 'i' or r.relreplident = 'i') and exists (
    select from unnest(k.indkey::int2[]) with ordinality c(attnum, position)
    join pg_attribute a on a.attrelid = r.oid and a.attnum = c.attnum
    left join pg_attribute b on b.attrelid = l.oid and b.attname = a.attname
    where c.position <= k.indnkeyatts and not coalesce(b.attnum = any ((o.indkey::int2[])[0:o.indnkeyatts - 1]), false))
$$;

-- Whether what is written to a table, or to a partition of its own, leaves no trace of its rows.
create or replace function sequin._is_outside_wal(relation oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select c.relpersistence <> 'p' or c.relkind = 'f' from pg_class c where c.oid = relation
$$;

-- Refuses a table that cannot be streamed, with the reason and the statement that mends it.
-- 22023 what it is, 55000 the state it is in, 42501 whose it is, 0A000 what this server cannot do.
create or replace function sequin._check_table(relation oid)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text := sequin._table_name(relation);
  v_class pg_class;
  v_leaf oid;
begin
  select * into v_class from pg_class c where c.oid = relation;
  if v_class.relkind not in ('r', 'p') then
    raise invalid_parameter_value using
      message = format('%s is %s, not a table', v_table, case v_class.relkind
        when 'v' then 'a view' when 'm' then 'a materialized view' when 'f' then 'a foreign table' when 'S' then 'a sequence'
        when 'i' then 'an index' when 'I' then 'an index' when 'c' then 'a composite type' when 't' then 'a TOAST table'
        else 'something else' end),
      hint = 'Its changes are not in the write-ahead log as rows of its own.'
        || case when v_class.relkind in ('v', 'm') then ' Stream the tables it is made from.' else '' end;
  end if;
  if v_class.relnamespace = 'sequin'::regnamespace or v_class.relnamespace = 'pg_catalog'::regnamespace
     or v_class.relnamespace = 'information_schema'::regnamespace then
    raise invalid_parameter_value using
      message = format('%s belongs to %s and cannot be streamed', v_table,
        case when v_class.relnamespace = 'sequin'::regnamespace then 'Sequin itself' else 'the system' end),
      hint = 'Stream tables of your own.';
  end if;
  if v_class.relpersistence = 't' then
    raise object_not_in_prerequisite_state using
      message = format('%s is a temporary table', v_table),
      hint = 'Its changes are not in the write-ahead log. Make it a table: create table … as table ' || v_table || ';';
  end if;
  if v_class.relpersistence = 'u' then
    raise object_not_in_prerequisite_state using
      message = format('%s is an unlogged table', v_table),
      hint = format('alter table %s set logged;', v_table);
  end if;
  if v_class.relispartition then
    raise invalid_parameter_value using
      message = format('%s is a partition', v_table),
      hint = format('A partitioned table is one table: name %s.', (
        with recursive up(oid, depth) as (
          select relation, 0
          union all
          select i.inhparent, up.depth + 1 from up join pg_inherits i on i.inhrelid = up.oid
        )
        select sequin._table_name(up.oid) from up order by up.depth desc limit 1));
  end if;
  if v_class.relkind = 'p' and current_setting('server_version_num')::int < 130000 then
    raise feature_not_supported using
      message = format('%s is partitioned, and PostgreSQL 12 cannot publish a partitioned table', v_table),
      hint = 'Upgrade to PostgreSQL 13 or newer.';
  end if;
  if not pg_has_role(current_user, v_class.relowner, 'usage') then
    raise insufficient_privilege using
      message = format('%s belongs to %I, and only its owner may publish it', v_table, pg_get_userbyid(v_class.relowner)),
      -- Never a superuser's rights.
      hint = format(case when (select r.rolsuper from pg_roles r where r.oid = v_class.relowner)
        then 'alter table %3$s owner to %2$I;' else 'grant %1$I to %2$I;' end, pg_get_userbyid(v_class.relowner), current_user, v_table);
  end if;

  -- Publishing a table without a replica identity would make its owner's UPDATEs and DELETEs fail.
  for v_leaf in
    with recursive down(oid) as (
      select relation
      union all
      select i.inhrelid from down join pg_inherits i on i.inhparent = down.oid
      where v_class.relkind = 'p'
    )
    select d.oid from down d order by d.oid
  loop
    if sequin._is_outside_wal(v_leaf) then
      raise object_not_in_prerequisite_state using
        message = format('%s has an unlogged or foreign partition: what is written to %s is not in the write-ahead log', v_table,
          sequin._table_name(v_leaf)),
        hint = format('alter table %1$s set logged; or, of a foreign one: alter table … detach partition %1$s;', sequin._table_name(v_leaf));
    end if;
    if exists (
         select from pg_class c join pg_index i on i.indrelid = c.oid
         where c.oid = v_leaf and c.relreplident = 'd' and i.indisprimary and not i.indimmediate) then
      raise object_not_in_prerequisite_state using
        message = format('the primary key of %s is deferrable, and so no replica identity: its updates and deletes would fail '
          'once published', sequin._table_name(v_leaf)),
        hint = (
          select case
            when not n.conislocal then 'It is that of the partitioned table: mend it there.'
            else format('alter table %1$s drop constraint %2$I, add constraint %2$I primary key (%3$s); or: alter table %1$s '
                   'replica identity full;', sequin._table_name(v_leaf), n.conname,
                   (select string_agg(quote_ident(k.name), ', ' order by k.place)
                    from unnest(sequin._key_columns(v_leaf)) with ordinality k(name, place)))
            end
          from pg_constraint n where n.conrelid = v_leaf and n.contype = 'p');
    end if;
    -- A replica identity of its own is not that of the partitions that are added later; a primary key is.
    if v_leaf = relation and v_class.relkind = 'p' and not exists (
         select from pg_index i where i.indrelid = relation and i.indisprimary) then
      raise object_not_in_prerequisite_state using
        message = format('%s is partitioned and has no primary key: updates and deletes in a partition that is added later would fail, as it '
          'is published with the others', v_table),
        hint = format('alter table %s add primary key (…);', v_table);
    end if;
    if not sequin._has_replica_identity(v_leaf) then
      raise object_not_in_prerequisite_state using
        message = format('%s has no %s, so its updates and deletes would fail once published', sequin._table_name(v_leaf),
          case when exists (select from pg_index i where i.indrelid = v_leaf and i.indisprimary and i.indimmediate)
               then 'replica identity: it is set to nothing, or to an index that was dropped'
               else 'primary key or replica identity' end),
        hint = sequin._no_identity_mend(v_leaf);
    end if;
    -- Before 18 none is sent; the primary key is no virtual one.
    if current_setting('server_version_num')::int < 180000 and exists (
         select from pg_class c
         join pg_index i on i.indrelid = c.oid and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end
         join pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey) and a.attgenerated <> ''
         where c.oid = v_leaf) then
      raise object_not_in_prerequisite_state using
        message = format('the key of %s has a generated column, which PostgreSQL %s does not send: its rows would have no name',
          sequin._table_name(v_leaf), current_setting('server_version')),
        hint = format('alter table %1$s replica identity using index …; (of other columns), or: alter table %1$s replica identity full;',
          sequin._table_name(v_leaf));
    end if;
    -- To be a column that full identity must publish, and virtual, which cannot be published: 18 and newer.
    if current_setting('server_version_num')::int >= 180000 and exists (
         select from pg_class c join pg_attribute a on a.attrelid = c.oid
         where c.oid = v_leaf and c.relreplident = 'f' and a.attgenerated = 'v' and not a.attisdropped) then
      raise object_not_in_prerequisite_state using
        message = format('%s has replica identity full and a virtual generated column: its updates and deletes would fail once published',
          sequin._table_name(v_leaf)),
        hint = format('alter table %s replica identity default;', sequin._table_name(v_leaf));
    end if;
    if v_leaf <> relation and sequin._identity_mend(relation, v_leaf) is not null then
      raise object_not_in_prerequisite_state using
        message = format('the replica identity of partition %s lacks columns of the key of %s: its updates and deletes would come without it',
          sequin._table_name(v_leaf), v_table),
        hint = sequin._identity_mend(relation, v_leaf);
    end if;
  end loop;
end $$;

-- Puts a table into the publication, unless it is there. Waits for transactions that are writing to it, and keeps
-- others from starting until the caller commits: a row written before the table was published is not captured,
-- whenever its transaction commits, so that nothing else keeps the promise that no later commit is missed.
create or replace function sequin._publish(source sequin.source, relation oid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from pg_publication p where p.pubname = source.publication_name) then
    raise object_not_in_prerequisite_state using
      message = format('publication "%s" does not exist', source.publication_name),
      hint = 'It was dropped after Sequin was installed. Start the bridge: it says what was lost, and what to do.';
  end if;
  if exists (
       select from pg_publication p
       join pg_publication_rel r on r.prpubid = p.oid
       where p.pubname = source.publication_name and r.prrelid = relation) then
    if exists (
         select from sequin.source_table t
         where t.source_id = source.id and t.relation_oid = relation and sequin._is_captured(t.id)) then
      return;
    end if;
    -- Somebody else has put it there, and a bridge that runs passes over it. It looks again when it is told anew what the
    -- table is, and so it is taken out and put in.
    execute format('lock table %s in share mode', sequin._table_name(relation));
    execute format('alter publication %I drop table only %s', source.publication_name, sequin._table_name(relation));
  end if;
  if exists (
       select from pg_locks l
       where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.relation = _publish.relation and l.mode = 'RowExclusiveLock'
         and l.database = (select d.oid from pg_database d where d.datname = current_database())) then
    raise warning using
      message = format('what this transaction has written to %s before is not captured: it was not published yet', sequin._table_name(relation)),
      hint = 'Commit before the stream is made; or have a consumer begin with the rows there are: start_at => ''beginning''.';
  end if;
  execute format('lock table %s in share mode', sequin._table_name(relation));
  execute format('alter publication %I add table only %s', source.publication_name, sequin._table_name(relation));
end $$;

-- 22023 unless it is a mode.
create or replace function sequin._check_mode(stream text, mode text)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if mode is null or mode not in ('rows', 'changes') then
    raise invalid_parameter_value using
      message = format('stream "%s": mode is ''rows'' or ''changes'', not %s', stream, coalesce(quote_literal(mode), 'null')),
      hint = 'rows: the newest version of each row. changes: every change, with the old values.';
  end if;
end $$;

-- 22023 unless rows can be sorted by a column: not every type has an order, nor every array or composite of them.
create or replace function sequin._check_order(stream text, relation oid, sort_column text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_type text := (
    select format_type(sequin._castable_type(a.atttypid), null) from pg_attribute a
    where a.attrelid = relation and a.attname = sort_column and a.attnum > 0 and not a.attisdropped);
begin
  execute format('select from (select null::%s) t(v) order by t.v', v_type);
exception when undefined_function then
  raise invalid_parameter_value using
    message = format('stream "%s": sort_column "%s" of %s is of type %s, which has no order', stream, sort_column,
      sequin._table_name(relation), v_type),
    hint = 'Name a column whose values can be sorted, or leave it out for the primary key.';
end $$;

-- Registers tables and makes the stream. See create_stream, which has resolved the names as its caller sees them.
create or replace function sequin._create_stream(
  name text, relations oid[], mode text, sort_column text, source text, if_not_exists boolean
)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_source sequin.source;
  v_old sequin.stream;
  v_old_relations oid[];
  v_stream_id int;
  v_relation oid;
begin
  perform sequin._check_name('stream', name);
  perform sequin._check_mode(name, mode);
  v_source := sequin._source(source);
  foreach v_relation in array relations loop
    perform sequin._require_select(v_relation);
    if sort_column is not null and not exists (
         select from pg_attribute a
         where a.attrelid = v_relation and a.attname = sort_column and a.attnum > 0 and not a.attisdropped) then
      raise undefined_column using
        message = format('sort_column: table %s has no column "%s"', sequin._table_name(v_relation), sort_column),
        hint = sequin._did_you_mean(sort_column,
          array(select a.attname::text from pg_attribute a
                where a.attrelid = v_relation and a.attnum > 0 and not a.attisdropped),
          'It orders the rows that exist already; leave it out for the primary key.');
    end if;
    perform sequin._check_order(name, v_relation, sort_column) where sort_column is not null;
  end loop;

  -- Two that make the same stream at once: the second waits here, and then finds it made.
  perform pg_advisory_xact_lock(hashtextextended('sequin.create_stream', 7190235));
  select * into v_old from sequin.stream s where s.name = _create_stream.name;
  if found then
    select array_agg(t.relation_oid order by st.position) into v_old_relations
    from sequin.stream_table st join sequin.source_table t on t.id = st.table_id
    where st.stream_id = v_old.id;
    if if_not_exists and v_old_relations = relations and v_old.mode = mode
       and v_old.sort_column is not distinct from sort_column and v_old.source_id = v_source.id then
      return 'unchanged';
    end if;
    raise duplicate_object using
      message = format('stream "%s" exists already%s', name, case when if_not_exists then ', and is another one' else '' end),
      hint = case when if_not_exists
        then format('It is %s of %s, sorted by %s. Give this one another name, or sequin.drop_stream(%L) first.', v_old.mode,
               (select string_agg(coalesce(case when s.conninfo is null then sequin._table_name(t.relation_oid) else st.given_name end,
                         'a dropped table'), ', ' order by st.position)
                from sequin.stream_table st
                join sequin.source_table t on t.id = st.table_id
                join sequin.source s on s.id = t.source_id
                where st.stream_id = v_old.id), coalesce(quote_ident(v_old.sort_column), 'primary key'), name)
        else 'if_not_exists => true makes the same definition a no-op.' end;
  end if;

  insert into sequin.stream (name, source_id, mode, sort_column)
  values (name, v_source.id, mode, sort_column)
  returning id into v_stream_id;
  foreach v_relation in array relations loop
    perform sequin._check_table(v_relation);
    perform sequin._publish(v_source, v_relation);
    insert into sequin.source_table (source_id, relation_oid, schema_name, table_name, key_columns)
    select v_source.id, c.oid, n.nspname, c.relname, sequin._key_columns(c.oid)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.oid = v_relation
    on conflict (source_id, relation_oid) do nothing;
    -- Not locked for nothing: the bridge would wait for this transaction where the table is given another name meanwhile.
    update sequin.source_table t
    set schema_name = n.nspname, table_name = c.relname, key_columns = sequin._key_columns(c.oid)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.oid = v_relation and t.source_id = v_source.id and t.relation_oid = c.oid
      and (t.schema_name, t.table_name, t.key_columns) is distinct from (n.nspname::text, c.relname::text, sequin._key_columns(c.oid));
    perform sequin._note_published(v_source, v_relation);
    insert into sequin.stream_table (stream_id, table_id, position)
    select v_stream_id, t.id, array_position(relations, v_relation)
    from sequin.source_table t
    where t.source_id = v_source.id and t.relation_oid = v_relation;
  end loop;

  if mode = 'changes' then
    for v_relation in
      with recursive down(oid) as (
        select r.oid from unnest(relations) r(oid)
        union all
        select i.inhrelid from down
        join pg_inherits i on i.inhparent = down.oid
        join pg_class p on p.oid = i.inhparent and p.relkind = 'p'
      )
      select c.oid from down d join pg_class c on c.oid = d.oid where c.relreplident <> 'f' order by c.oid
    loop
      raise warning using
        message = format('old values of %s: only its key, as its replica identity is not full', sequin._table_name(v_relation)),
        hint = sequin._old_values_hint(v_relation);
    end loop;
  end if;
  for v_relation in
    select i.inhrelid from pg_inherits i join pg_class p on p.oid = i.inhparent and p.relkind <> 'p'
    where i.inhparent = any (relations) and i.inhrelid <> all (relations)
    order by i.inhrelid
  loop
    raise warning using
      message = format('stream "%s" is without the rows of %s: it inherits from one of its tables, and is a table of its own', name,
        sequin._table_name(v_relation)),
      hint = 'Name it too, or make a stream of it.';
  end loop;
  if v_source.slot_name is null
     or not exists (select from pg_replication_slots s where s.slot_name = v_source.slot_name) then
    raise warning using
      message = 'no bridge has run on this database yet: changes are captured from when one first starts',
      hint = 'sequin bridge --database-url …';
  end if;
  return 'created';
end $$;

-- The relation of that name, as regclass finds it. 42704 if there is none, 22023 for what can be no name; label is what it
-- is for. Not a definer and no search_path of its own: the name is looked up as its caller would.
create or replace function sequin._relation(label text, name text)
returns oid
language plpgsql
stable
as $$
declare
  v_relation pg_catalog.oid;
  v_hint constant pg_catalog.text := 'Write table or schema.table, and quote what is not plain lower case: ''"Odd Table"'', '
    'in an array ''{"\"Odd Table\""}''.';
begin
  if name is null then
    raise invalid_parameter_value using
      message = pg_catalog.format('%s: the name of its table is null', label),
      hint = v_hint;
  end if;
  begin
    -- Of some that can be none newer servers do not say so; and a number is no name.
    perform pg_catalog.parse_ident(name);
    v_relation := pg_catalog.to_regclass(name);
  exception when invalid_name or syntax_error or feature_not_supported or invalid_parameter_value then
    raise invalid_parameter_value using
      message = pg_catalog.format('%s: "%s" is not a table''s name: %s', label, name, sqlerrm),
      hint = v_hint;
  end;
  if v_relation is null then
    raise undefined_object using
      message = pg_catalog.format('%s: table "%s" does not exist', label, name),
      hint = sequin._did_you_mean(name, array(
        select case when pg_catalog.pg_table_is_visible(c.oid)
                      and (pg_catalog.cardinality(pg_catalog.parse_ident(name)) operator(pg_catalog.=) 1
                           or n.nspname operator(pg_catalog.<>) (pg_catalog.parse_ident(name))[1]::pg_catalog.name)
                    then c.relname::pg_catalog.text
               else pg_catalog.format('%I.%I', n.nspname, c.relname) end
        from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid operator(pg_catalog.=) c.relnamespace
        where c.relkind in ('r', 'p') and n.nspname not in ('pg_catalog', 'information_schema', 'sequin')
          and pg_catalog.has_table_privilege(c.oid, 'select')
        limit 1000),
        'Names are looked up by search_path. ' || v_hint);
  end if;
  return v_relation;
end $$;

create or replace function sequin.create_stream(
  name text,
  tables text[],
  mode text default 'rows',
  sort_column text default null,
  source text default 'local',
  if_not_exists boolean default false
)
returns text
language plpgsql
as $$
-- Not a definer and no search_path of its own: names are looked up as the caller's regclass would.
declare
  v_name text;
  v_relation pg_catalog.oid;
  v_relations pg_catalog.oid[] := '{}';
begin
  if tables is null or pg_catalog.cardinality(tables) = 0 then
    raise invalid_parameter_value using
      message = pg_catalog.format('stream "%s" has no tables', name),
      hint = 'Name one or more: ''{orders, billing.invoices}''.';
  end if;
  if source is distinct from 'local' then
    return sequin._create_far_stream(name, tables, mode, sort_column, source, coalesce(if_not_exists, false));
  end if;
  foreach v_name in array tables loop
    v_relation := sequin._relation(pg_catalog.format('stream "%s"', name), v_name);
    if v_relation = any (v_relations) then
      raise invalid_parameter_value using
        message = pg_catalog.format('stream "%s" names table "%s" twice', name, v_name),
        hint = 'Name each table once.';
    end if;
    v_relations := pg_catalog.array_append(v_relations, v_relation);
  end loop;
  return sequin._create_stream(name, v_relations, mode, sort_column, source, coalesce(if_not_exists, false));
end $$;
comment on function sequin.create_stream(text, text[], text, text, text, boolean) is
'Makes a stream over one or more tables and puts them into the publication.

name           1 to 48 bytes, kept as given
tables         looked up by search_path, as regclass does: ''{orders, billing.invoices}''
mode           ''rows'': a message is the newest version of a row; ''changes'': every change, with the old values
sort_column    orders the rows that exist already, of one table after another; default: the primary key
source         the database the tables are in; ''local'' is this one. In another, which create_source has named, the bridge
               looks them up (by the search_path of its role there: schema.table says which is meant), and captures them
               from then on: see state and error in sequin.streams
if_not_exists  the same definition again is a no-op

Returns created or unchanged. Needs SELECT on each table. Waits for transactions that are writing to a table that was
not published before, and blocks new ones until this one commits, so that no change committed later is missed.

Errors: 42704 unknown table or source, 42710 the name is taken, 22023 bad argument, or not a table, 42703 unknown
sort_column (22023: one that has no order), 42501 no right, 55000 a table that cannot be streamed as it is (the hint mends
it), 0A000 a partitioned table on PostgreSQL 12.';

create or replace function sequin.drop_stream(name text, if_exists boolean default false)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stream sequin.stream;
begin
  if if_exists and not exists (select from sequin.stream s where s.name = drop_stream.name) then
    return 'absent';
  end if;
  v_stream := sequin._stream(name);
  perform sequin._require_reader(v_stream.id);
  if exists (select from sequin.consumer c where c.stream_id = v_stream.id) then
    raise object_not_in_prerequisite_state using
      message = format('stream "%s" has consumers', name),
      hint = (select string_agg(format('select sequin.drop_consumer(%L);', c.name), ' ' order by c.name)
              from sequin.consumer c where c.stream_id = v_stream.id);
  end if;
  delete from sequin.stream s where s.id = v_stream.id;
  perform sequin._unpublish(v_stream.source_id);
  perform sequin._release_tables(v_stream.source_id);
  return 'dropped';
end $$;
comment on function sequin.drop_stream(text, boolean) is
'Drops a stream, and takes tables that no other stream or pipeline needs out of the publication.

Returns dropped, or absent where if_exists is true and there was none.
Errors: 42704 unknown stream, 42501 no right to read it, 55000 it has consumers: drop them first.';
