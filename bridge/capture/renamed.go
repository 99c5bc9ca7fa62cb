package capture

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// errRenamed is returned where a partitioned table goes by another name than the server sends.
var errRenamed = errors.New("a partitioned table was renamed, which the server says only where it is asked anew")

// renamed is a partitioned table whose name is another in the catalog, and how far the server had written then.
type renamed struct {
	name string
	lsn  pglogrepl.LSN
}

// sent takes note of the name that the stream has for a relation.
func (l *Live) sent(oid uint32, name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.names == nil {
		l.names = map[uint32]string{}
	}
	l.names[oid] = name
	delete(l.renamed, oid)
}

// checkNames looks whether partitioned tables still have the names that the stream has for them: the server remembers those with
// each partition, and does not look at the table again. What was read since it was first seen would have told.
func (l *Live) checkNames(ctx context.Context, conn *pgx.Conn) error {
	l.mu.Lock()
	names := maps.Clone(l.names)
	l.mu.Unlock()
	oids := []int64{}
	for oid := range maps.Keys(names) {
		oids = append(oids, int64(oid))
	}
	rows, err := conn.Query(ctx, `
		select c.oid::bigint, n.nspname::text || '.' || c.relname::text, pg_catalog.pg_current_wal_insert_lsn()::text
		from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
		where c.oid = any ($1::bigint[]::oid[]) and c.relkind = 'p'`, oids)
	if err != nil {
		return fmt.Errorf("look at names of tables: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var oid int64
		var name, text string
		var lsn pglogrepl.LSN
		if err = rows.Scan(&oid, &name, &text); err == nil {
			lsn, err = pglogrepl.ParseLSN(text)
		}
		if err != nil {
			return fmt.Errorf("look at names of tables: %w", err)
		}
		if l.isStale(uint32(oid), name, names[uint32(oid)], lsn) {
			return fmt.Errorf("%w: %s is %s now", errRenamed, names[uint32(oid)], name)
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("look at names of tables: %w", err)
	}
	return nil
}

// isStale tells whether a table has had another name than it is sent under since before what is read now.
func (l *Live) isStale(oid uint32, name, sent string, lsn pglogrepl.LSN) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	before, isKnown := l.renamed[oid]
	switch {
	case name == sent || l.names[oid] != sent:
		delete(l.renamed, oid)
		return false
	case isKnown && before.name == name:
		return before.lsn <= pglogrepl.LSN(l.position.Load())
	}
	if l.renamed == nil {
		l.renamed = map[uint32]renamed{}
	}
	l.renamed[oid] = renamed{name, lsn}
	return false
}
