package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"sequin/bridge/dev"
	"sequin/bridge/localpg"
)

func devCommand() *cli.Command {
	return &cli.Command{
		Name:  "dev",
		Usage: "run a Postgres of its own, with the schema in it and a bridge beside it",
		Description: "For trying it out and for development: everyone on this machine is let in. It uses the PostgreSQL that is\n" +
			"installed, or else downloads one. It runs until SIGTERM or SIGINT; what is in the directory stays.\n" +
			"Run by root, the server runs as postgres or nobody.",
		Flags: []cli.Flag{
			&cli.StringFlag{
				Name: "dir", EnvVars: []string{"SEQUIN_DEV_DIR"},
				Usage: "the server's `DIRECTORY` (default: ~/.local/share/sequin/dev; root's: /var/lib/sequin/dev)",
			},
			&cli.IntFlag{Name: "port", Usage: "on 127.0.0.1 (default: a free one, and the same the next time)"},
			&cli.IntFlag{Name: "postgres", Usage: "`MAJOR` version (default: the newest that is installed)"},
			&cli.StringFlag{
				Name: "download-from", EnvVars: []string{"SEQUIN_DOWNLOAD_FROM"}, Value: localpg.Repository,
				Usage: "`URL` of a Maven repository, for where no PostgreSQL is installed",
			},
			logFormatFlag,
		},
		Action: func(c *cli.Context) error {
			log, err := newLog(c)
			if err != nil {
				return err
			}
			dir := c.String("dir")
			if dir == "" {
				if dir, err = dev.DefaultDir(); err != nil {
					return err
				}
			}
			return dev.Run(c.Context, dev.Config{
				Dir:        dir,
				Major:      c.Int("postgres"),
				Port:       c.Int("port"),
				Repository: c.String("download-from"),
				Version:    version,
				Log:        log,
				Ready:      func(s dev.Server) { fmt.Fprint(c.App.Writer, s.Greeting()) },
			})
		},
	}
}
