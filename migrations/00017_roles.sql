-- +goose Up

-- By name in a dump: in another cluster the number may be another role's.
alter table sequin.consumer_grant alter column role type regrole;
