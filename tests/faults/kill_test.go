package faults

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// The bridge is killed again and again under load.
func TestBridgeKilled(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	random := rand.New(rand.NewPCG(seed, 1000))
	db := pgtest.New(t)
	audit := pgtest.NewAudit(db, seed)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	audit.Start(4, 0)
	for range pgtest.Rounds(t, 8) {
		time.Sleep(time.Duration(random.IntN(600)) * time.Millisecond) // a random moment is the point
		b.Kill()
		b = pgtest.BridgeProcess(t, db.URL)
	}
	audit.Stop()
	audit.Check(t, time.Minute)
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// The server crashes again and again under load, and the bridge finds its way back by itself.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	random := rand.New(rand.NewPCG(seed, 1000))
	c := pgtest.NewCluster(t, nil)
	db := pgtest.NewOn(t, c)
	audit := pgtest.NewAudit(db, seed)
	b := pgtest.BridgeProcess(t, db.URL)
	b.AwaitLog("msg=capturing")
	audit.Start(4, 0)
	for range pgtest.Rounds(t, 3) {
		time.Sleep(time.Duration(500+random.IntN(1500)) * time.Millisecond) // a random moment is the point
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := c.Stop(ctx, localpg.Immediate); err != nil {
			t.Fatal(err)
		}
		if err := c.Start(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	audit.Stop()
	audit.Check(t, time.Minute)
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}
