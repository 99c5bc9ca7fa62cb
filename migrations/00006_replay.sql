-- +goose Up

-- What sync must know of segments that are gone: up to where a route's rows were dropped. One row a route that has lost
-- some to the retention.
create table sequin.dropped_log (
  route_id int primary key,
  seq      bigint not null
);

-- Numbers the rows that republish reads from a table: see sequin._is_reread.
create sequence sequin.reread minvalue 0 maxvalue 2147483647 cycle;
