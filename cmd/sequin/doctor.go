package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"sequin/bridge/doctor"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:        "doctor",
		Usage:       "is this database ready? Each thing that is not, with what mends it",
		Description: "It only reads. Exits with 1 where something has to be mended first.",
		Flags:       []cli.Flag{databaseURLFlag},
		Action: func(c *cli.Context) error {
			url, err := databaseURL(c)
			if err != nil {
				return err
			}
			findings, err := doctor.Examine(c.Context, url)
			if err != nil {
				return err
			}
			errors := 0
			for _, f := range findings {
				if f.Status == doctor.Error {
					errors++
				}
				if _, err := fmt.Fprintf(c.App.Writer, "%-8s %-22s %s\n", f.Status, f.Name, f.Detail); err != nil {
					return err
				}
				if f.Mend == "" {
					continue
				}
				if _, err := fmt.Fprintf(c.App.Writer, "%-8s %-22s → %s\n", "", "", f.Mend); err != nil {
					return err
				}
			}
			if errors > 0 {
				return fmt.Errorf("%d of %d checks found what has to be mended", errors, len(findings))
			}
			return nil
		},
	}
}
