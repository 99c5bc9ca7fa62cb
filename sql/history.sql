-- History: rows that a consumer is given from the table, as they are, in the order of sort_column; and where it meets
-- what is committed meanwhile.
--
-- A backfill is a segment of the log of its own, k, between two live ones: history has higher seqs than every change
-- before the cut, and lower ones than every change after it. Its rows are under a side route that this consumer alone
-- reads, with the groups and lanes that the table's changes have, so that everything else about delivery is as ever.
--
--      live, j            history, k             live, k + 1
--   ---------------+   +-----------------+   +------------------->
--   commit < cut   |   | the table's rows |   | cut <= commit
--
-- The cut is an LSN, H, taken after a snapshot S of the source: the reader of the slot goes on in k + 1 with the first
-- transaction that commits at or after H, never before. One that it was reading when it heard of the cut stays in j: nothing
-- of k can be read before that is there whole. A row is written as history only if the changes after the cut
-- do not bring it anyway: if its xmin is older than S's, it has not changed since; any other is looked up in the log,
-- once that has come to where the chunk was read. So no row comes older than it came before, and none is missing.
--
-- Until its history is written, a consumer reads nothing after what is written of it: _head is the end of its log.
--
-- Of another source's tables the LSN, the snapshot and the rows are that server's. A backfill waits until they are published.

-- The log's end, as far as a consumer is concerned. One statement, and so one moment, whatever the caller knows.
create or replace function sequin._head(c sequin.consumer)
returns bigint
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select case when t.history_id is null then greatest(p.last_seq, t.history_seq)
                when b.cut_at is null then least(greatest(p.last_seq, t.history_seq), b.segment::bigint << 32)
                else coalesce(
                  (select s.last_seq from sequin.backfill_step s where s.backfill_id = b.id order by s.step desc limit 1),
                  b.segment::bigint << 32) end
    from sequin.consumer t
    join sequin.stream m on m.id = t.stream_id
    cross join lateral (
      select p.last_seq from sequin.progress p where p.source_id = m.source_id order by p.step desc limit 1) p
    left join sequin.backfill b on b.id = t.history_id
    where t.id = c.id);
end $$;

-- What a stream's history is sorted by in a table, and of what type: the sort column, else the first of the key. Of a
-- domain, what it is over.
create or replace function sequin._sort_type(stream sequin.stream, t sequin.source_table)
returns table (column_name text, type_name text)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select a.attname::text, format_type(sequin._castable_type(a.atttypid), -1)
  from pg_attribute a
  where a.attrelid = t.relation_oid and a.attname = coalesce(stream.sort_column, t.key_columns[1]) and not a.attisdropped
$$;

-- The row to begin with, as the bridge reads it: what a date or a time is written as depends on who writes it. Where the
-- types are not known here, or the text is not of one value in all tables, it is left as it is.
create or replace function sequin._from_row(consumer text, stream sequin.stream, from_row text)
returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table sequin.source_table;
  v_sort record;
  v_text text;
  v_texts text[] := '{}';
begin
  for v_table in
    select t.*
    from sequin.stream_table st
    join sequin.source_table t on t.id = st.table_id
    join sequin.source s on s.id = t.source_id and s.conninfo is null
    where st.stream_id = stream.id and from_row is not null
    order by st.position
  loop
    select * into v_sort from sequin._sort_type(stream, v_table);
    continue when not found;
    begin
      execute format('select sequin._plain_text(row(cast(%L as %s)))', from_row, v_sort.type_name) into v_text;
    exception when data_exception then
      raise invalid_parameter_value using
        message = format('consumer "%s": %L is no value of %s, column "%s" of %I.%I', consumer, from_row, v_sort.type_name,
          v_sort.column_name, v_table.schema_name, v_table.table_name),
        hint = format('The row to begin with is given by its value of "%s".', v_sort.column_name);
    end;
    v_texts := v_texts || v_text;
  end loop;
  return case when cardinality(v_texts) > 0 and v_texts[1] = all (v_texts) then v_texts[1] else from_row end;
end $$;

-- Asks for a backfill: of all rows of the consumer's tables, or those from a row on. Its id. The bridge does the rest.
create or replace function sequin._backfill(
  consumer_id int, from_row text, filter text default null, is_start boolean default false
)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  c sequin.consumer;
  v_stream sequin.stream;
  v_tables int[];
  v_table sequin.source_table;
  v_id bigint;
