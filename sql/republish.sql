-- Delivering chosen messages, or rows, again to one consumer.
--
-- A message comes again from the log, under its own seq. A row comes as the newest message that the log has of it. Where
-- it has none, the row is read from its table, and needs a seq of its own that keeps it before whatever the log brings
-- of it later. Three ways were weighed: rows of the log in a segment of their own (the segments live now would have to
-- end there, which takes the bridge), a watermark through the slot (the bridge again), and this, which takes a lock and
-- nothing else: under the locks of all lanes the row is read first, and then the log is asked once more. It still has
-- nothing of the row: so whatever it will have comes to its lane later, and waits there behind the row, which holds its
-- group. The seq is one that the log never gives out, below the live segment's: see _is_reread.
-- The row is as new as its table, which the log may be behind: changes that it has yet to bring follow, in order.

-- The group of a row by its key, as capture has it in the log: FNV-1a over its route and key, and a last mix.
create or replace function sequin._key_hash(route_id int, record_pk text)
returns int
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_mask constant bigint := 4294967295;
  v_bytes bytea := int4send(route_id) || '\x01' || convert_to(record_pk, 'UTF8');
  v_high bigint := 3421674724;
  v_low bigint := 2216829733;
  v_product numeric;
begin
  for n in 0..length(v_bytes) - 1 loop
    -- The route's bytes in reverse: the lowest first.
    v_low := v_low # get_byte(v_bytes, case when n < 4 then 3 - n else n end);
    v_high := v_high * 435 + ((v_low * 435) >> 32) + ((v_low << 8) & v_mask) & v_mask;
    v_low := v_low * 435 & v_mask;
  end loop;
  v_low := v_low # (v_high >> 1);
  v_product := v_low::numeric * 3981806797;
  v_high := mod(v_high::numeric * 3981806797 + v_low::numeric * 4283543511 + div(v_product, 4294967296), 4294967296);
  v_low := mod(v_product, 4294967296);
  v_low := v_low # (v_high >> 1);
  return v_low - case when v_low > 2147483647 then 4294967296 else 0 end;
end $$;

-- A message's group in a consumer, of which the log has one by key. Its lane is what that leaves modulo the lanes.
create or replace function sequin._group_of(c sequin.consumer, key_hash int, record jsonb)
returns int
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select case when c.group_by is null then key_hash when c.group_by = '{}' then 0 else sequin._group_hash(record, c.group_by) end
$$;

-- Runs a query with the rights and the search_path of its caller: one that only reads, as this is stable; and one only,
-- as it is a cursor's. The names of its columns, and its rows; without any, the names alone.
create or replace function sequin._republish_query(consumer text, query text)
returns table (columns text[], record jsonb)
language plpgsql
stable
set extra_float_digits = 3
as $$
declare
  v_cursor refcursor;
  v_row record;
  v_is_any boolean := false;
begin
  if query is null then
    raise invalid_parameter_value using
      message = pg_catalog.format('consumer "%s": the query is null', consumer),
      hint = 'It is a SELECT that returns seq, or rows of a streamed table.';
  end if;
  begin
    open v_cursor no scroll for execute query;
  exception when syntax_error or undefined_table or undefined_column or undefined_function or undefined_object or ambiguous_column
      or invalid_schema_name or datatype_mismatch or undefined_parameter then
    raise exception using
      errcode = sqlstate,
      message = pg_catalog.format('consumer "%s": the query: %s', consumer, sqlerrm),
      hint = 'It is a SELECT that returns seq, or rows of a streamed table.';
  when invalid_cursor_definition or feature_not_supported or null_value_not_allowed then
    raise invalid_parameter_value using
      message = pg_catalog.format('consumer "%s": the query cannot be republished: %s', consumer, sqlerrm),
      hint = 'It is one SELECT, which changes nothing.';
  end;
  loop
    fetch v_cursor into v_row;
    exit when not found and v_is_any;
    begin
      record := pg_catalog.to_jsonb(v_row);
    exception when data_exception then
      raise invalid_parameter_value using
        message = pg_catalog.format('consumer "%s": the query returns what jsonb cannot hold: %s', consumer, sqlerrm),
        hint = 'Select seq, or the key''s columns, alone.';
    end;
    if not v_is_any then
      columns := array(select pg_catalog.jsonb_object_keys(record));
    end if;
    if not found then record := null; end if;
    v_is_any := true;
    return next;
    exit when record is null;
  end loop;
  close v_cursor;
