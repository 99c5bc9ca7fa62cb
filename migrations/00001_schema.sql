-- +goose Up

-- The tables. Functions and views are not here: they are the repeatable layer in sql/, applied whole.
-- Nothing in this directory may use anything from sql/, so that either can be read, and run, alone.

-- Where changes come from. 'local' is this database.
create table sequin.source (
  id                int generated always as identity primary key,
  name              text not null unique,
  conninfo          text,                         -- null: this database
  database_id       uuid not null,                -- names the source in event log tables, for good
  slot_name         text,                         -- set when a bridge first starts
  publication_name  text not null default 'sequin',
  system_identifier text,                         -- the cluster and database the slot belongs to: what start-up compares
  timeline          int,
  database_oid      oid,
  error             text,                         -- why the bridge refuses to go on; null when it does not
  error_hint        text,
  created_at        timestamptz not null default now()
);

insert into sequin.source (name, database_id)
values ('local', md5(random()::text || clock_timestamp()::text)::uuid);

-- A table that is, or was, streamed. Its id is its route in the log. Names follow renames; the oid is who it is.
create table sequin.source_table (
  id           int generated always as identity primary key,
  source_id    int not null references sequin.source,
  relation_oid oid not null,
  schema_name  text not null,
  table_name   text not null,
  key_columns  text[] not null,                   -- the primary key, else the replica identity's; '{}': none
  created_at   timestamptz not null default now(),
  unique (source_id, relation_oid)
);

create table sequin.stream (
  id          int generated always as identity primary key,
  name        text not null unique,
  source_id   int not null references sequin.source,
  mode        text not null check (mode in ('rows', 'changes')),
  sort_column text,
  created_at  timestamptz not null default now()
);

create table sequin.stream_table (
  stream_id int not null references sequin.stream on delete cascade,
  table_id  int not null references sequin.source_table,
  position  int not null,                         -- as listed in create_stream
  primary key (stream_id, table_id)
);
create index on sequin.stream_table (table_id);

-- The change log: each published change once, in commit order, written by one bridge a source, so that no reader
-- ever sees a later seq before an earlier one. Append only. A partition is a segment, and a segment is the high
-- 32 bits of seq: which partition holds a seq is arithmetic, a segment can never overflow, several sources share
-- one seq space, and space comes back by dropping whole segments.
create table sequin.log (
  seq          bigint not null,
  committed_at timestamptz not null,
  route_id     int not null,                      -- source_table.id
  group_hash   int not null,                      -- hash of table and key: messages of one group keep their order
  lane         smallint not null,                 -- group_hash modulo 64: what consumers share out among workers
  action       "char" not null,                   -- i u d t; r: read by a backfill; x: the old key's end, where an update changed the key
  table_schema text not null,
  table_name   text not null,
  record_pk    text collate "C",
  record       jsonb,
  changes      jsonb,                             -- updates: the old values of what changed, as far as Postgres gives them
  metadata     jsonb not null                     -- commit_lsn, xid, unchanged: made once here, not at every delivery
) partition by range (seq);
create index log_route_seq on sequin.log (route_id, seq);
create index log_route_lane_seq on sequin.log (route_id, lane, seq);
create index log_record_pk on sequin.log (record_pk, route_id);

create table sequin.log_segment (
  id         int primary key,
  source_id  int not null references sequin.source,
  opened_at  timestamptz not null default now(),
  closed_at  timestamptz                          -- null: being written, or waiting to be
);
create sequence sequin.log_segment_id minvalue 0 start 0;

-- How far the log has got. Append only, newest wins (an updated row would rot under a long snapshot elsewhere).
-- A bridge writes step + 1 in the transaction that writes the rows: two bridges cannot both succeed.
create table sequin.progress (
  source_id   int not null references sequin.source,
  step        bigint not null,
  applied_lsn pg_lsn not null,                    -- end of the last source transaction in the log
  horizon_lsn pg_lsn not null,                    -- the slot may have been confirmed up to here though nothing was logged
  last_seq    bigint not null,
  written_at  timestamptz not null default clock_timestamp(),
  primary key (source_id, step)
);

-- How many messages a table has had, as of a seq: counts in views are differences of these, never count(*).
create table sequin.tally (
  route_id int not null,
  seq      bigint not null,
  total    bigint not null,
  primary key (route_id, seq)
);

