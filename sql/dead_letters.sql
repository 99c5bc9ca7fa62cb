-- Messages that were given up after max_deliver deliveries.

create or replace function sequin.redrive(consumer text, seqs bigint[] default null)
returns bigint
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set jit = off
as $$
declare
  c sequin.consumer := sequin._consumer(consumer);
  v_lanes smallint[];
  v_lane smallint;
  s sequin.lane;
  v_void text;
  v_count int;
  v_held int;
  v_groups int[];
  v_total bigint := 0;
begin
  perform sequin._refuse_write('redrive');
  v_lanes := array(
    select distinct d.lane from sequin.dead_letter d
    where d.consumer_id = c.id and (seqs is null or d.seq = any (seqs))
    order by d.lane);
  foreach v_lane in array v_lanes loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
  end loop;
  perform sequin._decide_again(c, seqs);
  foreach v_lane in array v_lanes loop
    s := sequin._lane(c.id, v_lane);
    with gone as (
      delete from sequin.dead_letter d
      where d.consumer_id = c.id and d.lane = v_lane and (seqs is null or d.seq = any (seqs)) and not d.is_undecided
      returning d.*
    ), held as (
      -- Its group is held back from here on; what of it is out with the lane's lease comes first.
      insert into sequin.held_group as h (consumer_id, lane, group_hash, after_seq, behind_lease, route_id, record_pk, is_mixed)
      select c.id, v_lane, g.group_hash, s.upto_seq, s.lease, min(g.route_id), min(g.record_pk),
             count(distinct (g.route_id, g.record_pk)) > 1
      from gone g
      group by g.group_hash
      on conflict (consumer_id, lane, group_hash) do update
        set is_mixed = h.is_mixed or excluded.is_mixed
                       or (h.route_id, h.record_pk) is distinct from (excluded.route_id, excluded.record_pk)
      returning h.group_hash, h.xmax = 0 as is_new
    ), tracked as (
      insert into sequin.delivery (
        consumer_id, seq, lane, group_hash, deliver_count, not_before, is_out, error, route_id, committed_at, action,
        table_schema, table_name, record_pk, record, changes, metadata)
      select c.id, g.seq, v_lane, g.group_hash, 0, clock_timestamp(), false, g.error, g.route_id, g.committed_at, g.action,
             g.table_schema, g.table_name, g.record_pk, g.record, g.changes, g.metadata
      from gone g
      returning seq
    )
    select (select count(*) from tracked), count(*) filter (where h.is_new), array_agg(h.group_hash)
      into v_count, v_held, v_groups
    from held h;
    perform sequin._count_lane(c, v_lane, v_count, v_count, v_held, 0);
    perform sequin._arm(c.id, v_lane, v_groups);
    v_total := v_total + v_count;
  end loop;
  return v_total;
end $$;
comment on function sequin.redrive(text, bigint[]) is
'Puts dead letters back: they are delivered again, counting from one, each before whatever is left of its group. Those
that filter or transform failed on are decided on again: what fails again stays, with the new error, and what is not the
consumer''s goes.

consumer  whose
seqs      which; default: all of them

Returns how many. Errors: 42704 unknown consumer, 25006 read only transaction or replica, 55000 the filter or transform
cannot be evaluated as it is.';
