// Package wal reads what pgoutput writes: protocol version 1, text format, as PostgreSQL 12 and newer send it.
//
// It takes no copy: what a [Decoder] returns points into the message and into the decoder, and is good until the next
// call. Every length is checked against what is there, so that no bytes, however wrong, do more than return
// [ErrMalformed].
//
// The formats are described in "Logical Replication Message Formats" of the PostgreSQL manual.
package wal
