// Package bridge is the process beside the database: it reads the replication slot, writes the change log, and does
// what time does by itself. It composes the parts, each a package of its own; what SQL can decide is decided in sql/.
package bridge
