package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/urfave/cli/v2"

	"sequin/bridge/address"
	"sequin/bridge/cause"
	"sequin/bridge/schema"
)

// version is set when a release is built.
var version = schema.Version

func newApp(out, errOut io.Writer) *cli.App {
	app := &cli.App{
		Name:                 "sequin",
		Usage:                "stream changes out of Postgres, with SQL",
		Version:              version,
		HideVersion:          true, // it is a command
		EnableBashCompletion: true,
		Writer:               out,
		ErrWriter:            errOut,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: logFormatName, EnvVars: []string{"SEQUIN_LOG_FORMAT"}, Value: "text", Usage: logFormatFlag.Usage},
			&cli.BoolFlag{Name: "version", Usage: "print the version"},
		},
		Before: func(c *cli.Context) error {
			_, err := newLog(c)
			return err
		},
		Action: func(c *cli.Context) error {
			switch {
			case c.Args().Present():
				return fmt.Errorf("there is no command %q: sequin help shows those there are", c.Args().First())
			case c.Bool("version"):
				return printVersion(c)
			}
			return cli.ShowAppHelp(c)
		},
		Commands: []*cli.Command{
			migrateCommand(),
			bridgeCommand(),
			doctorCommand(),
			devCommand(),
			versionCommand(),
		},
		ExitErrHandler: func(*cli.Context, error) {}, // main prints it
	}
	for _, command := range app.Commands {
		refuseArguments(command)
	}
	return app
}

// refuseArguments has a command and its subcommands say which argument it does not take.
func refuseArguments(command *cli.Command) {
	command.HideHelpCommand = true // it would be an argument
	for _, sub := range command.Subcommands {
		refuseArguments(sub)
	}
	action := command.Action
	command.Action = func(c *cli.Context) error {
		if c.Args().Present() {
			return fmt.Errorf("%s takes no argument %q", c.Command.Name, c.Args().First())
		}
		return action(c)
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
	// A command's own has no default, which would hide what was given before the command.
	logFormatFlag = &cli.StringFlag{Name: logFormatName, Usage: "text or json, on stderr"}
)

var errNoURL = errors.New("which database? Give --database-url, or set DATABASE_URL")

// databaseURL returns the address that a command was given.
func databaseURL(c *cli.Context) (string, error) {
	url := c.String(databaseURLName)
	if url == "" {
		return "", errNoURL
	}
	_, err := address.Parse(url)
	return url, err
}

// newLog returns the log that a command was asked for.
func newLog(c *cli.Context) (*slog.Logger, error) {
	var format string
	for _, level := range c.Lineage() {
		if format = level.String(logFormatName); format != "" {
			break
		}
	}
	handler, err := newHandler(c.App.ErrWriter, cmp.Or(format, "text"))
	if err != nil {
		return nil, err
	}
	c.App.Metadata[logFormatName] = format // for what ends the program
	return slog.New(handler), nil
}

func newHandler(w io.Writer, format string) (slog.Handler, error) {
	options := &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if err, ok := a.Value.Any().(error); ok {
			a.Value = slog.StringValue(cause.Text(err))
		}
		return a
	}}
	switch format {
	case "text":
		return slog.NewTextHandler(w, options), nil
	case "json":
		return slog.NewJSONHandler(w, options), nil
	default:
		return nil, fmt.Errorf("--%s is text or json, not %q", logFormatName, format)
	}
}

// run runs the program, and returns what it exits with.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	app := newApp(out, errOut)
	err := app.RunContext(ctx, args)
	switch {
	case err == nil:
		return 0
	case app.Metadata[logFormatName] == "json":
		slog.New(slog.NewJSONHandler(errOut, nil)).Error(cause.Text(err))
	default:
		fmt.Fprintln(errOut, "sequin:", cause.Text(err))
	}
	return 1
}