create table sequin.consumer (
  id              int generated always as identity primary key,
  name            text not null unique,
  stream_id       int not null references sequin.stream,
  routes          int[] not null,                 -- what it reads of the log: its stream's tables
  is_rows         boolean not null,               -- its stream's mode
  reads           text not null check (reads in ('key', 'total', 'feed')),
                                                  -- key: the log's lanes; total: the log in seq order; feed: an index of its own
  lane_count      int not null,
  lane_quota      int not null,                   -- what a lane may have out without a look at the others
  permit_count    int not null,                   -- beyond that, permits: so many, of which a lane may hold some
  permit_size     int not null,                   -- and each is good for so many messages
  filter          text,
  transform       text,
  actions         text[] not null,
  group_by        text[],
  start_at        text not null,
  ack_wait        interval not null,
  max_deliver     int,
  max_ack_pending int not null,
  backoff         interval not null,
  max_backoff     interval not null,
  paused_at       timestamptz,
  start_lsn       pg_lsn not null,                -- commits before it are not this consumer's
  start_base      bigint not null,                -- the log's head when it was made: the search for start_seq begins here
  start_seq       bigint,                         -- null until the log has passed start_lsn
  start_total     bigint,                         -- messages its routes had had at start_seq
  feed_id         int,                            -- names its rows in sequin.feed; a new one whenever its shape changes
  created_at      timestamptz not null default now()
);
create index on sequin.consumer (stream_id);

create table sequin.consumer_grant (
  consumer_id int not null references sequin.consumer on delete cascade,
  role        oid not null,
  granted_at  timestamptz not null default now(),
  primary key (consumer_id, role)
);

-- One turn names one lease, everywhere and for ever: ack_ids are made of it. Only even ones: the odd one after it is the
-- row that ends the lease, so that an ack needs none of its own.
create sequence sequin.turn increment 2 minvalue 2;

-- The state of a consumer's lanes. Append only, newest (highest prev) wins. A row replaces the row whose turn is its
-- prev, and the primary key lets only one do so.
create table sequin.lane (
  consumer_id  int not null,
  lane         smallint not null,
  prev         bigint not null,                   -- the turn of the row this one replaces; 0: none
  turn         bigint not null,
  cursor_seq   bigint not null,                   -- up to here everything is acknowledged, or kept in sequin.delivery
  upto_seq     bigint not null,                   -- up to here everything is handed out
  passed       bigint not null default 0,         -- rows ever passed by, for counting what is pending
  held_back    bigint not null default 0,         -- of those, rows of held groups that still wait in the log
  lease        bigint,                            -- the turn that handed out cursor_seq..upto_seq; null: nothing is out
  leased_at    timestamptz,
  leased_until timestamptz,
  out_count    int not null default 0,            -- of the lease, not yet settled
  picks        int[],                             -- which rows of the range were handed out; null: all
  settled_to   int not null default 0,            -- the first so many rows of the lease are settled (picks is null)
  settled      int[],                             -- and these; null: none
  tracked      int not null default 0,            -- rows in sequin.delivery
  fresh        int not null default 0,            -- of those, never handed out: they are not pending an ack
  held         int not null default 0,            -- rows in sequin.held_group
  permits      smallint[],                        -- what it holds, where it has more pending than lane_quota
  primary key (consumer_id, lane, prev)
);

-- Where a consumer stands as a whole: each message up to seq is settled, but for those in the busy lanes. Append
-- only, newest wins. A caught-up consumer learns from one row that 64 lanes have nothing for it.
create table sequin.floor (
  consumer_id int not null,
  step        bigint not null,
  seq         bigint not null,
  busy        smallint[] not null,
  is_deep     boolean not null default false,     -- far behind: any busy lane is worth a try
  primary key (consumer_id, step)
);

-- Messages followed one by one: the exceptions. Nacked, expired, moved out of their lane's way, or redriven. They
-- carry their message with them, so that one that fails for days does not hold the log.
create table sequin.delivery (
  consumer_id   int not null,
  seq           bigint not null,
  lane          smallint not null,
  group_hash    int not null,
  deliver_count int not null,
  not_before    timestamptz not null,             -- backing off until then; while out: the end of its lease
  due_at        timestamptz,                      -- of the first of its group: not_before, or -infinity where it was never
                                                  -- handed out; null: waits behind another; epoch: is_done
  lease         bigint,                           -- the turn of its latest delivery
  pick          int,                              -- its place in that delivery
  is_out        boolean not null,                 -- a worker has it
  is_done       boolean not null default false,   -- acknowledged: to be removed by whoever next has the lane
  leased_at     timestamptz,
  error         text,
  route_id      int not null,
  committed_at  timestamptz not null,
  action        "char" not null,
  table_schema  text not null,
  table_name    text not null,
  record_pk     text,
  record        jsonb,
  changes       jsonb,
  metadata      jsonb not null,
  primary key (consumer_id, seq)
);
create index delivery_due on sequin.delivery (consumer_id, due_at) where due_at is not null;
create index delivery_group on sequin.delivery (consumer_id, lane, group_hash, seq);
create index delivery_lease on sequin.delivery (consumer_id, lease) where lease is not null;

