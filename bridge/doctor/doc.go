// Package doctor tells whether a database is ready for Sequin, and what to do where it is not. It only reads.
package doctor
