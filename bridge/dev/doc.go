// Package dev is Sequin with all that it needs: a PostgreSQL of its own, the schema in it and a bridge beside it.
package dev
