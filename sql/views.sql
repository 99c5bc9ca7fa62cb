-- What there is. Views for the owner, and for roles that may configure.

create or replace view sequin.sources as
select s.name, s.database_id, s.conninfo is null as is_local, s.slot_name, s.publication_name,
       case when s.error is not null then 'error' when s.conninfo is not null and s.slot_name is null then 'pending' else 'ok' end as state,
       s.error, s.created_at, s.error_hint as hint
from sequin.source s
where s.dropped_at is null;
comment on view sequin.sources is
'Databases whose tables are streamed. state: pending (the bridge has not begun to capture it), ok, error. What a source is
reached by is never shown.';

create or replace view sequin.streams as
select s.name, c.name as source, s.mode, s.sort_column,
       (select array_agg(case when t.column_names is null and st.given_name is not null then st.given_name
                              else format('%I.%I', t.schema_name, t.table_name) end order by st.position)
        from sequin.stream_table st join sequin.source_table t on t.id = st.table_id
        where st.stream_id = s.id) as tables,
       (select count(*) from sequin.consumer n where n.stream_id = s.id) as consumer_count,
       s.created_at, e.state, e.error
from sequin.stream s
join sequin.source c on c.id = s.source_id
cross join lateral sequin._stream_state(s.id) e;
comment on view sequin.streams is
'Streams, and the tables they are made of. state: active; error: its tables were dropped; of another source''s tables also
pending (the bridge has not found them yet), or error.';

create or replace view sequin.consumers as
select c.id, c.name, s.name as stream,
       case when c.paused_at is not null then 'paused' when r.error is not null then 'error'
            when c.start_seq is null then 'starting' else 'active' end as state,
       c.filter, c.transform, c.actions, c.group_by, c.start_at, c.ack_wait, c.max_deliver, c.max_ack_pending, c.backoff,
       c.max_backoff, c.paused_at, c.created_at, r.error
from sequin.consumer c
join sequin.stream s on s.id = c.stream_id
cross join lateral (select sequin._consumer_error(c) as error) r;
comment on view sequin.consumers is
'Consumers and their options. state: starting (it waits for the log to pass the moment it was made), active, paused, or
error: its filter or transform cannot be evaluated as things are. It waits, and loses nothing, until alter_consumer gives
it another, or what error names is back.';

create or replace view sequin.messages as
select s.name as stream, l.seq, sequin._action(l.action) as action, l.table_schema, l.table_name, l.record_pk, l.record,
       case when s.mode = 'changes' then l.changes end as changes, l.committed_at, l.metadata
from sequin.stream s
join sequin.stream_table t on t.stream_id = s.id
join sequin.log l on l.route_id = t.table_id
where l.action <> 'x' or s.mode = 'rows';
comment on view sequin.messages is
'The kept log, as each stream has it. Ask by stream and seq, or stream and record_pk: those are indexed.';

-- A consumer's messages that are out, or on their way back, for those who may see the view of them: whoever may configure may
-- call this. Of the argument only the id counts.
create or replace function sequin._deliveries(c sequin.consumer)
returns table (
  ack_id bigint, seq bigint, action text, table_schema text, table_name text, record_pk text, deliver_count int,
  state text, delivered_at timestamptz, expires_at timestamptz, due_at timestamptz, error text
)
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
  select sequin._ack_id(s.lease, s.lane, r.place), r.seq, sequin._action(r.action), r.table_schema, r.table_name,
         r.record_pk, 1, case when s.leased_until > clock_timestamp() then 'out' else 'expired' end, s.leased_at,
         s.leased_until, null, null
  from sequin.consumer c
  cross join lateral generate_series(0, c.lane_count - 1) n(lane)
  cross join lateral sequin._lane(c.id, n.lane::smallint) s
  cross join lateral (
    select r.*, (row_number() over (order by r.seq) - 1)::int as place
    from sequin._rows(c, s.lane, s.cursor_seq, s.upto_seq, 2147483647) r) r
  cross join lateral unnest(sequin._unsettled(s)) u(place)
  where c.id = ($1).id and s.lease is not null and r.place = u.place
    and has_table_privilege(sequin._caller(), 'sequin.deliveries', 'select')
  union all
  select case when d.is_out then sequin._ack_id(d.lease, d.lane, d.pick) end, d.seq, sequin._action(d.action),
         d.table_schema, d.table_name, d.record_pk, d.deliver_count,
         case when not d.is_out then 'waiting' when d.not_before > clock_timestamp() then 'out' else 'expired' end,
         d.leased_at, case when d.is_out then d.not_before end, case when not d.is_out then d.not_before end, d.error
  from sequin.delivery d
  where d.consumer_id = ($1).id and not d.is_done
    and has_table_privilege(sequin._caller(), 'sequin.deliveries', 'select')
$$;

create or replace view sequin.deliveries as
select c.name as consumer, d.*
from sequin.consumer c
cross join lateral sequin._deliveries(c) d
where c.start_seq is not null;
comment on view sequin.deliveries is
'Messages that were handed out and are not acknowledged. state: out (until expires_at), expired (its worker is late), or
waiting (given back or taken back: from due_at on it comes again, in its turn).';

create or replace view sequin.dead_letters as
select c.name as consumer, d.seq, sequin._action(d.action) as action, d.table_schema, d.table_name, d.record_pk, d.record,
       case when not c.is_rows then d.changes end as changes, d.committed_at, d.metadata, d.deliver_count, d.error, d.dead_at
from sequin.dead_letter d
join sequin.consumer c on c.id = d.consumer_id;
comment on view sequin.dead_letters is
'Messages that were given up after max_deliver deliveries, or that a filter or transform failed on (deliver_count is 0).
sequin.redrive(consumer, seqs) puts them back.';

create or replace view sequin.webhooks as
select null::int as id, null::text as name, null::text as stream, null::text as url, null::text as state where false;
comment on view sequin.webhooks is 'Webhooks: not in this version, and so always empty.';
