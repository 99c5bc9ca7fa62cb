package main

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/dev"
	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// The story is told to its end, and shows what it tells.
func TestDemo(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for _, want := range []string{
		fmt.Sprintf("-- PostgreSQL %d with", pgtest.Binaries(t).Major),
		"shop=# create table orders (id int primary key",
		"worker_a=# select ack_id, seq, action, record, deliver_count\nworker_a-# from sequin.receive('shipping', wait => '5s');\n",
		"shop=*# rollback;\nROLLBACK\n",
		" customer | amount \n----------+--------\n ann      |  13.50\n bob      |     20\n(2 rows)\n\n",
		" customer | amount \n----------+--------\n(0 rows)\n\n",
		"shop-#   group_by => '{}', start_at => 'beginning');\n create_consumer \n-----------------\n created\n(1 row)\n\n",
		" consumer | state | rows_done | rows_total \n----------+-------+-----------+------------\n invoices | done  |         5 |          5\n(1 row)\n\n",
		" read   | {\"cents\": 2000, \"order\": 5}\n(4 rows)\n\n",
		" rewind  \n---------\n rewound\n(1 row)\n\n",
		" republish \n-----------\n         3\n(1 row)\n\n",
		" read   | 8         | {\"id\": 8, \"amount\": 70, \"customer\": \"cyd\"}\n delete | 4         | {\"id\": 4, \"amount\": 10, \"customer\": \"ann\"}\n(3 rows)\n\n",
		" update | 5         | {\"amount\": 20} | bob\n delete | 6         |                | ann\n(2 rows)\n\n",
		"ERROR:  consumer \"shiping\" does not exist\nHINT:  ",
		"-- That is all.",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("it does not show %q", want)
		}
	}
	if t.Failed() {
		t.Log(&out)
	}
}

// Where the server answers something else than the story says, the story ends there with an error.
func TestNotAsTold(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	var out bytes.Buffer
	err := tell(t.Context(), &out, dev.Server{URL: db.URL})
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || !strings.Contains(out.String(), "ERROR:  ") {
		t.Errorf("without a schema: got %v\n%s", err, &out)
	}
	if strings.Contains(out.String(), "That is all") {
		t.Errorf("it goes on after an error: %s", &out)
	}

	s := &story{ctx: t.Context(), out: &out, server: dev.Server{URL: db.URL}}
	x := s.connect("x")
	defer x.close()
	x.fail("42P01", `select * from nowhere`)
	s.expect(x.run(`select 1 as n`).rows("n") == "1", "one is not one")
	if s.err != nil {
		t.Fatalf("what is as told is an error: %v", s.err)
	}
	s.expect(x.run(`select 1 as n`).rows("n") == "2", "one is not two")
	s.expect(false, "and something else")
	if s.err == nil || !strings.Contains(s.err.Error(), "one is not two") {
		t.Errorf("what is not as told gives %v", s.err)
	}

	s.err = nil
	x.fail("42P01", `select 1`)
	if s.err == nil {
		t.Error("an error that does not come is not noticed")
	}
}

var tables = []string{
	`select 1`,
	`select 1 as id, 'x' as "a long name", null as nothing, true as t`,
	`select g as n, repeat('x', g * 3) as text, g * 1.5 as number, g::float8 as f from generate_series(1, 3) g`,
	`select 1 as a, 'none' as b where false`,
	`select E'one\ntwo\n\nfour' as lines, 7 as n, E'a\nb' as last`,
	`select 'é☃' as "ü", jsonb_build_object('a', 1) as j, '{1,2}'::int[] as a`,
	`select 5::oid as o, 6::int2 as s, '0/16'::pg_lsn as l, now() > '2000-01-01' as later`,
	`create temporary table t (i int)`,
}

// What is printed is what psql prints, to the letter.
func TestAsPsql(t *testing.T) {
	t.Parallel()
	// Debian has a wrapper of that name, which may have nothing to call.
	if err := exec.Command("psql", "--version").Run(); err != nil {
		t.Skipf("there is no psql to compare with: %v", err)
	}
	db := pgtest.Empty(t)
	for _, sql := range tables {
		var out bytes.Buffer
		s := &story{ctx: t.Context(), out: &out, server: dev.Server{URL: db.URL}}
		x := s.connect("x")
		x.run(sql)
		x.close()
		if s.err != nil {
			t.Fatal(s.err)
		}
		_, got, _ := strings.Cut(out.String(), ";\n")
		cmd := exec.CommandContext(t.Context(), "psql", "-X", "-d", db.URL, "-c", sql)
		cmd.Env = append(cmd.Environ(), "LC_ALL=C.UTF-8", "PGCLIENTENCODING=UTF8")
		want, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("psql: %v: %s", err, want)
		}
		if got != string(want) {
			t.Errorf("%s\ngot:\n%s\npsql:\n%s", sql, got, want)
		}
	}
}

func TestPrintError(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	printError(&out, &pgconn.PgError{Severity: "ERROR", Message: "no", Detail: "not so", Hint: "so"})
	if want := "ERROR:  no\nDETAIL:  not so\nHINT:  so\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}
