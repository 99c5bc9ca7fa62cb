package wal

import (
	"errors"
	"reflect"
	"testing"
)

// Messages as a PostgreSQL 15 server sent them, for a table t (id int primary key, a text, b text).
var (
	begin    = "B\x00\x00\x00\x01\x02\x03\x04\x05\x00\x02\xc1\x00\x00\x00\x00\x00\x00\x00\x02\xf6"
	commit   = "C\x00\x00\x00\x00\x01\x02\x03\x04\x05\x00\x00\x00\x01\x02\x03\x04\x35\x00\x02\xc1\x00\x00\x00\x00\x00"
	relation = "R\x00\x00\x40\x01public\x00t\x00d\x00\x03\x01id\x00\x00\x00\x00\x17\xff\xff\xff\xff\x00a\x00\x00\x00\x00\x19\xff\xff\xff\xff\x00b\x00\x00\x00\x00\x19\xff\xff\xff\xff"
	insert   = "I\x00\x00\x40\x01N\x00\x03t\x00\x00\x00\x011t\x00\x00\x00\x00n"
	update   = "U\x00\x00\x40\x01K\x00\x03t\x00\x00\x00\x011nnN\x00\x03t\x00\x00\x00\x012t\x00\x00\x00\x01xu"
	full     = "U\x00\x00\x40\x01O\x00\x03t\x00\x00\x00\x011nnN\x00\x03t\x00\x00\x00\x011nn"
	remove   = "D\x00\x00\x40\x01K\x00\x03t\x00\x00\x00\x012nn"
	truncate = "T\x00\x00\x00\x02\x00\x00\x00\x40\x01\x00\x00\x40\x02"
)

func text(s string) Value { return Value{Kind: Text, Text: []byte(s)} }

func TestDecode(t *testing.T) {
	null, unchanged := Value{Kind: Null}, Value{Kind: Unchanged}
	for _, test := range []struct {
		name string
		data string
		want Message
	}{
		{"begin", begin, &Begin{CommitLSN: 0x102030405, CommitTime: 0x0002c10000000000, XID: 0x2f6}},
		{"commit", commit, &Commit{CommitLSN: 0x102030405, EndLSN: 0x102030435, CommitTime: 0x0002c10000000000}},
		{"relation", relation, &Relation{OID: 0x4001, Schema: "public", Name: "t", ReplicaIdentity: 'd', Columns: []RelationColumn{
			{Name: "id", TypeOID: 23, IsKey: true}, {Name: "a", TypeOID: 25}, {Name: "b", TypeOID: 25},
		}}},
		{"insert", insert, &Insert{RelationOID: 0x4001, New: Tuple{text("1"), text(""), null}}},
		{"update of a key", update, &Update{
			RelationOID: 0x4001, OldKind: 'K', Old: Tuple{text("1"), null, null}, New: Tuple{text("2"), text("x"), unchanged},
		}},
		{"update with the old row", full, &Update{
			RelationOID: 0x4001, OldKind: 'O', Old: Tuple{text("1"), null, null}, New: Tuple{text("1"), null, null},
		}},
		{"delete", remove, &Delete{RelationOID: 0x4001, OldKind: 'K', Old: Tuple{text("2"), null, null}}},
		{"truncate", truncate[:5] + "\x01" + truncate[6:], &Truncate{RelationOIDs: []uint32{0x4001, 0x4002}}},
		{"message", "M\x00rest", &Other{Kind: 'M'}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := new(Decoder).Decode([]byte(test.data))
			if err != nil || !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %+v, %v; want %+v", got, err, test.want)
			}
		})
	}
}

func TestDecodeCutShort(t *testing.T) {
	for _, whole := range []string{begin, commit, relation, insert, update, full, remove, truncate} {
		for n := range len(whole) {
			if _, err := new(Decoder).Decode([]byte(whole[:n])); !errors.Is(err, ErrMalformed) {
				t.Errorf("%q cut to %d bytes: got error %v", whole[:1], n, err)
			}
		}
	}
}

// A decoder keeps what it has allocated: a row must not show through in the next one.
func TestDecodeAgain(t *testing.T) {
	var d Decoder
	for _, data := range []string{update, full, insert, remove} {
		want, err := new(Decoder).Decode([]byte(data))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := d.Decode([]byte(data)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, data := range []string{begin, commit, relation, insert, update, full, remove, truncate} {
		f.Add([]byte(data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := new(Decoder).Decode(data)
		if (m == nil) != (err != nil) || err != nil && !errors.Is(err, ErrMalformed) {
			t.Errorf("got %v, %v", m, err)
		}
	})
}
