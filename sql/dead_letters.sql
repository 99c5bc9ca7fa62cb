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
  v_letters sequin.delivery[];
  v_void text;
  v_total bigint := 0;
begin
  perform sequin._refuse_write('redrive');
  perform sequin._require_reader(c.stream_id);
  v_lanes := array(
    select distinct d.lane from sequin.dead_letter d
    where d.consumer_id = c.id and (seqs is null or d.seq = any (seqs))
    order by d.lane);
  foreach v_lane in array v_lanes loop
    v_void := pg_advisory_xact_lock(sequin._lane_key(c.name, v_lane));
  end loop;
  c := sequin._as_before(c);
  if c.id is null then
    return sequin.redrive(consumer, seqs);
  end if;
  perform sequin._decide_again(c, seqs);
  foreach v_lane in array v_lanes loop
    with gone as (
      delete from sequin.dead_letter d
      where d.consumer_id = c.id and d.lane = v_lane and (seqs is null or d.seq = any (seqs)) and not d.is_undecided
      returning d.*
    )
    select array_agg(
             (c.id, g.seq, v_lane, g.group_hash, 0, now(), null, null, null, false, false, null, g.error, g.route_id,
              g.committed_at, g.action, g.table_schema, g.table_name, g.record_pk, g.record, g.changes,
              g.metadata)::sequin.delivery order by g.seq)
      into v_letters
    from gone g;
    perform sequin._put_back(c, v_lane, v_letters);
    v_total := v_total + coalesce(cardinality(v_letters), 0);
  end loop;
  if v_total > 0 then
    perform pg_notify('sequin.' || c.name, '');
  end if;
  return v_total;
end $$;
comment on function sequin.redrive(text, bigint[]) is
'Puts dead letters back: they are delivered again, counting from one, each before whatever is left of its group. Those
that filter or transform failed on are decided on again: what fails again stays, with the new error, and what is not the
consumer''s goes. One that comes again anyway, after a rewind, does not come twice. Of a stream of rows, a letter comes again
as it was, and so after newer versions of its row that were delivered meanwhile: seq says which is newer.

consumer  whose
seqs      which; default: all of them

Returns how many. Errors: 42704 unknown consumer, 42501 no right to read its stream, 25006 read only transaction or replica,
55000 the filter or transform cannot be evaluated as it is.';
