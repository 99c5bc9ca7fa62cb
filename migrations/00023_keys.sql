-- +goose Up

-- What named a table's rows where the log ends. source_table has what names them now, for those who read the rows that exist. By
-- itself, as the log's writer must not wait for whoever has a table of a stream that he makes.
create table sequin.source_key (
  table_id     int primary key references sequin.source_table on delete cascade,
  relation_oid oid not null,
  key_columns  text[] not null,
  column_names text[] not null                    -- what the table's columns were called, in order
);

-- It returns them, too.
drop function if exists sequin.bridge_tables(int);
