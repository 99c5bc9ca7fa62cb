-- The version of the SQL that is installed, e.g. '0.1.0'.
create or replace function sequin.version()
returns text
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select v.version from sequin.sql_version v order by v.id desc limit 1
$$;
comment on function sequin.version() is
'The version of Sequin that installed this schema, e.g. 0.1.0. A bridge of another version refuses to start.';
