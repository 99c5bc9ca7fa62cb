-- What the next versions bring. The calls are here already, and say so.

create or replace function sequin._not_yet(what text)
returns void
language plpgsql
immutable
as $$
begin
  raise feature_not_supported using
    message = pg_catalog.format('%s is not in this version', what),
    hint = 'select sequin.version(); shows which this is; the changelog says what is in each.';
end $$;

create or replace function sequin.rewind(
  consumer text, to_seq bigint default null, to_time timestamptz default null, to_row text default null
)
returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('rewind'); return null; end $$;
comment on function sequin.rewind(text, bigint, timestamptz, text) is 'Not in this version: 0A000.';

create or replace function sequin.backfill(consumer text, from_row text default null, filter text default null)
returns bigint language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('backfill'); return null; end $$;
comment on function sequin.backfill(text, text, text) is 'Not in this version: 0A000.';

create or replace function sequin.cancel_backfill(id bigint)
returns boolean language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('backfill'); return null; end $$;
comment on function sequin.cancel_backfill(bigint) is 'Not in this version: 0A000.';

create or replace function sequin.republish(consumer text, query text)
returns bigint language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('republish'); return null; end $$;
comment on function sequin.republish(text, text) is 'Not in this version: 0A000.';

-- cursor is both what goes in and what comes out: an inout argument is the one way to give the two the same name.
create or replace function sequin.sync(
  stream text, inout cursor text default null, batch_size int default 1000, wait interval default '0', out seq bigint,
  out action text, out table_schema text, out table_name text, out record_pk text, out record jsonb, out changes jsonb,
  out committed_at timestamptz
)
returns setof record
language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('sync'); end $$;
comment on function sequin.sync(text, text, int, interval) is 'Not in this version: 0A000.';

create or replace function sequin.create_pipeline(
  name text,
  source_table text,
  event_table text,
  actions text[] default '{insert,update,delete}',
  filter text default null,
  retention interval default null,
  if_not_exists boolean default false
)
returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('change capture into an event log table'); return null; end $$;
comment on function sequin.create_pipeline(text, text, text, text[], text, interval, boolean) is 'Not in this version: 0A000.';

create or replace function sequin.alter_pipeline(
  name text, actions text[] default null, filter text default null, retention interval default null
)
returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('change capture into an event log table'); return null; end $$;
comment on function sequin.alter_pipeline(text, text[], text, interval) is 'Not in this version: 0A000.';

create or replace function sequin.drop_pipeline(name text, if_exists boolean default false)
returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('change capture into an event log table'); return null; end $$;
comment on function sequin.drop_pipeline(text, boolean) is 'Not in this version: 0A000.';

create or replace function sequin.pause_pipeline(name text)
returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('change capture into an event log table'); return null; end $$;
comment on function sequin.pause_pipeline(text) is 'Not in this version: 0A000.';

create or replace function sequin.resume_pipeline(name text)
returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('change capture into an event log table'); return null; end $$;
comment on function sequin.resume_pipeline(text) is 'Not in this version: 0A000.';

create or replace function sequin.create_webhook(
  name text,
  stream text,
  url text,
  headers jsonb default '{}',
  secret text default null,
  batch_size int default 1,
  request_timeout interval default '30 seconds',
  concurrency int default 8,
  filter text default null,
  transform text default null,
  actions text[] default '{insert,update,delete}',
  group_by text[] default null,
  start_at text default 'now',
  start_row text default null,
  ack_wait interval default '30 seconds',
  max_deliver int default null,
  max_ack_pending int default 10000,
  backoff interval default '1 second',
  max_backoff interval default '5 minutes',
  if_not_exists boolean default false
)
returns text language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin perform sequin._not_yet('webhook delivery'); return null; end $$;
comment on function sequin.create_webhook(text, text, text, jsonb, text, int, interval, int, text, text, text[], text[], text, text, interval, int, int, interval, interval, boolean) is
'Not in this version: 0A000.';
