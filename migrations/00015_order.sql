-- +goose Up

-- What last_key is in the order of. A key that is another one by the time a bridge goes on says nothing of the rows after it.
alter table sequin.backfill_step add row_order text;

drop function if exists sequin.bridge_backfills(int);
drop function if exists sequin.bridge_backfill_step(bigint, bigint, int, text[], bigint, bigint, bigint);
