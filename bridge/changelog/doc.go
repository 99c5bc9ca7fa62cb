// Package changelog turns changes into rows of the change log, and writes them.
//
// An [Encoder] makes each change a row of COPY's binary format, in the order of the log's columns, with its seq and
// its group's hash. Rows pass through a [Queue] to a [Writer], which puts everything that has come together meanwhile
// into one COPY and one commit, beside the progress row: many small transactions share a commit when the log is the
// slower side, and a large one is piped through a single COPY, in bounded memory.
//
// Why COPY, binary, straight into the segment: on the same rows, COPY into the log took two thirds of the time of
// multi-row inserts, and binary saved the server an escape pass over each record. The begin, the COPY, its rows, the
// progress and the commit are sent without waiting for an answer in between: one round trip a batch.
//
// A transaction that has become large goes on in a draft: a table that is not a part of the log yet, and has no indexes
// before all its rows are in it. See sql/drafts.sql for what that is worth.
//
// A commit that follows another within 200 ms is not waited for until it is on disk, as PostgreSQL's own subscriptions
// do by default. What is then lost in a crash of the server is not lost to the log: the slot is confirmed only as far
// as is on disk, and whatever a reader made of the rows is in a commit after theirs, and lost with them.
package changelog
