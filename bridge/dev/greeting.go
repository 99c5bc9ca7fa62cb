package dev

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

const greeting = `
PostgreSQL %d with Sequin in it, and a bridge beside it. To connect:

  %s %s

To try it:

  create table orders (id int generated always as identity primary key, item text not null);
  select sequin.create_stream('orders', '{orders}');
  select sequin.create_consumer('shipping', 'orders');
  insert into orders (item) values ('lamp'), ('chair');
  select * from sequin.receive('shipping', 10, wait => '5s');

Control-C stops it. What is in it stays, in %s.

`

// Greeting says how to connect, and what to try.
func (s Server) Greeting() string {
	psql := "psql"
	if _, err := exec.LookPath(psql); err != nil {
		if path, err := exec.LookPath(filepath.Join(s.Binaries.Dir, psql)); err == nil {
			psql = path
		}
	}
	// Without its query, which a shell may take for a pattern.
	url, _, _ := strings.Cut(s.URL, "?")
	return fmt.Sprintf(greeting, s.Binaries.Major, psql, url, s.Dir)
}
