package changelog

import (
	"bytes"
	"strconv"
)

// appendValue appends a value, given as PostgreSQL's text, as JSON.
func appendValue(b []byte, f *form, text []byte) []byte {
	if isCrowded(f.kind, text) {
		return appendString(b, text)
	}
	switch f.kind {
	case asBool:
		if len(text) == 1 && text[0] == 't' {
			return append(b, "true"...)
		}
		return append(b, "false"...)
	case asNumber:
		// NaN, Infinity, -Infinity
		if last := len(text) - 1; last < 0 || text[last] < '0' || text[last] > '9' {
			return appendString(b, text)
		}
		return append(b, text...)
	case asJSON:
		if !fitsJSONB(text, f.isNarrow) {
			return appendString(b, text)
		}
		return append(b, text...)
	case asJSONB:
		// One that was put together in SQL may be nested deeper than the parser goes.
		if len(text) > 2*maxDepth && bytes.Count(text, []byte("{"))+bytes.Count(text, []byte("[")) > maxDepth && !fitsJSONB(text, false) {
			return appendString(b, text)
		}
		return append(b, text...)
	case asTimestamp:
		return appendTimestamp(b, text, false)
	case asTimestamptz:
		return appendTimestamp(b, text, true)
	case asArray:
		return appendArray(b, f, text)
	default:
		return appendString(b, text)
	}
}

const hexDigits = "0123456789abcdef"

// appendString appends text as a JSON string.
func appendString(b, text []byte) []byte {
	b = append(b, '"')
	start := 0
	for i, c := range text {
		if c >= 0x20 && c != '"' && c != '\\' {
			continue
		}
		b = append(b, text[start:i]...)
		start = i + 1
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
	}
	b = append(b, text[start:]...)
	return append(b, '"')
}

// appendTimestamp appends "2026-01-02 03:04:05+00" as "2026-01-02T03:04:05+00:00", as to_jsonb has it.
func appendTimestamp(b, text []byte, hasZone bool) []byte {
	space := bytes.IndexByte(text, ' ')
	if space < 0 { // infinity
		return appendString(b, text)
	}
	date, rest := text[:space], text[space+1:]
	era := []byte(nil)
	if i := bytes.IndexByte(rest, ' '); i >= 0 {
		rest, era = rest[:i], rest[i:]
	}
	b = append(b, '"')
	b = append(b, date...)
	b = append(b, 'T')
	b = append(b, rest...)
	if n := len(rest); hasZone && n >= 3 && (rest[n-3] == '+' || rest[n-3] == '-') {
		b = append(b, ":00"...)
	}
	b = append(b, era...)
	return append(b, '"')
}

// appendArray appends {1,2,NULL} as [1,2,null]. One with bounds of its own ([0:1]={1,2}) stays a string, which has
// them: JSON's arrays do not.
func appendArray(b []byte, f *form, text []byte) []byte {
	if len(text) == 0 || text[0] != '{' {
		return appendString(b, text)
	}
	start := len(b)
	var element []byte
	depth := 0
	for i := 0; i < len(text); {
		switch c := text[i]; {
		case c == '{':
			depth++
			b = append(b, '[')
			i++
		case c == '}':
			depth--
			b = append(b, ']')
			i++
		case c == f.delim:
			b = append(b, ',')
			i++
		case c == '"':
			element = element[:0]
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
				if i < len(text) {
					element = append(element, text[i])
				}
			}
			i++
			b = appendValue(b, f.elem, element)
		default:
			end := i
			for end < len(text) && text[end] != f.delim && text[end] != '}' {
				end++
			}
			if string(text[i:end]) == "NULL" {
				b = append(b, "null"...)
			} else {
				b = appendValue(b, f.elem, text[i:end])
			}
			i = end
		}
	}
	if depth != 0 {
		return appendString(b[:start], text)
	}
	return b
}

// fitsJSONB tells whether jsonb takes what json took: json keeps its text as it was, with \u0000, with halves of
// surrogate pairs, with numbers and nesting beyond all bounds.
func fitsJSONB(text []byte, isNarrow bool) bool {
	const maxDigits, maxExponent = 1000, 1000
	depth := 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return false
			}
		case c == '}' || c == ']':
			depth--
		case c == '"':
			var ok bool
			if i, ok = skipString(text, i, isNarrow); !ok {
				return false
			}
		case c >= '0' && c <= '9':
			start := i
			for i+1 < len(text) && isDigit(text[i+1]) {
				i++
			}
			if i-start > maxDigits {
				return false
			}
		case c == 'e' || c == 'E':
			if i+1 < len(text) && (isDigit(text[i+1]) || text[i+1] == '+' || text[i+1] == '-') {
				end := i + 2
				for end < len(text) && isDigit(text[end]) {
					end++
				}
				if n, err := strconv.Atoi(string(text[i+1 : end])); err != nil || n > maxExponent || n < -maxExponent {
					return false
				}
				i = end - 1
			}
		}
	}
	return true
}

const maxDepth = 1000

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// skipString returns the place of a JSON string's closing quote, and whether jsonb takes what is before it.
func skipString(text []byte, i int, isNarrow bool) (int, bool) {
	high := false // a first half of a surrogate pair, which the second has to follow
	for i++; i < len(text); i++ {
		if text[i] != '\\' {
			if high {
				return i, false
			}
			if text[i] == '"' {
				return i, true
			}
			continue
		}
		i++
		if i >= len(text) {
			return i, false
		}
		if text[i] != 'u' {
			if high {
				return i, false
			}
			continue
		}
		if i+4 >= len(text) {
			return i, false
		}
		code, err := strconv.ParseUint(string(text[i+1:i+5]), 16, 16)
		isLow := code >= 0xdc00 && code <= 0xdfff
		if err != nil || code == 0 || high != isLow || isNarrow && code > 0x7f {
			return i, false
		}
		high = code >= 0xd800 && code <= 0xdbff
		i += 4
	}
	return i, false
}
