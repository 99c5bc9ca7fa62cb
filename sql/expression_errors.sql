-- What is wrong with an expression, and where in its text.

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
