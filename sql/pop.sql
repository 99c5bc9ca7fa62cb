-- Receive and ack in one, for work in the same database: exactly once.

create or replace function sequin.pop(
  consumer text default null,
  batch_size int default 1,
  wait interval default '0'
)
returns table (
  seq bigint,
  action text,
  table_schema text,
  table_name text,
  record_pk text,
  record jsonb,
  changes jsonb,
  committed_at timestamptz,
  deliver_count int,
  metadata jsonb
)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if consumer is null then
    consumer := (sequin._my_consumer(null)).name;
  end if;
  -- The lease is seen by nobody but the ack: both are in the caller's transaction.
  return query
    with received as materialized (
      select * from sequin.receive(consumer, batch_size, wait)
    ), acknowledged as materialized (
      select sequin.ack(consumer, array(select r.ack_id from received r)) as n
    )
    select r.seq, r.action, r.table_schema, r.table_name, r.record_pk, r.record, r.changes, r.committed_at,
           r.deliver_count, r.metadata
    from acknowledged
    cross join received r;
end $$;
comment on function sequin.pop(text, int, interval) is
'Receive and ack in one. In the transaction that does the work, in this database, that is exactly once: a rollback
gives the messages back.

  begin;
    insert into totals select … from sequin.pop(''totals'', 100);
  commit;

consumer    may be left out where there is exactly one
batch_size  1 to 10000: at most so many
wait        0 to 60 seconds: where there is nothing, wait so long for something

Returns what receive does, less ack_id. Errors: as receive.';
