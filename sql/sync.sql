-- Reading a stream without a consumer: the caller keeps the cursor, and nothing is written here.
--
-- A cursor begins at a cut: a snapshot, taken with the log's last seq. First come the rows of the tables, a page a call,
-- by keyset; then the log from that seq on. What makes it one strictly ordered whole:
--   a row of the table that has changed since the cut is left out, as the log delivers it;
--   a row of the log whose transaction the cut saw already (the bridge was behind) is left out, as the table had it.
-- Which transactions the cut saw its snapshot says. Whether a row has changed since: its xmin is below any transaction
-- that the cut did not see; or else, the log decides, once it is as far as the page (a subtransaction's xmin says
-- nothing, nor does that of a table that was rewritten).
-- The log may have a transaction that is not visible yet: capture reads it at its commit record, and it may wait for a
-- synchronous standby still. A cut is taken again where it missed one of those.

-- What makes a cursor one of this stream's, in this database.
create or replace function sequin._sync_tag(s sequin.stream)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format('%s %s %s', c.database_id, s.id, extract(epoch from s.created_at)) from sequin.source c where c.id = s.source_id
$$;

-- A cursor: of the rows of a table, or of the log.
create or replace function sequin._sync_cursor(tag text, payload text)
returns text
language sql
immutable
as $$
  select pg_catalog.translate(
    pg_catalog.encode(pg_catalog.convert_to(pg_catalog.left(pg_catalog.md5(tag || payload), 12) || payload, 'UTF8'), 'base64'),
    E'+/=\n', '-_')
$$;

