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

drop function if exists sequin._check_expression(text, text), sequin._explain_error(text, text, text, text, text);

-- The tokens of an expression: where each begins, and what it is (a string, a quoted or plain name, a number, or another
-- character). Plain names are in lower case. 42601 for what never ends.
create or replace function sequin._tokens(expression text)
returns table (place int, kind text, token text)
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $body$
declare
  -- Of a name: a letter, or whatever is not ASCII.
  v_letter constant text := '[^\u0001-\u0040\u005b-\u005e\u0060\u007b-\u007f]';
  r record;
  v_in text := '';        -- what it is inside of: a quote (e for one with backslashes), --, /*, or a dollar quote
  v_depth int := 0;       -- of comments
  v_skip int := 0;
  v_end int := 0;         -- of the last name, and one on
  v_is_escaped boolean := false; -- the last token is a string with backslashes
begin
  -- Words, white space, and single characters: the rest is told by what comes next.
  for r in
    select w.word, w.start, lead(w.word) over o as next, lead(w.word, 2) over o as after
    from (
      select w.word, w.n, 1 + (sum(length(w.word)) over (order by w.n) - length(w.word))::int as start
      from (
        select m.match[1] as word, m.n
        from regexp_matches(expression, v_letter || '[^\u0001-\u002f\u003a-\u0040\u005b-\u005e\u0060\u007b-\u007f]*|[0-9][0-9A-Za-z_.]*|[ \t\r\n\f\v]+|.', 'g')
          with ordinality m(match, n)) w) w
    window o as (order by w.n)
    order by w.n
  loop
    if v_skip > 0 then
      v_skip := v_skip - 1;
      continue;
    end if;
    case
    when v_in = '' then
      null;
    when v_in = '--' then
      if r.word ~ '[\n\r]' then v_in := ''; end if;
      continue;
    when v_in = '/*' then
      if r.word = '/' and r.next = '*' then
        v_depth := v_depth + 1;
        v_skip := 1;
      elsif r.word = '*' and r.next = '/' then
        v_depth := v_depth - 1;
        v_skip := 1;
        if v_depth = 0 then v_in := ''; end if;
      end if;
      continue;
    when left(v_in, 1) = '$' then
      if r.word = '$' and (v_in = '$$' and r.next = '$' or v_in = '$' || r.next || '$' and r.after = '$') then
        v_skip := case when v_in = '$$' then 1 else 2 end;
        v_is_escaped := false;
        v_in := '';
        return next;
      end if;
      continue;
    else
      if r.word = '\' and v_in = 'e' then
        v_skip := 1;
      elsif r.word <> (case when v_in = 'e' then '''' else v_in end) then
        token := token || r.word;
      elsif r.next = r.word then
        token := token || r.word;
        v_skip := 1;
      else
        v_is_escaped := v_in = 'e';
        v_in := '';
        return next;
      end if;
      continue;
    end case;

    place := r.start;
    token := '';
    if r.word ~ '^[ \t\r\n\f\v]' then -- and no other: to the server it is part of a name
      continue;
    elsif r.word = '-' and r.next = '-' then
      v_in := '--';
    elsif r.word = '/' and r.next = '*' then
      v_in := '/*';
      v_depth := 1;
      v_skip := 1;
    elsif r.word in ('''', '"') then
      kind := case when r.word = '"' then 'quoted' else 'string' end;
      -- On another line such a string goes on.
      v_in := case when v_is_escaped and r.word = '''' then 'e' else r.word end;
    elsif lower(r.word) in ('e', 'b', 'x', 'n') and r.next = '''' then
      kind := 'string';
      v_in := case when lower(r.word) = 'e' then 'e' else '''' end;
      v_skip := 1;
    elsif lower(r.word) = 'u' and r.next = '&' and r.after in ('''', '"') then
      kind := case when r.after = '"' then 'quoted' else 'string' end;
      v_in := r.after;
      v_skip := 2;
    elsif r.word = '$' and v_end < r.start and r.next = '$' then
      kind := 'string';
      v_in := '$$';
      v_skip := 1;
    elsif r.word = '$' and v_end < r.start and r.next ~ ('^' || v_letter) and r.after = '$' then
      kind := 'string';
      v_in := '$' || r.next || '$';
      v_skip := 2;
    else
      kind := case when r.word ~ ('^' || v_letter) then 'name' when r.word ~ '^[0-9]' then 'number' else 'other' end;
      token := lower(r.word);
      v_is_escaped := false;
      -- Dollar signs and digits that follow at once go on with the name.
      if r.word ~ v_letter or v_end = r.start and r.word ~ '^[$0-9]' then
        v_end := r.start + length(r.word);
      end if;
      return next;
    end if;
  end loop;
  if v_in not in ('', '--') then
    raise syntax_error using
      message = format('unterminated %s at position %s', case
        when v_in = '/*' then 'comment' when v_in = '"' then 'quoted name' when v_in like '$%' then 'dollar-quoted string'
        else 'quoted string' end, place);
  end if;
end $body$;

-- What an expression is, for the end of an error.
create or replace function sequin._expression_hint(is_far boolean)
returns text
language sql
immutable
as $$
  select case
    when is_far then 'It is one SQL expression over new and old, which are jsonb where the table is another database''s, action,'
      ' table_name and committed_at: (new->>''amount'')::numeric > 100'
    else 'It is one SQL expression over new, old, action, table_name and committed_at: a filter, ''new.amount > 100''; a transform,'
      ' ''jsonb_build_object(''''id'''', new.id)''.' end
$$;

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

-- Where the first of these names is in an expression, for the end of a message: " at position n".
create or replace function sequin._at_position(expression text, names text[])
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select coalesce((
    select format(' at position %s', t.place)
    from (
      select t.*, lag(t.token) over (order by t.place) as before from sequin._tokens(expression) t) t
    where t.kind in ('name', 'quoted', 'other') and t.token = any (names)
      and (t.before is distinct from '.' or cardinality(names) = 1)
    order by t.place
    limit 1), '')
$$;

-- The type that a column is given as in an expression: one whose values come to be without running anybody's code, now
-- and later. A domain is what it is over; a composite, a range over a domain, a type with a cast of somebody's own, or one
-- whose name somebody else may give to another, is its text.
create or replace function sequin._plain_type(type oid)
returns oid
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  t pg_type;
  v_element oid;
  v_subtype oid;
begin
  select * into t from pg_type y where y.oid = type;
  if t.typtype = 'd' then
    return sequin._plain_type(t.typbasetype);
  elsif t.typinput = 'array_in'::regproc then
    v_element := sequin._plain_type(t.typelem);
    if v_element = t.typelem then
      return type;
    end if;
    return coalesce(nullif((select e.typarray from pg_type e where e.oid = v_element), 0), 'text'::regtype);
  elsif t.typtype in ('r', 'm') then
    v_subtype := (
      select r.rngsubtype from pg_range r
      where r.rngtypid = type or (to_jsonb(r) ->> 'rngmultitypid')::oid = type);
    if v_subtype is distinct from sequin._plain_type(v_subtype) or exists (
         select from pg_range r
         join pg_proc p on p.oid = r.rngcanonical
         join pg_language l on l.oid = p.prolang
         where r.rngsubtype = v_subtype and l.lanname not in ('c', 'internal')
           and (r.rngtypid = type or (to_jsonb(r) ->> 'rngmultitypid')::oid = type)) then
      return 'text'::regtype;
    end if;
  elsif t.typtype not in ('b', 'e') then
    return 'text'::regtype;
  end if;
  if t.typnamespace = 'pg_catalog'::regnamespace then
    return type;
  elsif exists (
       select from pg_cast k
       join pg_proc p on p.oid = k.castfunc
       join pg_language l on l.oid = p.prolang
       where type in (k.castsource, k.casttarget) and l.lanname not in ('c', 'internal'))
     or not sequin._is_trusted_owner(t.typowner)
     or exists (
       select from pg_namespace n
       where n.oid = t.typnamespace and (n.nspname ~ '^pg_(toast_)?temp_' or not sequin._is_trusted_owner(n.nspowner))) then
    return 'text'::regtype;
  end if;
  return type;
end $$;

-- The columns of a table that its messages carry, each with the type it is given as.
create or replace function sequin._expression_columns(relation oid)
returns table (attnum int2, name text, type oid)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select a.attnum, a.attname::text, case when a.atttypid < 16384 then a.atttypid else sequin._plain_type(a.atttypid) end
  from pg_attribute a
  where a.attrelid = relation and a.attnum > 0 and not a.attisdropped
    -- A generated column is in the write-ahead log from PostgreSQL 18 on, and if it is stored.
    and (a.attgenerated = '' or a.attgenerated = 's' and current_setting('server_version_num')::int >= 180000)
$$;

-- A type's name, wherever it is written.
create or replace function sequin._type_name(type oid)
returns text
language sql
stable
set search_path = ''
set quote_all_identifiers = off
as $$
  select case when e.typnamespace operator(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace
              then pg_catalog.format('pg_catalog.%I', e.typname) else pg_catalog.format_type(e.oid, -1) end
         operator(pg_catalog.||) case when e.oid operator(pg_catalog.<>) t.oid then '[]' else '' end
  from pg_catalog.pg_type t
  join pg_catalog.pg_type e on e.oid operator(pg_catalog.=) case
    when t.typinput operator(pg_catalog.=) 'pg_catalog.array_in'::pg_catalog.regproc then t.typelem else t.oid end
  where t.oid operator(pg_catalog.=) type
$$;

-- A select whose one column, _sequin_value, is an expression over the names it may have. The same FROM, in effect, is
-- what it is evaluated in. A relation of 0 is a table of another database.
create or replace function sequin._probe(relation oid, value text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select format($sql$select _sequin_f._sequin_value
from (select null::pg_catalog.jsonb as _sequin_record, null::pg_catalog.bool as _sequin_new, null::pg_catalog.bool as _sequin_old,
             null::pg_catalog.text as _sequin_action, null::pg_catalog.text as _sequin_table,
             null::pg_catalog.timestamptz as _sequin_at) _sequin_m%s
cross join lateral (
  select %s as _sequin_value
  from (
    select %s_sequin_m._sequin_action as action, _sequin_m._sequin_table as table_name,
           _sequin_m._sequin_at as committed_at) _sequin) _sequin_f$sql$,
    case when relation <> 0 then (
      select format($sql$
left join lateral pg_catalog.jsonb_to_record(_sequin_m._sequin_record) as new (%1$s) on _sequin_m._sequin_new
left join lateral pg_catalog.jsonb_to_record(_sequin_m._sequin_record) as old (%1$s) on _sequin_m._sequin_old$sql$,
        coalesce(string_agg(format('%I %s', k.name, sequin._type_name(k.type)), ', ' order by k.attnum), '_sequin_none pg_catalog.text'))
      from sequin._expression_columns(relation) k) end,
    value,
    case when relation = 0 then '_sequin_m._sequin_record as new, _sequin_m._sequin_record as old, ' end)
$$;

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

-- The label with the table that an expression is read for, where there are several. Those of another database are alike.
create or replace function sequin._label_of(label text, relations oid[], place int)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select label || coalesce((
    select format(', for table %I.%I', n.nspname, c.relname)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.oid = relations[place] and cardinality(relations) > 1), '')
$$;

-- Where the grammar ends an expression: the place of the first token that cannot follow what is before it. Null: the
-- grammar has nothing against it. What is executed here is never a whole statement.
create or replace function sequin._syntax_place(expression text)
returns int
language plpgsql
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $body$
declare
  v_texts text[] := array['(', '(1) _sequin_name _sequin_end', format(E'(\n%s\n) _sequin_name _sequin_end', expression)];
  v_said text[] := '{}';
  v_starts int[];
  v_low int := 1;
  v_high int;
  v_middle int;
  v_place int;
  v_found int;
  v_word text;
begin
  -- What the server says, in its language, of an end, and of a word too many.
  foreach v_word in array v_texts loop
    begin
      execute 'select ' || v_word;
    exception when others then
      v_said := v_said || sqlerrm;
    end;
  end loop;
  if v_said[3] = v_said[2] then
    return null;
  end if;
  -- Pieces that may end a text: operators, casts, parameters, numbers, and names with a dollar sign are not taken apart.
  v_starts := array(
    select t.place
    from (
      select t.*, lag(t.place) over w as last_place, lag(t.kind) over w as last_kind, lag(t.token) over w as last_token
      from sequin._tokens(expression) t
      window w as (order by t.place)) t
    where t.last_place is null
       or t.last_kind <> 'other' and (t.token <> '$' or t.place > t.last_place + length(t.last_token))
          -- What these are depends on the next word.
          and t.last_token not in ('not', 'nulls', 'with', 'without', 'format')
       or t.last_token in ('(', ')', ',', '[', ']') or t.last_kind = 'other' and t.place > t.last_place + 1
    order by t.place);
  v_high := cardinality(v_starts) + 1;
  while v_low < v_high loop
    v_middle := (v_low + v_high) / 2;
    begin
      execute E'select (\n' || case when v_middle = cardinality(v_starts) then expression else left(expression, v_starts[v_middle + 1] - 1) end;
    exception when others then
      v_word := sqlerrm;
    end;
    if v_word = v_said[1] then
      v_low := v_middle + 1;
    else
      v_high := v_middle;
      v_said[3] := v_word;
    end if;
  end loop;
  if v_low > cardinality(v_starts) then
    return length(expression) + 1;
  end if;
  -- Of a piece, the token that the server names, and no comment that has it, too; of two alike, not one that may end a text.
  v_word := substring(v_said[3] from '"(.*)"');
  for v_place in
    select t.place from sequin._tokens(expression) t
    where t.place >= v_starts[v_low] and t.place < coalesce(v_starts[v_low + 1], length(expression) + 1)
      and substr(expression, t.place, length(v_word)) = v_word
    order by t.place
  loop
    if v_found is not null then
      begin
        execute E'select (\n' || left(expression, v_found + length(v_word) - 1);
      exception when others then
        exit when sqlerrm <> v_said[1];
      end;
    end if;
    v_found := v_place;
  end loop;
  return coalesce(v_found, v_starts[v_low]);
end $body$;

-- Where a name, with dots or without, or the function of that name, is first in an expression. Null: nowhere.
create or replace function sequin._name_place(expression text, name text, is_function boolean)
returns int
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  with tokens as (
    select t.*, row_number() over w as n, lag(t.token) over w as before
    from sequin._tokens(expression) t
    window w as (order by t.place)
  ), parts as (
    select p.part, 2 * p.n - 2 as n, count(*) over () as count from unnest(string_to_array(name, '.')) with ordinality p(part, n)
  )
  select min(t.place)
  from tokens t
  where t.kind in ('name', 'quoted') and t.before is distinct from '.'
    and (select bool_and(coalesce(k.token, '') = p.part and k.kind in ('name', 'quoted')) from parts p left join tokens k on k.n = t.n + p.n)
    and (select coalesce(k.token, '') = '(' from (select max(p.n) + t.n + 1 as n from parts p) e left join tokens k on k.n = e.n) = is_function
$$;

-- Says of an error of the server's whose expression it is of, and where, if that can be told: place is given of one of the
-- grammar's. None but what says nothing of the expression is left as it is, with the statement that it came of.
create or replace function sequin._explain_error(
  label text, is_far boolean, expression text, place int, code text, message text, hint text
)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
set standard_conforming_strings = on
as $$
declare
  v_code text := case
    when code in ('42703', '42702', '42P01', '42P02', '42704', '3F000', '42883') then '42703'
    -- A literal that its type does not take is of the wrong type, and so is what fails whatever the message.
    when code in ('42804', '42846', '42725', '42809', '42P16', '42P18', '42P21', '42P22') or left(code, 2) = '22'
      or message like '%set-returning%' then '42804'
    when left(code, 2) in ('42', '54', '0A') and code <> '42501' then '42601'
    else code end;
  v_message text := message;
  v_hint text := case when hint not like '%\_sequin\_%' then replace(nullif(hint, ''), '_sequin.', '') end;
  v_place int := place;
  v_word text;
  v_pattern text;
begin
  if left(code, 2) in ('08', '25', '40', '53', '55', '57', '58', 'XX') then
    return;
  elsif code = '42501' and not has_database_privilege(current_database(), 'temporary') then
    v_message := format('it is checked by a temporary view, and role "%s" may not make one', current_user);
    v_hint := format('grant temporary on database %I to %I;', current_database(), current_user);
  elsif code = '42702' then
    v_hint := 'Say whose: new.column, or old.column.';
  elsif code = '42804' and message like 'argument of IS TRUE must be type boolean, not type %' then
    v_message := format('it is of type %s, and not boolean', substr(message, 52));
    v_hint := case when is_far then 'A filter is true or false: (new->>''amount'')::numeric > 100'
      else 'A filter is true or false: ''new.amount > 100''.' end;
    v_place := 1;
  elsif code = '42804' and message = 'argument of IS TRUE must not return a set' then
    v_message := 'it returns a set, and not one value';
  elsif code = '42P16' and message like 'column "\_sequin\_value" has pseudo-type %' then
    v_message := format('it is of type %s, and not jsonb', substr(message, 40));
    v_hint := 'jsonb_build_object(''id'', new.id), to_jsonb(new), or a cast: (…)::jsonb.';
    v_place := 1;
  elsif code = '42803' then
    v_message := 'it has an aggregate function';
  elsif code = '42703' and message like '%\_sequin\_%' then
    v_code := '42601';
    v_message := 'it is not one expression';
    v_place := 1;
  elsif is_far and message ~ '^missing FROM-clause entry for table "(new|old)"$' then
    v_message := substring(message from '"(.*)"') || ' is jsonb here, and has no columns';
  elsif code = '42703' or message like 'missing FROM-clause entry%' then
    v_hint := coalesce(v_hint, 'A column is new.… or old.…; to_jsonb(new) is the row as jsonb.'
      || case when current_setting('server_version_num')::int < 180000 then ' Generated columns are in messages from PostgreSQL 18 on.' else '' end);
  end if;
  if is_far and v_code in ('42601', '42703', '42804') and v_hint not like 'A filter %' then
    v_hint := null;
  end if;

  if code = '42883' then
    v_word := substring(message from '^function (.*?)\(');
    if exists (select from pg_proc p where p.proname = regexp_replace(v_word, '^.*\.', ''))
       or exists (select from pg_operator o where o.oprname = substring(message from ' ([-+*/<>=~!@#%^&|`?]+) ')) then
      -- There are such, of other types.
      v_code := '42804';
    end if;
    v_place := sequin._name_place(expression, v_word, true);
  elsif v_code = '42703' then
    v_place := sequin._name_place(
      expression, substring(message from '^column ([^" ]+) does not exist'), false);
    v_place := coalesce(v_place, sequin._name_place(expression, substring(message from '"(.*?)"'), false));
  end if;
  v_word := coalesce(
    substring(message from '(?:at or near|: |type modifier) "(.*)"'),
    substring(message from '(\$\d+)$'),
    substring(message from '^operator does not exist: .*? ([-+*/<>=~!@#%^&|`?]+) '),
    substring(message from '^column notation \.(.*) applied to type'),
    lower(substring(message from '^(?:argument of )?(AND|OR|NOT|COALESCE|GREATEST|LEAST|CASE|NULLIF|LIMIT|VALUES|IN)\M')),
    substring(message from '"(.*?)"'));
  -- What the grammar has a word for.
  v_word := coalesce(case
    when v_word ~ '^!?~~\*?$' then case when v_word like '%*' then 'ilike' else 'like' end
    when message like '%ANY/ALL (array)%' then (
      select t.token from sequin._tokens(expression) t where t.token in ('any', 'all', 'some') order by t.place limit 1)
    when code = '42803' then (
      select t.token
      from (select t.*, lead(t.token) over (order by t.place) as next from sequin._tokens(expression) t) t
      where t.next = '(' and exists (select from pg_proc p where p.proname = t.token and p.prokind = 'a')
      order by t.place limit 1)
    end, v_word);
  if v_place is null and v_word <> '' then
    v_pattern := case
      when v_word ~ '^\w' then '(?<!\w)%s(?!\w)'
      when v_word ~ '^[-+*/<>=~!@#%^&|`?]+$' then '(?<![-+*/<>=~!@#%%^&|`?])%s(?![-+*/<>=~!@#%%^&|`?])'
      else '%s' end;
    v_pattern := '(?i)' || format(v_pattern, regexp_replace(v_word, '([][\\^$.|?*+(){}-])', '\\\1', 'g'));
    if (select count(*) from regexp_matches(expression, v_pattern, 'g')) = 1 then
      v_place := length((regexp_split_to_array(expression, v_pattern))[1]) + 1;
    end if;
  end if;
  if place > length(expression) then
    v_message := 'syntax error at the end of it,';
  end if;
  -- Of the whole of it, where no part can be told.
  if v_place is null and v_code in ('42601', '42703', '42804') then
    v_place := 1;
  end if;
  raise exception using
    errcode = v_code,
    message = format('%s: %s', label, v_message) || coalesce(' at position ' || v_place, ''),
    detail = left(expression, 200),
    hint = coalesce(v_hint, sequin._expression_hint(is_far));
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
             lead(t.token, 3) over w as after, lead(t.place, 3) over w as after_place, lead(t.place, 2) over w as name_place
      from sequin._tokens(compiled) t
      window w as (order by t.place)) n
    where n.kind = 'name' and n.token in ('new', 'old') and n.dot = '.' and n.before is distinct from '.'
    order by n.place desc
  loop
    if v_token.name = '*' then
      if v_token.function = 'to_jsonb' and v_token.before = '(' and v_token.after = ')' and v_token.dot_before is distinct from '.' then
        v_inlined := overlay(v_inlined placing format('_sequin_m.%s_record', v_token.token)
          from v_token.function_place for v_token.after_place + 1 - v_token.function_place);
      end if;
      continue;
    end if;
    v_type := types[array_position(columns, v_token.name)];
    continue when v_type is null or v_type like '%[]';
    v_inlined := overlay(v_inlined placing case
        when v_type in ('pg_catalog.json', 'pg_catalog.jsonb') then
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
      select n.place, n.token, n.name, left(n.token, 3) as alias
      from (
        select t.place, t.token, t.kind, lead(t.token) over w as dot, lag(t.token) over w as before, lead(t.token, 2) over w as name
        from sequin._tokens(e.compiled) t
        window w as (order by t.place)) n
      where e.is_typed and n.kind = 'name' and n.dot = '.' and n.before is distinct from '.' and n.token in (
        substring(v_frame_def from 'jsonb_to_record\([^()]*\) (?:AS )?(new[_0-9]*)\('),
        substring(v_frame_def from 'jsonb_to_record\([^()]*\) (?:AS )?(old[_0-9]*)\('))
      order by n.place desc
    loop
      e.uses_new := e.uses_new or v_token.alias = 'new';
      e.uses_old := e.uses_old or v_token.alias = 'old';
      if v_token.name <> '*' and not v_token.name = any (e.columns) then
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
          select t.token, t.kind, lead(t.token) over w as dot, lag(t.token) over w as before, lead(t.token, 2) over w as name
          from sequin._tokens(e.inlined) t
          window w as (order by t.place)) n
        where n.kind = 'name' and n.token in ('new', 'old') and n.dot = '.' and n.name = '*' and n.before is distinct from '.');
    end if;
    -- Planned without a message: what is wrong whatever the message, is wrong now.
    perform sequin._rehearse(v_label, e, kind);
    return next e;
  end loop;
end $$;
