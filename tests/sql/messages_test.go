package sql

import (
	"encoding/json"
	"fmt"
	"testing"

	"sequin/tests/pgtest"
)

// Questions that the view is for read what they are about, and not the log: whether or not the server has looked at it yet.
func TestMessagesReadsLittle(t *testing.T) {
	f := setup(t, "changes")
	all := f.write(inserts(upto(20_000)...)...)
	middle := all[len(all)/2]
	for _, analyzed := range []bool{false, true} {
		if analyzed {
			f.Exec(`analyze`)
		}
		for what, question := range map[string]string{
			"seq":       fmt.Sprintf(`stream = 's' and seq = %d`, middle),
			"seqs":      fmt.Sprintf(`stream = 's' and seq between %d and %d`, middle, middle+50),
			"record_pk": `stream = 's' and record_pk = '42' order by seq`,
		} {
			t.Run(fmt.Sprintf("%s analyzed %t", what, analyzed), func(t *testing.T) {
				var plans []struct{ Plan planNode }
				if err := json.Unmarshal([]byte(f.explain(`select * from sequin.messages where `+question)), &plans); err != nil {
					t.Fatal(err)
				}
				if plans[0].Plan.Rows < 1 {
					t.Error("no rows")
				}
				if n := plans[0].Plan.read(); n > 200 {
					t.Errorf("%.0f rows were read", n)
				}
			})
		}
	}
}

func (f *fixture) explain(query string) string {
	f.Helper()
	return pgtest.Value[string](f.DB, `explain (analyze, format json) `+query)
}

type planNode struct {
	Rows    float64 `json:"Actual Rows"`
	Loops   float64 `json:"Actual Loops"`
	Removed float64 `json:"Rows Removed by Filter"`
	Recheck float64 `json:"Rows Removed by Index Recheck"`
	Plans   []planNode
}

// read returns how many rows the scans below a node have looked at.
func (n planNode) read() float64 {
	if len(n.Plans) == 0 {
		return (n.Rows + n.Removed + n.Recheck) * n.Loops
	}
	var sum float64
	for _, p := range n.Plans {
		sum += p.read()
	}
	return sum
}
