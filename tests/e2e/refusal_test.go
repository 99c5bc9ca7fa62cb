package e2e

import (
	"fmt"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// Where a server or a role is not ready, the bridge says what to do, in its log and in health(), and goes on when it is
// done.
func TestRoleMayNotReplicate(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	role := "app_" + db.Name
	db.Exec(`create role ` + role + ` login`)
	db.Cleanup(func() { db.Exec(`drop owned by ` + role + ` cascade; drop role ` + role) })
	db.Exec(`grant create on database ` + db.Name + ` to ` + role)
	migrate := pgtest.StartProcess(t, "migrate", "--database-url", db.URLAs(role))
	if err := migrate.Exited(time.Minute); err != nil {
		t.Fatalf("migrate ended with %v: %s", err, migrate.Log())
	}
	b := pgtest.BridgeProcess(t, db.URLAs(role))
	b.AwaitLog("may not replicate")
	pgtest.Eventually(t, 10*time.Second, func() error {
		var hint string
		err := db.Pool.QueryRow(t.Context(), `select hint from sequin.health() where status = 'error' and hint like 'alter role%'`).Scan(&hint)
		if err != nil {
			return fmt.Errorf("health() does not say so: %w", err)
		}
		return nil
	})
	db.Exec(`alter role ` + role + ` replication`)
	b.AwaitLog("msg=capturing")
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

func TestWALLevel(t *testing.T) {
	t.Parallel()
	db := pgtest.NewOn(t, pgtest.NewCluster(t, map[string]string{"wal_level": "replica"}))
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("wal_level is replica")
	b.AwaitLog("alter system set wal_level = 'logical'")
}
