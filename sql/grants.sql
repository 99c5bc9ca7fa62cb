-- A consumer's own rights: a role may be given one consumer, and sees nothing else.

-- What a role must be able to call to consume.
create or replace function sequin._consuming_functions()
returns text[]
language sql
immutable
as $$
  select array[
    'sequin.receive(text, int, interval, interval)',
    'sequin.ack(text, bigint[])',
    'sequin.nack(text, bigint[], interval, text)',
    'sequin.extend(text, bigint[], interval)',
    'sequin.pop(text, int, interval)'
  ]
$$;

-- 42704 unless there is such a role, 22023 for everyone; its oid.
create or replace function sequin._role(role name)
returns oid
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_oid oid;
begin
  select r.oid into v_oid from pg_roles r where r.rolname = role;
  if role = 'public' then
    raise invalid_parameter_value using
      message = '"public" is everyone, and no role',
      hint = 'Rights are given to each role by itself, and its members have them too: name one.';
  elsif not found then
    perform sequin._refuse_unknown(
      'role', role::text, array(select r.rolname::text from pg_roles r where r.rolname not like 'pg\_%'),
      coalesce('create role ' || quote_ident(role) || ';', 'Name one of those there are: select rolname from pg_roles;'));
  end if;
  return v_oid;
end $$;

create or replace function sequin.grant_consume(consumer text, role name)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer := sequin._consumer(consumer);
  v_role oid := sequin._role(role);
  v_function text;
begin
  perform sequin._refuse_restricted();
  -- Who may not read the tables lets nobody else.
  if not sequin._is_owner(sequin._caller()) then
    perform sequin._require_stream(v_consumer.stream_id);
  end if;
  insert into sequin.consumer_grant (consumer_id, role) values (v_consumer.id, v_role) on conflict do nothing;
  if not found then
    return 'unchanged';
  end if;
  execute format('grant usage on schema sequin to %I', role);
  foreach v_function in array sequin._consuming_functions() loop
    execute format('grant execute on function %s to %I', v_function, role);
  end loop;
  return 'granted';
end $$;
comment on function sequin.grant_consume(text, name) is
'Lets a role (and its members) receive, ack, nack, extend and pop on one consumer, and do nothing else here.

Returns granted or unchanged. Errors: 42704 unknown consumer or role, 22023 public, which is no role, 42501 no right to select
from its tables.';

create or replace function sequin.revoke_consume(consumer text, role name)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_consumer sequin.consumer := sequin._consumer(consumer);
  v_role oid := sequin._role(role);
begin
  perform sequin._require_reader(v_consumer.stream_id);
  delete from sequin.consumer_grant g where g.consumer_id = v_consumer.id and g.role = v_role;
  if not found then
    return 'unchanged';
  end if;
  perform sequin._revoke_if_last(v_role);
  return 'revoked';
end $$;
comment on function sequin.revoke_consume(text, name) is
'Takes back what grant_consume gave. Deliveries that are out run into their ack_wait.

Returns revoked or unchanged. Errors: 42704 unknown consumer or role, 42501 no right to read its stream.';

-- A role's last consumer is gone: so are its rights on the functions.
create or replace function sequin._revoke_if_last(role oid)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_name name;
  v_function text;
begin
  if exists (select from sequin.consumer_grant g where g.role = _revoke_if_last.role) then
    return;
  end if;
  select r.rolname into v_name from pg_roles r where r.oid = role;
  if not found then
    return;
  end if;
  foreach v_function in array sequin._consuming_functions() loop
    execute format('revoke execute on function %s from %I', v_function, v_name);
  end loop;
  if not exists (select from sequin._configurers() c(role) where c.role = _revoke_if_last.role) then
    execute format('revoke usage on schema sequin from %I', v_name);
  end if;
end $$;
