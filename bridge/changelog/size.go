package changelog

import "sequin/bridge/wal"

// What jsonb can hold: 256 MB in all, and so many elements of one array or object that the parser still finds room for.
// Capture must not end at a row that is larger: what is too much is left out, and named.
const (
	maxJSONB   = 1<<28 - 64<<10
	maxTokens  = 1 << 23
	surelyFits = 4 << 20 // as text: no text becomes more than sixteen times as long
)

// jsonbSize is no less than what a value takes, as JSON text or as jsonb, whichever is longer.
func jsonbSize(f *form, text []byte) int {
	if isPlain(f.kind) || isCrowded(f.kind, text) {
		size := len(text) + 8
		for _, c := range text {
			switch {
			case c < 0x20:
				size += 5
			case c == '"' || c == '\\':
				size++
			}
		}
		return size
	}
	const perToken = 16 // an entry, a number's or a container's header, alignment
	size := len(text) + perToken*tokens(text)
	for _, c := range text {
		if c < 0x20 {
			size += 5
		}
	}
	return size
}

func isPlain(kind formKind) bool { return kind != asJSON && kind != asJSONB && kind != asArray }

// isCrowded tells whether a document or an array has more elements than can be parsed: it is kept as its text.
func isCrowded(kind formKind, text []byte) bool {
	return len(text) > maxTokens && !isPlain(kind) && tokens(text) > maxTokens
}

// tokens counts the elements of a JSON document, or of an array's text.
func tokens(text []byte) int {
	n := 1
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case ',', ';', ':', '{', '[':
			n++
		case '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		}
	}
	return n
}

// textSize is how much text a row has.
func textSize(tuples ...wal.Tuple) int {
	n := 0
	for _, t := range tuples {
		for _, v := range t {
			n += len(v.Text)
		}
	}
	return n
}
