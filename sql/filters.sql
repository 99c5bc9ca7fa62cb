-- Filters and transforms of consumers: which messages are a consumer's, and what is in them. Evaluated once a message,
-- when it comes into the consumer's feed, a batch at a time. What an expression fails on becomes a dead letter there; what
-- makes an expression fail whatever the message stops the feed until it is put right.

-- What an expression is evaluated in, after a FROM that has _sequin_m: new_record, old_record, action, table_name and
-- committed_at. Of a row, only the columns that are named are read.
create or replace function sequin._expression_frame(filter sequin._expression, transform sequin._expression)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_relation oid := coalesce(filter.relation, transform.relation);
  v_is_whole boolean := coalesce(filter.is_whole, false) or coalesce(transform.is_whole, false);
  v_row text;
  v_frame text := '';
begin
  if not coalesce(filter.is_typed, transform.is_typed) then
    return ' cross join lateral (select _sequin_m.new_record as new, _sequin_m.old_record as old, _sequin_m.action,'
      ' _sequin_m.table_name, _sequin_m.committed_at) _sequin';
  end if;
  if v_is_whole then
    select string_agg(format('%I %s', k.name, sequin._type_name(k.type)), ', ' order by k.attnum) into v_row
    from sequin._expression_columns(v_relation) k;
  else
    select string_agg(format('%I %s', k.name, k.type), ', ') into v_row
    from (
      -- One name of a type that versions of the server write in two ways.
      select k.name, min(k.type) as type
      from (
        select * from unnest(filter.columns, filter.types) k(name, type)
        union all
        select * from unnest(transform.columns, transform.types) k(name, type)) k
      where k.type like '%[]'
      group by k.name) k;
  end if;
  if v_row is not null and (filter.uses_new or transform.uses_new) then
    v_frame := v_frame || format(
      ' left join lateral jsonb_to_record(_sequin_m.new_record) as new (%s) on _sequin_m.new_record is not null', v_row);
  end if;
  if v_row is not null and (filter.uses_old or transform.uses_old) then
    v_frame := v_frame || format(
      ' left join lateral jsonb_to_record(_sequin_m.old_record) as old (%s) on _sequin_m.old_record is not null', v_row);
  end if;
  return v_frame ||
    ' cross join lateral (select _sequin_m.action, _sequin_m.table_name, _sequin_m.committed_at) _sequin';
end $$;

-- The old row of an update: the new one with the old values of what changed. Without replica identity full, what did not
-- change is not known either: then there is the key, and the rest is null.
create or replace function sequin._old_record(record jsonb, changes jsonb, key text[], is_full boolean)
returns jsonb
language sql
immutable
as $$
  select case
    when is_full and changes is not null or changes - key <> '{}' then record || changes
    else coalesce((select jsonb_object_agg(k.name, record -> k.name) from unnest(key) k(name)), '{}') || coalesce(changes, '{}')
  end
$$;

