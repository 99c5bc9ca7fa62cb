-- Names: what they may be, who they belong to, and what was probably meant.

-- How many single-character edits turn one text into the other (Levenshtein). Null where either is.
create or replace function sequin._distance(a text, b text)
returns int
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_row int[] := array(select generate_series(0, length(b)));
  v_next int[];
begin
  for i in 1..coalesce(length(a), 0) loop
    v_next := array[i];
    for j in 1..coalesce(length(b), 0) loop
      v_next := v_next || least(
        v_next[j] + 1,
        v_row[j + 1] + 1,
        v_row[j] + (substr(a, i, 1) <> substr(b, j, 1))::int);
    end loop;
    v_row := v_next;
  end loop;
  return v_row[length(b) + 1];
end $$;

-- A hint for an unknown name: the nearest of those there are, else what to call. Near is what differs in a third of its
-- characters at most, or has the other in it.
create or replace function sequin._did_you_mean(name text, candidates text[], otherwise text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(
    (select format('Did you mean "%s"?', c.name)
     from (select lower(left(_did_you_mean.name, 64)) as name) n
     cross join unnest(candidates[1:1000]) c(name)
     cross join lateral (select sequin._distance(lower(c.name), n.name) as distance) d
     where n.name <> ''
       and (d.distance <= greatest(1, greatest(length(c.name), length(n.name)) / 3)
            or length(n.name) > 1 and strpos(lower(c.name), n.name) > 0
            or length(c.name) > 1 and strpos(n.name, lower(c.name)) > 0)
     order by d.distance, c.name
     limit 1),
    otherwise)
$$;

-- 42704: there is none of that kind and name. The hint is the nearest of those there are, else what to call.
create or replace function sequin._refuse_unknown(kind text, name text, candidates text[], otherwise text)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  raise undefined_object using
    message = case when name is null then format('the name of the %s is null', kind)
      else format('%s "%s" does not exist', kind, name) end,
    hint = sequin._did_you_mean(name, candidates, otherwise);
end $$;

-- 22023 unless the text can name something: 1 to 48 bytes, so that the channel "sequin.<name>" fits 63.
create or replace function sequin._check_name(kind text, name text)
returns void
language plpgsql
immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if name is null or octet_length(name) not between 1 and 48 then
    raise invalid_parameter_value using
      message = case when name is null then format('the name of the new %s is null', kind)
        else format('%s name "%s" is %s bytes long', kind, left(name, 60), octet_length(name)) end,
      hint = 'A name is 1 to 48 bytes, kept as given.';
  end if;
end $$;

-- The stream of that name. 42704 if there is none.
create or replace function sequin._stream(name text)
returns sequin.stream
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_stream sequin.stream;
begin
  select * into v_stream from sequin.stream s where s.name = _stream.name;
  if not found then
    perform sequin._refuse_unknown('stream', name, array(select s.name from sequin.stream s),
      'Make it with sequin.create_stream(name, tables), or list those there are: select * from sequin.streams;');
  end if;
  return v_stream;
end $$;

-- The consumer of that name, for whoever may configure. 42704 if there is none.
create or replace function sequin._consumer(name text)
returns sequin.consumer
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer;
begin
  select * into v_consumer from sequin.consumer c where c.name = _consumer.name;
  if not found then
    perform sequin._refuse_unknown('consumer', name, array(select c.name from sequin.consumer c),
      'Make it with sequin.create_consumer(name, stream), or list those there are: select * from sequin.consumers;');
  end if;
  return v_consumer;
end $$;

-- The consumer of that name, for the caller to consume from; a null name is the only one there is.
-- 42704 if there is none, 22023 if null is not enough, 42501 if it is not the caller's.
create or replace function sequin._my_consumer(name text)
returns sequin.consumer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer;
  v_mine text[];
begin
  perform sequin._refuse_restricted();
  select * into v_consumer from sequin.consumer c where c.name = _my_consumer.name;
  if found then
    if not sequin._may_consume(v_consumer.id) then
      raise insufficient_privilege using
        message = format('role "%s" may not consume from consumer "%s"', sequin._caller(), name),
        hint = format('select sequin.grant_consume(%L, %L);', name, sequin._caller());
    end if;
    return v_consumer;
  end if;
  -- A role learns the names of its own consumers only.
  v_mine := array(select c.name from sequin.consumer c where sequin._may_consume(c.id) order by c.name);
  if name is not null then
    perform sequin._refuse_unknown('consumer', name, v_mine, 'Make it with sequin.create_consumer(name, stream).');
  elsif not exists (select from sequin.consumer) then
    raise undefined_object using
      message = 'there is no consumer',
      hint = 'Make one with sequin.create_consumer(name, stream).';
  elsif (select count(*) from sequin.consumer) > 1 then
    raise invalid_parameter_value using
      message = 'there is more than one consumer: name the one that is meant',
      hint = format('Yours are: %s.', coalesce(nullif(array_to_string(v_mine[1:5], ', '), ''), 'none'));
  end if;
  select * into v_consumer from sequin.consumer c;
  return sequin._my_consumer(v_consumer.name);
end $$;
