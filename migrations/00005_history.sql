-- +goose Up

-- Backfills: rows that a consumer is given from the table itself. See sql/history.sql.

-- What a backfill writes is for one consumer: it is in the log under a route of its own, beside the table's. Negative,
-- so that no table's is ever like it.
create sequence sequin.side_route_id as int increment -1 minvalue -2147483648 maxvalue -1 start -1;
create table sequin.side_route (
  id          int primary key,
  consumer_id int not null,
  table_id    int not null references sequin.source_table,
  unique (consumer_id, table_id)
);

create table sequin.backfill (
  id           bigint generated always as identity primary key,
  consumer_id  int not null references sequin.consumer on delete cascade,
  is_start     boolean not null,                  -- the consumer begins with it
  table_ids    int[] not null,                    -- one after the other
  side_routes  int[] not null,                    -- of each table
  sort_column  text,
  from_row     text,
  filter       text,
  state        text not null default 'waiting' check (state in ('waiting', 'running', 'done', 'cancelled', 'failed')),
  segment      int,                               -- of the log, its own: null until it has been made
  live_segment int,                               -- where the log goes on after it, from the cut on
  cut_lsn      pg_lsn,                            -- what commits before it is before the history, in the log
  cut_xmin     bigint,                            -- transactions before it had ended by then: their rows have not changed since
  cut_at       timestamptz,                       -- the log is past the cut, and what is before it can be read in the tables
  rows_total   bigint,                            -- as the planner estimates
  error        text,
  created_at   timestamptz not null default clock_timestamp(),
  started_at   timestamptz,
  finished_at  timestamptz
);
create index on sequin.backfill (consumer_id);

-- How far a backfill has got. Append only, newest wins; written in the transaction that writes the rows, and a bridge
-- that was taken over from cannot write the same step.
create table sequin.backfill_step (
  backfill_id bigint not null,
  step        bigint not null,
  place       int not null,                       -- which of its tables
  last_key    text[],                             -- of the last row that was read: sort column and key; null: none yet
  last_seq    bigint not null,                    -- the last that was written
  rows_done   bigint not null,                    -- read, and so done with
  primary key (backfill_id, step)
);

alter table sequin.log_segment add backfill_id bigint;   -- whose history it is; null: the live log's
alter table sequin.consumer add history_id bigint;       -- the backfill that is being written: nothing after it is read yet
alter table sequin.consumer add history_seq bigint;      -- the last row that was written for it alone
