create table product_search (id bigint primary key, words tsvector not null);
create index on product_search using gin (words);
select sequin.create_consumer('search', 'products', start_at => 'beginning');
