-- Types of users' columns, and what may be done with them under the rights of the schema's owner.

-- A type, or what it is a domain over.
create or replace function sequin._base_type(type oid)
returns oid
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  with recursive down(oid, is_domain, base) as (
    select t.oid, t.typtype = 'd', t.typbasetype from pg_type t where t.oid = type
    union all
    select t.oid, t.typtype = 'd', t.typbasetype from down d join pg_type t on t.oid = d.base where d.is_domain
  )
  select d.oid from down d where not d.is_domain
$$;

-- What a text may be cast to for a type: what it is over. 42501 where that has in it a type of somebody's who has fewer rights
-- than the schema's owner: a domain's checks would run with these, and what is no domain could become one under its name.
create or replace function sequin._castable_type(type oid)
returns oid
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_base oid := sequin._base_type(type);
  v_part oid;
  v_owner oid;
begin
  with recursive part(oid) as (
    select v_base
    union
    select n.oid
    from part p
    join pg_type t on t.oid = p.oid
    cross join lateral (
      select t.typelem where t.typlen = -1
      union all
      select t.typbasetype where t.typtype = 'd'
      union all
      select a.atttypid from pg_attribute a where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
      union all
      select r.rngsubtype from pg_range r where t.oid in (r.rngtypid, (to_jsonb(r) ->> 'rngmultitypid')::oid)) n(oid)
    where n.oid <> 0
  )
  select t.oid, case when sequin._is_trusted_owner(t.typowner) then n.nspowner else t.typowner end into v_part, v_owner
  from part p
  join pg_type t on t.oid = p.oid
  join pg_namespace n on n.oid = t.typnamespace
  where n.nspname <> 'pg_catalog' and not (sequin._is_trusted_owner(t.typowner) and sequin._is_trusted_owner(n.nspowner))
  limit 1;
  if found then
    raise insufficient_privilege using
      message = format('type %s, or its schema, is %I''s, and what it checks would run with the rights of %I', format_type(v_part, null),
        pg_get_userbyid(v_owner), current_user),
      hint = format('alter type %s owner to %I; or, of its schema: alter schema … owner to %2$I;', format_type(v_part, null), current_user);
  end if;
  return v_base;
end $$;
