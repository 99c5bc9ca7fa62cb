package usecases

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

var (
	sections = regexp.MustCompile(`(?m)^## `)
	blocks   = regexp.MustCompile("(?s)\n```sql\n(.*?)```")
)

// The SQL of the README's "Use it" runs as it is there, one piece after another, on a database with the tables that it
// speaks of.
func TestREADME(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var use string
	for _, section := range sections.Split(string(readme), -1) {
		if strings.HasPrefix(section, "Use it\n") {
			use, _, _ = strings.Cut(section, "### Give a worker no more than it needs") // which takes roles, of the whole server
		}
	}
	db := products(t)
	ran := 0
	for _, block := range blocks.FindAllStringSubmatch(use, -1) {
		sql := block[1]
		if strings.Contains(sql, "sequin.rewind(") {
			awaitLogged(db)
		}
		if _, err := db.Pool.Exec(t.Context(), sql); err != nil {
			t.Errorf("%v:\n%s", err, sql)
		}
		ran++
	}
	if ran < 10 {
		t.Fatalf("%d pieces were found", ran)
	}
	if bad := pgtest.Column[string](db, `select name || ' ' || coalesce(error, state) from sequin.consumers where state not in ('active', 'starting')`); len(bad) > 0 {
		t.Errorf("consumers that do not work: %q", bad)
	}
	pgtest.Eventually(t, 30*time.Second, func() error {
		if got := pgtest.Value[string](db, `select coalesce(string_agg(action || ' ' || changes::text, ', '), '') from orders_events`); !strings.HasPrefix(got, `update {"status": "new"}`) {
			return fmt.Errorf("the audit log has %q", got)
		}
		return nil
	})
}

// awaitLogged waits until there is something of orders in the log.
func awaitLogged(db *pgtest.DB) {
	db.Helper()
	pgtest.Eventually(db.TB, 30*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.messages where stream = 'orders')`) {
			return fmt.Errorf("nothing of orders is in the log")
		}
		return nil
	})
}
