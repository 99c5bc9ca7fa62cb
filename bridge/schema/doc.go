// Package schema installs Sequin's schema and keeps it current: numbered migrations for what has history (tables, types,
// data), and one repeatable layer for functions and views, applied whole, in one transaction, whenever its text has
// changed. All functions switch at once or not at all, and how they came to be is git's to tell, not the database's.
package schema