-- Whether updates of a table carry the whole old row. Of a partitioned one, if it says so itself, and each partition does.
create or replace function sequin._is_full(relation oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  with recursive down(oid) as (
    select relation
    union all
    select i.inhrelid from down join pg_inherits i on i.inhparent = down.oid
    where (select c.relkind = 'p' from pg_class c where c.oid = relation)
  )
  select coalesce(bool_and(c.relreplident = 'f'), false)
  from down join pg_class c on c.oid = down.oid where c.relkind = 'r' or c.oid = relation
$$;

-- The columns of a row's old key, where that is all of it that an update carries; in the order in which record_pk has them.
create or replace function sequin._identity_columns(route_id int)
returns text[]
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(
    case when s.conninfo is not null then t.identity_columns
         else (select case when array_agg(a.attname::text) <@ t.key_columns and count(*) = cardinality(t.key_columns) then t.key_columns
                           else array_agg(a.attname::text order by a.attnum) end
               from pg_class c
               join pg_index i on i.indrelid = c.oid and i.indisreplident
               cross join lateral unnest(i.indkey::int2[]) with ordinality k(attnum, place)
               join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum and k.place <= i.indnkeyatts
               where c.oid = t.relation_oid and c.relreplident = 'i'
               having count(*) > 0) end, t.key_columns)
  from sequin.source_table t
  join sequin.source s on s.id = t.source_id
  where t.id = $1
$$;

-- Whether an error says nothing of the expression, and the same may go well the next time.
create or replace function sequin._is_passing(code text)
returns boolean
language sql
immutable
as $$
  select pg_catalog.left(code, 2) in ('08', '25', '40', '53', '55', '57', '58')
$$;

-- Evaluates a filter and a transform (either may be null) on messages, and returns those that were chosen: with what
-- the transform made of them, or with the error that one of the two failed with. source selects the messages: seq,
-- group_hash, table_name, committed_at, action (as users read it), new_record and old_record. 55000 where an expression
-- cannot be evaluated at all any more.
create or replace function sequin._evaluate(source text, filter sequin._expression, transform sequin._expression)
returns table (seq bigint, group_hash int, record jsonb, error text)
language plpgsql
set search_path = pg_catalog, pg_temp
-- What the server printed means what it did, and a value's text is the same, whoever the caller is.
set standard_conforming_strings = on
set transform_null_equals = off
set array_nulls = on
set xmloption = content
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set intervalstyle = 'postgres'
set extra_float_digits = 1
set bytea_output = 'hex'
set lc_monetary = 'C'
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_frame text := sequin._expression_frame(filter, transform);
  v_query text;
  v_seqs bigint[];
  v_groups int[];
  v_records jsonb[];
  v_code text;
  v_message text;
begin
  v_query := format(
    'select array_agg(_sequin_m.seq), array_agg(_sequin_m.group_hash), array_agg(%s) from (%s) _sequin_m%s where %s',
    coalesce(transform.inlined, 'null::jsonb'), source, v_frame, coalesce(filter.inlined, 'true'));
  begin
    execute v_query into v_seqs, v_groups, v_records;
    return query select * from unnest(v_seqs, v_groups, v_records, null::text[]);
    return;
  exception when others then
    if sequin._is_passing(sqlstate) then
      raise;
    end if;
  end;
  -- Whatever the message?
  begin
    execute 'explain ' || v_query;
  exception when others then
    if sequin._is_passing(sqlstate) then
      raise;
    end if;
    raise object_not_in_prerequisite_state using
      message = sqlerrm,
      hint = 'sequin.alter_consumer(name, filter => …, transform => …) gives it another.';
  end;
  -- One by one. A block has no arguments and no result: settings of this transaction have them. (What selects the messages
  -- may be long, and would be part of each error's context were it written in the block.)
  perform set_config('sequin.evaluated', source, true);
  execute format('do %L', format($do$
#variable_conflict use_column
declare
  _sequin_row record;
  _sequin_step text;
  _sequin_is_chosen boolean;
  _sequin_record jsonb;
  _sequin_result jsonb[] := '{}';
begin
  for _sequin_row in execute current_setting('sequin.evaluated') loop
    begin
      _sequin_step := 'filter';
      select %s into _sequin_is_chosen
      from (select _sequin_row.new_record, _sequin_row.old_record, _sequin_row.action, _sequin_row.table_name, _sequin_row.committed_at) _sequin_m%s;
      continue when not _sequin_is_chosen;
      _sequin_step := 'transform';
      select %s into _sequin_record
      from (select _sequin_row.new_record, _sequin_row.old_record, _sequin_row.action, _sequin_row.table_name, _sequin_row.committed_at) _sequin_m%s;
      _sequin_result := _sequin_result || (
        jsonb_build_object('seq', _sequin_row.seq, 'group_hash', _sequin_row.group_hash)
        || case when _sequin_record is not null then jsonb_build_object('record', _sequin_record) else '{}' end);
    exception when others then
      if sequin._is_passing(sqlstate) then
        raise;
      end if;
      _sequin_result := _sequin_result || jsonb_build_object(
        'seq', _sequin_row.seq, 'group_hash', _sequin_row.group_hash, 'error', _sequin_step || ': ' || sqlerrm);
    end;
  end loop;
  perform set_config('sequin.evaluated', array_to_json(_sequin_result)::text, true);
end
$do$, coalesce(filter.inlined, 'true'), v_frame, coalesce(transform.inlined, 'null::jsonb'), v_frame));
  v_message := current_setting('sequin.evaluated');
  perform set_config('sequin.evaluated', '', true);
  return query
    select (e.value ->> 'seq')::bigint, (e.value ->> 'group_hash')::int, e.value -> 'record', e.value ->> 'error'
    from jsonb_array_elements(v_message::jsonb) e;
end $$;

-- Plans an expression's evaluation, without a message. What fails there would fail on each.
create or replace function sequin._rehearse(label text, e sequin._expression, kind text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
-- As _evaluate.
set standard_conforming_strings = on
set transform_null_equals = off
set array_nulls = on
set xmloption = content
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set intervalstyle = 'postgres'
set extra_float_digits = 1
set bytea_output = 'hex'
set lc_monetary = 'C'
as $$
begin
  -- Over columns, as of a null the server would leave out branches, and what is wrong in them.
  execute format('explain select %s from (select %s) _sequin_m%s', e.inlined,
    'd.record as new_record, d.changes as old_record, d.error as action, d.table_name, d.committed_at from sequin.dead_letter d',
    sequin._expression_frame(case when kind = 'filter' then e end, case when kind <> 'filter' then e end));
exception when others then
  if sequin._is_passing(sqlstate) then
    raise;
  end if;
  raise exception using
    errcode = case when left(sqlstate, 2) = '22' then '42804' else sqlstate end,
    message = format('%s: %s at position 1', label, sqlerrm),
    hint = 'It fails whatever the message is.';
end $$;

-- The table whose rows come under a route: its own, or one beside it for history.
create or replace function sequin._table_of(route_id int)
returns int
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select case when $1 > 0 then $1 else (select r.table_id from sequin.side_route r where r.id = $1) end
$$;

-- A consumer's compiled expression for a table.
create or replace function sequin._consumer_expression(consumer_id int, route_id int, kind text)
returns sequin._expression
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select (case when s.conninfo is null then t.relation_oid else 0 end, e.compiled, e.inlined, e.is_typed, e.is_whole, e.uses_new,
          e.uses_old, e.columns, e.types, e.others)::sequin._expression
  from sequin.consumer_expression e
  join sequin.source_table t on t.id = e.route_id
  join sequin.source s on s.id = t.source_id
  where e.consumer_id = $1 and e.route_id = sequin._table_of($2) and e.kind = $3
$$;

-- The tables of these routes, as _parse and _compile want them: 0 for one of another database.
create or replace function sequin._expression_relations(routes int[])
returns oid[]
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select array_agg(case when s.conninfo is null then t.relation_oid else 0 end order by r.position)
  from unnest(routes) with ordinality r(id, position)
  join sequin.source_table t on t.id = r.id
  join sequin.source s on s.id = t.source_id
$$;

-- The same for a stream, or the stream of a consumer, as create_consumer and alter_consumer ask.
create or replace function sequin._stream_relations(stream text, consumer text)
returns oid[]
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stream_id int;
begin
  if consumer is not null then
    v_stream_id := (sequin._consumer(consumer)).stream_id;
  else
    v_stream_id := (sequin._stream(stream)).id;
  end if;
  return sequin._expression_relations(array(
    select st.table_id from sequin.stream_table st where st.stream_id = v_stream_id order by st.position));
end $$;

-- Puts a consumer's compiled expression of a kind in place of what there was. Whether it is another one.
create or replace function sequin._keep_expression(c sequin.consumer, kind text, text text, views oid[])
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_label text := format('consumer "%s": %s', c.name, kind);
  v_routes int[] := sequin._with_side(c.routes, '{}');
  v_relations oid[] := sequin._expression_relations(v_routes);
  v_before text[];
  v_after text[];
  v_relation oid;
begin
  v_before := array(
    select e::text from sequin.consumer_expression e where e.consumer_id = c.id and e.kind = _keep_expression.kind order by e.route_id);
  delete from sequin.consumer_expression e where e.consumer_id = c.id and e.kind = _keep_expression.kind;
  if text is not null then
    insert into sequin.consumer_expression (
      consumer_id, route_id, kind, compiled, inlined, is_typed, is_whole, uses_new, uses_old, columns, types, others)
    -- Those of another database have no relation here, and come in their order.
    select c.id, v_routes[case when e.relation = 0 then e.place else array_position(v_relations, e.relation) end], kind, e.compiled,
           e.inlined, e.is_typed, e.is_whole, e.uses_new, e.uses_old, e.columns, e.types, e.others
    from sequin._compile(v_label, v_relations, kind, text, views) with ordinality e(
      relation, compiled, inlined, is_typed, is_whole, uses_new, uses_old, columns, types, others, place);
  end if;
  delete from sequin.consumer_error r where r.consumer_id = c.id;
  for v_relation in
    select t.relation_oid
    from sequin.consumer_expression e
    join sequin.source_table t on t.id = e.route_id
    where e.consumer_id = c.id and e.kind = _keep_expression.kind and e.is_typed and e.uses_old
      and (e.is_whole or not e.columns <@ sequin._identity_columns(e.route_id)) and not sequin._is_full(t.relation_oid)
  loop
    raise warning using
      message = format('%s: of %s, old has only the key in updates and deletes: the rest is null', v_label, sequin._table_name(v_relation)),
      hint = format('alter table %s replica identity full;', sequin._table_name(v_relation));
  end loop;
  v_after := array(
    select e::text from sequin.consumer_expression e where e.consumer_id = c.id and e.kind = _keep_expression.kind order by e.route_id);
  return v_before <> v_after;
end $$;

-- Why a compiled expression of a table's rows cannot be evaluated, as things are; null: it can. A column it names is gone,
-- or of another type; or something else that it uses is not what it was when it was checked.
create or replace function sequin._expression_problem(kind text, table_id int, e sequin._expression)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_problem text;
begin
  select case
           when k.type is null then
             format('%s: table %s has no column "%s" any more', kind, sequin._table_name(t.relation_oid), n.name)
           else
             format('%s: column "%s" of table %s is of type %s now, and was %s when it was checked', kind, n.name,
               sequin._table_name(t.relation_oid), format_type(k.type, -1), coalesce(to_regtype(n.type)::text, n.type))
         end
    into v_problem
  from sequin.source_table t
  cross join lateral unnest(e.columns, e.types) n(name, type)
  left join lateral sequin._expression_columns(t.relation_oid) k on k.name = n.name
  -- Not by its name: versions differ in which names they quote.
  where t.id = table_id and e.is_typed and (k.type is null or to_regtype(n.type) is distinct from k.type)
    -- A table that was dropped has no other columns than it had.
    and exists (select from pg_class r where r.oid = t.relation_oid)
  order by n.name
  limit 1;
  if v_problem is null then
    select format('%s: %s is not what it was when it was checked', kind, o.name) into v_problem
    from unnest(e.others) o(name)
    where not sequin._is_as_checked(o.name)
    order by o.name
    limit 1;
  end if;
  return v_problem;
end $$;

-- Why a consumer's filter or transform cannot be evaluated, as things are; null: it can.
create or replace function sequin._consumer_error(c sequin.consumer)
returns text
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  if c.filter is null and c.transform is null then
    return null;
  end if;
  return coalesce(
    (select p.problem
     from sequin.consumer_expression e
     cross join lateral sequin._expression_problem(e.kind, e.route_id, sequin._consumer_expression(c.id, e.route_id, e.kind)) p(problem)
     where e.consumer_id = c.id and p.problem is not null
     order by e.kind, e.route_id
     limit 1),
    (select r.error from sequin.consumer_error r where r.consumer_id = c.id));
end $$;

-- A query for messages of a table, for _evaluate. source is what the rows are of, as l.
create or replace function sequin._message_source(c sequin.consumer, route_id int, source text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_is_full boolean;
begin
  select case when s.conninfo is null then sequin._is_full(t.relation_oid) else t.identity_columns is null end into v_is_full
  from sequin.source_table t join sequin.source s on s.id = t.source_id
  where t.id = sequin._table_of(_message_source.route_id);
  return format(
    'select l.seq, %s as group_hash, l.table_name, l.committed_at, sequin._action(l.action) as action,'
    ' case when l.action in (''i'', ''u'', ''r'') then l.record end as new_record,'
    ' case when l.action in (''d'', ''x'') then l.record'
    ' when l.action = ''u'' then sequin._old_record(l.record, l.changes, %L::text[], %L) end as old_record'
    ' from %s where l.route_id = %s and l.action = any (%L::"char"[])',
    case when c.group_by is null then 'l.group_hash' when c.group_by = '{}' then '0'
         else format('sequin._group_hash(l.record, %L::text[])', c.group_by) end,
    sequin._identity_columns(sequin._table_of(route_id)), v_is_full, source, route_id,
    array(select a.action from unnest('{i,u,d,x,t,r}'::"char"[]) a(action) where sequin._is_chosen(c, a.action)));
end $$;

-- Decides on messages of one table: which are the consumer's, and what is in them; or why that cannot be said. Where it is
-- not known what the table was like, that is why.
create or replace function sequin._decide(c sequin.consumer, route_id int, source text)
returns table (seq bigint, group_hash int, record jsonb, error text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_filter sequin._expression := sequin._consumer_expression(c.id, _decide.route_id, 'filter');
  v_transform sequin._expression := sequin._consumer_expression(c.id, _decide.route_id, 'transform');
  v_query text := sequin._message_source(c, _decide.route_id, source);
begin
  if c.filter is not null and v_filter.compiled is null or c.transform is not null and v_transform.compiled is null
     or (v_filter.is_whole or v_transform.is_whole) and v_filter.relation is distinct from 0::oid and not exists (
       select from pg_class k where k.oid = coalesce(v_filter.relation, v_transform.relation)) then
    return query execute format('select m.seq, m.group_hash, null::jsonb, %L from (%s) m',
      'the table was dropped, and what its rows were is not known', v_query);
  else
    -- An old row is put together once, however often it is referred to.
    return query select * from sequin._evaluate(
      v_query || case when v_filter.uses_old or v_transform.uses_old then ' offset 0' else '' end, v_filter, v_transform);
  end if;
end $$;

-- Makes messages that could not be decided on dead letters. They are the table's rows still.
create or replace function sequin._bury_undecided(c sequin.consumer, seq bigint, route_id int, group_hash int, error text)
returns void
language sql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
  insert into sequin.dead_letter (
    consumer_id, seq, group_hash, lane, deliver_count, error, route_id, committed_at, action, table_schema, table_name,
    record_pk, record, changes, metadata, is_undecided)
  select c.id, l.seq, $4, $4 & (c.lane_count - 1), 0, $5, l.route_id, l.committed_at, l.action, l.table_schema, l.table_name,
         l.record_pk, l.record, l.changes, l.metadata, true
  from sequin.log l
  where l.route_id = $3 and l.seq = $2
  on conflict (consumer_id, seq) do update
    set error = excluded.error, dead_at = clock_timestamp(), is_undecided = true, record = excluded.record
$$;

-- _feed for a consumer that chooses by expression. Where that cannot be evaluated the feed stays where it is, and says why.
create or replace function sequin._feed_decided(c sequin.consumer, last sequin.feed_progress, upto bigint, looked bigint)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
as $$
declare
  v_error text;
begin
  -- An error of the last time is tried again.
  if exists (select from sequin.consumer_error r where r.consumer_id = c.id) then
    delete from sequin.consumer_error r where r.consumer_id = c.id;
  end if;
  v_error := sequin._consumer_error(c);
  if v_error is not null then
    return 0;
  end if;
  begin
    with decided as materialized (
      select r.id as route_id, d.*
      from unnest(c.routes) r(id)
      cross join lateral sequin._decide(c, r.id, format('(select * from sequin.log l where l.seq > %s and l.seq <= %s) l', last.seq, upto)) d
    ), buried as materialized (
      select sequin._bury_undecided(c, d.seq, d.route_id, d.group_hash, d.error) from decided d where d.error is not null
    ), added as (
      insert into sequin.feed (feed_id, seq, route_id, group_hash, lane, record)
      select c.feed_id, d.seq, d.route_id, d.group_hash, d.group_hash & (c.lane_count - 1), d.record
      from decided d
      where d.error is null
      order by d.seq
      returning lane
    )
    insert into sequin.feed_progress (feed_id, step, seq, lanes, total)
    select c.feed_id, last.step + 1, upto, coalesce(bit_or(1::bigint << a.lane), 0), last.total + count(*)
    from added a
    where (select count(*) from buried) >= 0
    on conflict do nothing;
    if not found then
      raise serialization_failure using
        message = format('the feed of consumer "%s" is being written by another', c.name),
        hint = 'Try again.';
    end if;
    return looked;
  exception when object_not_in_prerequisite_state then
    v_error := sqlerrm;
  end;
  insert into sequin.consumer_error as r (consumer_id, error) values (c.id, v_error)
  on conflict (consumer_id) do update set error = excluded.error, failed_at = clock_timestamp();
  return 0;
end $$;

-- Evaluates filter and transform again on dead letters that they failed on, before a redrive: those that are chosen are
-- messages now; those that are not are gone; what fails again stays, with the new error.
create or replace function sequin._decide_again(c sequin.consumer, seqs bigint[])
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
-- Of a table that has just been filled the server expects a row or two, and would look through all for each.
set enable_nestloop = off
as $$
declare
  v_seqs bigint[];
  v_error text := sequin._consumer_error(c);
  v_route int;
begin
  for v_route, v_seqs in
    select d.route_id, array_agg(d.seq) from sequin.dead_letter d
    where d.consumer_id = c.id and d.is_undecided and (seqs is null or d.seq = any (seqs))
    group by d.route_id
    order by d.route_id
  loop
    if v_error is not null then
      raise object_not_in_prerequisite_state using
        message = format('consumer "%s": %s', c.name, v_error),
        hint = 'sequin.alter_consumer(name, filter => …, transform => …) gives it another; then redrive.';
    elsif c.filter is null and c.transform is null then
      update sequin.dead_letter d set is_undecided = false where d.consumer_id = c.id and d.seq = any (v_seqs);
      continue;
    end if;
    with decided as materialized (
      select * from sequin._decide(c, v_route, format(
        '(select l.* from unnest(%2$L::bigint[]) w(seq)'
        ' cross join lateral (select * from sequin.dead_letter l where l.consumer_id = %1$s and l.seq = w.seq offset 0) l offset 0) l',
        c.id, v_seqs))
    ), kept as (
      update sequin.dead_letter d
      set is_undecided = e.error is not null, error = coalesce(e.error, d.error),
          dead_at = case when e.error is not null then clock_timestamp() else d.dead_at end,
          record = case when e.error is null and c.transform is not null then e.record else d.record end
      from decided e
      where d.consumer_id = c.id and d.seq = e.seq
      returning d.seq
    )
    delete from sequin.dead_letter d
    where d.consumer_id = c.id and d.seq = any (array(select unnest(v_seqs) except select e.seq from decided e))
      and (select count(*) from kept) >= 0;
  end loop;
end $$;
