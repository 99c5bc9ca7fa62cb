-- +goose Up

drop function if exists sequin._event_table_problem(oid, boolean);
drop function if exists sequin._check_event_table(sequin.pipeline);
drop function if exists sequin._check_circle(sequin.pipeline);
drop function if exists sequin.bridge_pipelines(int);
