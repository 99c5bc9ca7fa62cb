package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/urfave/cli/v2"

	"sequin/bridge/schema"
)

// version is set when a release is built.
var version = schema.Version

func newApp(out, errOut io.Writer) *cli.App {
	return &cli.App{
		Name:                 "sequin",
		Usage:                "stream changes out of Postgres, with SQL",
		Version:              version,
		HideVersion:          true, // it is a command
		HideHelpCommand:      true,
		EnableBashCompletion: true,
		Writer:               out,
		ErrWriter:            errOut,
		Flags:                []cli.Flag{logFormatFlag},
		Commands: []*cli.Command{
			migrateCommand(),
			bridgeCommand(),
			doctorCommand(),
			devCommand(),
			versionCommand(),
		},
		ExitErrHandler: func(*cli.Context, error) {}, // main prints it
	}
}

const (
	databaseURLName = "database-url"
	logFormatName   = "log-format"
)

var (
	databaseURLFlag = &cli.StringFlag{
		Name: databaseURLName, EnvVars: []string{"DATABASE_URL"},
		Usage: "the database, as a `URL` or libpq's key=value pairs",
	}
	logFormatFlag = &cli.StringFlag{
		Name: logFormatName, EnvVars: []string{"SEQUIN_LOG_FORMAT"}, Value: "text",
		Usage: "text or json, on stderr",
	}
)

var errNoURL = errors.New("which database? Give --database-url, or set DATABASE_URL")

// databaseURL returns the address that a command was given.
func databaseURL(c *cli.Context) (string, error) {
	if url := c.String(databaseURLName); url != "" {
		return url, nil
	}
	return "", errNoURL
}

// newLog returns the log that a command was asked for.
func newLog(c *cli.Context) (*slog.Logger, error) {
	switch format := c.String(logFormatName); format {
	case "text":
		return slog.New(slog.NewTextHandler(c.App.ErrWriter, nil)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(c.App.ErrWriter, nil)), nil
	default:
		return nil, fmt.Errorf("--log-format is text or json, not %q", format)
	}
}
