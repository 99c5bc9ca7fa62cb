package usecases

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"sequin/tests/pgtest"
)

// engine starts workflows, once a key, as an engine does that is given one; it refuses every third call, and everything
// of order 13.
type engine struct {
	mu      sync.Mutex
	calls   int
	started map[string]int // the order, by key
}

func (e *engine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var order struct {
		ID     int
		Status string
	}
	err := json.NewDecoder(r.Body).Decode(&order)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.calls++
	if err != nil || order.Status != "paid" || order.ID == 13 || e.calls%3 == 0 {
		http.Error(w, "not now", http.StatusServiceUnavailable)
		return
	}
	e.started[r.Header.Get("Idempotency-Key")] = order.ID
}

// orders counts the workflows of each order.
func (e *engine) orders() map[int]int {
	e.mu.Lock()
	defer e.mu.Unlock()
	orders := map[int]int{}
	for _, id := range e.started {
		orders[id]++
	}
	return orders
}

// A workflow is started once for each order that is paid, whatever becomes of the worker, or of the order meanwhile; one
// that cannot be started does not hold up the others.
func TestWorkflow(t *testing.T) {
	t.Parallel()
	inREADME(t, "workflow.py")
	inREADME(t, "workflow_setup.sql")
	path := pgtest.Python(t, "psycopg")
	db := pgtest.New(t)
	db.Exec(`create table orders (id int primary key, status text not null)`)
	setup, err := os.ReadFile("workflow_setup.sql")
	if err != nil {
		t.Fatal(err)
	}
	db.Exec(string(setup))
	db.Exec(`select sequin.alter_consumer('fulfilment', ack_wait => '1 second', backoff => '10 milliseconds', max_backoff => '10 milliseconds', max_deliver => 30)`)
	pgtest.StartBridge(t, db.URL)
	e := &engine{started: map[string]int{}}
	server := httptest.NewServer(e)
	t.Cleanup(server.Close)
	env := []string{"DATABASE_URL=" + db.URL, "WORKFLOW_URL=" + server.URL}
	worker := start(t, path, "workflow.py", env...)
	for n := range 4 {
		db.Exec(fmt.Sprintf(`insert into orders select %d + n, 'new' from generate_series(1, 10) n`, n*10))
		db.Exec(fmt.Sprintf(`update orders set status = 'paid' where id between %d and %d`, n*10+1, n*10+8))
		db.Exec(fmt.Sprintf(`update orders set status = 'shipped' where id between %d and %d`, n*10+1, n*10+4))
		pgtest.Eventually(t, 30*time.Second, func() error {
			if len(e.orders()) < n*7 {
				return fmt.Errorf("%d workflows: %s", len(e.orders()), worker.out.String())
			}
			return nil
		})
		worker.kill()
		worker = start(t, path, "workflow.py", env...)
	}
	pgtest.Eventually(t, 60*time.Second, func() error {
		if got := pgtest.Value[string](db, `select pending || ' ' || in_flight || ' ' || dead_letters from sequin.consumer_status`); got != "0 0 1" {
			return fmt.Errorf("pending, in flight and dead letters are %s: %s", got, worker.out.String())
		}
		return nil
	})
	for id, n := range e.orders() {
		if n != 1 || (id-1)%10 >= 8 {
			t.Errorf("order %d has %d workflows", id, n)
		}
	}
	if n := len(e.orders()); n != 31 {
		t.Errorf("%d orders have workflows, want 31", n)
	}
	if got := pgtest.Value[string](db, `select record_pk || ' ' || error from sequin.dead_letters`); got != "13 HTTP Error 503: Service Unavailable" {
		t.Errorf("the dead letter is %s", got)
	}
}
