package capture

import (
	"context"
	"fmt"
	"slices"
	"time"

	"sequin/bridge/wal"
)

const (
	unseenPause    = 5 * time.Millisecond // at first; then twice as long each time
	unseenMaxPause = 200 * time.Millisecond
	unseenTold     = time.Second // after it, the log says so
)

// unseenQuery asks who is at work on a relation itself, in a transaction that writes: vacuum, which has the same lock, has no
// transaction to commit.
const unseenQuery = `
	select coalesce(pg_catalog.array_agg(x.transactionid::text::bigint), '{}')
	from pg_catalog.pg_locks l
	join pg_catalog.pg_locks x on x.virtualtransaction = l.virtualtransaction and x.locktype = 'transactionid'
	  and x.mode = 'ExclusiveLock' and x.granted
	where l.locktype = 'relation' and l.relation = $1::bigint::oid and l.granted
	  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
	  and l.mode in ('ShareUpdateExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')`

// awaitSeen waits until whoever made a relation what the stream says it is can be seen to have done so. A commit is sent as
// soon as it is on disk, and seen only afterwards: with a synchronous standby, once that has answered. Who asks the catalog
// in between finds no such stream, type or key. Until it can be seen, the transaction has its lock on the relation; and one
// that was not read yet may have it for as long as it likes: it has nothing to do with what is read now.
func (r *reader) awaitSeen(ctx context.Context, rel *wal.Relation) error {
	began, isSaid := time.Now(), false
	for pause := unseenPause; ; pause = min(2*pause, unseenMaxPause) {
		var xids []int64
		if err := r.catalog.QueryRow(ctx, unseenQuery, int64(rel.OID)).Scan(&xids); err != nil {
			return fmt.Errorf("look for who is at work on table %s.%s: %w", rel.Schema, rel.Name, err)
		}
		isRead := func(xid int64) bool { return uint32(xid) == r.begin.XID || r.live.hasRead(uint32(xid)) }
		if !slices.ContainsFunc(xids, isRead) {
			return nil
		}
		if !isSaid && time.Since(began) >= unseenTold {
			r.log.Info("waiting: a transaction that made or altered this table is committed, and cannot be seen yet",
				"table", rel.Schema+"."+rel.Name)
			isSaid = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		if err := r.confirm(ctx, false); err != nil {
			return err
		}
	}
}
