// Package quote quotes what goes into SQL, or into a hint that somebody will run, where a parameter cannot.
package quote

import "strings"

// Literal quotes a string.
func Literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// Identifier quotes a name.
func Identifier(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }
