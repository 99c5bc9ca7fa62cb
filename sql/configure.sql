-- Who may configure, and the last word on rights: nothing is PUBLIC's.

-- What a role that configures may call: everything users call, but for what loses messages of all, and what that calls as
-- them.
create or replace function sequin._configuring_functions()
returns setof regprocedure
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select p.oid::regprocedure
  from pg_proc p
  where p.pronamespace = 'sequin'::regnamespace and p.prokind = 'f'
    and (p.proname !~ '^(_|bridge_)' and p.proname not in ('set_retention', 'accept_gap') or p.proname in (
           '_create_stream', '_create_far_stream', '_create_consumer', '_alter_consumer', '_create_pipeline', '_alter_pipeline',
           '_pipeline_relations', '_relation', '_event_table_sql', '_start_backfill', '_parse',
           '_parse_statements', '_drop_views', '_stream_relations', '_label_of', '_syntax_place', '_explain_error', '_expression_hint',
           '_name_place', '_tokens', '_republish', '_republish_by',
           '_republish_query', '_did_you_mean', '_distance', '_not_yet')
         -- A view's functions are called with its reader's rights.
         or exists (
           select from pg_depend d
           where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_proc'::regclass and d.refobjid = p.oid))
  order by p.oid
$$;

create or replace function sequin._views()
returns setof regclass
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select c.oid::regclass from pg_class c where c.relnamespace = 'sequin'::regnamespace and c.relkind = 'v' order by c.oid
$$;

-- Roles that were given grant_configure.
create or replace function sequin._configurers()
returns table (role oid)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select a.grantee
  from pg_proc p
  cross join lateral aclexplode(p.proacl) a
  where p.pronamespace = 'sequin'::regnamespace and p.proname = '_create_stream' and a.grantee not in (0, p.proowner)
$$;

-- Gives a role what configures. What it has already stays as it is.
create or replace function sequin._grant_configuring(role name)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_function regprocedure;
  v_view regclass;
begin
  execute format('grant usage on schema sequin to %I', role);
  for v_function in select * from sequin._configuring_functions() loop
    execute format('grant execute on function %s to %I', v_function, role);
  end loop;
  for v_view in select * from sequin._views() loop
    -- What is in tables that it may not read is not for it to see here.
    continue when exists (select from pg_attribute a where a.attrelid = v_view and a.attname = 'record_pk');
    execute format('grant select on %s to %I', v_view, role);
  end loop;
end $$;

create or replace function sequin.grant_configure(role name)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_role oid := sequin._role(role);
begin
  perform sequin._require_owner('grant what configures');
  if exists (select from sequin._configurers() c where c.role = v_role) then
    return 'unchanged';
  end if;
  perform sequin._grant_configuring(role);
  return 'granted';
end $$;
comment on function sequin.grant_configure(name) is
'Lets a role make, alter and drop streams, consumers and pipelines, and read the views, but for those that show rows
(messages, deliveries and dead_letters: grant select on them by hand). Only of tables it may select from: of others'' streams,
consumers and pipelines it sees how they stand, and may pause and resume them. Of its own it may also let others consume,
with grant_consume, which consuming still takes. What may lose messages that others need, set_retention and accept_gap, stays
the owner''s.

Returns granted or unchanged. Errors: 42704 unknown role, 42501 not the owner of the schema.';

create or replace function sequin.revoke_configure(role name)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_role oid := sequin._role(role);
  v_function regprocedure;
  v_view regclass;
  v_name text;
begin
  perform sequin._require_owner('take back what configures');
  if not exists (select from sequin._configurers() c where c.role = v_role) then
    return 'unchanged';
  end if;
  for v_function in select * from sequin._configuring_functions() loop
    execute format('revoke execute on function %s from %I', v_function, role);
  end loop;
  for v_view in select * from sequin._views() loop
    execute format('revoke select on %s from %I', v_view, role);
  end loop;
  -- What it may consume, it may still.
  if exists (select from sequin.consumer_grant g where g.role = v_role) then
    foreach v_name in array sequin._consuming_functions() loop
      execute format('grant execute on function %s to %I', v_name, role);
    end loop;
  else
    execute format('revoke usage on schema sequin from %I', role);
  end if;
  return 'revoked';
end $$;
comment on function sequin.revoke_configure(name) is
'Takes back what grant_configure gave. Returns revoked or unchanged. Errors: 42704 unknown role, 42501 not the owner of the
schema.';

-- Functions are PUBLIC's until somebody says otherwise.
revoke all on all functions in schema sequin from public;
revoke all on all tables in schema sequin from public;
revoke all on schema sequin from public;
revoke all on type sequin._survey from public;
revoke all on type sequin._expression from public;

-- Roles that configure get what this version adds.
do $$
declare
  v_role name;
begin
  for v_role in select r.rolname from sequin._configurers() c join pg_roles r on r.oid = c.role loop
    perform sequin._grant_configuring(v_role);
  end loop;
end $$;
