package schema

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"sequin/migrations"
)

// gooseTable is where goose keeps which migrations were run.
const gooseTable = "sequin.goose_db_version"

// searchPath keeps what others have put into a schema of the role's own path out of what is installed.
const searchPath = "pg_catalog, pg_temp"

// lockKey is of the advisory lock that one installation at a time holds.
const lockKey = 7190234

// InstallError is an error of the server's in a file of the repeatable layer.
type InstallError struct {
	File string
	Line int // 0: not known
	*pgconn.PgError
}

func (e *InstallError) Error() string {
	if e.Line > 0 {
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.PgError.Error())
	}
	return fmt.Sprintf("%s: %s", e.File, e.PgError.Error())
}

func (e *InstallError) Unwrap() error { return e.PgError }

// Up installs the schema, or brings it up to this program's. Where it is current, it does nothing. It refuses one that
// is newer. However many run at once, one does the work.
func Up(ctx context.Context, databaseURL string, log *slog.Logger) error {
	conn, err := pgx.Connect(ctx, databaseURL)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := settle(ctx, conn); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, `select pg_catalog.pg_advisory_lock($1)`, lockKey); err != nil {
		return fmt.Errorf("wait for another installation to end: %w", err)
	}
	status, err := Look(ctx, conn)
	if err != nil {
		return err
	}
	if status.State == Newer {
		return fmt.Errorf("%w (it is %s, the program's is %s)", ErrNewer, status.Version, Version)
	}
	if err := CheckNames(ctx, conn); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, `create schema if not exists sequin`); err != nil {
		return fmt.Errorf("create schema: %w", err)
	}
	if err := migrate(ctx, databaseURL, log); err != nil {
		return err
	}
	if err := install(ctx, conn, log); err != nil {
		return err
	}
	log.Info("schema is current", "version", Version)
	return nil
}

// settle keeps settings of the database or the role out of the way of a long installation.
func settle(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `set statement_timeout = 0; set lock_timeout = 0; set client_min_messages = warning;
		set default_transaction_read_only = off; set default_transaction_isolation = 'read committed'; set client_encoding = 'UTF8';
		set standard_conforming_strings = on; set search_path = `+searchPath)
	if err != nil {
		return fmt.Errorf("prepare connection: %w", err)
	}
	return nil
}

// migrate runs the migrations that were not run.
func migrate(ctx context.Context, databaseURL string, log *slog.Logger) error {
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		return err
	}
	config.RuntimeParams["statement_timeout"] = "0"
	config.RuntimeParams["default_transaction_read_only"] = "off"
	config.RuntimeParams["search_path"] = searchPath
	db := stdlib.OpenDB(*config)
	defer db.Close()
	provider, err := newProvider(db)
	if err != nil {
		return err
	}
	results, err := provider.Up(ctx)
	if err != nil {
		return fmt.Errorf("run migrations: %w", err)
	}
	for _, r := range results {
		log.Info("ran migration", "version", r.Source.Version, "took", r.Duration)
	}
	return nil
}

func newProvider(db *sql.DB) (*goose.Provider, error) {
	provider, err := goose.NewProvider(goose.DialectPostgres, db, migrations.FS,
		goose.WithTableName(gooseTable), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	return provider, nil
}

// install applies the repeatable layer, unless it is there as it is.
func install(ctx context.Context, conn *pgx.Conn, log *slog.Logger) error {
	files, checksum, err := layer()
	if err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		var isCurrent bool
		err := tx.QueryRow(ctx, `select coalesce((select (v.checksum, v.version) = ($1, $2)
			from sequin.sql_version v order by v.id desc limit 1), false)`, checksum, Version).Scan(&isCurrent)
		if err != nil {
			return fmt.Errorf("look at what is installed: %w", err)
		}
		if isCurrent {
			return nil
		}
		for _, f := range files {
			// Without arguments, the file goes as it is: many statements, in one message.
			if _, err := tx.Exec(ctx, f.text); err != nil {
				return locate(f, err)
			}
		}
		_, err = tx.Exec(ctx, `insert into sequin.sql_version (checksum, version) values ($1, $2)`, checksum, Version)
		if err != nil {
			return fmt.Errorf("record what is installed: %w", err)
		}
		log.Info("installed functions and views", "version", Version)
		return nil
	})
}

// locate tells where in a file the server found an error. Its position counts characters.
func locate(f file, err error) error {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return fmt.Errorf("install %s: %w", f.name, err)
	}
	e := &InstallError{File: f.name, PgError: pgErr}
	if chars := []rune(f.text); pgErr.Position > 0 && int(pgErr.Position) <= len(chars) {
		e.Line = 1 + strings.Count(string(chars[:pgErr.Position-1]), "\n")
	}
	return e
}
