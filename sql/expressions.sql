-- Expressions of users': filters and transforms, from text to something that may be evaluated.
--
-- An expression is parsed by the server, as its author: _parse, which is not a definer, makes a temporary view of it,
-- and names in it resolve as the author sees them. Parsing may run code (the text of a literal goes through the input
-- function of its type, and a domain's checks with it), so that it has the author's rights and no more.
--
-- _compile then reads the view's parse tree, as the server keeps it, and lets through what cannot run anything but the
-- system's and trusted extensions' C functions: evaluation has the rights of the schema's owner. What the server prints
-- for the expression, with every name qualified, is what is kept. Columns are given as types that nobody can change
-- under it: a domain as what it is over, a composite as its text.

-- 42601, with the position, unless a text can be put between parentheses and stay there.
create or replace function sequin._check_expression(label text, is_far boolean, expression text)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_token record;
  v_open int[] := '{}';
  v_depth int := 0;
  v_count int := 0;
  v_problem text;
begin
  if length(expression) > 100000 then
    raise invalid_parameter_value using
      message = format('%s is %s characters long', label, length(expression)),
      hint = 'At most 100000: compare with a table of your own where the messages are received.';
  end if;
  begin
    for v_token in select * from sequin._tokens(expression) loop
      v_count := v_count + 1;
      if v_token.kind in ('name', 'quoted') and v_token.token like '\_sequin%' then
        raise undefined_column using
          message = format('%s: there is no %s, at position %s', label, v_token.token, v_token.place),
          hint = 'The names there are: new, old, action, table_name and committed_at.';
      elsif v_token.kind <> 'other' then
        continue;
      elsif v_token.token = ';' then
        v_problem := format('syntax error at or near ";" at position %s', v_token.place);
      elsif v_token.token = '(' then
        v_depth := v_depth + 1;
        v_open[v_depth] := v_token.place;
        if v_depth > 1000 then
          v_problem := format('1000 parentheses in each other at position %s', v_token.place);
        end if;
      elsif v_token.token = ')' and v_depth = 0 then
        v_problem := format('a parenthesis that was not opened at position %s', v_token.place);
      elsif v_token.token = ')' then
        v_depth := v_depth - 1;
      end if;
      exit when v_problem is not null;
    end loop;
    if v_problem is null and v_depth > 0 then
      v_problem := format('a parenthesis that is not closed at position %s', v_open[v_depth]);
    elsif v_count = 0 then
      v_problem := 'nothing there';
    end if;
  exception when syntax_error then
    v_problem := sqlerrm;
  end;
  if v_problem is not null then
    raise syntax_error using
      message = format('%s: %s', label, v_problem),
      detail = coalesce(nullif(left(expression, 200), ''), 'The text is empty.'),
      hint = sequin._expression_hint(is_far);
  end if;
end $$;

-- How the two kinds of expression are written down: a filter is true or it is not; null counts as not.
create or replace function sequin._as_value(kind text, expression text)
returns text
language sql
immutable
as $$
  select pg_catalog.format(E'(\n%s\n)', expression) || case when kind = 'filter' then ' is true' else '' end
$$;

-- The statements that _parse runs: one for each relation, null for one that is gone.
create or replace function sequin._parse_statements(label text, relations oid[], kind text, expression text)
returns text[]
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform sequin._check_expression(label, 0 = any (relations), expression);
  return array(
    select case when r.oid = 0 or exists (select from pg_class c where c.oid = r.oid) then
             format('create temporary view %I as /* %s */ %s', '_sequin_' || kind || '_' || r.position,
               translate(label, '*/', ''), sequin._probe(r.oid, sequin._as_value(kind, expression)))
           end
    from unnest(relations) with ordinality r(oid, position)
    order by r.position);
end $$;

-- Parses an expression ('filter' or 'transform') for tables, as the caller: temporary views, for _compile to look at
-- and drop. label begins every message: consumer "x": filter. A relation of 0 is a table of another database, where new
-- and old are jsonb. Null without an expression. What the server says of an error has its position, and the text.
create or replace function sequin._parse(label text, relations oid[], kind text, expression text)
returns oid[]
language plpgsql
-- But for its names, and the dates and times in it, which are its author's, a text means one thing, whoever that is.
set standard_conforming_strings = on
set transform_null_equals = off
set array_nulls = on
set xmloption = content
as $$
-- Not a definer and no search_path of its own: names resolve as the caller sees them.
declare
  v_statements text[];
  v_views pg_catalog.oid[] := '{}';
  v_name text;
  v_code pg_catalog.text;
  v_message pg_catalog.text;
  v_hint text;
  v_place pg_catalog.int4;
begin
  if expression is null then
    return null;
  end if;
  v_statements := sequin._parse_statements(label, relations, kind, expression);
  for v_i in 1..pg_catalog.cardinality(v_statements) loop
    if v_statements[v_i] is null then
      v_views := pg_catalog.array_append(v_views, null);
      continue;
    end if;
    v_name := pg_catalog.concat('_sequin_', kind, '_', v_i);
    perform sequin._drop_views(array[pg_catalog.to_regclass(pg_catalog.concat('pg_temp.', v_name))::pg_catalog.oid]);
    begin
      execute v_statements[v_i];
    exception when others then
      get stacked diagnostics v_hint = pg_exception_hint;
      v_code := sqlstate;
      v_message := sqlerrm;
      v_place := case when v_code operator(pg_catalog.=) '42601' then sequin._syntax_place(expression) end;
      perform sequin._explain_error(
        case when v_place is null then sequin._label_of(label, relations, v_i) else label end,
        relations[v_i] operator(pg_catalog.=) 0::pg_catalog.oid, expression, v_place, v_code, v_message, v_hint);
      raise;
    end;
    v_views := pg_catalog.array_append(v_views, pg_catalog.to_regclass(pg_catalog.concat('pg_temp.', v_name))::pg_catalog.oid);
  end loop;
  return v_views;
end $$;

-- Drops what _parse has made.
create or replace function sequin._drop_views(views oid[])
returns void
language plpgsql
as $$
begin
  for v_i in 1..coalesce(pg_catalog.cardinality(views), 0) loop
    if views[v_i] is not null then
      execute pg_catalog.format('drop view %s', views[v_i]::pg_catalog.regclass);
    end if;
  end loop;
end $$;

-- Has a compiled expression read columns straight from the message, where that is the same: as text, cast to the
-- column's type. It costs half of what it takes to make a row of them first. An array, whose JSON its type does not
-- read, and the row as a whole stay columns of a row; the row as jsonb is the message itself.
create or replace function sequin._inline(compiled text, columns text[], types text[])
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_inlined text := compiled;
  v_token record;
  v_type text;
begin
  for v_token in
    select *
    from (
      select t.*, lag(t.token) over w as before, lag(t.token, 2) over w as function, lag(t.token, 3) over w as dot_before,
             lag(t.place, 2) over w as function_place, lead(t.token) over w as dot, lead(t.token, 2) over w as name,
             lead(t.kind, 2) over w as name_kind, lead(t.token, 3) over w as after, lead(t.place, 3) over w as after_place, lead(t.place, 2) over w as name_place
      from sequin._tokens(compiled) t
      window w as (order by t.place)) n
    where n.kind = 'name' and n.token in ('new', 'old') and n.dot = '.' and n.before is distinct from '.'
    order by n.place desc
  loop
    -- A column may be called *, in quotes.
    if v_token.name = '*' and v_token.name_kind = 'other' then
      if v_token.function = 'to_jsonb' and v_token.before = '(' and v_token.after = ')' and v_token.dot_before is distinct from '.' then
        v_inlined := overlay(v_inlined placing format('_sequin_m.%s_record', v_token.token)
          from v_token.function_place for v_token.after_place + 1 - v_token.function_place);
      end if;
      continue;
    end if;
    v_type := types[array_position(columns, v_token.name)];
    continue when v_type is null or v_type like '%[]';
    v_inlined := overlay(v_inlined placing case
        -- As types: versions differ in which names they quote.
        when to_regtype(v_type) in ('json'::regtype, 'jsonb'::regtype) then
          format('(nullif(_sequin_m.%s_record -> %L, ''null'')::%s)', v_token.token, v_token.name, v_type)
        else format('((_sequin_m.%s_record ->> %L)::%s)', v_token.token, v_token.name, v_type) end
      from v_token.place for v_token.name_place + length(quote_ident(v_token.name)) - v_token.place);
  end loop;
  return v_inlined;
end $$;

-- An expression that was parsed, for one table: what there is to evaluate.
do $$
begin
  if to_regtype('sequin._expression') is null then
    create type sequin._expression as (
      relation oid, compiled text, inlined text, is_typed boolean, is_whole boolean, uses_new boolean, uses_old boolean,
      columns text[], types text[], others text[]);
  end if;
end $$;

-- Checks what _parse has made of an expression and compiles it, a row for each relation that is there. The caller of
-- both drops the views, with _drop_views. Errors: 42601 what is no plain expression, 42804 another type than the kind's, 42501 a function that the
-- caller may not execute.
create or replace function sequin._compile(label text, relations oid[], kind text, expression text, views oid[])
returns setof sequin._expression
language plpgsql
set search_path = pg_catalog, pg_temp
-- What is printed here is read under _evaluate's settings.
set standard_conforming_strings = on
set quote_all_identifiers = off
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set intervalstyle = 'postgres'
set extra_float_digits = 1
set bytea_output = 'hex'
set lc_monetary = 'C'
as $$
declare
  e sequin._expression;
  v_frame oid;
  v_frame_tree text;
  v_frame_def text;
  v_known text;
  v_tree text;
  v_def text;
  v_prefix text;
  v_suffix text;
  v_type oid;
  v_token record;
  v_label text;
  v_name text;
begin
  perform sequin._check_expression(label, 0 = any (relations), expression);
  if not has_database_privilege(current_database(), 'temporary') then
    raise insufficient_privilege using
      message = format('%s: it is checked by a temporary view, and role "%s" may not make one', label, current_user),
      hint = format('grant temporary on database %I to %I;', current_database(), current_user);
  end if;
  if cardinality(views) is distinct from cardinality(relations) then
    raise invalid_parameter_value using
      message = format('%s: it was not parsed for this stream', label),
      hint = 'Call sequin.create_consumer or sequin.alter_consumer.';
  end if;
  for v_i in 1..coalesce(cardinality(relations), 0) loop
    continue when views[v_i] is null;
    if not exists (select from pg_class c where c.oid = views[v_i] and c.relkind = 'v' and c.relpersistence = 't') then
      raise invalid_parameter_value using
        message = format('%s: it was not parsed for this stream', label),
        hint = 'Call sequin.create_consumer or sequin.alter_consumer.';
    end if;
    e := null;
    v_label := sequin._label_of(label, relations, v_i);
    e.relation := relations[v_i];
    e.is_typed := e.relation <> 0;

    -- The same with a known value in the expression's place: what is the same on both sides of it is the frame.
    v_known := case when kind = 'filter' then 'false' else '''"_sequin"''::pg_catalog.jsonb' end;
    execute format('create temporary view _sequin_frame as %s', sequin._probe(e.relation, sequin._as_value(kind, v_known)));
    v_frame := 'pg_temp._sequin_frame'::regclass;
    select r.ev_action::text, pg_get_viewdef(v_frame) into v_frame_tree, v_frame_def
    from pg_rewrite r where r.ev_class = v_frame and r.rulename = '_RETURN';
    select r.ev_action::text, pg_get_viewdef(views[v_i]) into v_tree, v_def
    from pg_rewrite r where r.ev_class = views[v_i] and r.rulename = '_RETURN';
    execute 'drop view pg_temp._sequin_frame';
    v_known := case when kind = 'filter' then '(false IS TRUE)' else '''"_sequin"''::jsonb' end;
    v_suffix := substr(v_frame_def, strpos(v_frame_def, v_known) + length(v_known));
    -- What begins on a line of its own, as CASE does, takes the space before it away.
    v_prefix := rtrim(left(v_frame_def, strpos(v_frame_def, v_known) - 1));

    e.others := sequin._check_tree(v_label, kind, expression, v_tree, v_frame_tree);
    if length(v_prefix) = 0 or left(v_def, length(v_prefix)) <> v_prefix or right(v_def, length(v_suffix)) <> v_suffix
       or length(v_def) <= length(v_prefix) + length(v_suffix) then
      raise syntax_error using
        message = format('%s: it is not one expression at position 1', v_label),
        hint = sequin._expression_hint(not e.is_typed);
    end if;
    e.compiled := btrim(substr(v_def, length(v_prefix) + 1, length(v_def) - length(v_prefix) - length(v_suffix)), e' \n');
    -- However they were written: what it is read from has other names when it is evaluated.
    select t.token into v_name
    from sequin._tokens(e.compiled) t where t.kind in ('name', 'quoted') and t.token like '\_sequin\_%' limit 1;
    if found then
      raise undefined_column using
        message = format('%s: there is no %s at position %s', v_label, v_name, coalesce(sequin._name_place(expression, v_name, false), 1)),
        hint = 'The names there are: new, old, action, table_name and committed_at.';
    end if;
    select a.atttypid into v_type from pg_attribute a where a.attrelid = views[v_i] and a.attnum = 1;
    if kind = 'transform' and v_type = 'json'::regtype then
      e.compiled := format('(%s)::jsonb', e.compiled);
    elsif v_type <> (case when kind = 'filter' then 'boolean' else 'jsonb' end)::regtype then
      raise datatype_mismatch using
        message = format('%s: it is of type %s, and not jsonb at position 1', v_label, format_type(v_type, -1)),
        hint = 'jsonb_build_object(''id'', new.id), to_jsonb(new), or a cast: (…)::jsonb.';
    end if;

    -- new and old may go by another name in what was printed: versions before 16 have those in every view.
    e.is_whole := false;
    e.uses_new := not e.is_typed;
    e.uses_old := not e.is_typed;
    e.columns := '{}';
    for v_token in
      select n.place, n.token, n.name, n.name_kind, left(n.token, 3) as alias
      from (
        select t.place, t.token, t.kind, lead(t.token) over w as dot, lag(t.token) over w as before, lead(t.token, 2) over w as name,
               lead(t.kind, 2) over w as name_kind
        from sequin._tokens(e.compiled) t
        window w as (order by t.place)) n
      where e.is_typed and n.kind = 'name' and n.dot = '.' and n.before is distinct from '.' and n.token in (
        substring(v_frame_def from 'jsonb_to_record\([^()]*\) (?:AS )?(new[_0-9]*)\('),
        substring(v_frame_def from 'jsonb_to_record\([^()]*\) (?:AS )?(old[_0-9]*)\('))
      order by n.place desc
    loop
      e.uses_new := e.uses_new or v_token.alias = 'new';
      e.uses_old := e.uses_old or v_token.alias = 'old';
      if (v_token.name <> '*' or v_token.name_kind <> 'other') and not v_token.name = any (e.columns) then
        e.columns := e.columns || v_token.name;
      end if;
      e.compiled := overlay(e.compiled placing v_token.alias from v_token.place for length(v_token.token));
    end loop;
    select coalesce(array_agg(k.name order by k.attnum), '{}'), coalesce(array_agg(sequin._type_name(k.type) order by k.attnum), '{}'),
           array(select unnest(e.others) union
                 select format('type %s', sequin._type_name(k.type)) from sequin._expression_columns(e.relation) k
                 where k.name = any (e.columns) and k.type >= 16384
                 order by 1)
      into e.columns, e.types, e.others
    from sequin._expression_columns(e.relation) k
    where k.name = any (e.columns);
    e.inlined := e.compiled;
    if e.is_typed then
      e.inlined := sequin._inline(e.compiled, e.columns, e.types);
      e.is_whole := exists (
        select from (
          select t.token, t.kind, lead(t.token) over w as dot, lag(t.token) over w as before, lead(t.token, 2) over w as name,
                 lead(t.kind, 2) over w as name_kind
          from sequin._tokens(e.inlined) t
          window w as (order by t.place)) n
        where n.kind = 'name' and n.token in ('new', 'old') and n.dot = '.' and n.name = '*' and n.name_kind = 'other'
          and n.before is distinct from '.');
    end if;
    -- Planned without a message: what is wrong whatever the message, is wrong now.
    perform sequin._rehearse(v_label, e, kind);
    return next e;
  end loop;
end $$;

-- What is stored was made by an earlier version of this, or of the server. Where a column is called *, the row may be needed now.
do $$
begin
  update sequin.consumer_expression e
  set inlined = sequin._inline(e.compiled, e.columns, e.types), is_whole = e.is_whole or e.compiled like '%"*"%'
  where e.is_typed and e.inlined <> sequin._inline(e.compiled, e.columns, e.types);
  update sequin.pipeline_expression e
  set inlined = sequin._inline(e.compiled, e.columns, e.types), is_whole = e.is_whole or e.compiled like '%"*"%'
  where e.is_typed and e.inlined <> sequin._inline(e.compiled, e.columns, e.types);
end $$;
