package address

import (
	"strings"
	"testing"
)

// However an address is written, and whatever is wrong with it, no part of its password is shown.
func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		"postgres://u:secret@127.0.0.1/db":                                    "",
		"postgres://u:sec%40ret@127.0.0.1/db?sslmode=disable":                 "",
		"host=/tmp user=u password='secret' dbname=db":                        "",
		"host=127.0.0.1 user=u password = secret sslmode=bogus":               "failed to configure TLS (sslmode is invalid)",
		"postgres://u:secret@127.0.0.1/db?sslmode=bogus":                      "failed to configure TLS (sslmode is invalid)",
		"host=127.0.0.1 password = 'a secret' port=none":                      "try it with psql",
		`host=127.0.0.1 password=a\ secret port=none`:                         "try it with psql",
		`host=127.0.0.1 password='it\'s secret' port=none`:                    "try it with psql",
		"host=127.0.0.1 user=u password = secret garbage":                     "try it with psql",
		"postgres://u:a/secret@127.0.0.1/db":                                  "try it with psql",
		"postgres://u:a@secret@127.0.0.1/db":                                  "write it as %40",
		"postgres://u:a@secret@127.0.0.1,127.0.0.2:5433/db":                   "write it as %40",
		"postgres://u:secret@127.0.0.1/db?sslrootcert=/no/file&sslmode=allow": "failed to configure TLS (unable to read CA file",
	} {
		_, err := Parse(text)
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", text, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret")):
			t.Errorf("%s: got %v", text, err)
		}
	}
}
