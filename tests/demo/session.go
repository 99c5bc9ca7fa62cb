package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/dev"
)

// A story is told to a writer, until something in it is not so.
type story struct {
	ctx    context.Context
	out    io.Writer
	server dev.Server
	err    error

	isSpaced bool // what was printed last ends with an empty line
}

// say prints what comes next.
func (s *story) say(text string) {
	if s.err != nil {
		return
	}
	if !s.isSpaced {
		fmt.Fprintln(s.out)
	}
	fmt.Fprintf(s.out, "-- %s\n\n", strings.ReplaceAll(text, "\n", "\n-- "))
}

// expect ends the story where something is not so.
func (s *story) expect(isSo bool, format string, args ...any) {
	if s.err == nil && !isSo {
		s.err = fmt.Errorf("it is not as told: "+format, args...)
	}
}

// session is a connection, as one psql has.
type session struct {
	*story
	name string
	conn *pgconn.PgConn
}

// connect opens a session.
func (s *story) connect(name string) *session {
	x := &session{story: s, name: name}
	if s.err != nil {
		return x
	}
	config, err := pgx.ParseConfig(s.server.URL)
	if err != nil {
		s.err = err
		return x
	}
	config.RuntimeParams["application_name"] = name
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { printError(s.out, (*pgconn.PgError)(n)) }
	if x.conn, err = pgconn.ConnectConfig(s.ctx, &config.Config); err != nil {
		s.err = fmt.Errorf("connect: %w", err)
	}
	return x
}

func (x *session) close() {
	if x.conn != nil {
		_ = x.conn.Close(context.WithoutCancel(x.ctx))
	}
}

// result is what a statement gave: its rows, by column.
type result []map[string]string

// rows returns the values of some columns, a row a line: "1 insert".
func (r result) rows(columns ...string) string {
	lines := make([]string, len(r))
	for n, row := range r {
		values := make([]string, len(columns))
		for i, column := range columns {
			values[i] = row[column]
		}
		lines[n] = strings.Join(values, " ")
	}
	return strings.Join(lines, "\n")
}

// list returns a column's values as the text of an array.
func (r result) list(column string) string {
	return "{" + strings.ReplaceAll(r.rows(column), "\n", ",") + "}"
}

// run runs a statement, which must succeed, and prints it with its result.
func (x *session) run(sql string) result {
	r, err := x.try(sql)
	if err != nil && x.err == nil {
		x.err = err
	}
	return r
}

// fail runs a statement, which must fail with an error of a code.
func (x *session) fail(code, sql string) {
	if x.err != nil {
		return
	}
	_, err := x.try(sql)
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != code {
		x.err = fmt.Errorf("it is not as told: %s: got %v, not an error %s", sql, err, code)
	}
}

// await asks, and says nothing of it, until a statement's one row has a value. A bridge takes a moment; a reader of the
// story need not look at each try.
func (x *session) await(sql, column, want string) {
	var got string
	for begun := time.Now(); x.err == nil && time.Since(begun) < 20*time.Second; {
		answer, err := x.ask(sql)
		if err != nil {
			x.err = fmt.Errorf("%s: %w", sql, err)
			return
		}
		for i, field := range answer.FieldDescriptions {
			if field.Name == column && len(answer.Rows) == 1 {
				got = string(answer.Rows[0][i])
			}
		}
		if got == want {
			return
		}
		select {
		case <-x.ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	x.expect(false, "%s: %s is %q, and not %q", sql, column, got, want)
}

func (x *session) try(sql string) (result, error) {
	if x.err != nil {
		return nil, nil
	}
	prompt := x.name + "="
	if x.conn.TxStatus() != 'I' {
		prompt += "*"
	}
	more := strings.Replace(prompt, "=", "-", 1)
	fmt.Fprintf(x.out, "%s# %s;\n", prompt, strings.ReplaceAll(sql, "\n", "\n"+more+"# "))
	answer, err := x.ask(sql)
	x.isSpaced = err == nil && len(answer.FieldDescriptions) > 0
	if err != nil {
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) {
			printError(x.out, pgErr)
		}
		return nil, fmt.Errorf("%s: %w", sql, err)
	}
	printAnswer(x.out, answer)
	r := make(result, len(answer.Rows))
	for n, row := range answer.Rows {
		r[n] = make(map[string]string)
		for i, field := range answer.FieldDescriptions {
			r[n][field.Name] = string(row[i])
		}
	}
	return r, nil
}

// ask sends a statement as psql does, and reads what comes: the columns too where there are no rows.
func (x *session) ask(sql string) (*pgconn.Result, error) {
	var answer pgconn.Result
	results := x.conn.Exec(x.ctx, sql)
	for results.NextResult() {
		r := results.ResultReader()
		answer.FieldDescriptions = slices.Clone(r.FieldDescriptions())
		for r.NextRow() {
			row := make([][]byte, len(r.Values()))
			for i, value := range r.Values() {
				row[i] = slices.Clone(value)
			}
			answer.Rows = append(answer.Rows, row)
		}
		answer.CommandTag, _ = r.Close() // its error is the whole's
	}
	return &answer, results.Close()
}