end $$;

-- What a query's columns say of its rows: messages (table_id is null), or rows of a table; and which of the columns say
-- which. 22023 where they say neither, or the rows may be those of several tables.
create or replace function sequin._republish_by(consumer text, columns text[], out table_id int, out names text[])
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  c sequin.consumer := sequin._consumer(consumer);
  v_tables record;
begin
  -- Of several tables with such a key, those that have all of the columns; of those, the one that has no others.
  select array_agg(f.id) as ids, min(f.id) as id, count(*) as n, bool_or(f.has_seq) as has_seq,
         string_agg(f.name, ', ' order by f.id) as names
    into v_tables
  from (
    select t.id, format('%I.%I', t.schema_name, t.table_name) as name, 'seq' = any (a.names) as has_seq,
           rank() over (order by columns <@ a.names desc, columns <@ a.names and columns @> a.names desc) as place
    from sequin.source_table t
    join sequin.source o on o.id = t.source_id
    cross join lateral (
      select case when o.conninfo is not null then t.column_names else array(
        select a.attname::text from pg_attribute a
        where a.attrelid = t.relation_oid and a.attnum > 0 and not a.attisdropped) end as names) a
    where t.id = any (c.routes) and cardinality(t.key_columns) > 0 and sequin._identity_columns(t.id) <@ columns) f
  where f.place = 1;
  if 'seq' = any (columns) and v_tables.has_seq is not true then
    names := '{seq}';
  elsif v_tables.n = 1 then
    table_id := v_tables.id;
    names := sequin._identity_columns(table_id);
  else
    raise invalid_parameter_value using
      message = format('consumer "%s": the query returns neither seq nor %s: its columns are %s', consumer,
        case when v_tables.n > 1 then 'the rows of one table (' || v_tables.names || ' have such a key)' else 'the key of a streamed table' end,
        array_to_string(columns, ', ')),
      -- Of a table without a key, only seq says which of its rows is meant.
      hint = format('select seq from sequin.messages where stream = %L and …;%s',
        (select s.name from sequin.stream s where s.id = c.stream_id),
        (select format(' or select * from %s where …;',
                  string_agg(format('%I.%I', t.schema_name, t.table_name), ' or ' order by array_position(c.routes, t.id)))
         from sequin.source_table t where t.id = any (c.routes) and cardinality(t.key_columns) > 0 having count(*) > 0));
  end if;
end $$;

-- The key columns of a table, as jsonb_to_record takes them: their types read the values, as a cast from text may be
-- somebody's own.
create or replace function sequin._key_types(source_table sequin.source_table)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select string_agg(format('%I %s', n.name, t.type), ', ' order by n.place)
  from unnest(source_table.key_columns) with ordinality n(name, place)
  cross join lateral sequin._column_type(source_table.relation_oid, n.name) t
$$;

-- The rows of a table that these have the keys of, as 'read' messages of a consumer. The caller has every lane's lock.
create or replace function sequin._reread(c sequin.consumer, source_table sequin.source_table, keys jsonb[])
returns setof sequin.delivery
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set extra_float_digits = 3
set bytea_output = 'hex'
set lc_monetary = 'C'
as $$
declare
  v_base bigint := (
    select ((p.last_seq >> 32) << 32) - 2147483648 from sequin.progress p
    where p.source_id = source_table.source_id order by p.step desc limit 1);
