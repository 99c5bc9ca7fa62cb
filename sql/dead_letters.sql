-- Messages that were given up after max_deliver deliveries.

create or replace function sequin.redrive(consumer text, seqs bigint[] default null)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  c sequin.consumer := sequin._consumer(consumer);
  d sequin.dead_letter;
  s sequin.lane;
  v_void text;
  v_new boolean;
  v_count bigint := 0;
begin
  perform sequin._refuse_write('redrive');
  for d in
    delete from sequin.dead_letter t
    where t.consumer_id = c.id and (seqs is null or t.seq = any (seqs))
    returning t.*
  loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, d.lane));
    s := sequin._lane(c.id, d.lane);
    -- Its group is held back from here on; what of it is out with the lane's lease comes first.
    insert into sequin.held_group (consumer_id, lane, group_hash, after_seq, behind_lease)
    values (c.id, d.lane, d.group_hash, s.upto_seq, s.lease)
    on conflict do nothing;
    v_new := found;
    insert into sequin.delivery (
      consumer_id, seq, lane, group_hash, deliver_count, not_before, is_out, error, route_id, committed_at, action,
      table_schema, table_name, record_pk, record, changes, metadata)
    values (
      c.id, d.seq, d.lane, d.group_hash, 0, clock_timestamp(), false, d.error, d.route_id, d.committed_at, d.action,
      d.table_schema, d.table_name, d.record_pk, d.record, d.changes, d.metadata);
    perform sequin._count_lane(c.id, d.lane, 1, v_new::int, 0);
    perform sequin._arm(c.id, d.lane, d.group_hash);
    v_count := v_count + 1;
  end loop;
  return v_count;
end $$;
comment on function sequin.redrive(text, bigint[]) is
'Puts dead letters back: they are delivered again, counting from one, each before whatever is left of its group.

consumer  whose
seqs      which; default: all of them

Returns how many. Errors: 42704 unknown consumer.';
