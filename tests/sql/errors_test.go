package sql

import (
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"sequin/tests/pgtest"
)

// Each wrong call has its SQLSTATE, a message that names the object, and a hint that says what to do.
func TestErrors(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table orders (id int primary key, note text);
		create table bare (id int);
		create table parent (id int primary key) partition by range (id);
		create table part partition of parent for values from (0) to (10);
		create unlogged table fast (id int primary key);
		create view seen as select * from orders;
		create materialized view kept as select * from orders;
		create sequence counter;
		create table deferred (id int primary key deferrable initially deferred);
		create table typed (id int primary key, doc json, docs json[], place point, areas circle);
		create table nothing (id int primary key);
		create table made (a int, k int generated always as (a * 2) stored primary key);
		create table sums (id int primary key, a int, total int generated always as (a * 2) stored);
		create table keyless (id int, at date) partition by range (at);
		create table keyless_1 partition of keyless for values from ('2020-01-01') to ('2021-01-01');
		alter table keyless replica identity full; alter table keyless_1 replica identity full;
		alter table nothing replica identity nothing;
		create foreign data wrapper w;
		create server far foreign data wrapper w;
		create foreign table away (id int) server far;
		select sequin.create_stream('orders', '{orders}'); select sequin.create_stream('sums', '{sums}');
		select sequin.create_consumer('mailer', 'orders')`)
	if pgtest.Major() < 18 {
		for _, test := range [][3]string{
			{`select sequin.create_stream('x', '{made}')`, "55000", "replica identity full"},
			{`select sequin.create_consumer('x', 'sums', group_by => '{total}')`, "42703", "Each table"},
			{`select sequin.create_consumer('x', 'sums', filter => 'new.total > 1')`, "42703", "PostgreSQL 18"},
		} {
			if e := db.Error(test[0]); e.Code != test[1] || !strings.Contains(e.Hint, test[2]) {
				t.Errorf("%s: %s %s, hint %q", test[0], e.Code, e.Message, e.Hint)
			}
		}
	}
	if pgtest.Major() > 12 {
		for _, identity := range []string{"full", "default"} {
			db.Exec(`alter table keyless replica identity ` + identity)
			if e := db.Error(`select sequin.create_stream('x', '{keyless}')`); e.Code != "55000" || e.Hint != "alter table public.keyless add primary key (...);" {
				t.Errorf("%s %s, hint %q", e.Code, e.Message, e.Hint)
			}
		}
	}
	for _, test := range []struct {
		sql, code, message, hint string
	}{
		{`select sequin.create_stream('x', '{ordres}')`, "42704", `"ordres"`, `"orders"`},
		{`select sequin.create_stream('x', '{or}')`, "42704", `stream "x": table "or"`, `"orders"`},
		{`select sequin.create_stream('x', '{public.ordres}')`, "42704", `"public.ordres"`, `"public.orders"`},
		{`select sequin.create_stream('x', '{nosuch.orders}')`, "42704", `"nosuch.orders"`, `"orders"`},
		{`select sequin.create_stream('x', '{omens}')`, "42704", `"omens"`, "search_path"},
		{`select sequin.create_stream('x', array[''])`, "22023", `stream "x": ""`, "quote"},
		{`select sequin.create_stream('x', array['""'])`, "22023", "is not a table's name", "quote"},
		{`select sequin.create_stream('x', '{Odd Table.x}')`, "22023", `"Odd Table.x"`, "quote"},
		{`select sequin.create_stream('x', '{"orders; drop table x"}')`, "22023", `"orders; drop table x"`, "quote"},
		{`select sequin.create_stream('x', '{a.b.c.d}')`, "22023", `"a.b.c.d"`, "schema.table"},
		{`select sequin.create_stream('x', '{otherdb.public.orders}')`, "22023", `"otherdb.public.orders"`, "schema.table"},
		{`select sequin.create_stream('x', array[null]::text[])`, "22023", `stream "x"`, "schema.table"},
		{`select sequin.create_stream('x', '{typed}', sort_column => 'doc')`, "22023", `"x": sort_column "doc"`, "primary key"},
		{`select sequin.create_stream('x', '{typed}', sort_column => 'docs')`, "22023", "json[]", "primary key"},
		{`select sequin.create_stream('x', '{typed}', sort_column => 'place')`, "22023", "point", "primary key"},
		{`select sequin.create_stream('x', '{typed}', sort_column => 'areas')`, "22023", "circle", "primary key"},
		{`select sequin.create_pipeline('p', 'orders', '')`, "22023", `pipeline "p": event table ""`, "quote"},
		{`select sequin.create_pipeline('p', 'orders', 'bad"name"')`, "22023", `pipeline "p": event table "bad"name`, "quote"},
		{`select sequin.create_pipeline('p', 'orders', 'a.b.c')`, "22023", `"a.b.c"`, "schema.table"},
		{`select sequin.create_pipeline('p', 'Odd Table.x', 'log')`, "22023", `pipeline "p": "Odd Table.x"`, "quote"},
		{`select sequin.create_pipeline('p', null, 'log')`, "22023", `pipeline "p": source_table is null`, ""},
		{`select sequin.create_pipeline('p', 'orders', 'log', retention => '1001 years')`, "22023", `"p": retention`, "1000 years"},
		{`select sequin.create_stream('x', '{}')`, "22023", `"x"`, ""},
		{`select sequin.create_stream('x', null)`, "22023", `"x"`, ""},
		{`select sequin.create_stream('x', '{orders,public.orders}')`, "22023", "twice", ""},
		{`select sequin.create_stream('', '{orders}')`, "22023", "name", ""},
		{`select sequin.create_stream(null, '{orders}')`, "22023", "name", ""},
		{`select sequin.create_stream(repeat('é', 25), '{orders}')`, "22023", "name", "48"},
		{`select sequin.create_stream('orders', '{orders}')`, "42710", `"orders"`, "if_not_exists"},
		{`select sequin.create_stream('orders', '{orders}', mode => 'changes', if_not_exists => true)`, "42710", `"orders"`, "drop_stream"},
		{`select sequin.create_stream('orders', '{orders}', sort_column => 'note', if_not_exists => true)`, "42710", `"orders"`, "sorted by primary key"},
		{`select sequin.create_stream('x', '{orders}', mode => 'row')`, "22023", "mode", "rows"},
		{`select sequin.create_stream('x', '{orders}', mode => null)`, "22023", "mode", "rows"},
		{`select sequin.create_stream('x', '{orders}', sort_column => 'nota')`, "42703", `"nota"`, `"note"`},
		{`select sequin.create_stream('x', '{orders}', source => 'locale')`, "42704", `"locale"`, `"local"`},
		{`select sequin.create_stream('x', '{orders}', source => null)`, "42704", "source", "create_source"},
		{`select sequin.create_stream('x', '{bare}')`, "55000", "bare", "alter table public.bare"},
		{`select sequin.create_stream('x', '{nothing}')`, "55000", "nothing", "alter table public.nothing replica identity default;"},
		{`create type pair as (a int, b int); select sequin.create_stream('x', '{pair}')`, "22023", "a composite type", "write-ahead log"},
		{`select sequin.create_stream('x', '{deferred}')`, "55000", "is deferrable", "alter table public.deferred drop constraint deferred_pkey"},
		{`select sequin.create_stream('x', '{part}')`, "22023", "partition", "parent"},
		{`select sequin.create_stream('x', '{fast}')`, "55000", "unlogged", "set logged"},
		{`create temp table brief (id int primary key); select sequin.create_stream('x', '{brief}')`, "55000", "temporary", "create table"},
		{`select sequin.create_stream('x', '{seen}')`, "22023", "view", ""},
		{`select sequin.create_stream('x', '{kept}')`, "22023", "view", ""},
		{`select sequin.create_stream('x', '{counter}')`, "22023", "sequence", ""},
		{`select sequin.create_stream('x', '{away}')`, "22023", "foreign", ""},
		{`select sequin.create_stream('x', '{sequin.consumer}')`, "22023", "Sequin itself", ""},
		{`select sequin.create_stream('x', '{pg_catalog.pg_class}')`, "22023", "system", ""},
		{`select sequin.drop_stream('ordres')`, "42704", `"ordres"`, `"orders"`},
		{`select sequin.drop_stream('orders')`, "55000", `"orders"`, "sequin.drop_consumer('mailer')"},

		{`select sequin.create_consumer('x', 'ordres')`, "42704", `"ordres"`, `"orders"`},
		{`select sequin.create_consumer('mailer', 'orders')`, "42710", `"mailer"`, "if_not_exists"},
		{`select sequin.create_consumer('mailer', 'orders', ack_wait => '1 hour', if_not_exists => true)`, "42710", `"mailer"`, "alter_consumer"},
		{`select sequin.create_consumer('mailer', 'sums', if_not_exists => true)`, "42710", `"mailer"`, "drop_consumer"},
		{`select sequin.create_consumer('x', 'orders', actions => null)`, "22023", `"x": actions is null`, "insert"},
		{`select sequin.republish('mailer', null)`, "22023", `consumer "mailer": the query is null`, "SELECT"},
		{`select sequin.republish('mailer', 'selec 1')`, "42601", `consumer "mailer": the query: syntax error`, "SELECT"},
		{`select sequin.republish('mailer', 'select * from nowhere')`, "42P01", `consumer "mailer": the query: relation "nowhere"`, "SELECT"},
		{`select sequin.create_consumer('', 'orders')`, "22023", "name", ""},
		{`select sequin.create_consumer('x', 'orders', actions => '{inserted}')`, "22023", `"x"`, "insert"},
		{`select sequin.create_consumer('x', 'orders', actions => '{}')`, "22023", `"x"`, "insert"},
		{`select sequin.create_consumer('x', 'orders', group_by => '{nota}')`, "42703", `"nota"`, `"note"`},
		{`select sequin.create_consumer('x', 'orders', group_by => '{null}')`, "22023", `"x"`, ""},
		{`select sequin.create_consumer('x', 'orders', group_by => '{{id,note}}')`, "22023", `consumer "x": group_by is an array of arrays`, "Name columns"},
		{`select sequin.create_consumer('x', 'orders', group_by => '{id,note,id}')`, "22023", `consumer "x": group_by has "id" twice`, "Name columns"},
		{`select sequin.alter_consumer('mailer', group_by => '{{id,note}}')`, "22023", `consumer "mailer": group_by`, "Name columns"},
		{`select sequin.alter_consumer('mailer', group_by => '{id,id}')`, "22023", `consumer "mailer": group_by`, "Name columns"},
		{`select sequin.create_consumer('x', 'orders', start_at => 'then')`, "22023", "start_at", "now"},
		{`select sequin.create_consumer('x', 'orders', start_row => '1')`, "22023", "start_row", ""},
		{`select sequin.create_consumer('x', 'orders', ack_wait => '0')`, "22023", "ack_wait", ""},
		{`select sequin.create_consumer('x', 'orders', ack_wait => '101 years')`, "22023", `"x": ack_wait`, "100 years"},
		{`select sequin.create_consumer('x', 'orders', backoff => '101 years', max_backoff => '101 years')`, "22023", `"x": backoff`, "100 years"},
		{`select sequin.create_consumer('x', 'orders', max_backoff => '300000 years')`, "22023", `"x": max_backoff`, "100 years"},
		{`select sequin.alter_consumer('mailer', ack_wait => '101 years')`, "22023", `"mailer": ack_wait`, "100 years"},
		{`select sequin.alter_consumer('mailer', max_backoff => '101 years')`, "22023", `"mailer": max_backoff`, "100 years"},
		{`select * from sequin.receive('mailer', ack_wait => '300000 years')`, "22023", `receive from consumer "mailer": ack_wait`, "100 years"},
		{`select * from sequin.receive('mailer', 10, ack_wait => '101 years')`, "22023", `receive from consumer "mailer": ack_wait`, "100 years"},
		{`select sequin.extend('mailer', '{1}', ack_wait => '101 years')`, "22023", `extend for consumer "mailer": ack_wait`, "100 years"},
		{`select sequin.nack('mailer', '{1}', delay => '101 years')`, "22023", `nack to consumer "mailer": delay`, "100 years"},
		{`select sequin.set_retention('1001 years')`, "22023", "keep", "1000 years"},
		{`select sequin.create_consumer('x', 'orders', max_deliver => 0)`, "22023", "max_deliver", ""},
		{`select sequin.create_consumer('x', 'orders', max_ack_pending => 0)`, "22023", "max_ack_pending", ""},
		{`select sequin.create_consumer('x', 'orders', backoff => '-1s')`, "22023", "backoff", ""},
		{`select sequin.create_consumer('x', 'orders', backoff => '1 hour')`, "22023", "max_backoff", ""},
		{`select sequin.create_consumer('x', 'orders', filter => 'new.nope = 1')`, "42703", `consumer "x": filter: column new.nope does not exist at position 1`, ""},
		{`select sequin.create_consumer('x', 'orders', filter => 'id = 1')`, "42703", `"id"`, "new.column"},
		{`select sequin.create_consumer('x', 'orders', filter => 'new.id > ')`, "42601", `consumer "x": filter: syntax error at the end of it, at position 10`, ""},
		{`select sequin.create_consumer('x', 'orders', filter => 'new.id = ] 1')`, "42601", "at position 10", ""},
		{`select sequin.create_consumer('x', 'orders', filter => 'new.id')`, "42804", "integer", ""},
		{`select sequin.create_consumer('x', 'orders', filter => '')`, "42601", "filter", ""},
		{`select sequin.create_consumer('x', 'orders', transform => 'new.id')`, "42804", `consumer "x": transform: it is of type integer`, "jsonb"},
		{`select sequin.create_consumer('x', 'orders', transform => 'to_jsonb(new), 1')`, "42804", "record", "jsonb"},
		{`select sequin.create_consumer('x', 'orders', start_at => 'row')`, "22023", "start_row", "sort_column"},
		{`select sequin.create_consumer('x', 'orders', start_at => 'beginning', start_row => '1')`, "22023", "start_row", ""},
		{`select sequin.create_consumer('x', 'orders', start_at => 'row', start_row => 'one')`, "22023", "integer", "id"},
		{`select sequin.alter_consumer('mialer')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.alter_consumer(null, filter => 'true')`, "42704", "the name of the consumer is null", "create_consumer"},
		{`select sequin.backfill(null, filter => 'true')`, "42704", "the name of the consumer is null", "create_consumer"},
		{`select sequin.pause_consumer('')`, "42704", `""`, "create_consumer"},
		{`select sequin.pause_consumer('ev')`, "42704", `"ev"`, "create_consumer"},
		{`select sequin.pause_consumer('the mailer')`, "42704", `"the mailer"`, `"mailer"`},
		{`select sequin.alter_consumer('mailer', ack_wait => '-1s')`, "22023", "ack_wait", ""},
		{`select sequin.alter_consumer('mailer', group_by => '{nota}')`, "42703", `"nota"`, `"note"`},
		{`select sequin.alter_consumer('mailer', filter => 'new.nope')`, "42703", `consumer "mailer": filter`, ""},
		{`select sequin.alter_consumer('mialer', filter => 'true')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.drop_consumer('mialer')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.pause_consumer('mialer')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.resume_consumer('mialer')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.grant_consume('mialer', 'postgres')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.grant_consume('mailer', 'postgre')`, "42704", `"postgre"`, `"postgres"`},
		{`select sequin.grant_consume('mailer', 'public')`, "22023", `"public"`, "each role"},
		{`select sequin.grant_configure('public')`, "22023", `"public"`, "each role"},
		{`select sequin.revoke_consume('mailer', 'postgre')`, "42704", `"postgre"`, `"postgres"`},
		{`select sequin.redrive('mialer')`, "42704", `"mialer"`, `"mailer"`},

		{`select * from sequin.receive('mialer')`, "42704", `"mialer"`, `"mailer"`},
		{`select * from sequin.receive('mailer', 0)`, "22023", `receive from consumer "mailer": batch_size is 0`, "10000"},
		{`select * from sequin.receive('mailer', 10001)`, "22023", "batch_size", "10000"},
		{`select * from sequin.receive('mailer', null)`, "22023", "batch_size", "10000"},
		{`select * from sequin.receive('mailer', wait => '61s')`, "22023", `receive from consumer "mailer": wait`, "60"},
		{`select * from sequin.receive('mailer', wait => '-1s')`, "22023", "wait", "60"},
		{`select * from sequin.receive('mailer', wait => null)`, "22023", "wait", "60"},
		{`select * from sequin.receive('mailer', ack_wait => '0')`, "22023", `receive from consumer "mailer": ack_wait`, ""},
		{`select * from sequin.pop('mialer')`, "42704", `"mialer"`, `"mailer"`},
		{`select * from sequin.pop('mailer', 0)`, "22023", `pop from consumer "mailer": batch_size is 0`, "10000"},
		{`select * from sequin.pop('mailer', 10001)`, "22023", "batch_size", "10000"},
		{`select * from sequin.pop('mailer', wait => '61s')`, "22023", `pop from consumer "mailer": wait`, "60"},
		{`select sequin.ack('mialer', '{1}')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.nack('mialer', '{1}')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.nack('mailer', '{1}', delay => '-1s')`, "22023", `nack to consumer "mailer": delay`, ""},
		{`select sequin.extend('mialer', '{1}')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.extend('mailer', '{1}', ack_wait => '0')`, "22023", `extend for consumer "mailer": ack_wait`, ""},
		{`begin isolation level repeatable read; select * from sequin.receive('mailer', wait => '1s')`, "55000", `receive from consumer "mailer": wait`, ""},
		{`begin isolation level serializable; select * from sequin.pop('mailer', wait => '1s')`, "55000", "wait", ""},
		{`begin read only; select * from sequin.receive('mailer')`, "25006", "read only", "primary"},
		{`begin read only; select * from sequin.pop('mailer', 100)`, "25006", "read only", "primary"},
		{`begin read only; select sequin.ack('mailer', '{1}')`, "25006", "read only", "primary"},
		{`begin read only; select sequin.nack('mailer', '{1}')`, "25006", "read only", "primary"},
		{`begin read only; select sequin.extend('mailer', '{1}')`, "25006", "read only", "primary"},

		{`select sequin.set_retention(null)`, "22023", "keep", ""},
		{`select sequin.set_retention('-1 day')`, "22023", "keep", ""},
		{`select sequin.set_retention('1 day', 1)`, "22023", "max_bytes", ""},
		{`select sequin.accept_gap('loca')`, "42704", `"loca"`, `"local"`},
		{`select sequin.accept_gap(pipeline => 'audit')`, "42704", `"audit"`, "create_pipeline"},

		{`select sequin.rewind('mailer', to_seq => 1)`, "55000", `"mailer"`, "sequin bridge"},
		{`select sequin.rewind('mailer')`, "22023", `"mailer"`, "to_seq"},
		{`select sequin.rewind('mailes', to_seq => 1)`, "42704", `"mailes"`, `"mailer"`},
		{`begin read only; select sequin.rewind('mailer', to_seq => 1)`, "25006", "read only", "primary"},
		{`select sequin.republish('mailer', 'select 1')`, "22023", `"mailer"`, "sequin.messages"},
		{`begin read only; select sequin.cancel_backfill(1)`, "25006", "cancel_backfill writes, and this transaction is read only", "read write transaction"},
		{`select sequin.republish('mailer', 'select * from orders')`, "55000", `"mailer"`, "No bridge has run yet: sequin bridge --database-url"},
		{`select sequin.republish('mailes', 'select 1')`, "42704", `"mailes"`, `"mailer"`},
		{`begin read only; select sequin.republish('mailer', 'select * from orders')`, "25006", "read only", "primary"},
		{`select * from sequin.sync('orders')`, "55000", `"orders"`, "sequin bridge"},
		{`select * from sequin.sync('ordres')`, "42704", `"ordres"`, `"orders"`},
		{`select * from sequin.sync('orders', batch_size => 0)`, "22023", `sync of stream "orders": batch_size is 0`, "10000"},
		{`select * from sequin.sync('orders', wait => '61s')`, "22023", `sync of stream "orders": wait`, "60"},
		{`begin isolation level repeatable read; select * from sequin.sync('orders', wait => '1s')`, "55000", "wait", ""},
		{`select * from sequin.sync('orders', 'MQ')`, "22023", `"orders"`, "null"},
		{`select * from sequin.sync('orders', '')`, "22023", `"orders"`, "null"},
		{`select * from sequin.sync('orders', E'é\n')`, "22023", `"orders"`, "null"},
		{`select sequin.backfill('mialer')`, "42704", `"mialer"`, `"mailer"`},
		{`select sequin.backfill('mailer', 'one')`, "22023", "integer", "id"},
		{`select sequin.backfill('mailer', filter => 'new.nope')`, "42703", `consumer "mailer": filter`, ""},
		{`select sequin.cancel_backfill(1)`, "42704", "backfill 1", "sequin.backfills"},
		{`select sequin.create_webhook('w', 'orders', 'http://127.0.0.1')`, "0A000", "", ""},

		{`select sequin.create_source('local', 'env:FAR')`, "42710", `"local"`, "another name"},
		{`select sequin.create_source('', 'env:FAR')`, "22023", "name", "48"},
		{`select sequin.create_source('far', null)`, "22023", `"far"`, "postgres://"},
		{`select sequin.create_source('far', 'mydb')`, "22023", `"far"`, "postgres://"},
		{`select sequin.create_source('far', 'mysql://far/db')`, "22023", `"far"`, "postgres://"},
		{`select sequin.create_source('far', 'host=far password=''open')`, "22023", `"far"`, "postgres://"},
		{`select sequin.create_source('far', 'env:NO SUCH')`, "22023", `"far"`, "env:NAME"},
		{`select sequin.alter_source('near', 'env:FAR')`, "42704", `"near"`, "create_source"},
		{`select sequin.alter_source('local', 'env:FAR')`, "55000", `"local"`, "--database-url"},
		{`select sequin.drop_source('near')`, "42704", `"near"`, "create_source"},
		{`select sequin.drop_source('local')`, "55000", `"local"`, "--uninstall"},
		{`select sequin.create_source('far', 'host=far'); select sequin.create_source('far', 'host=far')`, "42710", `"far"`, "alter_source"},
		{`select sequin.create_source('far', 'host=far'); select sequin.create_stream('x', '{a.b.c}', source => 'far')`, "22023", "a.b.c", "schema.table"},
		{`select sequin.create_source('far', 'host=far'); select sequin.create_stream('x', '{a,a}', source => 'far')`, "22023", "twice", ""},
		{`select sequin.create_source('far', 'host=far'); select sequin.create_stream('x', '{a}', mode => 'row', source => 'far')`, "22023", "mode", ""},
		{`select sequin.create_source('far', 'host=far'); select sequin.create_stream('orders', '{orders}', source => 'far')`, "42710", `"orders"`, "if_not_exists"},
		{`select sequin.create_source('far', 'host=far'); select sequin.create_stream('x', '{a}', source => 'far'); select sequin.drop_source('far')`, "55000", `"far"`, "drop_stream('x')"},
	} {
		conn, err := db.Pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_, err = conn.Conn().PgConn().Exec(t.Context(), test.sql).ReadAll()
		_, _ = conn.Exec(t.Context(), `rollback`)
		conn.Release()
		e := asPgError(err)
		switch {
		case e == nil:
			t.Errorf("%s: got %v, want %s", test.sql, err, test.code)
		case e.Code != test.code || !strings.Contains(e.Message, test.message) || e.Hint == "" || !strings.Contains(e.Hint, test.hint):
			t.Errorf("%s: got %s: %s (hint: %s); want %s, %q and %q", test.sql, e.Code, e.Message, e.Hint, test.code, test.message, test.hint)
		}
	}
	// None of it left anything behind.
	if n := pgtest.Value[int](db, `select count(*) from sequin.streams`) + pgtest.Value[int](db, `select count(*) from sequin.consumers`); n != 3 {
		t.Errorf("%d streams and consumers", n)
	}
}

// A name that is null, wherever one is asked for, is refused as any other that there is not, or that cannot be.
func TestNullNames(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`
		create table orders (id int primary key);
		select sequin.create_stream('s', '{orders}');
		select sequin.create_consumer('c', 's');
		select sequin.create_consumer('d', 's');
		select sequin.create_source('far', 'host=far');
		select sequin.create_pipeline('p', 'orders', 'order_log')`)
	values := map[string]string{
		"consumer": `'c'`, "stream": `'s'`, "role": `'postgres'`, "tables": `'{orders}'`, "source": `'local'`, "source_table": `'orders'`,
		"event_table": `'another_log'`, "ack_ids": `'{1}'`, "conninfo": `'host=far'`, "query": `'select 1 as seq'`, "to_seq": `1`,
	}
	nameOf := map[string]string{"consumer": `'c'`, "stream": `'s'`, "source": `'far'`, "pipeline": `'p'`}
	rows := pgtest.Column[string](db, `
		select concat_ws(' ', p.proname, a.name, (select string_agg(o.name, ' ' order by o.n)
		  from unnest(p.proargnames[:p.pronargs]) with ordinality o(name, n)
		  where o.name <> a.name and (o.n <= p.pronargs - p.pronargdefaults or o.name = 'to_seq')))
		from pg_proc p
		cross join lateral unnest(p.proargnames[:p.pronargs]) with ordinality a(name, n)
		where p.pronamespace = 'sequin'::regnamespace and p.proname !~ '^(_|bridge_)'
		  and a.name in ('name', 'consumer', 'stream', 'source', 'pipeline', 'role', 'tables', 'source_table', 'event_table', 'query')
		  and not (p.proname = 'accept_gap' and a.name <> 'source') and p.proname <> 'create_webhook'`)
	if len(rows) < 35 {
		t.Errorf("%d names to give", len(rows))
	}
	for _, row := range rows {
		words := strings.Fields(row)
		function, name, others := words[0], words[1], words[2:]
		args := name + " => null"
		for _, other := range others {
			value := values[other]
			if other == "name" {
				verb, kind, _ := strings.Cut(function, "_")
				if value = nameOf[kind]; verb == "create" {
					value = "'new'"
				}
			}
			args += ", " + other + " => " + value
		}
		sql := "select * from sequin." + function + "(" + args + ")"
		if e := db.Error(sql); e.Code != "42704" && e.Code != "22023" || e.Hint == "" {
			t.Errorf("%s: got %s: %s (hint: %s)", sql, e.Code, e.Message, e.Hint)
		}
	}
}

// Intervals without end are refused, where a server has them.
func TestInfiniteIntervals(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	if db.Major() < 17 {
		t.Skip("intervals are finite before 17")
	}
	db.Exec(`create table orders (id int primary key); select sequin.create_stream('s', '{orders}'); select sequin.create_consumer('c', 's')`)
	for _, call := range []string{
		`create_consumer('x', 's', ack_wait => 'X')`, `create_consumer('x', 's', max_backoff => 'X')`,
		`create_consumer('x', 's', backoff => 'X', max_backoff => 'X')`, `alter_consumer('c', ack_wait => 'X')`,
		`receive('c', ack_wait => 'X')`, `receive('c', wait => 'X')`, `pop('c', wait => 'X')`, `sync('s', wait => 'X')`,
		`nack('c', '{1}', delay => 'X')`, `extend('c', '{1}', ack_wait => 'X')`, `create_pipeline('p', 'orders', 'log', retention => 'X')`,
		`set_retention('X')`,
	} {
		for _, value := range []string{"infinity", "-infinity"} {
			sql := "select * from sequin." + strings.ReplaceAll(call, "X", value)
			if e := db.Error(sql); e.Code != "22023" || e.Hint == "" {
				t.Errorf("%s: got %s: %s (hint: %s)", sql, e.Code, e.Message, e.Hint)
			}
		}
	}
}

// The longest intervals that are taken can be used.
func TestLongestIntervals(t *testing.T) {
	f := setup(t, "rows")
	f.consumer("c", "ack_wait => '100 years'", "backoff => '100 years'", "max_backoff => '100 years'")
	f.write(inserts(1, 2, 3)...)
	got := f.receive(`'c', 3`)
	f.call("extend", ids(got), 3, `'100 years'`)
	f.call("nack", ids(got[:1]), 1, `'100 years'`)
	f.call("nack", ids(got[1:2]), 1)
	f.Exec(`select sequin.set_retention('1000 years'); select sequin.bridge_retain(1)`)
	f.Exec(`select sequin.bridge_rotate(1, $1)`, f.lastSeq)
	f.Exec(`select sequin.create_pipeline('p', 'item', 'item_log', retention => '1000 years')`)
	f.Exec(`select * from sequin.pipeline_status; select * from sequin.health(); select * from sequin.deliveries`)
	f.tend()
}

// Where every table of a stream was dropped, nothing more is to come: whoever would wait for it is told.
func TestDroppedTables(t *testing.T) {
	f := setup(t, "rows")
	f.Exec(`insert into item values (1)`)
	f.Exec(`update sequin.progress set applied_lsn = 'F/0'`) // where the log has come to
	var cursor string
	if err := f.Pool.QueryRow(t.Context(), `select cursor from sequin.sync('s')`).Scan(&cursor); err != nil {
		t.Fatal(err)
	}
	f.write(row{action: "d", key: 1})
	f.Exec(`drop table item`)
	// What the log has is still to be had.
	if n := pgtest.Value[int](f.DB, `select count(*) from sequin.sync('s', $1)`, cursor); n != 1 {
		t.Errorf("%d rows", n)
	}
	cursor = pgtest.Value[string](f.DB, `select cursor from sequin.sync('s', $1)`, cursor)
	f.Exec(`update sequin.progress set applied_lsn = 'F/0'`)
	for _, sql := range []string{
		`select sequin.create_consumer('x', 's')`,
		`select sequin.create_consumer('x', 's', filter => 'new.id > 1')`,
		`select sequin.create_consumer('x', 's', start_at => 'beginning')`,
		`select * from sequin.sync('s')`,
		`select * from sequin.sync('s', '` + cursor + `')`,
	} {
		if e := f.Error(sql); e.Code != "55000" || !strings.Contains(e.Message, "public.item") || !strings.Contains(e.Hint, "drop_stream('s')") {
			t.Errorf("%s: got %s: %s (hint: %s)", sql, e.Code, e.Message, e.Hint)
		}
	}
	if got := pgtest.Value[string](f.DB, `select state || ': ' || error from sequin.streams`); got != "error: it has no table any more: dropped were public.item" {
		t.Error(got)
	}
}

// Every hint of a table that is refused, run as it is, mends it.
func TestStreamRefusalHints(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(`create unlogged table fast (id int primary key)`)
	db.Exec(db.Error(`select sequin.create_stream('fast', '{fast}')`).Hint)
	db.Exec(`select sequin.create_stream('fast', '{fast}')`)
	db.Exec(`create table late (id int, no int, constraint "late key" primary key (id, no) deferrable)`)
	mend, full, _ := strings.Cut(db.Error(`select sequin.create_stream('late', '{late}')`).Hint, "; or: ")
	db.Exec("begin; " + full + " rollback")
	db.Exec(mend)
	db.Exec(`select sequin.create_stream('late', '{late}')`)
	db.Exec(`create table bare (id int)`)
	_, mend, _ = strings.Cut(db.Error(`select sequin.create_stream('bare', '{bare}')`).Hint, "; or, where it has none: ")
	db.Exec(mend)
	db.Exec(`select sequin.create_stream('bare', '{bare}'); insert into bare values (1); update bare set id = 2; delete from bare`)
}

func asPgError(err error) *pgconn.PgError {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e
	}
	return nil
}
