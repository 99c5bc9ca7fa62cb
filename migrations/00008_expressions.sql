-- +goose Up

-- What a pipeline's filter was compiled to: as sequin.consumer_expression is of a consumer's.
create table sequin.pipeline_expression (
  pipeline_id int primary key references sequin.pipeline on delete cascade,
  compiled    text not null,
  inlined     text not null,
  is_typed    boolean not null,
  is_whole    boolean not null,
  uses_new    boolean not null,
  uses_old    boolean not null,
  columns     text[] not null,
  types       text[] not null,
  others      text[] not null
);

-- What a backfill's filter was compiled to: a condition on a row, called new, of each of its tables, in their order.
alter table sequin.backfill add column conditions text[];