-- What is in a cursor of this stream. 22023 where it is none.
create or replace function sequin._sync_payload(s sequin.stream, cursor text)
returns text[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_text text;
begin
  begin
    v_text := convert_from(decode(rpad(translate(cursor, '-_', '+/'), (length(cursor) + 3) / 4 * 4, '='), 'base64'), 'UTF8');
  exception when data_exception then
    null;
  end;
  if cursor = '' or sequin._sync_cursor(sequin._sync_tag(s), substr(v_text, 13)) is distinct from cursor then
    raise invalid_parameter_value using
      message = format('stream "%s": this is not a cursor of it: %s', s.name, left(cursor, 40)),
      hint = 'Give the cursor of the last row that sync returned of this very stream, or null to start at its first row.';
  end if;
  return string_to_array(substr(v_text, 13), '|');
end $$;

-- Whether the cut saw a transaction of the log. snapshot is a txid_snapshot; of a cut that was taken on a replica, which
-- does not say what runs, it is the oldest that did, and transactions are told by where they were committed.
create or replace function sequin._is_in_cut(snapshot text, cut_lsn pg_lsn, commit_lsn pg_lsn, xid bigint)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select commit_lsn < cut_lsn and (snapshot !~ ':' or txid_visible_in_snapshot(
    -- xid has 32 bits: the one near the snapshot's.
    split_part(snapshot, ':', 2)::bigint + ((xid - split_part(snapshot, ':', 2)::bigint + 2147483648) & 4294967295) - 2147483648,
    snapshot::txid_snapshot))
$$;

-- How far the WAL is, for what this server shows.
create or replace function sequin._wal_lsn()
returns pg_lsn
language sql
volatile
as $$
  select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() else pg_catalog.pg_current_wal_insert_lsn() end
$$;

-- A cut: a snapshot, the log's last seq in it, and where the WAL was once it was taken.
create or replace function sequin._sync_cut(
  s sequin.stream, routes int[], deadline timestamptz, out snapshot text, out cut_seq bigint, out cut_lsn pg_lsn
)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_before pg_lsn;
begin
  loop
    v_before := sequin._wal_lsn();
    select txid_current_snapshot()::text, (
             select p.last_seq from sequin.progress p where p.source_id = s.source_id order by p.step desc limit 1)
      into snapshot, cut_seq;
    cut_lsn := sequin._wal_lsn();
    if cut_seq is null then
      raise object_not_in_prerequisite_state using
        message = format('stream "%s" has no log yet: no bridge has run on this database', s.name),
        hint = 'sequin bridge --database-url …';
    elsif pg_is_in_recovery() then
      snapshot := split_part(snapshot, ':', 1);
      exit when cut_lsn = v_before;
    else
      exit when not exists (
        select from unnest(routes) r(id)
        cross join lateral (
          select l.metadata from sequin.log l
          where l.route_id = r.id and l.seq <= cut_seq and split_part(snapshot, ':', 3) <> ''
          order by l.seq desc
          limit 4096) l
        join unnest(string_to_array(nullif(split_part(snapshot, ':', 3), ''), ',')::bigint[]) x(id)
          on (l.metadata ->> 'xid')::bigint = x.id & 4294967295);
    end if;
    if sequin._is_strict() or clock_timestamp() >= deadline then
      raise serialization_failure using
        message = format('stream "%s": transactions are in its log that are not visible yet', s.name),
        hint = 'Try again.';
    end if;
    perform pg_sleep(0.001);
  end loop;
end $$;

-- How far a source's log is certainly complete.
create or replace function sequin._log_lsn(source_id int)
returns pg_lsn
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select greatest(p.applied_lsn, p.horizon_lsn, r.confirmed_flush_lsn)
  from sequin.progress p
  join sequin.source s on s.id = p.source_id
  left join pg_replication_slots r on r.slot_name = s.slot_name
  where p.source_id = $1
  order by p.step desc
  limit 1
$$;

-- Held, shared, by those who wait for word that the log is complete so far: on an idle server the bridge would not write
-- that down else.
create or replace function sequin._sync_key()
returns bigint
language sql
immutable
as $$
  select pg_catalog.hashtextextended('sequin.sync', 7190235)
$$;

create or replace function sequin.bridge_is_awaited(source_id int)
returns boolean
language sql
volatile
security definer
set search_path = pg_catalog, pg_temp
as $$
  select o.conninfo is null and (
           not pg_try_advisory_xact_lock(sequin._sync_key()) or exists (
             select from sequin.consumer c
             join sequin.stream s on s.id = c.stream_id and s.source_id = o.id
             where c.start_seq is null and c.history_id is null))
         -- Else what was noted last would look as if it were on its way for as long as nothing else happens.
         or coalesce(n.current_lsn > case when o.conninfo is null then r.confirmed_flush_lsn else n.confirmed_lsn end, false)
  from sequin.source o
  left join pg_replication_slots r on r.slot_name = o.slot_name and o.conninfo is null
  left join lateral (
    select * from sequin.source_sample n where n.source_id = o.id order by n.sampled_at desc limit 1) n on true
  where o.id = $1
$$;
comment on function sequin.bridge_is_awaited(int) is
'For the bridge, every second: whether a sync, a consumer that has yet to begin, or source_status waits for word that the log is
complete so far.';

-- The columns that a table's rows are in order of: the stream's sort_column, then the key.
create or replace function sequin._sync_order(s sequin.stream, relation oid)
returns text[]
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case when s.sort_column is null or s.sort_column = k.columns[1] then k.columns else s.sort_column || k.columns end
  from (select sequin._key_columns(relation) as columns) k
$$;

-- Tells that order, and what it goes by, from another: the last row's values say nothing of what comes after them there.
create or replace function sequin._sync_order_tag(s sequin.stream, relation oid)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select left(md5(string_agg(concat_ws(' ', k.name, format_type(a.atttypid, -1), a.attcollation), ',' order by k.position)), 8)
  from unnest(sequin._sync_order(s, relation)) with ordinality k(name, position)
  left join pg_attribute a on a.attrelid = relation and a.attname = k.name and not a.attisdropped
$$;

-- The query of a page of a table's rows, after the one of these values: $1 is how many, $2 the cut's snapshot, $3 and $4 what
-- makes their cursors. In two parts where the sort column may be null: those rows come last. The values are written down
-- in it, to be read as their types do: a cast from text may be somebody's own.
create or replace function sequin._sync_page_sql(s sequin.stream, relation oid, last text[], is_nulls boolean)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_columns text[] := sequin._sync_order(s, relation);
  v_types text[];
  v_operators text[];
  v_values text[];
  v_where text := '';
  v_first int := case when is_nulls then 2 else 1 end;
  v_last int := cardinality(v_columns);
  v_has_sort boolean := v_columns <> sequin._key_columns(relation);
begin
  select array_agg(t.type order by k.position), array_agg(t.operators order by k.position) into v_types, v_operators
  from unnest(v_columns) with ordinality k(name, position)
  cross join lateral sequin._column_type(relation, k.name) t
  where t.type is not null;
  if cardinality(sequin._key_columns(relation)) = 0 or cardinality(v_types) < v_last then
    raise object_not_in_prerequisite_state using
      message = format('stream "%s": the rows of %s have no order: %s', s.name, sequin._table_name(relation),
        case when cardinality(v_types) < v_last then format('there is no column "%s" any more', s.sort_column) else 'it has no primary key' end),
      hint = case when cardinality(v_types) < v_last then format('Make the stream anew: sequin.drop_stream(%L), sequin.create_stream(…).', s.name)
        else format('alter table %s add primary key (…);', sequin._table_name(relation)) end;
  end if;
  v_values := array(select format('%L::%s', last[n], v_types[n]) from generate_series(1, v_last) n order by n);
  if last is not null and v_operators <@ '{pg_catalog}' then
    v_where := format('(%s) operator(pg_catalog.>) (%s)',
      (select string_agg(format('t.%I', v_columns[n]), ', ' order by n) from generate_series(v_first, v_last) n),
      (select string_agg(v_values[n], ', ' order by n) from generate_series(v_first, v_last) n));
  elsif last is not null then
    for n in reverse v_last..v_first loop
      v_where := format('t.%1$I operator(%2$I.>) %3$s', v_columns[n], v_operators[n], v_values[n])
        || case when n < v_last then format(' or t.%1$I operator(%2$I.=) %3$s and (%4$s)',
             v_columns[n], v_operators[n], v_values[n], v_where) else '' end;
    end loop;
    v_where := format('t.%1$I operator(%2$I.>=) %3$s and (%4$s)',
      v_columns[v_first], v_operators[v_first], v_values[v_first], v_where);
  end if;
  v_where := concat_ws(' and ', case when v_has_sort then format('t.%I is %s null', v_columns[1], case when is_nulls then '' else 'not' end) end,
    nullif(v_where, ''));
  return format(
    'select k.keys, sequin._sync_cursor($3, $4 || to_json(k.keys)), %2$s, to_jsonb(r.*), p.xid < 3 or x.next - (x.next - p.xid & 4294967295) < x.seen
     from (
       -- The oldest that the cut did not see and this page may; and a number that no xid here has come to.
       select txid_snapshot_xmax(txid_current_snapshot()) + 1048576 as next,
              case when $2 !~ '':'' then $2::bigint else coalesce((
                select min(i.xid) from txid_snapshot_xip($2::txid_snapshot) i(xid)
                where txid_visible_in_snapshot(i.xid, txid_current_snapshot())), txid_snapshot_xmax($2::txid_snapshot)) end as seen
       offset 0) x
     cross join (
       select t.*, t.xmin from %3$s t %4$s order by %5$s limit $1) t
     cross join lateral (select t.xmin::text::bigint as xid) p
     cross join lateral (select array[%1$s] as keys offset 0) k
     cross join lateral (select %6$s) r
     order by %5$s',
    (select string_agg(sequin._text_sql(k.name), ', ' order by k.position) from unnest(v_columns) with ordinality k(name, position)),
    sequin._record_pk_sql((
      select sequin._identity_columns(t.id) from sequin.source_table t
      where t.source_id = s.source_id and t.relation_oid = relation)),
    sequin._rows_sql(relation), case when v_where <> '' then 'where ' || v_where else '' end,
    (select string_agg(format('t.%I', v_columns[n]), ', ' order by n) from generate_series(v_first, v_last) n),
    sequin._record_sql(relation));
end $$;

-- cursor is both what goes in and what comes out: an inout argument is the one way to give the two the same name.
create or replace function sequin.sync(
  stream text, inout cursor text default null, batch_size int default 1000, wait interval default '0', out seq bigint,
  out action text, out table_schema text, out table_name text, out record_pk text, out record jsonb, out changes jsonb,
  out committed_at timestamptz
)
returns setof record
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off -- policies would run with the owner's rights
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
-- What a value's text depends on, as capture has it.
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set extra_float_digits = 3
set bytea_output = 'hex'
set lc_monetary = 'C'
as $$
#variable_conflict use_column
declare
  v_stream sequin.stream;
  v_tables sequin.source_table[];
  v_routes int[];
  v_table sequin.source_table;
  v_tag text;
  v_fields text[];
  v_seq bigint;                      -- of the log: up to here it was delivered, or the cut has it
  v_cut_lsn pg_lsn;
  v_snapshot text;                   -- the cut's; null: the log has passed it
  v_next int;                        -- the table whose rows come next
  v_last text[];                     -- the values of the last row before them; null: there is none
  v_is_nulls boolean := false;       -- those with a null in the sort column
  v_has_last boolean;
  v_keys text[];
  v_is_certain boolean;
  v_is_changed boolean;
  v_is_reached boolean;              -- the log is as far as the page
  v_is_stuck boolean := false;
  v_page_lsn pg_lsn;
  v_void text;
  v_limit int;
  v_left int := batch_size;
  v_count bigint;
  v_upto bigint;
  v_emitted bigint;
  v_began timestamptz := clock_timestamp();
  v_pause double precision;
  v_is_dropped boolean;              -- each of its tables: what the log has of them is all there is
  v_is_over boolean;                 -- and the log has come to where this call began
  v_lsn pg_lsn := sequin._wal_lsn();
  v_deadline timestamptz := clock_timestamp() + wait;
begin
  perform sequin._refuse_wait(format('sync of stream "%s"', stream), batch_size, wait);
  v_stream := sequin._stream(stream);
  if exists (select from sequin.source c where c.id = v_stream.source_id and c.conninfo is not null) then
    raise feature_not_supported using
      message = format('stream "%s" is of another database, whose tables cannot be read from here', stream),
      hint = 'A consumer delivers it: sequin.create_consumer(name, stream, start_at => ''beginning'').';
  end if;
  select array_agg(t order by st.position), array_agg(t.id) into v_tables, v_routes
  from sequin.stream_table st join sequin.source_table t on t.id = st.table_id
  where st.stream_id = v_stream.id;
  perform sequin._require_select(c.oid) from unnest(v_tables) t join pg_class c on c.oid = t.relation_oid;
  v_tag := sequin._sync_tag(v_stream);
  v_is_dropped := sequin._dropped_tables(v_stream.id) is not null;

  if cursor is null then
    perform sequin._refuse_dropped(v_stream);
    select k.snapshot, k.cut_seq, k.cut_lsn into v_snapshot, v_seq, v_cut_lsn
    from sequin._sync_cut(v_stream, v_routes, v_began + greatest(wait, '5 seconds')) k;
    v_next := 1;
  else
    v_fields := sequin._sync_payload(v_stream, cursor);
    v_seq := v_fields[2];
    v_cut_lsn := v_fields[3];
    v_snapshot := v_fields[4];
    if v_fields[1] = 'r' then
      v_next := v_fields[5];
      v_last := array(select jsonb_array_elements_text(array_to_string(v_fields[7:], '|')::jsonb));
      v_is_nulls := v_last[1] is null;
    end if;
  end if;
  v_has_last := v_last is not null;
  if exists (select from sequin.dropped_log d where d.route_id = any (v_routes) and d.seq > v_seq)
     or split_part(v_snapshot, ':', 1)::bigint < txid_snapshot_xmax(txid_current_snapshot()) - 2000000000 then
    raise object_not_in_prerequisite_state using
      message = format('stream "%s": the cursor is older than the log is kept: it goes on after seq %s, and the oldest kept is %s',
        stream, v_seq, sequin._oldest_seq(v_stream.source_id)),
      hint = format('Start again at the first row: select * from sequin.sync(%L); sequin.set_retention(keep) keeps more.', stream);
  elsif pg_is_in_recovery() and v_cut_lsn > sequin._wal_lsn() then
    raise object_not_in_prerequisite_state using
      message = format('stream "%s": the cursor was made at %s, and this replica is at %s', stream, v_cut_lsn, sequin._wal_lsn()),
      hint = 'Try again, once the replica has come so far.';
  end if;

  if v_has_last and exists (
       select from pg_class k
       where k.oid = v_tables[v_next].relation_oid and sequin._sync_order_tag(v_stream, k.oid) <> v_fields[6]) then
    raise object_not_in_prerequisite_state using
      message = format('stream "%s": what the rows of %s are in the order of was altered after the cursor was made', stream,
        sequin._table_name(v_tables[v_next].relation_oid)),
      hint = format('Start again at the first row: select * from sequin.sync(%L);', stream);
  end if;

  -- The rows of the tables, one table after another.
  while v_next <= cardinality(v_tables) and v_left > 0 loop
    v_table := v_tables[v_next];
    v_limit := greatest(v_left, 100);
    v_count := 0;
    v_page_lsn := null;
    v_is_reached := false;
    seq := v_seq;
    action := 'read';
    table_schema := v_table.schema_name;
    table_name := v_table.table_name;
    if exists (select from pg_class c where c.oid = v_table.relation_oid) then
      for v_keys, cursor, record_pk, record, v_is_certain in
        execute sequin._sync_page_sql(v_stream, v_table.relation_oid, case when v_has_last then v_last end, v_is_nulls)
        using v_limit, v_snapshot, v_tag,
          concat_ws('|', 'r', v_seq, v_cut_lsn, v_snapshot, v_next, coalesce(sequin._sync_order_tag(v_stream, v_table.relation_oid), '-'), '')
      loop
        v_is_changed := false;
        if not v_is_certain then
          v_page_lsn := coalesce(v_page_lsn, sequin._wal_lsn());
          v_pause := 0.001;
          loop
            perform sequin._see_segments();
            select exists (
              select from sequin.log l
              where l.record_pk = sync.record_pk and l.route_id = v_table.id and l.seq > v_seq
                and not sequin._is_in_cut(
                  v_snapshot, v_cut_lsn, (l.metadata ->> 'commit_lsn')::pg_lsn, (l.metadata ->> 'xid')::bigint))
              into v_is_changed;
            exit when v_is_changed or v_is_reached;
            v_is_reached := sequin._log_lsn(v_stream.source_id) >= v_page_lsn;
            continue when v_is_reached;
            v_void := pg_advisory_xact_lock_shared(sequin._sync_key());
            v_is_stuck := sequin._is_strict() or clock_timestamp() > v_began + greatest(wait, '5 seconds');
            exit when v_is_stuck;
            perform pg_sleep(v_pause);
            v_pause := least(v_pause * 1.1, 0.01);
          end loop;
          exit when v_is_stuck;
        end if;
        v_count := v_count + 1;
        v_last := v_keys;
        v_has_last := true;
        continue when v_is_changed;
        return next;
        v_left := v_left - 1;
        exit when v_left = 0;
      end loop;
    end if;
    exit when v_is_stuck;
    if v_left > 0 and v_count < v_limit then
      if not v_is_nulls and sequin._sync_order(v_stream, v_table.relation_oid) <> sequin._key_columns(v_table.relation_oid) then
        v_is_nulls := true;
      else
        v_is_nulls := false;
        v_next := v_next + 1;
      end if;
      v_has_last := false;
    end if;
  end loop;
  if v_is_stuck and v_left = batch_size then
    raise serialization_failure using
      message = format('stream "%s": its log has not come as far as its tables', stream),
      hint = case when sequin._is_strict() then 'Try again, in a new transaction.'
        else 'Try again; select * from sequin.health(); shows whether a bridge is at work.' end;
  elsif v_is_stuck then
    return;
  end if;

  -- The log.
  if v_is_dropped and not sequin._is_strict() then
    v_void := pg_advisory_xact_lock_shared(sequin._sync_key());
    v_deadline := greatest(v_deadline, v_began + '5 seconds');
  end if;
  v_pause := 0.001;
  loop
    v_limit := v_left;
    v_is_over := v_is_dropped and sequin._log_lsn(v_stream.source_id) >= v_lsn;
    -- Undone where it finds nothing: what waits has no lock on the log, which nobody could drop a segment of.
    begin
      perform sequin._see_segments();
      select count(*), max(l.seq) into v_count, v_upto
      from (
        select l.seq
        from unnest(v_routes) r(id)
        cross join lateral (
          select l.seq from sequin.log l where l.route_id = r.id and l.seq > v_seq order by l.seq limit v_limit) l
        order by l.seq
        limit v_limit) l;
      if v_count = 0 then
        raise exception using errcode = 'SQ000', message = 'there is nothing';
      end if;
    exception when sqlstate 'SQ000' then
      null;
    end;
    if v_count > 0 then
      return query
        select sequin._sync_cursor(v_tag, concat_ws('|', 'l', l.seq, case when l.is_cut then v_cut_lsn || '|' || v_snapshot end)),
               l.seq, sequin._action(l.action), l.table_schema, l.table_name, l.record_pk, l.record,
               case when v_stream.mode = 'changes' then l.changes end, l.committed_at
        from (
          select l.*, v_snapshot is not null and (l.metadata ->> 'commit_lsn')::pg_lsn < v_cut_lsn as is_cut
          from unnest(v_routes) r(id)
          cross join lateral (
            select * from sequin.log l where l.route_id = r.id and l.seq > v_seq and l.seq <= v_upto order by l.seq) l) l
        where (l.action <> 'x' or v_stream.mode = 'rows')
          and not (l.is_cut and sequin._is_in_cut(
            v_snapshot, v_cut_lsn, (l.metadata ->> 'commit_lsn')::pg_lsn, (l.metadata ->> 'xid')::bigint))
        order by l.seq;
      get diagnostics v_emitted = row_count;
      v_left := v_left - v_emitted;
      v_seq := v_upto;
    end if;
    exit when v_left <= 0;
    continue when v_count >= v_limit;
    if v_is_over and v_left = batch_size then
      perform sequin._refuse_dropped(v_stream);
    end if;
    exit when v_left < batch_size or clock_timestamp() >= v_deadline;
    perform pg_sleep(least(v_pause, greatest(extract(epoch from v_deadline - clock_timestamp()), 0)));
    v_pause := least(v_pause * 1.1, 0.01);
  end loop;
end $$;
comment on function sequin.sync(text, text, int, interval) is
'Reads a stream without a consumer: the caller keeps the cursor. First the rows of its tables, in order of the stream''s
sort_column (else the primary key; nulls last; one table after another), then every change that follows, in order. Folded
by record_pk they are the table. Nothing is written or held: any client may go on from any cursor, twice as well, on a
replica too.

stream      which
cursor      of the last row that was read; null: from the first row of the table
batch_size  1 to 10000: at most so many
wait        0 to 60 seconds: where there is nothing, wait so long for something

Returns cursor (of each row: keep the last one), seq, action and the rest as sequin.messages has them. Rows of the table
have action read, the seq of the moment when the cursor began (so that seq never falls), and no committed_at. Those that
have changed since then are not among them: they come as changes. No rows: there is nothing now; ask again with the same
cursor.

Needs SELECT on the stream''s tables. Errors: 42704 unknown stream, 22023 bad argument, or not a cursor of this stream,
42501 no right, 55000 the cursor is older than the log is kept, or the key was altered (start again with null), the replica
is behind it, a table has no key, all were dropped (and the log has no more of them), or no bridge has run; 40001 try again:
the log is behind the tables; 0A000 a stream of another database.';
