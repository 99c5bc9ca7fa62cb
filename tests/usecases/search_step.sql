with batch as materialized (
  select distinct on (record_pk) record_pk::bigint as id, action, record from sequin.pop('search', 1000)
  order by record_pk, seq desc
), gone as (
  delete from product_search s using batch b where s.id = b.id and b.action = 'delete'
)
insert into product_search
select id, to_tsvector('simple', record ->> 'name') from batch where action <> 'delete'
on conflict (id) do update set words = excluded.words;
