-- +goose Up

-- ack, nack and extend look for tracked messages by whole calls now, and not by leases.
drop function if exists sequin._mine(sequin.consumer, bigint, int[], boolean);
drop function if exists sequin._ack_some(sequin.consumer, bigint, smallint, int[]);
