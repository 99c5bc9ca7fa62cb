-- +goose Up

-- It is told how long it may wait.
drop function if exists sequin.bridge_retain(int);