begin
  return query execute format(
    'select $1, $2 + nextval(''sequin.reread''), (g.group_hash & ($3.lane_count - 1))::smallint, g.group_hash, 0, now(),
            null::timestamptz, null::bigint, null::int, false, false, null::timestamptz, null::text, $4.id, clock_timestamp(), ''r''::"char",
            $4.schema_name, $4.table_name, r.record_pk, r.record, null::jsonb,
            jsonb_build_object(''commit_lsn'', pg_current_wal_insert_lsn())
     from (
       select %1$s as record_pk, to_jsonb(r.*) as record
       from unnest($5) n(v)
       cross join lateral jsonb_to_record(n.v) as k (%5$s)
       join %2$s t on %3$s
       cross join lateral (select %4$s) r) r
     cross join lateral (select sequin._group_of($3, sequin._key_hash($4.id, r.record_pk), r.record) as group_hash) g',
    sequin._record_pk_sql(source_table.key_columns), sequin._rows_sql(source_table.relation_oid),
    (select string_agg(format('t.%1$I operator(%2$I.=) k.%1$I', n.name, t.operators), ' and ')
     from unnest(source_table.key_columns) n(name)
     cross join lateral sequin._column_type(source_table.relation_oid, n.name) t),
    sequin._record_sql(source_table.relation_oid), sequin._key_types(source_table))
  using c.id, v_base, c, source_table, keys;
end $$;

-- Of these messages, as the log has them, those that a consumer's filter lets through, with what its transform makes of
-- them; what one fails on is a dead letter. 55000 where either cannot be evaluated any more.
create or replace function sequin._decide_messages(c sequin.consumer, messages sequin.delivery[])
returns sequin.delivery[]
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_error text := sequin._consumer_error(c);
  v_route int;
  v_of_route sequin.delivery[];
  v_decided sequin.delivery[] := '{}';
  v_row record;
  m sequin.delivery;
begin
  if v_error is not null then
    raise object_not_in_prerequisite_state using
      message = format('consumer "%s": %s', c.name, v_error),
      hint = 'sequin.alter_consumer(name, filter => …, transform => …) gives it another.';
  end if;
  for v_route, v_of_route in
    select n.route_id, array_agg(n) from unnest(messages) n group by n.route_id order by n.route_id
  loop
    for v_row in
      select d.seq, d.record, d.error
      from sequin._decide(c, v_route, format('(select * from unnest(%L::sequin.delivery[])) l', v_of_route)) d
    loop
      select n.* into m from unnest(v_of_route) n where n.seq = v_row.seq;
      if v_row.error is not null then
        insert into sequin.dead_letter (
          consumer_id, seq, group_hash, lane, deliver_count, error, route_id, committed_at, action, table_schema, table_name,
          record_pk, record, changes, metadata, is_undecided)
        values (
          c.id, m.seq, m.group_hash, m.lane, 0, v_row.error, m.route_id, m.committed_at, m.action, m.table_schema, m.table_name,
          m.record_pk, m.record, m.changes, m.metadata, true)
        on conflict (consumer_id, seq) do update
          set error = excluded.error, dead_at = clock_timestamp(), is_undecided = true, record = excluded.record,
              group_hash = excluded.group_hash, lane = excluded.lane;
        continue;
      end if;
      if c.transform is not null then
        m.record := v_row.record;
      end if;
      v_decided := v_decided || m;
    end loop;
  end loop;
  return v_decided;
end $$;

-- Delivers again what a query has returned: its rows' seqs, or the keys of a table's.
create or replace function sequin._republish(consumer text, table_id int, rows jsonb[])
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
set row_security = off -- policies would run with the owner's rights
set enable_seqscan = off
set jit = off
-- What a key's text depends on, as capture has it.
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set extra_float_digits = 3
set bytea_output = 'hex'
set lc_monetary = 'C'
as $$
declare
  c sequin.consumer := sequin._consumer(consumer);
  v_stream sequin.stream;
  v_table sequin.source_table;
  v_keys text[];                     -- of rows, as record_pk
  v_missing text[];
  v_seqs bigint[];
  v_messages sequin.delivery[] := '{}';
  v_lane smallint;
  v_void text;
begin
  perform sequin._refuse_write('republish');
  perform sequin._require_reader(c.stream_id);
  if c.start_seq is null and not sequin._start(c.id) then
    raise object_not_in_prerequisite_state using
      message = format('consumer "%s" has not begun: the log has not passed the moment it was made', consumer),
      hint = case when exists (
          select from sequin.progress p join sequin.stream s on s.source_id = p.source_id where s.id = c.stream_id)
        then 'It begins once the bridge has captured a later change: try again then.'
        else 'No bridge has run yet: sequin bridge --database-url …' end;
  end if;
  select * into c from sequin.consumer t where t.id = c.id;
  select * into v_stream from sequin.stream s where s.id = c.stream_id;

  if table_id is null then
    if exists (select from unnest(rows) r where r ->> 'seq' !~ '^-?[0-9]{1,18}$' or r ->> 'seq' is null) then
      raise invalid_parameter_value using
        message = format('consumer "%s": the query returns a seq that is none: %s', consumer,
          (select coalesce(r ->> 'seq', 'null') from unnest(rows) r where r ->> 'seq' !~ '^-?[0-9]{1,18}$' or r ->> 'seq' is null limit 1)),
        hint = 'seq is that of sequin.messages, a bigint.';
    end if;
    v_seqs := array(select distinct (r ->> 'seq')::bigint from unnest(rows) r);
  else
    select * into v_table from sequin.source_table t where t.id = any (c.routes) and t.id = table_id;
    if exists (select from sequin.source s where s.id = v_table.source_id and s.conninfo is not null) then
      raise feature_not_supported using
        message = format('consumer "%s": the rows of %I.%I are not in this database', consumer, v_table.schema_name, v_table.table_name),
        hint = format('select seq from sequin.messages where stream = %L and record_pk = …;', v_stream.name);
    end if;
    if not exists (select from pg_class k where k.oid = v_table.relation_oid) then
      raise object_not_in_prerequisite_state using
        message = format('consumer "%s": table %I.%I was dropped', consumer, v_table.schema_name, v_table.table_name),
        hint = format('select seq from sequin.messages where stream = %L and record_pk = …; chooses among what the log has of it.',
          v_stream.name);
    end if;
    perform sequin._require_select(v_table.relation_oid);
    -- By what the log calls its rows.
    v_table.key_columns := sequin._identity_columns(v_table.id);
    begin
      execute format('select array_agg(distinct %s) from unnest($1) k(v) cross join lateral jsonb_to_record(k.v) as t (%s)',
          sequin._record_pk_sql(v_table.key_columns), sequin._key_types(v_table))
        into v_keys using rows;
    exception when data_exception or check_violation or not_null_violation then
      raise invalid_parameter_value using
        message = format('consumer "%s": the query returns what is no key of %I.%I: %s', consumer, v_table.schema_name,
          v_table.table_name, sqlerrm),
        hint = format('Its key is %s: select * from %I.%I where …;', array_to_string(v_table.key_columns, ', '),
          v_table.schema_name, v_table.table_name);
    end;
    -- Whatever the log brings of a row from here on, no worker has had.
    for v_lane in 0..c.lane_count - 1 loop
      v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane::smallint));
    end loop;
    for v_round in 1..2 loop
      select array_agg(l.seq) filter (where l.seq is not null), array_agg(k.record_pk) filter (where l.seq is null)
        into v_seqs, v_missing
      from unnest(v_keys) k(record_pk)
      left join lateral (
        -- Not max(l.seq): a planner would read the whole log backwards to the first of the key.
        select max(l.seq + 0) as seq from sequin.log l where l.record_pk = k.record_pk and l.route_id = v_table.id) l on true;
      exit when v_round = 2 or v_missing is null;
      -- Before the log is asked once more.
      v_messages := array(select m from sequin._reread(c, v_table, rows) m where m.record_pk = any (v_missing));
    end loop;
    v_messages := array(
      select n.m
      from (
        select distinct on (m.record_pk) m from unnest(v_messages) m
        where m.record_pk = any (v_missing)
        order by m.record_pk, m.seq) n);
  end if;

  v_messages := v_messages || array(
    select (c.id, l.seq, (g.group_hash & (c.lane_count - 1))::smallint, g.group_hash, 0, now(), null, null, null, false, false,
            null, null, l.route_id, l.committed_at, l.action, l.table_schema, l.table_name, l.record_pk, l.record, l.changes,
            l.metadata)::sequin.delivery
    from unnest(v_seqs) q(seq)
    cross join unnest(c.routes) r(id)
    cross join lateral (
      select * from sequin.log l where l.route_id = r.id and l.seq = q.seq and (l.action <> 'x' or v_stream.mode = 'rows') offset 0) l
    cross join lateral (select sequin._group_of(c, l.group_hash, l.record) as group_hash) g);
  if table_id is null and cardinality(v_messages) < cardinality(v_seqs) then
    raise invalid_parameter_value using
      message = format('consumer "%s": stream "%s" has no message %s', consumer, v_stream.name, (
        select string_agg(q.seq::text, ', ' order by q.seq)
        from (select q.seq from unnest(v_seqs) q(seq) where not exists (select from unnest(v_messages) m where m.seq = q.seq)
              order by q.seq limit 5) q)),
      hint = format('select seq from sequin.messages where stream = %L; shows which the log has. Of a row that it has not, select from the table.',
        v_stream.name);
  end if;

  -- What the consumer leaves out it does not get this way either.
  v_messages := array(select m from unnest(v_messages) m where sequin._is_chosen(c, m.action));
  if c.filter is not null or c.transform is not null then
    v_messages := sequin._decide_messages(c, v_messages);
  end if;
  for v_lane in select distinct m.lane from unnest(v_messages) m order by m.lane loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
  end loop;
  c := sequin._as_before(c);
  if c.id is null then
    return sequin._republish(consumer, table_id, rows);
  end if;
  for v_lane in select distinct m.lane from unnest(v_messages) m order by m.lane loop
    delete from sequin.dead_letter d
    where d.consumer_id = c.id and d.seq in (select m.seq from unnest(v_messages) m where m.lane = v_lane);
    perform sequin._put_back(c, v_lane, array(select m from unnest(v_messages) m where m.lane = v_lane));
  end loop;
  perform pg_notify('sequin.' || c.name, '') where v_messages <> '{}' and c.paused_at is null;
  return cardinality(v_messages);
