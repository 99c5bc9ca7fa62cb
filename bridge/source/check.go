package source

// checkQuery looks at a table of the source, by its name ($1), or by its oid where that is known ($2): who it is, and what
// of it is in the way of being streamed: the same as sequin._check_table refuses in the log's own database.
const checkQuery = `
with recursive rel as (
  select c.*, n.nspname, pg_catalog.format('%I.%I', n.nspname, c.relname) as title,
         pg_catalog.current_setting('server_version_num')::int as version
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  where c.oid = coalesce($2::bigint::pg_catalog.oid, pg_catalog.to_regclass($1)::pg_catalog.oid)
), up(oid, depth) as (
  select rel.oid, 0 from rel
  union all
  select i.inhparent, up.depth + 1 from up join pg_catalog.pg_inherits i on i.inhrelid = up.oid
), down(oid, kind) as (
  select rel.oid, rel.relkind from rel
  union all
  select c.oid, c.relkind
  from down d
  join pg_catalog.pg_inherits i on i.inhparent = d.oid
  join pg_catalog.pg_class c on c.oid = i.inhrelid
  where d.kind = 'p'
), leaf as (
  select c.oid, pg_catalog.format('%I.%I', n.nspname, c.relname) as title, c.relkind, c.relreplident,
         case c.relreplident
           when 'f' then true
           when 'd' then exists (select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary and i.indimmediate)
           when 'i' then exists (select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisreplident)
           else false
         end as has_identity,
         c.relreplident = 'f' and exists (
           select from pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attgenerated = 'v' and not a.attisdropped) as is_virtual,
         exists (
           select from pg_catalog.pg_index i
           join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey) and a.attgenerated <> ''
           where i.indrelid = c.oid and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end) as is_made
  from down d
  join pg_catalog.pg_class c on c.oid = d.oid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
)
select r.oid::bigint, r.nspname::text, r.relname::text, r.title, ` + columnsOf + `,
       coalesce(p.problem, ''), coalesce(p.hint, '')
from rel r
left join lateral (
  select v.problem, v.hint
  from (values
    (1, r.relkind not in ('r', 'p'), pg_catalog.format('%s is %s, not a table', r.title, case r.relkind
       when 'v' then 'a view' when 'm' then 'a materialized view' when 'f' then 'a foreign table'
       when 'S' then 'a sequence' when 'i' then 'an index' else 'something else' end),
     'Its changes are not in the write-ahead log as rows of its own. Stream the tables it is made from.'),
    (2, r.nspname in ('pg_catalog', 'information_schema', 'sequin'), pg_catalog.format('%s belongs to %s and cannot be streamed', r.title,
       case r.nspname when 'sequin' then 'Sequin itself' else 'the system' end), 'Stream tables of your own.'),
    (3, r.relpersistence = 'u', pg_catalog.format('%s is an unlogged table', r.title), pg_catalog.format('alter table %s set logged;', r.title)),
    (4, r.relispartition, pg_catalog.format('%s is a partition', r.title), pg_catalog.format('A partitioned table is one table: stream %s.', (
       select pg_catalog.format('%I.%I', n.nspname, c.relname)
       from up join pg_catalog.pg_class c on c.oid = up.oid join pg_catalog.pg_namespace n on n.oid = c.relnamespace
       order by up.depth desc limit 1))),
    (5, r.relkind = 'p' and r.version < 130000, pg_catalog.format('%s is partitioned, and PostgreSQL 12 cannot publish a partitioned table', r.title),
     'Upgrade the source to PostgreSQL 13 or newer.'),
    (6, not pg_catalog.pg_has_role(current_user, r.relowner, 'usage'),
     pg_catalog.format('%s belongs to %I, and only its owner may publish it', r.title, pg_catalog.pg_get_userbyid(r.relowner)),
     -- Never a superuser's rights.
     pg_catalog.format(case when (select o.rolsuper from pg_catalog.pg_roles o where o.oid = r.relowner)
       then 'On the source: alter table %3$s owner to %2$I;' else 'On the source: grant %1$I to %2$I;' end,
       pg_catalog.pg_get_userbyid(r.relowner), current_user, r.title)),
    (7, exists (select from leaf l where not l.has_identity), pg_catalog.format(
       '%s has no primary key or replica identity, so its updates and deletes would fail once published',
       (select l.title from leaf l where not l.has_identity order by l.oid limit 1)),
     pg_catalog.format('On the source: alter table %1$s add primary key (…); or, where it has none: alter table %1$s replica identity full;',
       (select l.title from leaf l where not l.has_identity order by l.oid limit 1))),
    (8, r.version >= 180000 and exists (select from leaf l where l.is_virtual), pg_catalog.format(
       '%s has replica identity full and a virtual generated column: its updates and deletes would fail once published',
       (select l.title from leaf l where l.is_virtual order by l.oid limit 1)),
     pg_catalog.format('On the source: alter table %s replica identity default;',
       (select l.title from leaf l where l.is_virtual order by l.oid limit 1))),
    (9, r.version < 180000 and exists (select from leaf l where l.is_made), pg_catalog.format(
       'the key of %s has a generated column, which PostgreSQL %s does not send: its rows would have no name',
       (select l.title from leaf l where l.is_made order by l.oid limit 1), pg_catalog.current_setting('server_version')),
     pg_catalog.format('On the source: alter table %s replica identity full;',
       (select l.title from leaf l where l.is_made order by l.oid limit 1))),
    (10, r.relkind = 'p' and not exists (select from pg_catalog.pg_index i where i.indrelid = r.oid and i.indisprimary), pg_catalog.format(
       '%s is partitioned and has no primary key: updates and deletes in a partition that is added later would fail, as it is published '
       'with the others', r.title),
     pg_catalog.format('On the source: alter table %s add primary key (…);', r.title))
  ) v(place, is_so, problem, hint)
  where v.is_so
  order by v.place
  limit 1) p on true`

