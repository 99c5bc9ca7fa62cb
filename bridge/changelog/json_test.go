package changelog

import (
	"encoding/json"
	"testing"
)

func TestAppendValue(t *testing.T) {
	ints := &form{kind: asArray, elem: &form{kind: asNumber}, delim: ','}
	texts := &form{kind: asArray, elem: &form{kind: asString}, delim: ','}
	boxes := &form{kind: asArray, elem: &form{kind: asString}, delim: ';'}
	documents := &form{kind: asArray, elem: &form{kind: asJSON}, delim: ','}
	for _, test := range []struct {
		form *form
		text string
		want string
	}{
		{&form{kind: asBool}, "t", `true`},
		{&form{kind: asBool}, "f", `false`},
		{&form{kind: asNumber}, "-12.50", `-12.50`},
		{&form{kind: asNumber}, "1e+20", `1e+20`},
		{&form{kind: asNumber}, "NaN", `"NaN"`},
		{&form{kind: asNumber}, "-Infinity", `"-Infinity"`},
		{&form{kind: asString}, "a\"b\\c\n\r\t\x01é", `"a\"b\\c\n\r\t\u0001é"`},
		{&form{kind: asTimestamp}, "2026-01-02 03:04:05.6", `"2026-01-02T03:04:05.6"`},
		{&form{kind: asTimestamp}, "infinity", `"infinity"`},
		{&form{kind: asTimestamp}, "0044-03-15 10:00:00 BC", `"0044-03-15T10:00:00 BC"`},
		{&form{kind: asTimestamptz}, "2026-01-02 03:04:05+00", `"2026-01-02T03:04:05+00:00"`},
		{&form{kind: asTimestamptz}, "0044-03-15 10:00:00+00 BC", `"0044-03-15T10:00:00+00:00 BC"`},
		{&form{kind: asJSONB}, `{"a": [1]}`, `{"a": [1]}`},
		{&form{kind: asJSON}, ` {"a" : 1}`, ` {"a" : 1}`},
		{&form{kind: asJSON}, `"\u0000"`, `"\"\\u0000\""`},
		{&form{kind: asJSON}, `["\ud83d\ude00"]`, `["\ud83d\ude00"]`},
		{&form{kind: asJSON}, `["\ud83d"]`, `"[\"\\ud83d\"]"`},
		{&form{kind: asJSON}, `1e100000`, `"1e100000"`},
		{ints, "{1,2,NULL}", `[1,2,null]`},
		{ints, "{{1,2},{3,4}}", `[[1,2],[3,4]]`},
		{ints, "{}", `[]`},
		{ints, "[0:1]={1,2}", `"[0:1]={1,2}"`},
		{texts, `{a,"b,\"c\\",NULL,"NULL","",é}`, `["a","b,\"c\\",null,"NULL","","é"]`},
		{boxes, `{(1,1),(0,0);(2,2),(1,1)}`, `["(1,1),(0,0)","(2,2),(1,1)"]`},
		{documents, `{"{\"a\": 1}",NULL,"\"\\u0000\""}`, `[{"a": 1},null,"\"\\u0000\""]`},
	} {
		got := string(appendValue(nil, test.form, []byte(test.text)))
		if got != test.want {
			t.Errorf("%q: got %s, want %s", test.text, got, test.want)
		}
		if !json.Valid([]byte(got)) {
			t.Errorf("%q: %s is not JSON", test.text, got)
		}
	}
}

func FuzzAppendArray(f *testing.F) {
	f.Add([]byte(`{a,"b\"",NULL}`))
	f.Add([]byte(`{{1},{2}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		appendValue(nil, &form{kind: asArray, elem: &form{kind: asJSON}, delim: ','}, text)
	})
}

func FuzzFitsJSONB(f *testing.F) {
	f.Add([]byte(`{"a": ["\ud83d\ude00", 1e9, "\u0000"]}`))
	f.Fuzz(func(t *testing.T, text []byte) { fitsJSONB(text, false) })
}
