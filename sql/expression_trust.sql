-- What an expression may run: evaluation has the rights of the schema's owner.

-- What of the system's functions that are not immutable an expression may call: they depend on the time, or on
-- settings such as the time zone, which are the same for every evaluation. Others read the catalog, the statistics,
-- settings, or, as text, whole queries.
create or replace function sequin._is_harmless(name text)
returns boolean
language sql
immutable
as $$
  select $1 operator(pg_catalog.~) ('^(age|anytextcat|textanycat|array_to_json|array_to_string|concat|concat_ws|convert|convert_from|'
    'convert_to|date|date_(add|subtract|part|trunc)|(date|timestamp|timestamptz)_(cmp|eq|ge|gt|le|lt|ne|mi|pl)_[a-z]+|'
    'enum_(first|last|range)|extract|format|interval_pl_timestamptz|jsonb?_build_(array|object)|jsonb?_to_tsvector|'
    'jsonb_path_[a-z_]+_tz|jsonb_to_record|length|make_timestamptz|money|now|numeric|overlaps|phraseto_tsquery|plainto_tsquery|'
    'websearch_to_tsquery|to_tsquery|to_tsvector|quote_literal|quote_nullable|row_to_json|statement_timestamp|'
    'transaction_timestamp|time|timetz|timestamp|timestamptz|timezone|to_char|to_date|to_json|to_jsonb|to_number|to_timestamp|'
    'xml|xml_is_well_formed)$')
$$;

-- A system of one's own is trusted with what it runs: an extension of a superuser's, or of this schema's owner.
create or replace function sequin._is_trusted(class regclass, object oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select exists (
    select from pg_depend d
    join pg_extension e on e.oid = d.refobjid
    join pg_roles r on r.oid = e.extowner
    where d.classid = class and d.objid = object and d.refclassid = 'pg_extension'::regclass and d.deptype = 'e'
      and (r.rolsuper or r.rolname = current_user))
    and exists (
      select from pg_namespace n
      where sequin._is_trusted_owner(n.nspowner) and n.oid = case class
        when 'pg_proc'::regclass then (select p.pronamespace from pg_proc p where p.oid = object)
        else (select o.oprnamespace from pg_operator o where o.oid = object) end)
$$;

-- Whether a function, operator or type of others' may still be in an expression, by the name that _check_tree gave it:
-- asked before each evaluation, as names may come to mean something else.
create or replace function sequin._is_as_checked(name text)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
  select coalesce(case split_part(name, ' ', 1)
    -- Their names are compared, not looked up: where one of their types is gone, that is an error before 16.
    when 'function' then (
      select sequin._is_trusted('pg_proc', p.oid) and p.provolatile <> 'v'
      from pg_proc p
      where p.oid >= 16384 and strpos(name, p.proname) > 0 and p.oid::regprocedure::text = substr(name, 10))
    when 'operator' then (
      select sequin._is_trusted('pg_operator', o.oid)
      from pg_operator o where o.oid >= 16384 and strpos(name, o.oprname) > 0 and o.oid::regoperator::text = substr(name, 10))
    else to_regtype(substr(name, 6)) = sequin._plain_type(to_regtype(substr(name, 6)))
  end, false)
$$;

-- Refuses an expression whose parse tree has something in it that a filter or transform may not have. Returns which
-- types, functions and operators that are not the system's are in it. frame is the tree of another expression in its
-- place: what is in both as often is not the expression's.
create or replace function sequin._check_tree(label text, kind text, expression text, tree text, frame text)
returns text[]
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  -- The nodes of scalar expressions, as the server's versions call them.
  v_nodes constant text[] := '{VAR,CONST,FUNCEXPR,NAMEDARGEXPR,OPEXPR,DISTINCTEXPR,NULLIFEXPR,SCALARARRAYOPEXPR,BOOLEXPR,RELABELTYPE,
    COERCEVIAIO,ARRAYCOERCEEXPR,COLLATE,COLLATEEXPR,CASE,CASEEXPR,WHEN,CASEWHEN,CASETESTEXPR,ARRAY,ARRAYEXPR,ROW,ROWEXPR,ROWCOMPARE,
    ROWCOMPAREEXPR,COALESCE,COALESCEEXPR,MINMAX,MINMAXEXPR,SQLVALUEFUNCTION,XMLEXPR,NULLTEST,BOOLEANTEST,FIELDSELECT,
    SUBSCRIPTINGREF,JSONCONSTRUCTOREXPR,JSONISPREDICATE,JSONVALUEEXPR,JSONFORMAT,JSONRETURNING,JSONEXPR,JSONBEHAVIOR}';
  v_node text;
  v_problem text;
  v_names text[] := '{}';
  v_hint text := 'It is one expression over one message: make a stream of the other table, or look it up where messages are received.';
  f record;