end $$;

create or replace function sequin.republish(consumer text, query text)
returns bigint
language plpgsql
as $$
-- Not a definer and no search_path of its own: the query is the caller's.
declare
  v_row record;
  v_by record;
  v_rows pg_catalog.jsonb[] := '{}';
begin
  for v_row in select * from sequin._republish_query(consumer, query) loop
    if v_by is null then
      select * into v_by from sequin._republish_by(consumer, v_row.columns);
    end if;
    if v_row.record is not null then
      v_rows := pg_catalog.array_append(v_rows, (
        select pg_catalog.jsonb_object_agg(n.name, v_row.record -> n.name) from pg_catalog.unnest(v_by.names) n(name)));
    end if;
  end loop;
  return sequin._republish(consumer, v_by.table_id, v_rows);
end $$;
comment on function sequin.republish(text, text) is
'Delivers what a query returns again to one consumer, and to no other: each message counts from one delivery, and comes
before whatever is left of its group.

consumer  which
query     one SELECT, run with the caller''s own rights, which returns seq (of sequin.messages: those messages), or the
          primary key of a streamed table (those rows: of each the newest message that the log has; where it has none, the
          row as it is now, with action read)

  select sequin.republish(''mailer'', ''select * from orders where customer_id = 7'');
  select sequin.republish(''mailer'', $$select seq from sequin.messages where stream = ''orders'' and committed_at > now() - interval ''1 hour''$$);

Returns how many messages. One that is out, or that the consumer has still to get, counts, and is not doubled; of a row that
the log has not, each call makes one. What the consumer''s actions and filter leave out it does not get this way either, and
what its filter or transform fails on is a dead letter. Waits for workers that are receiving.

Errors: 42704 unknown consumer, 22023 not one SELECT, neither seq nor the key of one table among its columns, a seq that the
stream''s log has not; 42501 no SELECT on the table, 55000 the consumer has not begun, or the table was dropped, 25006 read
only transaction or replica; and those of the query.';
