// Package backfill gives consumers the rows of a table that exist already: it reads the table in chunks, each a short
// transaction of its own, and writes them into a segment of the log that is made for it, beside live traffic.
//
//	┌─────────┐  begin   ┌─────────┐   cut    ┌─────────┐  open    ┌─────────┐  end
//	│ waiting │─────────▶│  begun  │─────────▶│   cut    │─────────▶│ reading │─────────▶
//	└─────────┘          └─────────┘          └─────────┘          └─────────┘
//	              its segment   the live log's next    the log is past     chunk after
//	              is made       segment, from an LSN   that LSN            chunk
//
// What each step means, and why no row comes twice, too old or not at all, is in sql/history.sql. Every step, and every
// chunk with how far it has got, is a transaction: after a crash it goes on from the last one.
//
// Before the first chunk is read, every transaction that the log has from before the cut must be visible in the tables. A
// commit is decoded once it is in the WAL, and visible only when the server is done with it: while it waits for a
// synchronous standby, it is in the log and not yet in the table.
package backfill