begin
  for v_node in
    select n.node
    from (
      select (regexp_matches(tree, '(?:^|[^\\]){([A-Z]+)', 'g'))[1] as node) n
    where n.node <> all (v_nodes) and n.node <> all (array(select (regexp_matches(frame, '(?:^|[^\\]){([A-Z]+)', 'g'))[1]))
    order by n.node <> 'SUBLINK', n.node <> 'WINDOWFUNC', n.node
  loop
    v_problem := case
      when v_node = 'SUBLINK' then 'a subquery' || sequin._at_position(expression, '{select,values,table,with}')
      when v_node in ('AGGREF', 'GROUPINGFUNC', 'WINDOWFUNC') then
        case when v_node = 'WINDOWFUNC' then 'a window function' else 'an aggregate function' end || coalesce((
          select format(': %s', p.proname) || sequin._at_position(expression, array[p.proname::text]) from pg_proc p
          where p.oid = substring(tree from ':(?:aggfnoid|winfnoid) (\d+)')::oid), '')
      when v_node like 'COERCETODOMAIN%' then 'a cast to a domain' || (
        select sequin._at_position(expression, array_agg(t.typname::text)) from pg_type t where t.typtype = 'd')
      else format('something that is not an expression (%s)', lower(v_node))
    end;
    if v_node like 'COERCETODOMAIN%' then
      v_hint := 'A domain''s checks would run with other rights than its author''s: cast to the type it is over.';
    end if;
    exit;
  end loop;
  if v_problem is null
     and (select count(*) from regexp_matches(tree, '{(QUERY|RTE|RANGETBLENTRY|TARGETENTRY) ', 'g'))
      <> (select count(*) from regexp_matches(frame, '{(QUERY|RTE|RANGETBLENTRY|TARGETENTRY) ', 'g')) then
    v_problem := 'more than one expression';
  end if;

  if v_problem is null then
    for f in
      select p.oid, p.proname, p.provolatile, p.proretset, p.prokind, l.lanname,
             p.pronamespace = 'pg_catalog'::regnamespace as is_system
      from pg_proc p
      join pg_language l on l.oid = p.prolang
      where p.oid in (
        select m[1]::oid from regexp_matches(tree, ':(?:funcid|opfuncid) (\d+)', 'g') m
        union
        select o.oprcode from pg_operator o
        where o.oid in (
          select m[1]::oid from regexp_matches(tree, ':opno (\d+)', 'g') m
          union
          select unnest(string_to_array(m[1], ' '))::oid from regexp_matches(tree, ':opnos \(o ([\d ]+)\)', 'g') m))
      order by p.oid
    loop
      if f.proretset then
        v_problem := 'a set-returning function: ' || f.proname;
      elsif f.provolatile = 'v' then
        v_problem := 'a volatile function: ' || f.proname;
        v_hint := 'A filter decides once per message, and must say the same whenever it is asked: use columns, and immutable or stable functions.';
      elsif not f.is_system and not (sequin._is_trusted('pg_proc', f.oid) and f.lanname in ('c', 'internal')) then
        v_problem := 'a function of its own: ' || f.proname;
        v_hint := 'It would run with other rights than its author''s. Write what it does as an expression, or call it where messages are received.';
      elsif f.is_system and f.provolatile <> 'i' and not sequin._is_harmless(f.proname) then
        v_problem := format('%s, which looks at more than the message', f.proname);
        v_hint := 'A filter sees new, old, action, table_name and committed_at.';
      elsif not has_function_privilege(sequin._caller(), f.oid, 'execute') then
        raise insufficient_privilege using
          message = format('%s: role "%s" may not execute %s', label, sequin._caller(), f.oid::regprocedure),
          hint = format('grant execute on function %s to %I;', f.oid::regprocedure, sequin._caller());
      end if;
      if v_problem is not null then
        v_problem := v_problem || sequin._at_position(expression, array[f.proname::text]);
        exit;
      end if;
    end loop;
  end if;

  if v_problem is null then
    for f in
      select o.oid, o.oprname
      from pg_operator o
      where o.oid in (
          select m[1]::oid from regexp_matches(tree, ':opno (\d+)', 'g') m
          union
          select unnest(string_to_array(m[1], ' '))::oid from regexp_matches(tree, ':opnos \(o ([\d ]+)\)', 'g') m)
        and o.oprnamespace <> 'pg_catalog'::regnamespace and not sequin._is_trusted('pg_operator', o.oid)
    loop
      v_problem := format('an operator of its own: %s', f.oid::regoperator) || sequin._at_position(expression, array[f.oprname::text]);
      v_hint := 'It would run with other rights than its author''s. Call what it calls, or use the system''s operators.';
      exit;
    end loop;
  end if;

  -- What the server prints without saying whose operator it is: read again, it would be the system's, of other types.
  if v_problem is null then
    for f in
      select o.oid::regoperator as operator, n.what, coalesce(n.word, left(o.oprname, 1)) as word
      from (
        select 'is distinct from' as what, 'distinct' as word, m[1]::oid as oid from regexp_matches(tree, '{DISTINCTEXPR :opno (\d+)', 'g') m
        union all
        select 'nullif', 'nullif', m[1]::oid from regexp_matches(tree, '{NULLIFEXPR :opno (\d+)', 'g') m
        union all
        select 'a case with a value', 'case', m[1]::oid
        from regexp_matches(tree, '{(?:CASE)?WHEN :expr {OPEXPR :opno (\d+)[^{}]*(?:{(?:RELABELTYPE|FUNCEXPR|COERCEVIAIO) [^{}]*)*{CASETESTEXPR', 'g') m
        union all
        select 'a comparison of rows', null, unnest(string_to_array(m[1], ' '))::oid from regexp_matches(tree, ':opnos \(o ([\d ]+)\)', 'g') m) n
      join pg_operator o on o.oid = n.oid
      where o.oprnamespace <> 'pg_catalog'::regnamespace
    loop
      v_problem := format('%s with an operator that is not the system''s: %s', f.what, f.operator) || sequin._at_position(expression, array[f.word]);
      v_hint := 'Compare with =, as in (new.email = old.email) is not true.';
      exit;
    end loop;
  end if;

  if v_problem is null then
    for f in
      select t.oid, t.typname
      from pg_type t
      where t.oid in (
          select m[1]::oid from regexp_matches(tree, ':[a-z_]*type(?:id)? (\d+)', 'g') m)
        and t.oid >= 16384 and sequin._plain_type(t.oid) <> t.oid
    loop
      v_problem := format('a value of type %s', f.oid::regtype) || sequin._at_position(expression, array[f.typname::text]);
      v_hint := 'Its checks or casts would run with other rights than its author''s. Use the type it is made from.';
      exit;
    end loop;
  end if;

  if v_problem is not null then
    raise syntax_error using
      message = format('%s: it has %s', label, v_problem) || case when v_problem ~ ' at position \d+$' then '' else ' at position 1' end,
      hint = v_hint;
  end if;

  return array(
    select format('function %s', p.oid::regprocedure)
    from pg_proc p
    where p.oid >= 16384 and p.oid in (select m[1]::oid from regexp_matches(tree, ':(?:funcid|opfuncid) (\d+)', 'g') m)
    union
    select format('operator %s', o.oid::regoperator)
    from pg_operator o
    where o.oid >= 16384 and o.oid in (select m[1]::oid from regexp_matches(tree, ':opno (\d+)', 'g') m)
    union
    select format('type %s', sequin._type_name(t.oid))
    from (
      select n.oid, sum(n.n)
      from (
        select m[1]::oid as oid, 1 as n from regexp_matches(tree, ':[a-z_]*type(?:id)? (\d+)', 'g') m
        union all
        select m[1]::oid, -1 from regexp_matches(frame, ':[a-z_]*type(?:id)? (\d+)', 'g') m) n
      group by n.oid
      having sum(n.n) > 0) n
    join pg_type t on t.oid = n.oid
    where t.oid >= 16384);
end $$;
