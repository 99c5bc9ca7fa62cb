-- +goose Up

-- Going on after a hole takes several steps, and what is missing looks different after each.
alter table sequin.gap
  add column passed_at timestamptz;               -- the bridge has begun to go on after it

-- It has got an argument.
drop function if exists sequin.bridge_is_awaited();
