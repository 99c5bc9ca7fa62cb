-- +goose Up

-- They returned nothing, and say now whether the bell was had.
drop function if exists sequin.bridge_hold_bell(int, bigint);
drop function if exists sequin.bridge_ring(int, bigint);