begin
  select * into c from sequin.consumer t where t.id = _backfill.consumer_id;
  select * into v_stream from sequin.stream s where s.id = c.stream_id;
  select array_agg(st.table_id order by st.position) into v_tables
  from sequin.stream_table st where st.stream_id = v_stream.id;
  for v_table in
    select t.* from sequin.source_table t join sequin.source s on s.id = t.source_id
    where t.id = any (v_tables) and (s.conninfo is null or t.column_names is not null)
    order by array_position(v_tables, t.id)
  loop
    -- Of another source's, as the bridge last saw them.
    if v_table.column_names is null then
      if not exists (select from pg_class k where k.oid = v_table.relation_oid) then
        raise object_not_in_prerequisite_state using
          message = format('consumer "%s": table %I.%I was dropped, and its rows with it', c.name, v_table.schema_name, v_table.table_name),
          hint = 'Make the stream anew without it: select sequin.create_stream(…); and a consumer of it.';
      end if;
      v_table.key_columns := sequin._key_columns(v_table.relation_oid);
      if v_table.key_columns <> '{}' and not exists (select from sequin._sort_type(v_stream, v_table)) then
        raise object_not_in_prerequisite_state using
          message = format('consumer "%s": table %I.%I has no column "%s" any more, by which its rows are sorted', c.name,
            v_table.schema_name, v_table.table_name, v_stream.sort_column),
          hint = 'Make the stream anew, with another sort_column: select sequin.create_stream(…); and a consumer of it.';
      end if;
    end if;
    if v_table.key_columns = '{}' then
      raise object_not_in_prerequisite_state using
        message = format('table %I.%I has no primary key: its rows cannot be told apart', v_table.schema_name, v_table.table_name),
        hint = format('alter table %I.%I add primary key (…); or %s', v_table.schema_name, v_table.table_name,
          case when is_start then 'begin with what is committed from now on, which needs none: start_at => ''now''.'
            else format('go back in the log, which needs none: select sequin.rewind(%L, to_time => …);', c.name) end);
    end if;
  end loop;
  from_row := sequin._from_row(c.name, v_stream, from_row);

  insert into sequin.side_route (id, consumer_id, table_id)
  select nextval('sequin.side_route_id'), c.id, t.id from unnest(v_tables) t(id)
  on conflict do nothing;
  insert into sequin.backfill (consumer_id, is_start, table_ids, side_routes, sort_column, from_row, filter)
  select c.id, is_start, v_tables, array_agg(r.id order by array_position(v_tables, r.table_id)), v_stream.sort_column,
         from_row, filter
  from sequin.side_route r where r.consumer_id = c.id and r.table_id = any (v_tables)
  returning id into v_id;
  if is_start then
    update sequin.consumer t set history_id = v_id where t.id = c.id;
  end if;

  if not (
       select case when s.conninfo is not null then sequin._has_bridge()
                   else exists (select from pg_replication_slots r where r.slot_name = s.slot_name and r.active) end
       from sequin.source s where s.id = v_stream.source_id) then
    raise warning using
      message = format('no bridge is running: consumer "%s" gets the rows that exist once one does', c.name),
      hint = 'sequin bridge --database-url …';
  end if;
  return v_id;
end $$;

-- Ends a backfill that is not over: what is written of it stays, and its consumer goes on. Whether it was not over.
create or replace function sequin._end_backfill(id bigint, state text, error text)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  b sequin.backfill;
begin
  update sequin.backfill t
  set state = _end_backfill.state, error = _end_backfill.error, finished_at = clock_timestamp()
  where t.id = _end_backfill.id and t.state in ('waiting', 'running')
  returning * into b;
  if not found then
    return false;
  end if;
  update sequin.consumer c
  set history_id = null,
      history_seq = coalesce(
        (select s.last_seq from sequin.backfill_step s where s.backfill_id = b.id order by s.step desc limit 1),
        case when b.cut_at is not null then b.segment::bigint << 32 end, c.history_seq)
  where c.id = b.consumer_id and c.history_id = b.id;
  return true;
end $$;

