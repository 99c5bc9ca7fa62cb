package main

import (
	"github.com/urfave/cli/v2"

	"sequin/bridge"
)

func bridgeCommand() *cli.Command {
	return &cli.Command{
		Name:  "bridge",
		Usage: "run the bridge: it reads the replication slot and writes the change log",
		Description: "In the foreground, until SIGTERM or SIGINT: then it writes and confirms what it has read, and exits 0.\n" +
			"Of several on one database, one works, and the others stand by.",
		Flags: []cli.Flag{databaseURLFlag, logFormatFlag},
		Action: func(c *cli.Context) error {
			url, err := databaseURL(c)
			if err != nil {
				return err
			}
			log, err := newLog(c)
			if err != nil {
				return err
			}
			b, err := bridge.New(bridge.Config{DatabaseURL: url, Log: log, Version: version})
			if err != nil {
				return err
			}
			return b.Run(c.Context)
		},
	}
}
