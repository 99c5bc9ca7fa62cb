-- +goose Up

-- What a source's publication is, by its row of the catalog, its xmin with it: one that was altered and put back, or renamed and
-- renamed back, has a row as before that another transaction wrote. What it kept back meanwhile is not in the stream.
alter table sequin.source add column publication_row jsonb;
-- The server cannot send what the slot has next: there was no publication of the name then.
alter table sequin.source add column is_unreadable boolean not null default false;

update sequin.source s set publication_row = to_jsonb(p) || jsonb_build_object('xmin', p.xmin::text)
from pg_publication p
where p.oid = s.publication_oid and s.conninfo is null;

drop function if exists sequin.bridge_settle(int, bigint);
drop function if exists sequin.bridge_captured_publication(int);