-- A filter as a condition on a row, called new, that is read from its table: what the row's 'read' message would be is
-- what it is evaluated on. Rows of another source's table are chosen here: see bridge_backfill_chosen.
create or replace function sequin._row_condition(e sequin._expression, table_name text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format(
    'exists (select from (select %s as new_record, null::pg_catalog.jsonb as old_record,'
    ' ''read''::pg_catalog.text as action, %L::pg_catalog.text as table_name, pg_catalog.now() as committed_at) _sequin_m%s where %s)',
    case when e.is_typed then format(
      '(select to_jsonb(r.*) from (select new.*) t cross join lateral (select %s) r)', sequin._record_sql(e.relation))
      else '_sequin_r.record' end,
    coalesce((select c.relname from pg_class c where e.is_typed and c.oid = e.relation), table_name),
    sequin._expression_frame(e, null), e.inlined)
$$;

-- See backfill, which has parsed the filter as its caller sees the names in it.
create or replace function sequin._start_backfill(consumer text, from_row text, filter text, views oid[])
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  c sequin.consumer := sequin._consumer(consumer);
  v_relations oid[];
  v_conditions text[];
  v_id bigint;
begin
  perform sequin._refuse_write('backfill');
  perform sequin._require_reader(c.stream_id);
  if filter is not null then
    v_relations := sequin._stream_relations(null, consumer);
    select array_agg(
             sequin._row_condition((e.relation, e.compiled, e.inlined, e.is_typed, e.is_whole, e.uses_new, e.uses_old, e.columns,
               e.types, e.others)::sequin._expression, (
               select t.table_name from sequin.stream_table st join sequin.source_table t on t.id = st.table_id
               where st.stream_id = c.stream_id and st.position = e.place))
             order by case when e.relation = 0 then e.place else array_position(v_relations, e.relation) end) into v_conditions
    from sequin._compile(format('consumer "%s": filter', consumer), v_relations, 'filter', filter, views)
      with ordinality e(relation, compiled, inlined, is_typed, is_whole, uses_new, uses_old, columns, types, others, place);
  end if;
  v_id := sequin._backfill(c.id, from_row, filter);
  update sequin.backfill b set conditions = v_conditions where b.id = v_id and v_conditions is not null;
  return v_id;
end $$;

create or replace function sequin.backfill(consumer text, from_row text default null, filter text default null)
returns bigint
language plpgsql
as $$
-- Not a definer and no search_path of its own: names in filter are looked up as the caller's would be.
declare
  v_views pg_catalog.oid[];
  v_id pg_catalog.int8;
begin
  if filter is not null and consumer is not null then
    v_views := sequin._parse(
      pg_catalog.format('consumer "%s": filter', consumer), sequin._stream_relations(null, consumer), 'filter', filter);
  end if;
  v_id := sequin._start_backfill(consumer, from_row, filter, v_views);
  perform sequin._drop_views(v_views);
  return v_id;
end $$;
comment on function sequin.backfill(text, text, text) is
'Delivers the rows of a consumer''s tables to it again, as messages with action read, without moving it. It runs in the
bridge, beside live traffic, and goes on after a crash; sequin.backfills shows how far it is. Changes that are committed
before it begins come before the rows, later ones after them, and no row comes older than it came before.

consumer  whose
from_row  only rows whose sort_column (without one: the first column of the primary key) is at least this; default: all
filter    only rows that this lets through: an SQL boolean over new, as create_consumer''s; evaluated where they are read.
          One that it fails on ends the backfill, which says so. The consumer''s own filter chooses among the rest

Returns the id of the backfill. A second one of the same consumer waits for the first.
Errors: 42704 unknown consumer, 42501 no right to read its stream, 22023 from_row is no value of that column, 42601, 42703,
42804 a filter that is none, 55000 a table that was dropped, or has no primary key or sort column any more. What of these
only another database can tell, sequin.backfills says.';

create or replace function sequin.cancel_backfill(id bigint)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform sequin._refuse_write('cancel_backfill');
  if not exists (select from sequin.backfill b where b.id = cancel_backfill.id) then
    raise undefined_object using
      message = format('backfill %s does not exist', coalesce(id::text, 'null')),
      hint = 'select * from sequin.backfills;';
  end if;
  perform sequin._require_reader(c.stream_id)
  from sequin.backfill b join sequin.consumer c on c.id = b.consumer_id
  where b.id = cancel_backfill.id;
  -- One that has failed is over; that somebody knows is all that is left to say.
  update sequin.backfill b set state = 'cancelled' where b.id = cancel_backfill.id and b.state = 'failed';
  return found or sequin._end_backfill(id, 'cancelled', null);
end $$;
comment on function sequin.cancel_backfill(bigint) is
'Ends a backfill: what it has written is delivered, and nothing more of it; its consumer goes on with what is live. One that
has failed is no error in health() any more.

id  as sequin.backfill returned it, or sequin.backfills shows it

Returns true, or false where it was over already. Errors: 42704 unknown backfill, 42501 no right to read its
consumer''s stream, 25006 read only transaction or replica.';

create or replace view sequin.backfills as
select b.id, c.name as consumer, b.state, coalesce(p.rows_done, 0) as rows_done,
       case when b.state = 'done' then coalesce(p.rows_done, 0)
            else greatest(b.rows_total, p.rows_done) end as rows_total,
       m.name as stream, b.from_row, b.filter,
       case when p.rows_done > 0
         then round(p.rows_done / greatest(extract(epoch from coalesce(b.finished_at, clock_timestamp()) - b.cut_at)::numeric, 0.001))::bigint
       end as rows_per_second,
       case when b.state = 'running' and p.rows_done > 0
         then round(greatest(b.rows_total - p.rows_done, 0) * extract(epoch from clock_timestamp() - b.cut_at)::numeric / p.rows_done)::bigint
       end as seconds_left,
       b.error, b.created_at, b.started_at, b.finished_at
from sequin.backfill b
join sequin.consumer c on c.id = b.consumer_id
join sequin.stream m on m.id = c.stream_id
left join lateral (
  select s.rows_done from sequin.backfill_step s where s.backfill_id = b.id order by s.step desc limit 1) p on true;
comment on view sequin.backfills is
'Backfills, and the history that consumers begin with. state: waiting (for a bridge, or for another of its consumer),
running, done, cancelled, failed (error says why). rows_total is an estimate until it is done.';
