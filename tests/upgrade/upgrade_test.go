// Package upgrade proves how the schema comes, stays current, and goes.
package upgrade

import (
	"bytes"
	"compress/gzip"
	"context"
	_ "embed"
	"errors"
	"io"
	"io/fs"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sequin/bridge/schema"
	"sequin/sql"
	"sequin/tests/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// catalog is all that a schema is made of, a line each.
func catalog(db *pgtest.DB) []string {
	return pgtest.Column[string](db, `
		select format('relation %s %s %s %s', c.relkind, c.relname, c.relacl, pg_get_expr(c.relpartbound, c.oid))
		from pg_class c where c.relnamespace = 'sequin'::regnamespace
		union all
		select format('column %s %s %s %s %s %s', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
		         pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum))
		from pg_attribute a
		join pg_class c on c.oid = a.attrelid and c.relkind in ('r', 'p', 'v')
		left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
		where c.relnamespace = 'sequin'::regnamespace and a.attnum > 0 and not a.attisdropped
		union all
		select format('index %s', pg_get_indexdef(i.indexrelid)) from pg_index i join pg_class c on c.oid = i.indrelid
		where c.relnamespace = 'sequin'::regnamespace
		union all
		select format('constraint %s %s %s', o.conrelid::regclass, o.conname, pg_get_constraintdef(o.oid)) from pg_constraint o
		where o.connamespace = 'sequin'::regnamespace
		union all
		select format('function %s %s %s %s', p.oid::regprocedure, p.proacl, obj_description(p.oid), pg_get_functiondef(p.oid)) from pg_proc p
		where p.pronamespace = 'sequin'::regnamespace
		union all
		select format('view %s %s %s', c.relname, obj_description(c.oid), pg_get_viewdef(c.oid)) from pg_class c
		where c.relnamespace = 'sequin'::regnamespace and c.relkind = 'v'
		union all
		select format('publication %s', to_jsonb(p) - 'oid' - 'pubowner') from pg_publication p
		union all
		select format('type %s %s', t.typname, t.typacl) from pg_type t where t.typnamespace = 'sequin'::regnamespace and t.typtype in ('c', 'e', 'd')
		union all
		select format('schema %s', n.nspacl) from pg_namespace n where n.nspname = 'sequin'
		order by 1`)
}

func same(t *testing.T, got, want []string) {
	t.Helper()
	for _, line := range got {
		if !slices.Contains(want, line) {
			t.Errorf("only here: %.300s", line)
		}
	}
	for _, line := range want {
		if !slices.Contains(got, line) {
			t.Errorf("missing: %.300s", line)
		}
	}
}

func up(t *testing.T, db *pgtest.DB) {
	t.Helper()
	if err := schema.Up(t.Context(), db.URL, pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
}

func state(t *testing.T, db *pgtest.DB) schema.State {
	t.Helper()
	s, err := schema.Look(t.Context(), db.Connect())
	if err != nil {
		t.Fatal(err)
	}
	return s.State
}

// However many install at once, one does the work, and the others find it done.
func TestUpAtOnce(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if err := schema.Up(context.Background(), db.URL, pgtest.Discard()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := pgtest.Value[int](db, `select count(*) from sequin.sql_version`); n != 1 {
		t.Errorf("installed %d times", n)
	}
	same(t, catalog(db), catalog(pgtest.New(t)))
}

// A second Up changes nothing; one after somebody's change of a function puts the program's back, with its rights.
func TestUpAgain(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	before := catalog(db)
	up(t, db)
	same(t, catalog(db), before)
	db.Exec(`create or replace function sequin.version() returns text language sql as $$ select 'mine' $$`)
	db.Exec(`insert into sequin.sql_version (checksum, version) values ('other', $1)`, schema.Version)
	if s := state(t, db); s != schema.Changed {
		t.Errorf("got state %v", s)
	}
	up(t, db)
	same(t, catalog(db), before)
	if v := pgtest.Value[string](db, `select sequin.version()`); v != schema.Version {
		t.Errorf("sequin.version() is %s", v)
	}
}

// What an earlier version had made of an expression of a user's is made anew.
func TestUpExpressions(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create table item (id int primary key, j json);
		select sequin.create_stream('s', '{item}'), sequin.create_consumer('c', 's', transform => 'to_jsonb(new.j)'),
			sequin.create_pipeline('p', 'item', 'events', filter => 'new.id > 1')`)
	const inlined = `select inlined from sequin.consumer_expression union all select inlined from sequin.pipeline_expression`
	want := pgtest.Column[string](db, inlined)
	db.Exec(`update sequin.consumer_expression set inlined = 'null'; update sequin.pipeline_expression set inlined = 'null'`)
	db.Exec(`insert into sequin.sql_version (checksum, version) values ('other', $1)`, schema.Version)
	up(t, db)
	if got := pgtest.Column[string](db, inlined); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

//go:embed testdata/live_changes_only.sql.gz
var earlier []byte // what migrate --dump printed before there were filters, backfills and pipelines

// An installation of an earlier version, in use: what is left is what is made anew, and its workers go on where they were.
func TestUpFromEarlier(t *testing.T) {
	t.Parallel()
	script, err := gzip.NewReader(bytes.NewReader(earlier))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(script)
	if err != nil {
		t.Fatal(err)
	}
	db := pgtest.Empty(t)
	db.Exec(string(text))
	db.Exec(`create table orders (id int primary key, note text);
		select sequin.create_stream('orders', '{orders}');
		select sequin.create_consumer('mailer', 'orders');
		select sequin.create_consumer('by_note', 'orders', group_by => '{note}')`)
	if s := state(t, db); s != schema.Older {
		t.Errorf("got state %v", s)
	}
	up(t, db)
	same(t, catalog(db), catalog(pgtest.New(t)))
	stop := pgtest.StartBridge(t, db.URL)
	defer stop()
	db.Exec(`insert into orders select i, 'n' from generate_series(1, 3) i`)
	for _, consumer := range []string{"mailer", "by_note"} {
		got := pgtest.Column[string](db, `select record_pk from sequin.pop($1, 10, '10s') order by seq`, consumer)
		if !slices.Equal(got, []string{"1", "2", "3"}) {
			t.Errorf("%s got %v", consumer, got)
		}
	}
}

// What --dump prints makes the same schema, and Up finds it current.
func TestDump(t *testing.T) {
	t.Parallel()
	var script bytes.Buffer
	if err := schema.Dump(&script); err != nil {
		t.Fatal(err)
	}
	db := pgtest.Empty(t)
	if _, err := db.Connect().PgConn().Exec(t.Context(), script.String()).ReadAll(); err != nil {
		t.Fatal(err)
	}
	same(t, catalog(db), catalog(pgtest.New(t)))
	if s := state(t, db); s != schema.Same {
		t.Errorf("got state %v", s)
	}
	before := catalog(db)
	up(t, db)
	same(t, catalog(db), before)
}

// plant makes a function in the installer's own path that fits a call better than the system's.
func plant(db *pgtest.DB) {
	db.Exec(`create function public.format(text, text) returns text language plpgsql as $$ begin raise 'planted'; end $$`)
}

// Nobody's function is run as the installer, and a database need not be UTF-8.
func TestUpAmongOthers(t *testing.T) {
	t.Parallel()
	planted := pgtest.Empty(t)
	plant(planted)
	up(t, planted)
	dumped := pgtest.Empty(t)
	plant(dumped)
	latin := pgtest.EmptyIn(t, `encoding 'LATIN1' lc_collate 'C' lc_ctype 'C' template template0`)
	var script bytes.Buffer
	if err := schema.Dump(&script); err != nil {
		t.Fatal(err)
	}
	for _, db := range []*pgtest.DB{dumped, latin} {
		if _, err := db.Connect().PgConn().Exec(t.Context(), script.String()).ReadAll(); err != nil {
			t.Fatal(err)
		}
		if s := state(t, db); s != schema.Same {
			t.Errorf("got state %v", s)
		}
	}
}

// psql takes the dump as it is.
func TestDumpWithPsql(t *testing.T) {
	t.Parallel()
	psql, err := exec.LookPath("psql")
	if err != nil {
		t.Skip("psql is not installed")
	}
	var script bytes.Buffer
	if err := schema.Dump(&script); err != nil {
		t.Fatal(err)
	}
	db := pgtest.Empty(t)
	cmd := exec.Command(psql, "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1", db.URL)
	cmd.Stdin = &script
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if s := state(t, db); s != schema.Same {
		t.Errorf("got state %v", s)
	}
}

// A database that is newer is refused by migrate and by the bridge, one that is older by the bridge; each is told which
// of the two to bring up.
func TestGate(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	check := func() error { return schema.Check(t.Context(), db.Connect()) }
	if err := check(); err != nil {
		t.Fatal(err)
	}
	db.Exec(`insert into sequin.sql_version (checksum, version) values ('x', '0.0.9')`)
	if err := check(); !errors.Is(err, schema.ErrOlder) {
		t.Errorf("got %v", err)
	}
	db.Exec(`insert into sequin.sql_version (checksum, version) values ('x', '99.10.0')`)
	if err := check(); !errors.Is(err, schema.ErrNewer) {
		t.Errorf("got %v", err)
	}
	before := catalog(db)
	if err := schema.Up(t.Context(), db.URL, pgtest.Discard()); !errors.Is(err, schema.ErrNewer) {
		t.Errorf("got %v", err)
	}
	same(t, catalog(db), before)
	b := pgtest.BridgeProcess(t, db.URL)
	if err := b.Exited(10 * time.Second); err == nil || !strings.Contains(b.Log(), "upgrade the program") {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}
	if err := schema.Check(t.Context(), pgtest.Empty(t).Connect()); !errors.Is(err, schema.ErrMissing) {
		t.Errorf("got %v", err)
	}
}

// A role that is no superuser installs, with what the README says it needs and no more.
func TestPlainRole(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	role := "plain_" + db.Name
	db.Exec(`create role ` + role + ` login replication`)
	db.Cleanup(func() { db.Exec(`drop owned by ` + role + ` cascade; drop role ` + role) })
	db.Exec(`grant create on database ` + db.Name + ` to ` + role)
	db.Exec(`create schema app authorization ` + role)
	if err := schema.Up(t.Context(), db.URLAs(role), pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
	conn := db.ConnectAs(role)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	exec(`create table app.orders (id int primary key)`)
	exec(`select sequin.create_stream('orders', '{app.orders}')`)
	exec(`select sequin.create_consumer('mailer', 'orders')`)
	stop := pgtest.StartBridge(t, db.URLAs(role))
	exec(`insert into app.orders values (1)`)
	var pk string
	if err := conn.QueryRow(t.Context(), `select record_pk from sequin.pop('mailer', 1, '10s')`).Scan(&pk); err != nil || pk != "1" {
		t.Fatalf("got %q, %v", pk, err)
	}
	stop()
	if err := schema.Uninstall(t.Context(), db.URLAs(role), pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
}

// Uninstall leaves nothing behind but the user's own tables as they were.
func TestUninstall(t *testing.T) {
	t.Parallel()
	db := pgtest.Empty(t)
	role := "worker_" + db.Name
	db.Exec(`create role ` + role)
	db.Cleanup(func() { db.Exec(`drop role ` + role) })
	db.Exec(`create table orders (id int primary key, note text)`)
	const everything = `
		select 'slot ' || slot_name from pg_replication_slots where database = current_database()
		union all select 'publication ' || pubname from pg_publication
		union all select 'schema ' || nspname || coalesce(nspacl::text, '') from pg_namespace where nspname !~ '^pg_(toast_)?temp'
		union all select 'relation ' || oid::regclass from pg_class where relnamespace = 'public'::regnamespace
		union all select 'trigger ' || tgname from pg_trigger where not tgisinternal
		union all select 'event trigger ' || evtname from pg_event_trigger
		union all select 'function ' || oid::regprocedure from pg_proc where pronamespace = 'public'::regnamespace
		union all select 'default rights ' || defaclacl::text from pg_default_acl
		union all select 'depends ' || refobjid::text from pg_shdepend where dbid = (select oid from pg_database where datname = current_database()) and deptype = 'a'
		union all select 'identity ' || relreplident::text from pg_class where oid = 'orders'::regclass
		order by 1`
	before := pgtest.Column[string](db, everything)
	up(t, db)
	db.Exec(`
		select sequin.create_stream('orders', '{orders}');
		select sequin.create_consumer('mailer', 'orders');
		select sequin.create_consumer('chosen', 'orders', group_by => '{note}')`)
	db.Exec(`select sequin.grant_consume('mailer', $1)`, role)
	stop := pgtest.StartBridge(t, db.URL)
	db.Exec(`insert into orders values (1, 'x')`)
	if n := len(pgtest.Column[int64](db, `select seq from sequin.receive('mailer', 10, '10s')`)); n != 1 {
		t.Fatalf("%d messages", n)
	}
	if err := schema.Uninstall(t.Context(), db.URL, pgtest.Discard()); err == nil || !strings.Contains(err.Error(), "stop the bridge first") {
		t.Fatalf("beside a bridge: got %v", err)
	}
	stop()
	if err := schema.Uninstall(t.Context(), db.URL, pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
	same(t, pgtest.Column[string](db, everything), before)
	// And a second time, on nothing, is none either.
	if err := schema.Uninstall(t.Context(), db.URL, pgtest.Discard()); err != nil {
		t.Fatal(err)
	}
	db.Exec(`update orders set note = 'y'; delete from orders`)
}

// What is somebody else's is neither taken nor removed, and what depends on the schema is named before it would go.
func TestForeign(t *testing.T) {
	t.Parallel()
	refused := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v", what, err)
		}
	}
	schemas := func(db *pgtest.DB) string {
		return pgtest.Value[string](db, `select concat_ws(' ', (select string_agg(c.relname, ',' order by 1) from pg_class c
			where c.relnamespace = to_regnamespace('sequin') and c.relkind = 'r'), (select pubname from pg_publication))`)
	}
	db := pgtest.Empty(t)
	db.Exec(`create schema sequin create table mine (a int)`)
	refused("install into another schema", schema.Up(t.Context(), db.URL, pgtest.Discard()), schema.ErrForeign)
	refused("uninstall another schema", schema.Uninstall(t.Context(), db.URL, pgtest.Discard()), schema.ErrForeign)
	if got := schemas(db); got != "mine" {
		t.Errorf("there is %s", got)
	}
	db.Exec(`drop schema sequin cascade; create publication sequin`)
	refused("install beside another publication", schema.Up(t.Context(), db.URL, pgtest.Discard()), schema.ErrPublication)
	if err := schema.Uninstall(t.Context(), db.URL, pgtest.Discard()); err != nil {
		t.Error(err)
	}
	if got := schemas(db); got != "sequin" {
		t.Errorf("there is %s", got)
	}
	db.Exec(`drop publication sequin; create schema sequin`) // made by somebody who may
	up(t, db)
	db.Exec(`create view mine as select * from sequin.messages; create function given() returns setof sequin.consumers language sql as 'select * from sequin.consumers'`)
	err := schema.Uninstall(t.Context(), db.URL, pgtest.Discard())
	if err == nil || !strings.Contains(err.Error(), "view public.mine") || !strings.Contains(err.Error(), "function public.given()") {
		t.Errorf("got %v", err)
	}
	db.Exec(`drop view mine; drop function given()`)
	if err := schema.Uninstall(t.Context(), db.URL, pgtest.Discard()); err != nil {
		t.Error(err)
	}
}

// The table of contents lists each file of the layer once.
func TestContents(t *testing.T) {
	t.Parallel()
	toc, err := fs.ReadFile(sql.FS, "install.sql")
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for line := range strings.Lines(string(toc)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "--") {
			listed = append(listed, line)
		}
	}
	slices.Sort(listed)
	files, err := fs.Glob(sql.FS, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	files = slices.DeleteFunc(files, func(name string) bool { return name == "install.sql" })
	if !slices.Equal(listed, files) {
		t.Errorf("install.sql lists %v, and there are %v", listed, files)
	}
}
