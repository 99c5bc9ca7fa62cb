package upkeep

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	feedRows    = 10_000                // of the log, in one transaction of a feed
	notifyEvery = 20 * time.Millisecond // a notification takes a lock of the whole server's at commit
)

// news is what has been written since it was last taken: coalesced, whoever is slower.
type news struct {
	mu     sync.Mutex
	routes []int32
	wake   chan struct{}
}

func (n *news) add(routes []int32) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range routes {
		if !slices.Contains(n.routes, r) {
			n.routes = append(n.routes, r)
		}
	}
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

func (n *news) take() []int32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	routes := n.routes
	n.routes = nil
	return routes
}

// dispatch brings the feeds up after each batch, and then tells those who listen.
func (u *Upkeep) dispatch(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-u.news.wake:
		}
		began := time.Now()
		routes := u.news.take()
		if err := u.feed(ctx); err != nil {
			u.warn(ctx, "write feeds", err)
			time.AfterFunc(tendEvery, func() { u.news.add(nil) })
		}
		if _, err := u.pool.Exec(ctx, `select sequin.bridge_notify($1, $2)`, routes, u.sourceID); err != nil {
			u.warn(ctx, "notify", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(notifyEvery - time.Since(began)):
		}
	}
}

// feed adds what the log has to the feeds, a piece of each in turn, until they have it all. One that fails keeps no
// other from going on.
func (u *Upkeep) feed(ctx context.Context) error {
	consumers, err := u.consumers(ctx)
	if err != nil {
		return err
	}
	behind := slices.DeleteFunc(consumers, func(c consumer) bool { return !c.HasFeed })
	var failed error
	for len(behind) > 0 {
		var still []consumer
		for _, c := range behind {
			var looked int64
			if err := u.pool.QueryRow(ctx, `select sequin.bridge_feed($1, $2)`, c.ID, feedRows).Scan(&looked); err != nil {
				failed = err
				continue
			}
			if looked >= feedRows {
				still = append(still, c)
			}
		}
		behind = still
	}
	return failed
}
