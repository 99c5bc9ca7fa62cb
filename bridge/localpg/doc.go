// Package localpg runs a PostgreSQL of its own on this machine: for trying Sequin out, and for its tests.
package localpg
