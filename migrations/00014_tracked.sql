-- +goose Up

-- A message is looked for with its group, never by seq alone: one index for both. Of two that begin with the consumer, a
-- planner that has seen the table nearly empty took whichever had fewer pages, and read all that was tracked at each look.
drop index sequin.delivery_group;
alter table sequin.delivery
  drop constraint delivery_pkey,
  add primary key (consumer_id, lane, group_hash, seq);

-- What it removes is given by its groups.
drop function if exists sequin._sweep(sequin.consumer, smallint, boolean);
