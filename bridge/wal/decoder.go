package wal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/jackc/pglogrepl"
)

// ErrMalformed is returned for bytes that are no message of the protocol.
var ErrMalformed = errors.New("malformed pgoutput message")

// Decoder reads messages, one at a time. The zero value is ready for use.
type Decoder struct {
	begin    Begin
	commit   Commit
	insert   Insert
	update   Update
	delete   Delete
	truncate Truncate
	other    Other
}

// Decode reads one message. It is good until the next call, and as long as data is; a *Relation stays good.
func (d *Decoder) Decode(data []byte) (Message, error) {
	if len(data) == 0 {
		return nil, fmt.Errorf("%w: empty", ErrMalformed)
	}
	r := reader{rest: data[1:]}
	var m Message
	switch data[0] {
	case 'B':
		d.begin = Begin{CommitLSN: r.lsn(), CommitTime: int64(r.uint64()), XID: r.uint32()}
		m = &d.begin
	case 'C':
		r.uint8() // flags: none are defined
		d.commit = Commit{CommitLSN: r.lsn(), EndLSN: r.lsn(), CommitTime: int64(r.uint64())}
		m = &d.commit
	case 'R':
		m = r.relation()
	case 'I':
		d.insert.RelationOID = r.uint32()
		r.expect('N')
		d.insert.New = r.tuple(d.insert.New[:0])
		m = &d.insert
	case 'U':
		d.update.RelationOID = r.uint32()
		d.update.OldKind = 0
		d.update.Old = d.update.Old[:0]
		kind := r.uint8()
		if kind == 'K' || kind == 'O' {
			d.update.OldKind = kind
			d.update.Old = r.tuple(d.update.Old)
			kind = r.uint8()
		}
		if kind != 'N' {
			r.fail()
		}
		d.update.New = r.tuple(d.update.New[:0])
		m = &d.update
	case 'D':
		d.delete.RelationOID = r.uint32()
		d.delete.OldKind = r.uint8()
		if d.delete.OldKind != 'K' && d.delete.OldKind != 'O' {
			r.fail()
		}
		d.delete.Old = r.tuple(d.delete.Old[:0])
		m = &d.delete
	case 'T':
		n := int(r.uint32())
		r.uint8() // options: cascade and restart identity, which the list of tables already answers
		d.truncate.RelationOIDs = d.truncate.RelationOIDs[:0]
		for range n {
			d.truncate.RelationOIDs = append(d.truncate.RelationOIDs, r.uint32())
			if r.isShort {
				break
			}
		}
		m = &d.truncate
	case 'O', 'Y', 'M':
		d.other.Kind = data[0]
		return &d.other, nil
	default:
		return nil, fmt.Errorf("%w: kind %q", ErrMalformed, data[0])
	}
	if r.isShort {
		return nil, fmt.Errorf("%w: kind %q, %d bytes", ErrMalformed, data[0], len(data))
	}
	return m, nil
}

// reader takes fields off a message. Once one is not there, isShort is set and the rest are zero.
type reader struct {
	rest    []byte
	isShort bool
}

func (r *reader) fail() {
	r.isShort = true
	r.rest = nil
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.rest) {
		r.fail()
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) uint8() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if b := r.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (r *reader) lsn() pglogrepl.LSN { return pglogrepl.LSN(r.uint64()) }

func (r *reader) string() string {
	i := bytes.IndexByte(r.rest, 0)
	if i < 0 {
		r.fail()
		return ""
	}
	s := string(r.rest[:i])
	r.rest = r.rest[i+1:]
	return s
}

func (r *reader) expect(kind byte) {
	if r.uint8() != kind {
		r.fail()
	}
}

func (r *reader) relation() *Relation {
	rel := &Relation{OID: r.uint32(), Schema: r.string(), Name: r.string(), ReplicaIdentity: r.uint8()}
	// The catalog's schema is sent as nothing.
	if rel.Schema == "" {
		rel.Schema = "pg_catalog"
	}
	n := int(r.uint16())
	for range n {
		c := RelationColumn{IsKey: r.uint8()&1 == 1, Name: r.string(), TypeOID: r.uint32()}
		r.uint32() // type modifier
		if r.isShort {
			break
		}
		rel.Columns = append(rel.Columns, c)
	}
	return rel
}

func (r *reader) tuple(t Tuple) Tuple {
	n := int(r.uint16())
	for range n {
		kind := ValueKind(r.uint8())
		switch kind {
		case Null, Unchanged:
			t = append(t, Value{Kind: kind})
		case Text:
			t = append(t, Value{Kind: kind, Text: r.take(int(r.uint32()))})
		default:
			r.fail()
		}
		if r.isShort {
			return t
		}
	}
	return t
}
