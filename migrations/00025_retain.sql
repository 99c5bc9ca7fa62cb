-- +goose Up

-- It is told how long it may wait.
drop function if exists sequin.bridge_retain(int);

-- It looked at the log, and kept it locked.
drop function if exists sequin._is_after(text, int[], int, bigint);
