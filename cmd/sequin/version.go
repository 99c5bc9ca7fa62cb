package main

import (
	"fmt"
	"runtime"

	"github.com/urfave/cli/v2"

	"sequin/bridge/schema"
)

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:   "version",
		Usage:  "print the version",
		Action: printVersion,
	}
}

func printVersion(c *cli.Context) error {
	_, err := fmt.Fprintf(c.App.Writer, "sequin %s, schema %s, %s %s/%s\n", version, schema.Version, runtime.Version(),
		runtime.GOOS, runtime.GOARCH)
	return err
}
