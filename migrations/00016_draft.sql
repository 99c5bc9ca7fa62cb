-- +goose Up

-- Segments of the log that are being filled by one large transaction, and are no partition of it yet.
create table sequin.log_draft (
  id         int primary key,                     -- of the segment that it will be
  source_id  int not null references sequin.source on delete cascade,
  commit_lsn pg_lsn not null                      -- of the transaction
);
