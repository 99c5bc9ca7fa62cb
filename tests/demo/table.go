package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// rightAligned are the types that psql aligns to the right.
var rightAligned = []uint32{
	pgtype.Int2OID, pgtype.Int4OID, pgtype.Int8OID, pgtype.Float4OID, pgtype.Float8OID, pgtype.NumericOID, pgtype.OIDOID, pgtype.XIDOID,
}

// printAnswer prints what a statement gave as psql does.
func printAnswer(w io.Writer, r *pgconn.Result) {
	if len(r.FieldDescriptions) == 0 {
		fmt.Fprintln(w, r.CommandTag)
		return
	}
	widths := make([]int, len(r.FieldDescriptions))
	rows := make([][][]string, len(r.Rows)) // row, column, line
	for i, field := range r.FieldDescriptions {
		widths[i] = utf8.RuneCountInString(field.Name)
	}
	for n, row := range r.Rows {
		rows[n] = make([][]string, len(row))
		for i, value := range row {
			rows[n][i] = strings.Split(string(value), "\n")
			for _, line := range rows[n][i] {
				widths[i] = max(widths[i], utf8.RuneCountInString(line))
			}
		}
	}

	rules := make([]string, len(widths))
	heads := make([]string, len(widths))
	for i, field := range r.FieldDescriptions {
		space := widths[i] - utf8.RuneCountInString(field.Name)
		heads[i] = " " + strings.Repeat(" ", space/2) + field.Name + strings.Repeat(" ", (space+1)/2) + " "
		rules[i] = strings.Repeat("-", widths[i]+2)
	}
	fmt.Fprintln(w, strings.Join(heads, "|"))
	fmt.Fprintln(w, strings.Join(rules, "+"))
	for _, row := range rows {
		printRow(w, r.FieldDescriptions, widths, row)
	}
	plural := "s"
	if len(rows) == 1 {
		plural = ""
	}
	fmt.Fprintf(w, "(%d row%s)\n\n", len(rows), plural)
}

// printRow prints a row, whose values may have several lines: all but the last end with a plus.
func printRow(w io.Writer, fields []pgconn.FieldDescription, widths []int, row [][]string) {
	height := 0
	for _, lines := range row {
		height = max(height, len(lines))
	}
	for n := range height {
		var b strings.Builder
		for i, lines := range row {
			if i > 0 {
				b.WriteByte('|')
			}
			b.WriteByte(' ')
			var text string
			if n < len(lines) {
				text = lines[n]
			}
			space := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
			isRight, hasMore, isLast := slices.Contains(rightAligned, fields[i].DataTypeOID), n+1 < len(lines), i+1 == len(row)
			if isRight {
				b.WriteString(space)
			}
			b.WriteString(text)
			if !isRight && (hasMore || !isLast) {
				b.WriteString(space)
			}
			if hasMore {
				b.WriteByte('+')
			} else if !isLast {
				b.WriteByte(' ')
			}
		}
		fmt.Fprintln(w, b.String())
	}
}

// printError prints an error or a notice of the server's as psql does.
func printError(w io.Writer, e *pgconn.PgError) {
	fmt.Fprintf(w, "%s:  %s\n", e.Severity, e.Message)
	if e.Detail != "" {
		fmt.Fprintf(w, "DETAIL:  %s\n", e.Detail)
	}
	if e.Hint != "" {
		fmt.Fprintf(w, "HINT:  %s\n", e.Hint)
	}
}