// columnsOf are the columns that name the rows of relation r, as sequin._key_columns has it; all columns; and those that
// its old rows have in the write-ahead log, null where that is all.
const columnsOf = `coalesce(
         (select pg_catalog.array_agg(a.attname::text order by k.place)
          from (select i.indkey::int2[] as attnums
                from pg_catalog.pg_index i
                where i.indrelid = r.oid and (i.indisprimary or i.indisreplident) and i.indislive
                order by i.indisprimary desc
                limit 1) i
          cross join lateral pg_catalog.unnest(i.attnums) with ordinality k(attnum, place)
          join pg_catalog.pg_attribute a on a.attrelid = r.oid and a.attnum = k.attnum),
         '{}'),
       array(select a.attname::text from pg_catalog.pg_attribute a
             where a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped order by a.attnum),
       case when not (
           with recursive down(oid, kind) as (
             select r.oid, r.relkind
             union all
             select c.oid, c.relkind
             from down d
             join pg_catalog.pg_inherits i on i.inhparent = d.oid
             join pg_catalog.pg_class c on c.oid = i.inhrelid
             where d.kind = 'p'
           )
           select pg_catalog.bool_and(c.relreplident = 'f')
           from down d join pg_catalog.pg_class c on c.oid = d.oid where c.relkind = 'r' or c.oid = r.oid)
         then array(
           select a.attname::text
           from pg_catalog.pg_index i
           join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = any (i.indkey::int2[])
           where i.indrelid = r.oid and case when r.relreplident = 'i' then i.indisreplident else i.indisprimary end
           order by a.attnum) end`

// ColumnsQuery asks a source for the columns that name a relation's rows ($1, its oid), all its columns, those of its old
// rows, and whether it is partitioned.
const ColumnsQuery = `select ` + columnsOf + `, r.relkind = 'p' from pg_catalog.pg_class r where r.oid = $1::bigint::pg_catalog.oid`

