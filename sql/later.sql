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
