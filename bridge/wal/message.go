package wal

import (
	"slices"

	"github.com/jackc/pglogrepl"
)

// Message is one of *Begin, *Commit, *Relation, *Insert, *Update, *Delete, *Truncate, or *Other.
type Message interface{ isMessage() }

// Begin opens a transaction. Its changes follow, then its Commit.
type Begin struct {
	CommitLSN  pglogrepl.LSN // where its commit record starts
	CommitTime int64         // microseconds since 2000-01-01 UTC, as PostgreSQL stores it
	XID        uint32
}

// Commit ends a transaction.
type Commit struct {
	CommitLSN  pglogrepl.LSN
	EndLSN     pglogrepl.LSN // where its commit record ends: the position to confirm and to go on from
	CommitTime int64
}

// Relation describes a table, before its first change on this connection and again whenever it has changed.
type Relation struct {
	OID             uint32
	Schema          string
	Name            string
	ReplicaIdentity byte // d (primary key), n (nothing), f (full), i (index)
	Columns         []RelationColumn
}

// Has tells whether it has all these columns, and there are any.
func (r *Relation) Has(columns []string) bool {
	for _, name := range columns {
		if !slices.ContainsFunc(r.Columns, func(c RelationColumn) bool { return c.Name == name }) {
			return false
		}
	}
	return len(columns) > 0
}

// IsIdentity tells whether these columns, in whatever order, are its replica identity, as far as that names any: one whose index
// was dropped names none.
func (r *Relation) IsIdentity(columns []string) bool {
	if r.ReplicaIdentity != 'd' && r.ReplicaIdentity != 'i' {
		return true
	}
	count := 0
	for _, c := range r.Columns {
		if c.IsKey {
			count++
			if !slices.Contains(columns, c.Name) {
				return false
			}
		}
	}
	return count == 0 || count == len(columns)
}

// RelationColumn is a column of a Relation.
type RelationColumn struct {
	Name    string
	TypeOID uint32
	IsKey   bool // part of the replica identity
}

// Insert is a new row.
type Insert struct {
	RelationOID uint32
	New         Tuple
}

// Update is a row's new version, with the old one as far as the replica identity gives it.
type Update struct {
	RelationOID uint32
	OldKind     byte // K (the key, where it changed), O (the whole row), or 0 (nothing)
	Old         Tuple
	New         Tuple
}

// Delete is a row's end.
type Delete struct {
	RelationOID uint32
	OldKind     byte // K or O
	Old         Tuple
}

// Truncate empties tables.
type Truncate struct {
	RelationOIDs []uint32
}

// Other is a message that carries no change: a type, an origin, an application's own.
type Other struct {
	Kind byte
}

func (*Begin) isMessage()    {}
func (*Commit) isMessage()   {}
func (*Relation) isMessage() {}
func (*Insert) isMessage()   {}
func (*Update) isMessage()   {}
func (*Delete) isMessage()   {}
func (*Truncate) isMessage() {}
func (*Other) isMessage()    {}

// Tuple holds a row's columns, in the order of its Relation.
type Tuple []Value

// Value is a column of a row.
type Value struct {
	Kind ValueKind
	Text []byte // of Text
}

// ValueKind tells what of a column was sent.
type ValueKind byte

// What of a column was sent. A column of an old key that is not part of the key is sent as Null, and is not null.
const (
	Null      ValueKind = 'n'
	Unchanged ValueKind = 'u' // a TOASTed value that the update did not touch
	Text      ValueKind = 't'
)
