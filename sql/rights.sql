-- Who is asking, and whether they may. Nearly every function here is a security definer, so that a role needs no
-- right on a table: inside one, current_user is the owner of the schema, and the caller is _caller().

-- The role in force outside: session_user alone is wrong after set role (PostgREST and Supabase log in as one role
-- and become another). A user's own definer function does not lend its rights: this sees through it.
create or replace function sequin._caller()
returns name
language sql
stable
as $$
  select coalesce(nullif(pg_catalog.current_setting('role'), 'none'), session_user)::pg_catalog.name
$$;

-- 42501 where the server runs somebody's code for somebody else: an index's expression in an ANALYZE or a vacuum, a materialized
-- view's query. session_user is who asked for that there, or a superuser, and the code is another's. UNLISTEN is one of the
-- few statements that the server refuses then and only then, and has no effect: nobody listens to that channel.
create or replace function sequin._refuse_restricted()
returns void
language plpgsql
as $$
begin
  unlisten "sequin.";
end $$;

-- Whether an owner's objects may be named in what runs with the rights of the schema's owner: it could make the name mean
-- something else at any moment. A superuser, who has the rights of the schema's owner, or owns the database.
create or replace function sequin._is_trusted_owner(owner oid)
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select pg_has_role(owner, (select n.nspowner from pg_namespace n where n.nspname = 'sequin'), 'usage')
    or exists (
      select from pg_database d
      where d.datname = current_database() and (d.datdba = owner or (select r.rolname from pg_roles r where r.oid = owner) = 'pg_database_owner'))
$$;

-- Whether role has the rights of the schema's owner. Called from definer functions only.
create or replace function sequin._is_owner(role name)
returns boolean
language sql
stable
as $$
  select role operator(pg_catalog.=) current_user or pg_catalog.pg_has_role(role, current_user, 'usage')
$$;

-- 42501 unless the caller has the owner's rights. What another database has, no right in this one speaks of.
create or replace function sequin._require_owner(what text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform sequin._refuse_restricted();
  if not sequin._is_owner(sequin._caller()) then
    raise insufficient_privilege using
      message = format('role "%s" may not %s', sequin._caller(), what),
      hint = format('Only %I may, who owns the schema, or a role that has its rights.', current_user);
  end if;
end $$;

-- 42501 unless the caller may select from the table, all of it: the log shows rows whole.
create or replace function sequin._require_select(relation oid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := sequin._caller();
  v_table text := relation::regclass::text;
begin
  perform sequin._refuse_restricted();
  if not has_table_privilege(v_caller, relation, 'select') then
    raise insufficient_privilege using
      message = format('role %I may not read table %s', v_caller, v_table),
      hint = format('grant select on %s to %I;', v_table, v_caller);
  end if;
  if exists (select from pg_class c where c.oid = relation and c.relrowsecurity)
     and not pg_has_role(v_caller, (select c.relowner from pg_class c where c.oid = relation), 'usage')
     and not exists (select from pg_roles r where r.rolname = v_caller and (r.rolbypassrls or r.rolsuper)) then
    raise insufficient_privilege using
      message = format('table %s has row level security, and a stream shows every row', v_table),
      hint = format('Let the owner of %s make the stream, or a role with BYPASSRLS.', v_table);
  end if;
end $$;

-- 42501 unless the caller may read a stream: select from its tables, or, where they are another source's, what the owner may.
create or replace function sequin._require_stream(stream_id int)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform sequin._refuse_restricted();
  perform sequin._require_select(t.relation_oid)
  from sequin.stream_table st
  join sequin.source_table t on t.id = st.table_id
  join sequin.source s on s.id = t.source_id and s.conninfo is null
  where st.stream_id = _require_stream.stream_id and exists (select from pg_class k where k.oid = t.relation_oid);
  perform sequin._require_owner(format('read stream "%s", which is another source''s', m.name))
  from sequin.stream m
  join sequin.source s on s.id = m.source_id and s.conninfo is not null
  where m.id = _require_stream.stream_id;
end $$;

-- 42501 unless the caller has the owner's rights, or may read a stream, or a table that has a pipeline. Who says what is
-- delivered of it, and when, learns what is in it, if only from errors.
create or replace function sequin._require_reader(stream_id int, relation oid default null)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform sequin._refuse_restricted();
  if not sequin._is_owner(sequin._caller()) then
    perform sequin._require_stream(stream_id);
    perform sequin._require_select(relation) where relation is not null;
  end if;
end $$;

-- Whether the caller may consume: the owner, or a role that was given it.
create or replace function sequin._may_consume(consumer_id int)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_caller name := sequin._caller();
begin
  return sequin._is_owner(v_caller) or exists (
    select from sequin.consumer_grant g
    join pg_roles r on r.oid = g.role::oid
    where g.consumer_id = _may_consume.consumer_id and pg_has_role(v_caller, g.role, 'usage'));
end $$;

-- 25006 with a hint, where core would raise it without.
create or replace function sequin._refuse_write(verb text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
  if current_setting('transaction_read_only') = 'on' then
    raise read_only_sql_transaction using
      message = format('%s writes, and this transaction is read only', verb),
      hint = case when pg_is_in_recovery()
        then 'This is a replica: route receive, ack, pop, and all that writes, to the primary.'
        else 'Route receive, ack, pop, and all that writes, to the primary, in a read write transaction: drivers and proxies may take '
          'them for reads.' end;
  end if;
end $$;
