-- +goose Up

-- Other databases than this one, as sources.

alter table sequin.source
  add column altered_at timestamptz not null default now(),  -- of its conninfo: a bridge that has another connects anew
  add column dropped_at timestamptz,              -- the bridge still has to clear away what is on the source
  add column home_oid oid;                        -- of the database whose slot and publication are there: a copy's are not

-- A table of another source is looked up, checked and published there by the bridge: until then it has no oid.
alter table sequin.source_table
  alter column relation_oid drop not null,
  add column column_names text[],                 -- null where it has not been found yet; local tables: in the catalog
  add column identity_columns text[],             -- of its old rows, where the server sends no more of them; null: it sends all
  add column published_at timestamptz,            -- its changes are captured; null: not yet, or not any more
  add column error text,                          -- why the bridge cannot
  add column error_hint text;

alter table sequin.stream_table
  add column given_name text;                     -- as create_stream was given it, where only the bridge can look it up

-- Positions of two servers do not compare: a consumer of another source's tables starts by the time of commits.
alter table sequin.consumer
  add column start_time timestamptz;

-- Where the write-ahead log of another source is, and its slot. Append only, newest wins.
create table sequin.source_sample (
  source_id     int not null,
  sampled_at    timestamptz not null default clock_timestamp(),
  current_lsn   pg_lsn not null,
  confirmed_lsn pg_lsn,
  restart_lsn   pg_lsn,
  primary key (source_id, sampled_at)
);

-- These have got an argument more.
drop function if exists sequin.bridge_consumers();
drop function if exists sequin.bridge_notify(int[]);
drop function if exists sequin.bridge_sample();
