// Package source reaches other databases than the one that the log is in: finds out how, says in words of its own why
// not, and does there what SQL in the log's database cannot: it looks tables up, checks and publishes them.
//
// What a source is reached by is nobody's to see. It comes from sequin.bridge_conninfo, goes into connections, and is in
// no error that this package returns.
package source
