// Package pgtest gives tests a real PostgreSQL: a server of the test process's own, started from local binaries, and a
// database of each test's own, cloned from a template with the schema in it.
//
// A package that uses it has
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
//
// PGTEST_MAJOR chooses the major version; default: the newest that is installed.
package pgtest
