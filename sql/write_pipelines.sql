-- How pipelines write. Events and how far the pipeline has got are one transaction, and only one step can follow
-- another: each change is written once, whatever dies in between and however many bridges there are.

-- The table that a pipeline writes to. 42P01 where it is gone; one that was made anew under its name is taken, if it is
-- somebody's who may read the source table.
create or replace function sequin._event_table(p sequin.pipeline)
returns oid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_relation oid;
  v_owner oid;
  v_schema text;
  v_name text;
  v_problem record;
begin
  select c.oid, c.relowner, n.nspname, c.relname into v_relation, v_owner, v_schema, v_name
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  where c.oid = p.event_relation;
  if not found then
    select c.oid, c.relowner, n.nspname, c.relname into v_relation, v_owner, v_schema, v_name
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = p.event_schema and c.relname = p.event_name;
    if not found then
      raise undefined_table using
        message = format('event table %I.%I does not exist any more', p.event_schema, p.event_name),
        hint = sequin._event_table_sql(p.event_schema, p.event_name, p.retention is not null) || ';';
    elsif not pg_has_role(v_owner, current_user, 'usage') and not exists (
        select from sequin.source_table t
        join pg_class c on c.oid = t.relation_oid
        where t.id = p.table_id and has_table_privilege(v_owner, c.oid, 'select')
          and (not c.relrowsecurity or pg_has_role(v_owner, c.relowner, 'usage'))) then
      raise insufficient_privilege using
        message = format('event table %I.%I was made anew by %I, who may not read the source table', v_schema, v_name,
          pg_get_userbyid(v_owner)),
        hint = format('alter table %I.%I owner to %I;', v_schema, v_name, current_user);
    end if;
  end if;
  -- Text would take anything, and a view might; what else does not fit, the insert refuses.
  if v_relation <> p.event_relation
     or (select count(*) from pg_attribute a
         where a.attrelid = v_relation and a.attnum > 0
           and (a.attname, a.atttypid) in (select e.name, e.type::oid from sequin._event_columns() e)) < 12 then
    select * into v_problem from sequin._event_table_problem(v_relation, p.retention is not null, sequin._left_null(
      p.actions, (select t.relation_oid from sequin.source_table t where t.id = p.table_id)), p.name);
    if found then
      raise exception using errcode = v_problem.code, message = v_problem.message, hint = v_problem.hint;
    end if;
  end if;
  if (v_relation, v_schema, v_name) is distinct from (p.event_relation, p.event_schema, p.event_name) then
    update sequin.pipeline t set event_relation = v_relation, event_schema = v_schema, event_name = v_name where t.id = p.id;
  end if;
  return v_relation;
end $$;

-- Has nobody alter a pipeline's table until this transaction ends: what is looked at is what is written to. One that is not there,
-- or no table, is told later; and who may insert and nothing else cannot lock it before 16.
create or replace function sequin._lock_event_table(p sequin.pipeline)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_relation oid := coalesce(
    (select c.oid from pg_class c where c.oid = p.event_relation), to_regclass(format('%I.%I', p.event_schema, p.event_name)));
begin
  if has_table_privilege(v_relation, 'update, delete, truncate')
     and exists (select from pg_class c where c.oid = v_relation and c.relkind in ('r', 'p')) then
    execute format('lock table only %s in row exclusive mode', sequin._table_name(v_relation));
  end if;
exception when undefined_table then
  null; -- dropped in this moment
end $$;

-- Starts a pipeline, once the log has passed the moment it was made: as _start does a consumer.
create or replace function sequin._start_pipeline(p sequin.pipeline)
returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_start bigint;
begin
  if exists (select from sequin.pipeline_progress v where v.pipeline_id = p.id) then
    return true;
  end if;
  v_start := sequin._start_by_lsn(
    (select t.source_id from sequin.source_table t where t.id = p.table_id), array[p.table_id], p.start_base, p.start_lsn);
  if v_start is null then
    return false;
  end if;
  insert into sequin.pipeline_progress (pipeline_id, step, seq, passed, written)
  values (p.id, 1, v_start, sequin._total(p.table_id, v_start), 0)
  on conflict do nothing;
  return found;
