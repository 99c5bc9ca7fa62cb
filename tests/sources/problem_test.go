package sources

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// A source that is stopped disturbs no other; its consumers go on with what there is; it catches up when it is back.
func TestStopped(t *testing.T) {
	t.Parallel()
	seed := pgtest.Seed(t)
	home, other := pgtest.New(t), pgtest.Empty(t)
	c := pgtest.NewCluster(t, nil)
	far := pgtest.EmptyOn(t, c)
	createSource(home, "far", far.URL)
	createSource(home, "other", other.URL)
	b := pgtest.BridgeProcess(t, home.URL)
	stopped := pgtest.NewFarAudit(home, far, "far", seed)
	home.Exec(`select sequin.create_consumer('c', 'items_far', ack_wait => '1 second', backoff => '0')`)
	going := []*pgtest.Audit{pgtest.NewAudit(home, seed), pgtest.NewFarAudit(home, other, "other", seed)}
	for _, a := range append(going, stopped) {
		a.Start(1, 5*time.Millisecond)
	}
	awaitCommits(t, 20, append(going, stopped)...)
	if n := len(pgtest.Column[int64](home, `select seq from sequin.receive('c', 1, '20s')`)); n != 1 {
		t.Fatalf("got %d messages", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := c.Stop(ctx, localpg.Fast); err != nil {
		t.Fatal(err)
	}
	awaitHealth(t, home, "source far | error | the source cannot be reached: connection refused", "source other | ok", "source local | ok")
	// The others' rows go on coming into the log,
	for _, source := range []string{"local", "other"} {
		before := logged(home, source)
		pgtest.Eventually(t, 20*time.Second, func() error {
			if n := logged(home, source); n < before+20 {
				return fmt.Errorf("%s: %d changes, and then %d", source, before, n)
			}
			return nil
		})
	}
	// and the lease that ran out meanwhile is ended by the bridge: its message is waiting again.
	pgtest.Eventually(t, 20*time.Second, func() error {
		if n := pgtest.Value[int](home, `select waiting from sequin.consumer_status where name = 'c'`); n != 1 {
			return fmt.Errorf("%d messages wait", n)
		}
		return nil
	})
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	awaitHealth(t, home, "source far | ok")
	awaitCommits(t, stopped.Commits.Load()+20, stopped)
	for _, a := range append(going, stopped) {
		a.Stop()
	}
	for _, a := range append(going, stopped) {
		a.Check(t, 30*time.Second)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

func logged(home *pgtest.DB, source string) int {
	return pgtest.Value[int](home, `select count(*) from sequin.log l join sequin.source_table t on t.id = l.route_id
		join sequin.source s on s.id = t.source_id where s.name = $1`, source)
}

// Whatever is wrong with a source is said, with what to do, and without what it is reached by; the others are captured.
func TestProblems(t *testing.T) {
	t.Parallel()
	const secret, right = "hunter2hunter2", "correct horse'battery"
	home, other := pgtest.New(t), pgtest.Empty(t)
	strict := strictCluster(t)
	far := pgtest.EmptyOn(t, strict)
	far.Exec(`create role app login replication; create role locked`)
	far.Exec(`alter role app password 'correct horse''battery'; grant create on database ` + far.Name + ` to app`)
	replica := pgtest.EmptyOn(t, pgtest.NewCluster(t, map[string]string{"wal_level": "replica"}))
	address := func(db *pgtest.DB, user, password string) string {
		return fmt.Sprintf("host=127.0.0.1 port=%d dbname=%s user=%s password=%s", db.Cluster.Port(), db.Name, user, password)
	}

	b := pgtest.BridgeProcessEnv(t, home.URL, "TEST_SOURCE_PASSWORD="+right, "TEST_SOURCE_URL="+other.URL)
	createSource(home, "wrong_password", address(far, "app", secret))
	createSource(home, "no_role", "host=127.0.0.1 user=nobody_there password="+secret+fmt.Sprintf(" port=%d dbname=%s", home.Cluster.Port(), home.Name))
	createSource(home, "no_entry", address(far, "locked", secret))
	createSource(home, "no_server", "postgres://app:"+secret+"@127.0.0.1:1/x")
	createSource(home, "no_name", "postgres://app:"+secret+"@nowhere.invalid/x")
	createSource(home, "no_database", fmt.Sprintf("postgres://postgres:%s@127.0.0.1:%d/not_there", secret, home.Cluster.Port()))
	createSource(home, "no_logical", replica.URL+"&password="+secret)
	createSource(home, "no_env", "env:TEST_SOURCE_NOT_SET")
	createSource(home, "no_conninfo", "host=127.0.0.1 port="+secret)
	createSource(home, "no_such_setting", fmt.Sprintf("host=127.0.0.1 user=postgres port=%d dbname=%s conect_timeout=3", home.Cluster.Port(), home.Name))
	createSource(home, "by_env", "env:TEST_SOURCE_URL")
	createSource(home, "right_password", address(far, "app", "env:TEST_SOURCE_PASSWORD"))
	awaitHealth(t, home,
		"source local | ok", "source by_env | ok", "source right_password | ok",
		"source wrong_password | error | the source does not take the password | select sequin.alter_source('wrong_password', conninfo);",
		"source no_role | error | the source does not know the bridge's role",
		"source no_entry | error | the source's pg_hba.conf does not let the bridge in | ",
		"source no_server | error | the source cannot be reached: connection refused | ",
		"source no_name | error | the name of the source's server is not known",
		"source no_database | error | the database does not exist on the source's server | ",
		"source no_logical | error | wal_level is replica, and changes can be decoded from logical only | alter system set wal_level",
		"source no_such_setting | error | the source refuses the connection: unrecognized configuration parameter",
		"The bridge tries again each second. If that is to stay so: select sequin.alter_source('no_such_setting', conninfo);",
		"source no_env | error | the bridge has no environment variable TEST_SOURCE_NOT_SET | ",
		"source no_conninfo | error | what the source is reached by cannot be read",
	)
	// One that is put right is captured; and one that is captured says what the role may not.
	home.Exec(`select sequin.alter_source('wrong_password', $1)`, address(far, "app", "env:TEST_SOURCE_PASSWORD"))
	awaitHealth(t, home, "source wrong_password | ok")
	far.Exec(`create table theirs (id int primary key)`)
	home.Exec(`select sequin.create_stream('theirs', '{theirs}', source => 'right_password')`)
	awaitHealth(t, home, "stream theirs | error | table theirs of source right_password: public.theirs belongs to postgres, and only its owner may publish it | On the source: alter table public.theirs owner to app;")
	far.Exec(`alter role app noreplication`)
	home.Exec(`select sequin.alter_source('by_env', $1)`, address(far, "app", "env:TEST_SOURCE_PASSWORD"))
	awaitHealth(t, home, `source by_env | error | role "app" may not replicate | alter role`)
	createSource(home, "plain", address(far, "app", "env:TEST_SOURCE_PASSWORD"))
	far.Exec(`revoke create on database ` + far.Name + ` from app; alter role app replication`)
	awaitHealth(t, home, "source plain | error | the bridge's role may not make a publication on the source | On the source: grant create on database")

	// Nothing that anybody sees has what they are reached by.
	var seen strings.Builder
	for _, view := range pgtest.Column[string](home, `select c.relname::text from pg_class c where c.relnamespace = 'sequin'::regnamespace and c.relkind = 'v'`) {
		for _, row := range pgtest.Column[string](home, `select v::text from sequin.`+view+` v`) {
			seen.WriteString(row + "\n")
		}
	}
	all := seen.String() + health(home) + b.Log() + strings.Join(pgtest.Column[string](home, `select concat_ws(' ', error, error_hint) from sequin.source`), "\n")
	for _, hidden := range []string{secret, right, "127.0.0.1", "nowhere.invalid", other.URL} {
		if i := strings.Index(all, hidden); i >= 0 {
			t.Errorf("%q is shown: …%s…", hidden, all[max(0, i-200):min(len(all), i+100)])
		}
	}
	if !strings.Contains(b.Log(), "the source does not take the password") {
		t.Errorf("the log does not say so: %s", b.Log())
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
}

// strictCluster is a server that asks role app for a password, and does not let role locked in.
func strictCluster(t *testing.T) *localpg.Cluster {
	t.Helper()
	rules := pgtest.Rules(t, "local all postgres trust\nhost all app 127.0.0.1/32 md5\nhost all postgres 127.0.0.1/32 trust\n")
	return pgtest.NewCluster(t, map[string]string{"hba_file": rules})
}
