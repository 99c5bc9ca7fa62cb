-- +goose Up

-- Which publication, and which place of a table in it, the log was captured under. One that is dropped and made anew has
-- another oid: what was committed in between is not in the stream, and nothing else tells.
alter table sequin.source add column publication_oid oid;
alter table sequin.source_table add column publication_rel_oid oid;
alter table sequin.source_table add column unpublished_lsn pg_lsn;   -- it was seen to be out of the publication; null: it is in

update sequin.source s set publication_oid = p.oid
from pg_publication p
where p.pubname = s.publication_name and s.conninfo is null;

update sequin.source_table t set publication_rel_oid = r.oid
from sequin.source s
join pg_publication p on p.pubname = s.publication_name
join pg_publication_rel r on r.prpubid = p.oid
where s.id = t.source_id and s.conninfo is null and r.prrelid = t.relation_oid;
