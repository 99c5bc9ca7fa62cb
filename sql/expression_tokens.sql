-- What an expression is made of, as the server's scanner sees it.

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