end $$;

-- What a pipeline has to come to next: where it stands, the rows of the log from one seq to another, of which the first
-- is there; and where the log ends. step is null where there is nothing. One segment of the log at a time. Like the rest of what
-- is called for each few rows, it is in plpgsql, whose plans are kept.
create or replace function sequin._pipeline_next(
  p sequin.pipeline, max_rows bigint, out step bigint, out passed bigint, out written bigint, out from_seq bigint,
  out upto_seq bigint, out head_seq bigint, out head_total bigint
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
begin
  select v.step, v.passed, v.written, l.seq, least(g.last_seq, l.seq + max_rows - 1, (((l.seq >> 32) + 1) << 32) - 1), g.last_seq, y.total
    into step, passed, written, from_seq, upto_seq, head_seq, head_total
  from sequin.source_table t
  cross join lateral (
    select v.* from sequin.pipeline_progress v where v.pipeline_id = p.id order by v.step desc limit 1) v
  cross join lateral (
    select g.last_seq from sequin.progress g where g.source_id = t.source_id order by g.step desc limit 1) g
  cross join lateral (
    select l.seq from sequin.log l where l.route_id = p.table_id and l.seq > v.seq order by l.seq limit 1) l
  cross join lateral (
    select y.total from sequin.tally y where y.route_id = p.table_id order by y.seq desc limit 1) y
  where t.id = p.table_id;
end $$;

-- Of the log's rows between two seqs, those that a pipeline's filter lets through. 55000 where it cannot be evaluated any
-- more, 22023 where it fails on one.
create or replace function sequin._pipeline_filter(p sequin.pipeline, from_seq bigint, upto_seq bigint)
returns bigint[]
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  e sequin._expression;
  v_problem text;
  v_hint text := format('select sequin.alter_pipeline(%L, filter => …); gives it another.', p.name);
  v_chooser sequin.consumer;
  v_seqs bigint[];
  v_failed bigint;
begin
  select t.relation_oid, x.compiled, x.inlined, x.is_typed, x.is_whole, x.uses_new, x.uses_old, x.columns, x.types, x.others into e
  from sequin.pipeline_expression x
  join sequin.source_table t on t.id = p.table_id
  where x.pipeline_id = p.id;
  v_problem := sequin._expression_problem('filter', p.table_id, e);
  if v_problem is null and e.is_whole and not exists (select from pg_class k where k.oid = e.relation) then
    v_problem := 'filter: the table was dropped, and what its rows were is not known';
  end if;
  if v_problem is not null then
    raise object_not_in_prerequisite_state using message = format('pipeline "%s": %s', p.name, v_problem), hint = v_hint;
  end if;
  v_chooser.actions := p.actions;
  v_chooser.is_rows := false;
  begin
    select array_agg(d.seq) filter (where d.error is null), min(d.seq) filter (where d.error is not null),
           (array_agg(d.error order by d.seq) filter (where d.error is not null))[1]
      into v_seqs, v_failed, v_problem
    from sequin._evaluate(
      sequin._message_source(v_chooser, p.table_id, format('(select * from sequin.%I l where l.seq between %s and %s) l',
        'log_' || (from_seq >> 32), from_seq, upto_seq)), e, null) d;
  exception when object_not_in_prerequisite_state then
    raise object_not_in_prerequisite_state using message = format('pipeline "%s": filter: %s', p.name, sqlerrm), hint = v_hint;
  end;
  if v_failed is not null then
    raise invalid_parameter_value using
      message = format('pipeline "%s": change %s: %s', p.name, v_failed, v_problem), hint = v_hint;
  end if;
  return coalesce(v_seqs, '{}');
end $$;

-- Makes the partitions that some rows of the log have none in yet. Those that are there may be of another width, and so more
-- than one may be missing where one is for all: it is asked again what is.
create or replace function sequin._make_room(relation oid, width bigint, log text, route_id int, from_seq bigint, upto_seq bigint)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_first timestamptz;
  v_last timestamptz;
  v_times timestamptz[];
begin
  execute format('select min(l.committed_at), max(l.committed_at) from %s l where l.route_id = $1 and l.seq between $2 and $3', log)
    into v_first, v_last using route_id, from_seq, upto_seq;
  loop
    exit when exists (select from sequin._partitions(relation) p where v_first >= p.from_at and v_last < p.to_at);
    execute format(
      'select array_agg(b.at) from (select distinct on (floor(date_part(''epoch'', l.committed_at) / $4)) l.committed_at as at '
      'from %s l where l.route_id = $1 and l.seq between $2 and $3 and not exists ('
      'select from sequin._partitions($5) p where l.committed_at >= p.from_at and l.committed_at < p.to_at)) b', log)
      into v_times using route_id, from_seq, upto_seq, width, relation;
    exit when v_times is null;
    perform sequin._make_partitions(relation, width, v_times);
  end loop;
end $$;

create or replace function sequin.bridge_pipeline(pipeline_id int, max_rows bigint)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
declare
  p sequin.pipeline;
  v_table sequin.source_table;
  v_next record;
  v_relation oid;
  v_log text;
  v_seqs bigint[];
  v_count bigint;
begin
  if not pg_try_advisory_xact_lock(sequin._pipeline_key(pipeline_id)) then
    return false;
  end if;
  select * into p from sequin.pipeline t where t.id = pipeline_id;
  if p.id is null or p.paused_at is not null or not sequin._start_pipeline(p) then
    return false;
  end if;
  v_next := sequin._pipeline_next(p, max_rows);
  if v_next.step is null then
    return false;
  end if;
  select * into v_table from sequin.source_table t where t.id = p.table_id;
  perform sequin._lock_event_table(p);
  v_relation := sequin._event_table(p);
  perform sequin._check_event_rights(v_relation);
  v_log := format('sequin.%I', 'log_' || (v_next.from_seq >> 32));
  -- Without a retention, too: it may have had one, and a table that cannot take an event helps nobody.
  if p.retention is not null
     or sequin._is_by_time(v_relation) and exists (
          select from pg_partitioned_table t join pg_class k on k.oid = t.partrelid
          where t.partrelid = v_relation and t.partdefid = 0 and pg_has_role(current_user, k.relowner, 'usage')) then
    perform sequin._make_room(v_relation, sequin._partition_width(p.retention), v_log, p.table_id, v_next.from_seq, v_next.upto_seq);
  end if;

  if p.filter is not null then
    v_seqs := sequin._pipeline_filter(p, v_next.from_seq, v_next.upto_seq);
  end if;
  execute format($insert$
    insert into %s (seq, source_database_id, source_table_oid, source_table_schema, source_table_name, record_pk, record,
      changes, action, committed_at)
    select l.seq, $1, $2, l.table_schema, l.table_name, l.record_pk, l.record, l.changes,
      case l.action when 'i' then 'insert' when 'u' then 'update' when 'd' then 'delete' else 'truncate' end, l.committed_at
    from %s l
    where l.route_id = $3 and l.seq between $4 and $5 and l.action = any ($6)
      and %s
    order by l.seq $insert$, v_relation::regclass, v_log,
    case when p.filter is null then 'true' else 'l.seq in (select unnest($7))' end)
    using (select s.database_id from sequin.source s where s.id = v_table.source_id), v_table.relation_oid::bigint, p.table_id,
      v_next.from_seq, v_next.upto_seq, array(select left(a.action, 1)::"char" from unnest(p.actions) a(action)),
      v_seqs;
  get diagnostics v_count = row_count;

  insert into sequin.pipeline_progress (pipeline_id, step, seq, passed, written)
  values (
    p.id, v_next.step + 1, v_next.upto_seq,
    case when v_next.upto_seq = v_next.head_seq then v_next.head_total else least(v_next.passed + v_count, v_next.head_total) end,
    v_next.written + v_count)
  on conflict do nothing;
  if not found then
    raise serialization_failure using
      message = format('pipeline "%s" is being written by another', p.name),
      hint = 'Try again.';
  end if;
  -- What newer rows have replaced goes now and then, by number: no scan starts among the dead.
  if v_next.step % 256 = 0 then
    delete from sequin.pipeline_progress v
    where v.pipeline_id = p.id and v.step > v_next.step - 512 and v.step <= v_next.step - 256;
  end if;
  if p.error is not null then
    update sequin.pipeline t set error = null, error_code = null, error_hint = null, failed_at = null where t.id = p.id;
  end if;
  return v_next.upto_seq < v_next.head_seq;
end $$;
comment on function sequin.bridge_pipeline(int, bigint) is
'For the bridge: writes a pipeline''s next events, from at most max_rows rows of the log. Returns whether there may be more.
Whatever is wrong with the event table is an error here.';

-- A pipeline's failure, for its view and health(). What is wrong with the table is said in the table's own terms.
create or replace function sequin.bridge_pipeline_error(
  pipeline_id int, code text, error text, hint text, constraint_name text, is_retention boolean
)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '1s'
as $$
declare
  p sequin.pipeline;
  v_name text;
  v_problem record;
begin
  select * into p from sequin.pipeline t where t.id = pipeline_id;
  if is_retention then
    update sequin.pipeline t set retention_error = bridge_pipeline_error.error
    where t.id = p.id and t.retention_error is distinct from bridge_pipeline_error.error;
    return found;
  end if;
  if exists (select from pg_class c where c.oid = p.event_relation) then
    v_name := sequin._table_name(p.event_relation);
    select * into v_problem from sequin._event_table_problem(p.event_relation, p.retention is not null, sequin._left_null(
      p.actions, (select t.relation_oid from sequin.source_table t where t.id = p.table_id)), p.name);
    if found and code <> '55P03' then
      code := v_problem.code;
      error := v_problem.message;
      hint := v_problem.hint;
    end if;
  end if;
  hint := coalesce(nullif(hint, ''), case
    when code = '55P03' then format('Somebody has it locked: select pid, mode from pg_locks where relation = %L::regclass;', v_name)
    when code = '23514' and constraint_name = '' then format('Make a partition for it: create table … partition of %s …;', v_name)
    when constraint_name <> '' then format('A constraint of the table''s own: alter table %s drop constraint %I;', v_name, constraint_name)
    when code = '57014' then 'It took too long: look at the table''s triggers.'
    else 'The table, its triggers or rights of yours: what it says.' end
    || format(' It is tried again by itself, and at once after select sequin.resume_pipeline(%L);', p.name));
  update sequin.pipeline t
  set error = bridge_pipeline_error.error, error_code = code, error_hint = hint, failed_at = clock_timestamp()
  where t.id = p.id and (t.error, t.error_code, t.error_hint) is distinct from (bridge_pipeline_error.error, code, hint);
  return found;
end $$;
comment on function sequin.bridge_pipeline_error(int, text, text, text, text, boolean) is
'For the bridge: why a pipeline does not go on, or (is_retention) why its old partitions are not dropped; null: they are.
Returns whether that is new.';

-- The pipelines of a source.
create or replace function sequin.bridge_pipelines(source_id int)
returns table (
  pipeline_id int, route_id int, is_paused boolean, has_retention boolean, changed_at timestamptz, is_behind boolean,
  name text
)
language plpgsql
stable
security definer
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
begin
  return query
    select p.id, p.table_id, p.paused_at is not null, p.retention is not null, p.changed_at,
           v.seq is null or exists (select from sequin.log l where l.route_id = p.table_id and l.seq > v.seq),
           p.name
    from sequin.pipeline p
    join sequin.source_table t on t.id = p.table_id and t.source_id = bridge_pipelines.source_id
    left join lateral (
      select v.seq from sequin.pipeline_progress v where v.pipeline_id = p.id order by v.step desc limit 1) v on true
    order by p.id;
end $$;
comment on function sequin.bridge_pipelines(int) is
'For the bridge, every second: the pipelines to write for, and whether there is something to write.';

-- Drops partitions of an event table that hold nothing within the retention, and makes those that come next. How many
-- were dropped. A lock that is not had at once is not waited for: the next call tries again.
create or replace function sequin.bridge_pipeline_retain(pipeline_id int)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
  p sequin.pipeline;
  v_void text;
  v_relation oid;
  v_partition oid;
  v_width bigint;
  v_count bigint := 0;
begin
  v_void := pg_advisory_xact_lock(sequin._pipeline_key(pipeline_id));
  select * into p from sequin.pipeline t where t.id = pipeline_id;
  if p.retention is null then
    return 0;
  end if;
  v_relation := sequin._event_table(p);
  perform sequin._check_event_rights(v_relation);
  v_width := sequin._partition_width(p.retention);
  if v_width >= 60 then
    perform sequin._make_partitions(v_relation, v_width, array[now(), now() + make_interval(secs => v_width)]);
  end if;
  for v_partition in
    select o.partition from sequin._partitions(v_relation) o where o.to_at <= now() - p.retention order by o.to_at
  loop
    execute format('drop table %s', sequin._table_name(v_partition));
    v_count := v_count + 1;
  end loop;
  return v_count;
end $$;
comment on function sequin.bridge_pipeline_retain(int) is
'For the bridge, every few seconds: drops the old partitions of a pipeline''s event table. Returns how many.';

-- The seq up to which a pipeline needs nothing of the log any more.
create or replace function sequin._pipeline_position(p sequin.pipeline)
returns bigint
language sql
stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
  select case
    when v.seq is null then p.start_base
    when exists (select from sequin.log l where l.route_id = p.table_id and l.seq > v.seq) then v.seq
    else (
      select g.last_seq from sequin.source_table t
      cross join lateral (
        select g.last_seq from sequin.progress g where g.source_id = t.source_id order by g.step desc limit 1) g
      where t.id = p.table_id)
  end
  from (select) one
  left join lateral (
    select v.seq from sequin.pipeline_progress v where v.pipeline_id = p.id order by v.step desc limit 1) v on true
$$;

-- Moves a pipeline past a seq that is about to be dropped, and puts the loss on record.
create or replace function sequin._skip_pipeline(p sequin.pipeline, upto bigint, reason text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
  v_void text;
  v_last sequin.pipeline_progress;
  v_passed bigint;
  v_lost bigint;
begin
  v_void := pg_advisory_xact_lock(sequin._pipeline_key(p.id));
  -- One that was paused before it could start, or fails with its first event, loses what there is for it, too.
  if not sequin._start_pipeline(p) then
    update sequin.pipeline t set start_base = upto where t.id = p.id and t.start_base < upto;
    return;
  end if;
  select * into v_last from sequin.pipeline_progress v where v.pipeline_id = p.id order by v.step desc limit 1;
  select count(*), count(*) filter (where sequin._action(l.action) = any (p.actions) and l.action <> 'x') into v_passed, v_lost
  from sequin.log l
  where l.route_id = p.table_id and l.seq > v_last.seq and l.seq <= upto;
  if v_passed = 0 then
    return;
  end if;
  insert into sequin.pipeline_progress (pipeline_id, step, seq, passed, written)
  values (p.id, v_last.step + 1, upto, v_last.passed + v_passed, v_last.written);
  insert into sequin.gap (source_id, pipeline_id, from_seq, to_seq, reason)
  select t.source_id, p.id, v_last.seq + 1, upto, reason from sequin.source_table t where t.id = p.table_id and v_lost > 0;
end $$;