// PublicationQuery asks a source for a publication ($1) as sequin._publication_row has one of the log's own database, and how far
// the server has written.
const PublicationQuery = `
select coalesce((pg_catalog.to_jsonb(p) || pg_catalog.jsonb_build_object('xmin', p.xmin::text))::text, ''), pg_catalog.pg_current_wal_insert_lsn()::text
from (select) one left join pg_catalog.pg_publication p on p.pubname = $1`

// placesQuery tells of relations ($1) whether they are there, under which name, and at which place in the publication ($2),
// with how far the server has written, what the publication keeps back of them, and the statement that mends it: as
// sequin._kept_back does of those in the log's own database.
const placesQuery = `
select o.oid::bigint, c.oid is null, coalesce(t.title, ''), r.oid::bigint, pg_catalog.pg_current_wal_insert_lsn()::text,
       coalesce(k.detail, ''), coalesce(k.mend, '')
from pg_catalog.unnest($1::bigint[]) o(oid)
left join pg_catalog.pg_class c on c.oid = o.oid::pg_catalog.oid
left join pg_catalog.pg_namespace n on n.oid = c.relnamespace
cross join lateral (select case when c.oid is not null then pg_catalog.format('%I.%I', n.nspname, c.relname) end as title) t
left join pg_catalog.pg_publication p on p.pubname = $2
left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = c.oid
cross join lateral pg_catalog.format('alter publication %I', $2) a(alter)
left join lateral (
  select v.detail, v.mend
  from (values
    (1, r.oid is null,
     pg_catalog.format('table %s is not in publication %s on the source any more: its changes are not captured', t.title, $2),
     pg_catalog.format('%s add table only %s;', a.alter, t.title)),
    (2, pg_catalog.to_jsonb(r) ->> 'prqual' is not null or pg_catalog.to_jsonb(r) ->> 'prattrs' is not null,
     pg_catalog.format('publication %s on the source has a row filter or a column list for table %s: the rest is not captured', $2, t.title),
     pg_catalog.format('%s drop table only %s; %1$s add table only %2$s;', a.alter, t.title)),
    (3, not (p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate),
     pg_catalog.format('publication %s on the source publishes some kinds of changes only: the others are not captured', $2),
     pg_catalog.format('%s set (publish = %L);', a.alter, 'insert, update, delete, truncate')),
    (4, c.relkind = 'p' and not coalesce((pg_catalog.to_jsonb(p) ->> 'pubviaroot')::boolean, true),
     pg_catalog.format('publication %s on the source publishes partitions under their own names: they are not captured', $2),
     pg_catalog.format('%s set (publish_via_partition_root = true);', a.alter)),
    (5, pg_catalog.to_jsonb(p) ->> 'pubgencols' = 'n' and exists (
       select from pg_catalog.pg_attribute g where g.attrelid = c.oid and g.attgenerated = 's' and not g.attisdropped),
     pg_catalog.format('publication %s on the source publishes no generated columns: they are not captured', $2),
     pg_catalog.format('%s set (publish_generated_columns = stored);', a.alter))
  ) v(place, is_so, detail, mend)
  where c.oid is not null and v.is_so
  order by v.place
  limit 1) k on true`

// surplusQuery finds what is in the publication ($2), and is none of the relations ($1).
const surplusQuery = `
select pg_catalog.format('%I.%I', n.nspname, c.relname)
from pg_catalog.pg_publication p
join pg_catalog.pg_publication_rel r on r.prpubid = p.oid
join pg_catalog.pg_class c on c.oid = r.prrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where p.pubname = $2 and not c.oid::bigint = any ($1::bigint[])`

// positionQuery tells where the server's log is, and a slot ($1).
const positionQuery = `
select pg_catalog.pg_current_wal_lsn()::text, s.confirmed_flush_lsn::text, s.restart_lsn::text
from (select) one left join pg_catalog.pg_replication_slots s on s.slot_name = $1`
