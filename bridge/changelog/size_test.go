package changelog

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"sequin/bridge/wal"
)

func TestTokens(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int{
		``: 1, `{1,2,3}`: 4, `{"a": [1, 2]}`: 5, `["a,b\",:[{", 1]`: 3, `{"a,b",c}`: 3, `"unterminated,`: 1, `"\`: 1,
	} {
		if got := tokens([]byte(text)); got != want {
			t.Errorf("%s has %d, want %d", text, got, want)
		}
	}
}

func TestOmit(t *testing.T) {
	t.Parallel()
	large := wal.Value{Kind: wal.Text, Text: bytes.Repeat([]byte("x"), 100<<20)}
	small := wal.Value{Kind: wal.Text, Text: []byte("1")}
	null := wal.Value{Kind: wal.Null}
	plain := &form{kind: asString}
	table := &Table{columns: []column{{[]byte(`"a":`), plain}, {[]byte(`"b":`), plain}, {[]byte(`"c":`), plain}, {[]byte(`"d":`), plain}}}
	for _, test := range []struct {
		tuple wal.Tuple
		want  []int
	}{
		{wal.Tuple{small, null, small, small}, nil},
		{wal.Tuple{large, small, large, null}, nil},
		{wal.Tuple{large, large, small, large}, []int{0}},
		{wal.Tuple{large, large, large, large}, []int{0, 1}},
	} {
		if got := table.omit(test.tuple); !slices.Equal(got, test.want) {
			t.Errorf("left out %v, want %v", got, test.want)
		}
	}
	// Escaping makes text longer.
	quoted := wal.Value{Kind: wal.Text, Text: bytes.Repeat([]byte("\x01"), 50<<20)}
	if got := table.omit(wal.Tuple{small, quoted, small, small}); !slices.Equal(got, []int{1}) {
		t.Errorf("left out %v", got)
	}
}

func TestCrowded(t *testing.T) {
	t.Parallel()
	ints := &form{kind: asArray, elem: &form{kind: asNumber}, delim: ','}
	text := []byte("{1" + strings.Repeat(",1", maxTokens) + "}")
	if got := appendValue(nil, ints, text); got[0] != '"' || len(got) != len(text)+2 {
		t.Errorf("it became %.20s…, of %d bytes", got, len(got))
	}
	if got := appendValue(nil, ints, text[len(text)-1_000_001:]); got[0] != '"' {
		t.Errorf("what is no array became %.20s…", got)
	}
}

func TestLongKey(t *testing.T) {
	t.Parallel()
	table := &Table{key: []int{0}, isUTF8: true}
	key := func(text string) string {
		b, ok := table.appendKey(nil, wal.Tuple{{Kind: wal.Text, Text: []byte(text)}}, nil)
		if !ok {
			t.Fatal("it has none")
		}
		return string(b)
	}
	short, long := strings.Repeat("é", maxKey/2), strings.Repeat("é", maxKey)
	if got := key(short); got != short {
		t.Errorf("a key of %d bytes became %q", len(short), got)
	}
	got := key(long)
	if len(got) > maxKey+3 || !strings.HasPrefix(got, short[:len(short)/2]) || got == key(long+"x") || strings.ContainsRune(got, '\uFFFD') {
		t.Errorf("a key of %d bytes became %q", len(long), got)
	}
	if got := key("a\xff"); got != "a\uFFFD" {
		t.Errorf("what is no text became %q", got)
	}
}
