package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/tests/pgtest"
)

// Names and texts of any kind, in a database's objects, in a stream's and a consumer's name, and in the rows, go through SQL
// and through the log unharmed.
func TestAnyName(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 7))
	db := pgtest.New(t)
	pgtest.StartBridge(t, db.URL)
	ctx := context.Background()
	for round := range 5 * pgtest.Rounds(t, 2) {
		schema, table, stream, consumer := anyName(random, 63), anyName(random, 63), anyName(random, 48), anyName(random, 48)
		columns := []string{"id"}
		for range 3 {
			columns = append(columns, fmt.Sprintf("%d%s", len(columns), anyName(random, 60)))
		}
		where := pgx.Identifier{schema, table}.Sanitize()
		var list []string
		for _, c := range columns[1:] {
			list = append(list, pgx.Identifier{c}.Sanitize()+" text")
		}
		db.Exec(fmt.Sprintf(`create schema if not exists %s; create table %s (id text primary key, %s); alter table %[2]s replica identity full`,
			pgx.Identifier{schema}.Sanitize(), where, strings.Join(list, ", ")))
		db.Exec(`select sequin.create_stream($1, array[$2], mode => 'changes')`, stream, where)
		db.Exec(`select sequin.create_consumer($1, $2)`, consumer, stream)
		row := map[string]string{}
		var args []any
		var places []string
		for i, c := range columns {
			row[c] = anyText(random)
			args = append(args, row[c])
			places = append(places, fmt.Sprintf("$%d", i+1))
		}
		db.Exec(fmt.Sprintf(`insert into %s values (%s)`, where, strings.Join(places, ", ")), args...)
		old := row[columns[1]]
		row[columns[1]] = old + "'"
		db.Exec(fmt.Sprintf(`update %s set %s = $1`, where, pgx.Identifier{columns[1]}.Sanitize()), row[columns[1]])
		awaitStream(t, db, stream, 2) // or the first of them would keep the second back
		var ackIDs []int64
		pgtest.Eventually(t, 30*time.Second, func() error {
			rows, err := db.Pool.Query(ctx, `select ack_id, action, table_schema, table_name, record_pk, record, changes from sequin.receive($1, 10)`, consumer)
			if err != nil {
				return err
			}
			defer rows.Close()
			for rows.Next() {
				var ackID int64
				var action, gotSchema, gotTable, pk string
				var record, changes []byte
				if err := rows.Scan(&ackID, &action, &gotSchema, &gotTable, &pk, &record, &changes); err != nil {
					t.Fatal(err)
				}
				ackIDs = append(ackIDs, ackID)
				if gotSchema != schema || gotTable != table || pk != row["id"] {
					t.Errorf("seed %d, round %d: %q.%q %q became %q.%q %q", seed, round, schema, table, row["id"], gotSchema, gotTable, pk)
				}
				if action != "update" {
					continue
				}
				got, was := map[string]string{}, map[string]string{}
				if json.Unmarshal(record, &got) != nil || json.Unmarshal(changes, &was) != nil ||
					!reflect.DeepEqual(got, row) || !reflect.DeepEqual(was, map[string]string{columns[1]: old}) {
					t.Errorf("seed %d, round %d: %q became %s, %s", seed, round, row, record, changes)
				}
			}
			if len(ackIDs) < 2 {
				return fmt.Errorf("%d messages of %q so far: %w", len(ackIDs), consumer, rows.Err())
			}
			return rows.Err()
		})
		if n := pgtest.Value[int](db, `select sequin.ack($1, $2)`, consumer, ackIDs); n != 2 {
			t.Errorf("seed %d, round %d: %d were acknowledged", seed, round, n)
		}
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where stream = $1 and record_pk = $2`, stream, row["id"]); n != 2 {
			t.Errorf("seed %d, round %d: %d messages by stream and key", seed, round, n)
		}
		if n := pgtest.Value[int](db, `select count(*) from sequin.health() where name = $1`, "consumer "+consumer); n != 1 {
			t.Errorf("seed %d, round %d: health() does not know consumer %q", seed, round, consumer)
		}
		db.Exec(`select sequin.drop_consumer($1)`, consumer)
		db.Exec(`select sequin.drop_stream($1)`, stream)
		db.Exec(`drop schema ` + pgx.Identifier{schema}.Sanitize() + ` cascade`)
	}
}

func awaitStream(t *testing.T, db *pgtest.DB, stream string, count int) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() error {
		if n := pgtest.Value[int](db, `select count(*) from sequin.messages where stream = $1`, stream); n != count {
			return fmt.Errorf("stream %q has %d messages", stream, n)
		}
		return nil
	})
}

var letters = []rune("aZ_0 \"'.,;%$\\-/*(){}[]|&\t\n\r\x01\x7fé€\U0001F600\u200b\u2028ß中")

// anyName returns a name of up to so many bytes.
func anyName(random *rand.Rand, length int) string {
	var b strings.Builder
	want := 1 + random.IntN(length)
	if random.IntN(3) == 0 {
		want = length
	}
	for {
		r := letters[random.IntN(len(letters))]
		if b.Len()+len(string(r)) > want {
			break
		}
		b.WriteRune(r)
	}
	if b.Len() == 0 {
		return "x"
	}
	return b.String()
}

func anyText(random *rand.Rand) string {
	var b strings.Builder
	for range random.IntN(200) {
		b.WriteRune(letters[random.IntN(len(letters))])
	}
	return b.String()
}
