-- +goose Up

-- What a consumer's filter and transform were compiled to, a row each for each table of its stream.
create table sequin.consumer_expression (
  consumer_id int not null references sequin.consumer on delete cascade,
  route_id    int not null references sequin.source_table,
  kind        text not null check (kind in ('filter', 'transform')),
  compiled    text not null,                      -- one expression, every name in it qualified
  inlined     text not null,                      -- the same, reading what it can straight from the message
  is_typed    boolean not null,                   -- new and old are rows; else jsonb, for a table of another database
  is_whole    boolean not null,                   -- needs new or old as a whole row
  uses_new    boolean not null,
  uses_old    boolean not null,
  columns     text[] not null,                    -- the columns that it names,
  types       text[] not null,                    -- and the type that each is read as
  others      text[] not null,                    -- types, functions and operators in it that are not the system's
  primary key (consumer_id, route_id, kind)
);

-- Why a consumer's filter or transform cannot be evaluated any more, as far as the catalog does not say so itself.
create table sequin.consumer_error (
  consumer_id int primary key references sequin.consumer on delete cascade,
  error       text not null,
  failed_at   timestamptz not null default clock_timestamp()
);

-- What a transform made of the message: record in its place, and evaluated once.
alter table sequin.feed add column record jsonb;

-- A message that filter or transform failed on: record is the table's, and redrive evaluates them again.
alter table sequin.dead_letter add column is_undecided boolean not null default false;
