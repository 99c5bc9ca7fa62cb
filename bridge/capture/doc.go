// Package capture keeps the change log of a source up with the source: a replication slot in, rows of sequin.log out,
// each committed change once and in commit order.
//
//	┌────────┐  slot free   ┌─────────┐  claimed   ┌───────────┐
//	│ waiting │────────────▶│ starting │──────────▶│ capturing  │
//	└────────┘              └─────────┘            └───────────┘
//	     ▲   slot in use: look again each second │        │
//	     │   refused: say why, look again        │        │ anything goes wrong:
//	     └───────────────────────────────────────┴────────┘ back off, start anew
//
// The slot is the lease: the server lets one bridge read it. It does not keep a bridge that has lost it from
// committing its last batch, and so bridge_claim takes the progress row over as well, by compare and set.
//
// The slot is not the bookmark. How far the log has got is in the log's own transaction (sequin.progress), and what
// the server sends again after a crash of either side is told by its commit's LSN and skipped. Starting where the slot
// is further than the log would be silent loss: it is refused, recorded as a gap, and gone on from only when
// sequin.accept_gap says so.
//
// Another source than the log's own database is captured the same way, by a Capture of its own: what is said of "the source"
// (slot, publication, catalog) is asked of that server, and what is said of "home" of the log's database.
package capture