-- A group with messages in sequin.delivery: its lane passes it by until they are settled.
create table sequin.held_group (
  consumer_id  int not null,
  lane         smallint not null,
  group_hash   int not null,
  after_seq    bigint not null,                   -- what the lane passed by begins after this
  behind_lease bigint,                            -- a lease that still has some of the group out
  held_back    bigint not null default 0,         -- messages of it that the lane has passed by since
  route_id     int not null,                      -- whose group it is, by key: the row
  record_pk    text collate "C",
  is_mixed     boolean not null default false,    -- another row's group has the same hash, and is held with it
  primary key (consumer_id, lane, group_hash)
);

create table sequin.dead_letter (
  consumer_id   int not null references sequin.consumer on delete cascade,
  seq           bigint not null,
  group_hash    int not null,
  lane          smallint not null,
  deliver_count int not null,
  error         text,
  dead_at       timestamptz not null default clock_timestamp(),
  route_id      int not null,
  committed_at  timestamptz not null,
  action        "char" not null,
  table_schema  text not null,
  table_name    text not null,
  record_pk     text,
  record        jsonb,
  changes       jsonb,
  metadata      jsonb not null,
  primary key (consumer_id, seq)
);

-- For a consumer that groups or chooses in its own way: which messages are its, and in which lane. Narrow, written
-- once a message, and dropped with the log's segments, so that dropping a consumer is one row however far behind it is.
create table sequin.feed (
  feed_id    int not null,
  seq        bigint not null,
  route_id   int not null,
  group_hash int not null,
  lane       smallint not null
) partition by range (seq);
create index feed_lane_seq on sequin.feed (feed_id, lane, seq);
create sequence sequin.feed_id;

-- How far a feed has got. Append only, newest wins.
create table sequin.feed_progress (
  feed_id int not null,
  step    bigint not null,
  seq     bigint not null,
  lanes   bigint not null,                        -- the lanes this step added to
  total   bigint not null,                        -- rows the feed has had
  primary key (feed_id, step)
);

-- Counters over time, for rates: one row a consumer every few seconds, by the bridge.
create table sequin.consumer_sample (
  consumer_id   int not null,
  sampled_at    timestamptz not null,
  handed_out    bigint not null,
  primary key (consumer_id, sampled_at)
);

-- What was lost, and why. Written whenever the log, or a consumer, goes on after a hole.
create table sequin.gap (
  id          bigint generated always as identity primary key,
  source_id   int not null references sequin.source,
  consumer_id int references sequin.consumer on delete cascade,   -- null: the log itself has the hole
  from_lsn    pg_lsn,
  to_lsn      pg_lsn,
  from_seq    bigint,
  to_seq      bigint,
  reason      text not null,
  recorded_at timestamptz not null default now(),
  accepted_at timestamptz                         -- null: an error in health()
);

create table sequin.setting (
  is_only    boolean primary key default true check (is_only),
  keep       interval not null default '1 day',   -- of the log, at least
  max_bytes  bigint                               -- of the log, at most, whoever still needs it; null: no limit
);
insert into sequin.setting default values;

-- Which text of sql/ is installed.
create table sequin.sql_version (
  id         bigint generated always as identity primary key,
  checksum   text not null,
  version    text not null,
  applied_at timestamptz not null default now()
);

-- +goose StatementBegin
do $$
declare
  v_options text := 'publish = ''insert, update, delete, truncate''';
  v_version int := current_setting('server_version_num')::int;
begin
  -- A partitioned table is one table, under its root's name (13 and newer can).
  if v_version >= 130000 then v_options := v_options || ', publish_via_partition_root = true'; end if;
  -- Without it, a table with a stored generated column and replica identity full refuses its owner's updates on 18.
  if v_version >= 180000 then v_options := v_options || ', publish_generated_columns = stored'; end if;
  execute format('create publication sequin with (%s)', v_options);
end $$;
-- +goose StatementEnd
