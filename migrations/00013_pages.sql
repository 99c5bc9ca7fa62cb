-- +goose Up

-- It takes the values of the last row now.
drop function if exists sequin._sync_page_sql(sequin.stream, oid, boolean, boolean);
