package sources

import (
	"fmt"
	"strings"
	"testing"

	"sequin/tests/pgtest"
)

// A table of another database may have the number of one of this one's. Nothing takes the one for the other.
func TestSameOID(t *testing.T) {
	t.Parallel()
	home := pgtest.New(t)
	home.Exec(`
		create table here (id int, note text, at_home int not null unique); alter table here replica identity using index here_at_home_key;
		select sequin.create_source('far', 'host=127.0.0.1 port=1');
		select sequin.create_stream('far', '{t}', source => 'far', mode => 'changes');
		select sequin.create_stream('here', '{here}')`)
	oid := pgtest.Value[int64](home, `select 'here'::regclass::oid::bigint`)
	home.Exec(`update sequin.source_table t set relation_oid = 'here'::regclass, schema_name = 'public', key_columns = '{id}', column_names = '{id,note}',
		identity_columns = '{id}', published_at = now() from sequin.source s where s.id = t.source_id and s.name = 'far'`)
	home.Exec(`select sequin.create_consumer('c', 'far', filter => $$ new->>'id' = old->>'id' $$, group_by => '{note}')`)
	if e := home.Error(`select sequin.create_consumer('d', 'far', group_by => '{at_home}')`); e.Code != "42703" {
		t.Errorf("got %s: %s", e.Code, e.Message)
	}
	if e := home.Error(`select sequin.create_stream('far', '{here}', if_not_exists => true)`); e.Code != "42710" || !strings.Contains(e.Hint, "changes of t, sorted by primary key.") {
		t.Errorf("got %s: %s (%s)", e.Code, e.Message, e.Hint)
	}
	if got := pgtest.Value[string](home, `select sequin._identity_columns(t.id)::text from sequin.source_table t join sequin.source s on s.id = t.source_id where s.name = 'far'`); got != "{id}" {
		t.Errorf("the identity is %s", got)
	}
	if got := pgtest.Value[string](home, `select sequin.create_pipeline('p', 'here', 'events')`); got != "created" {
		t.Errorf("the pipeline is %s", got)
	}
	routes := func(source string) string {
		return fmt.Sprint(pgtest.Column[int64](home, `select t.route_id from sequin.source s, sequin.bridge_tables(s.id) t
			join sequin.source_table w on w.id = t.route_id where s.name = $1 and w.source_id = s.id and t.relation_oid = $2`, source, oid))
	}
	if a, b := routes("local"), routes("far"); a == "[]" || b == "[]" || a == b {
		t.Errorf("routes are %s and %s", a, b)
	}
	home.Exec(`select sequin.bridge_publication(id) from sequin.source; select sequin.bridge_republish(id) from sequin.source where name = 'far'`)
	published := func(want int) {
		t.Helper()
		if n := pgtest.Value[int](home, `select count(*) from pg_publication_rel where prrelid = 'here'::regclass`); n != want {
			t.Errorf("the table is in %d publications, and not %d", n, want)
		}
	}
	// Neither goes with the other.
	home.Exec(`select sequin.drop_consumer('c'); select sequin.drop_stream('far')`)
	published(1)
	home.Exec(`select sequin.create_stream('far', '{t}', source => 'far')`)
	home.Exec(`update sequin.source_table t set relation_oid = 'here'::regclass, column_names = '{id,note}', published_at = now()
		from sequin.source s where s.id = t.source_id and s.name = 'far' and exists (select from sequin.stream_table st where st.table_id = t.id)
		and not exists (select from sequin.source_table o where o.source_id = s.id and o.relation_oid is not null)`)
	home.Exec(`select sequin.drop_pipeline('p')`)
	published(1)
	home.Exec(`select sequin.drop_stream('here')`)
	published(0)
	if got := pgtest.Value[string](home, `select concat_ws(' ', name, source, tables::text) from sequin.streams`); !strings.HasPrefix(got, "far far") {
		t.Errorf("got %s", got)
	}
}
