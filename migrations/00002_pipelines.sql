-- +goose Up

-- They were empty, and of other types.
drop view if exists sequin.pipelines, sequin.pipeline_status;

-- Change capture pipelines: each change of a table into an event log table of the user's.
create table sequin.pipeline (
  id              int generated always as identity primary key,
  name            text not null unique,
  table_id        int not null references sequin.source_table,  -- whose changes
  event_relation  oid not null,                   -- where to; the names follow it, and find it again if it was made anew
  event_schema    text not null,
  event_name      text not null,
  actions         text[] not null,
  filter          text,
  retention       interval,                       -- null: kept for good
  paused_at       timestamptz,
  start_lsn       pg_lsn not null,                -- commits before it are not this pipeline's
  start_base      bigint not null,                -- the log's head when it was made: the search for its first row begins here
  error           text,                           -- why it does not go on; null while it does
  error_code      text,
  error_hint      text,
  failed_at       timestamptz,
  retention_error text,                           -- why its old partitions are not dropped
  changed_at      timestamptz not null default clock_timestamp(),  -- by the user: what has failed is tried again at once
  created_at      timestamptz not null default now()
);
create index on sequin.pipeline (table_id);

-- How far a pipeline has got: none, and it has not started. Append only, newest wins. Written in the transaction that
-- writes the events, and only one row can follow another: so each change is written once.
create table sequin.pipeline_progress (
  pipeline_id int not null,
  step        bigint not null,
  seq         bigint not null,                    -- of the log, up to which it is done
  passed      bigint not null,                    -- rows its table had had by then: less where some were not chosen
  written     bigint not null,                    -- events it has written
  written_at  timestamptz not null default clock_timestamp(),
  primary key (pipeline_id, step)
);

-- A pipeline may lose changes to max_bytes, as a consumer may.
alter table sequin.gap add column pipeline_id int references sequin.pipeline on delete cascade;

drop function if exists sequin.accept_gap(text, text);
