package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func runWith(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), append([]string{"sequin"}, args...), &o, &e)
	return code, o.String(), e.String()
}

func TestArguments(t *testing.T) {
	t.Setenv("DATABASE_URL", "")
	for _, test := range []struct {
		args         string
		code         int
		out, errorIs string
	}{
		{"help", 0, "COMMANDS:", ""},
		{"", 0, "COMMANDS:", ""},
		{"help bridge", 0, "sequin bridge - run the bridge", ""},
		{"version", 0, "sequin " + version + ", schema", ""},
		{"--version", 0, "sequin " + version + ", schema", ""},
		{"brigde", 1, "", `no command "brigde"`},
		{"bridge x", 1, "", `bridge takes no argument "x"`},
		{"doctor x", 1, "", `doctor takes no argument "x"`},
		{"dev x", 1, "", `dev takes no argument "x"`},
		{"version x", 1, "", `version takes no argument "x"`},
		{"migrate up", 1, "", `migrate takes no argument "up"`},
		{"migrate status x", 1, "", `status takes no argument "x"`},
		{"bridge", 1, "", "--database-url"},
		{"--log-format xml version", 1, "", `--log-format is text or json, not "xml"`},
		{"bridge --database-url host=x --log-format xml", 1, "", `--log-format is text or json, not "xml"`},
	} {
		code, out, errOut := runWith(t, strings.Fields(test.args)...)
		if code != test.code || !strings.Contains(out, test.out) || !strings.Contains(errOut, test.errorIs) {
			t.Errorf("%q: exit %d, %s%s", test.args, code, out, errOut)
		}
	}
}

// Wherever the format is given, the log has it, and so does what ends the program; what is nearest to the command counts.
func TestLogFormat(t *testing.T) {
	const target = "postgres://nobody@127.0.0.1:1/none?sslmode=disable"
	for _, test := range []struct {
		env    string
		args   []string
		isJSON bool
	}{
		{"", []string{"migrate", "--database-url", target}, false},
		{"", []string{"--log-format", "json", "migrate", "--database-url", target}, true},
		{"", []string{"migrate", "--log-format", "json", "--database-url", target}, true},
		{"json", []string{"migrate", "--database-url", target}, true},
		{"json", []string{"--log-format", "text", "migrate", "--database-url", target}, false},
		{"", []string{"--log-format", "json", "migrate", "--log-format", "text", "--database-url", target}, false},
		{"", []string{"--log-format", "json", "doctor", "--database-url", target}, true},
		{"", []string{"--log-format", "json", "bridge", "x"}, true},
	} {
		t.Setenv("SEQUIN_LOG_FORMAT", test.env)
		code, _, errOut := runWith(t, test.args...)
		lines := strings.Split(strings.TrimSpace(errOut), "\n")
		if isJSON := json.Valid([]byte(lines[len(lines)-1])); code != 1 || isJSON != test.isJSON {
			t.Errorf("SEQUIN_LOG_FORMAT=%s %q: exit %d, %s", test.env, test.args, code, errOut)
		}
	}
}
