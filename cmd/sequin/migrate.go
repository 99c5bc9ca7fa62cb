package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/urfave/cli/v2"

	"sequin/bridge/schema"
)

func migrateCommand() *cli.Command {
	return &cli.Command{
		Name:  "migrate",
		Usage: "install the schema, or bring it up to this program's",
		Description: "Needs a role that may create a schema in the database. Where the schema is current, it does nothing.\n" +
			"The functions and views all switch in one transaction.",
		Flags: []cli.Flag{
			databaseURLFlag, logFormatFlag,
			&cli.BoolFlag{Name: "dump", Usage: "print the SQL for an empty database, instead of running it"},
			&cli.BoolFlag{Name: "uninstall", Usage: "remove the schema, the publication and the slot instead, and all that is in them"},
		},
		Action: migrate,
		Subcommands: []*cli.Command{{
			Name:   "status",
			Usage:  "what is installed, and what this program would install",
			Flags:  []cli.Flag{databaseURLFlag},
			Action: migrateStatus,
		}},
	}
}

func migrate(c *cli.Context) error {
	if c.Bool("dump") && c.Bool("uninstall") {
		return errors.New("--dump and --uninstall do not go together")
	}
	if c.Bool("dump") {
		return schema.Dump(c.App.Writer)
	}
	url, err := databaseURL(c)
	if err != nil {
		return err
	}
	log, err := newLog(c)
	if err != nil {
		return err
	}
	if c.Bool("uninstall") {
		return schema.Uninstall(c.Context, url, log)
	}
	return schema.Up(c.Context, url, log)
}

func migrateStatus(c *cli.Context) error {
	url, err := databaseURL(c)
	if err != nil {
		return err
	}
	conn, err := pgx.Connect(c.Context, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(c.Context))
	s, err := schema.Look(c.Context, conn)
	if err != nil {
		return err
	}
	installed := "nothing"
	if s.Version != "" {
		installed = fmt.Sprintf("%s (migration %d, functions and views %.12s, since %s)", s.Version, s.Migration, s.Checksum,
			s.AppliedAt.Format(time.RFC3339))
	}
	_, err = fmt.Fprintf(c.App.Writer, "installed  %s\nprogram    %s\npending    %d migrations\nstate      %s\n",
		installed, schema.Version, s.Pending, s.State)
	return err
}
