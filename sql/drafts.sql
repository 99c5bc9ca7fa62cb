-- Drafts: segments that one large transaction fills before they are a part of the log.
--
-- Three indexes are half of what a row of the log costs where it is inserted into them, and a fifth where they are built over
-- all rows at once, by two processes: of 500,000 rows, COPY into a segment took 3.1 s, and COPY into a table without indexes
-- and their building 1.3 and 0.6. So a transaction that has shown itself to be large goes on in a table of its own, which
-- nobody sees until it is attached, in the transaction that commits its rows. It is made in another before, so that a server
-- that crashes meanwhile knows the table, and it can be dropped.

-- Makes the table in which a source's large transaction goes on. Its id; null: not now. Not where the log has a segment after
-- this one already, perhaps a backfill's, which the transaction may have to be before; nor where there are many: each is
-- looked at by who reads the log; nor where a draft was left behind: what has failed once, for want of room for its indexes
-- maybe, goes the other way.
create or replace function sequin.bridge_draft(source_id int, segment int, commit_lsn text)
returns int
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
declare
  v_id int;
begin
  -- What is opened from now on is after it.
  lock table sequin.log_segment in share row exclusive mode;
  if exists (select from sequin.log_segment s where s.source_id = bridge_draft.source_id and s.id > segment)
     or (select count(*) from sequin.log_segment s where s.source_id = bridge_draft.source_id) >= 8
     or exists (select from sequin.log_draft d where d.source_id = bridge_draft.source_id) then
    return null;
  end if;
  v_id := nextval('sequin.log_segment_id');
  execute format('create table sequin.%I (like sequin.log including defaults, constraint is_whole check (seq >= %s and seq < %s))',
    'log_' || v_id, v_id::bigint << 32, (v_id::bigint + 1) << 32);
  insert into sequin.log_draft (id, source_id, commit_lsn) values (v_id, source_id, commit_lsn::pg_lsn);
  return v_id;
exception when lock_not_available then
  return null;
end $$;
comment on function sequin.bridge_draft(int, int, text) is
'For the bridge, in the middle of a large transaction, which commits at this LSN and whose rows go to this segment: the one to
go on in, a table that is not attached yet, or null.';

-- Makes a draft a segment, in the transaction that has filled it. The indexes first: what comes after them is soon done, and
-- the locks it takes are not held for long.
create or replace function sequin.bridge_attach_draft(source_id int, id int)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
as $$
declare
  v_table text := 'log_' || id;
  v_index text;
begin
  for v_index in
    select pg_get_indexdef(i.indexrelid) from pg_index i where i.indrelid = 'sequin.log'::regclass order by i.indexrelid
  loop
    execute regexp_replace(v_index, '^CREATE INDEX \S+ ON ONLY sequin\.log ', format('create index on sequin.%I ', v_table));
  end loop;
  delete from sequin.log_draft d where d.id = bridge_attach_draft.id;
  perform sequin._attach_segment(source_id, id);
  execute format('alter table sequin.%I drop constraint is_whole', v_table);
  return true;
end $$;
comment on function sequin.bridge_attach_draft(int, int) is
'For the bridge, before bridge_commit: the log has the rows of a draft from this transaction on.';

-- Drops the drafts of transactions that committed before an LSN: what was left where one did not come to its end, and came
-- again. One that is still being filled is locked.
create or replace function sequin._drop_drafts(source_id int, before pg_lsn)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id int;
begin
  for v_id in
    select d.id from sequin.log_draft d where d.source_id = _drop_drafts.source_id and d.commit_lsn < before
  loop
    begin
      execute format('lock table sequin.%I in access exclusive mode nowait', 'log_' || v_id);
      execute format('drop table sequin.%I', 'log_' || v_id);
      delete from sequin.log_draft d where d.id = v_id;
    exception when lock_not_available then
      null;
    end;
  end loop;
end $$;
