-- What Sequin's SQL is made of, in the order it is installed: all of it in one transaction, whenever any of it
-- changes. Tables and their data are in migrations/; here are functions, views and grants only.
--
-- In one page, what a user does with it:
--
--   select sequin.create_stream('orders', '{orders}');
--   select sequin.create_consumer('mailer', 'orders');
--   select * from sequin.receive('mailer', 10, wait => '5s');      -- a lease on up to ten messages
--   select sequin.ack('mailer', '{…}');                            -- the ack_ids of what is done
--   select sequin.nack('mailer', '{…}', error => 'no such host');  -- later, please
--
--   begin;                                                         -- or, where the work is in this database: exactly once
--     insert into totals select … from sequin.pop('totals', 100);
--   commit;
--
-- Public functions and views are named as users say them. _names are for other functions here; bridge_names are
-- what the bridge process calls.

version.sql
rights.sql
names.sql
types.sql
lanes.sql
permits.sql
segments.sql
drafts.sql
publication.sql
sources.sql
streams.sql
rows.sql
expression_tokens.sql
expression_errors.sql
expression_types.sql
expression_trust.sql
expressions.sql
filters.sql
consumers.sql
alter_consumer.sql
history.sql
grants.sql
survey.sql
wait.sql
receive.sql
take.sql
deliveries.sql
due.sql
ack.sql
pop.sql
put_back.sql
dead_letters.sql
feeds.sql
event_tables.sql
partitions.sql
pipelines.sql
write_pipelines.sql
rewind.sql
sync.sql
republish.sql
retention.sql
bridge.sql
backfill.sql
bridge_sources.sql
upkeep.sql
views.sql
status.sql
capture_health.sql
health.sql
source_health.sql
later.sql
configure.sql
