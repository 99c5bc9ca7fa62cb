package sql

import (
	"strings"
	"testing"

	"sequin/tests/pgtest"
)

// What users call, to the letter: names, arguments, defaults and results are a promise. An argument or a column more is
// at the end; anything else breaks somebody's program.
const publicFunctions = `
accept_gap(source text default 'local', consumer text default null, pipeline text default null) returns bigint
ack(consumer text, ack_ids bigint[]) returns bigint
alter_consumer(name text, filter text default null, transform text default null, actions text[] default null, group_by text[] default null, start_at text default null, start_row text default null, ack_wait interval default null, max_deliver integer default null, max_ack_pending integer default null, backoff interval default null, max_backoff interval default null) returns text
alter_source(name text, conninfo text) returns text
alter_pipeline(name text, actions text[] default null, filter text default null, retention interval default null) returns text
backfill(consumer text, from_row text default null, filter text default null) returns bigint
cancel_backfill(id bigint) returns boolean
create_consumer(name text, stream text, filter text default null, transform text default null, actions text[] default '{insert,update,delete}', group_by text[] default null, start_at text default 'now', start_row text default null, ack_wait interval default '00:00:30', max_deliver integer default null, max_ack_pending integer default 10000, backoff interval default '00:00:01', max_backoff interval default '00:05:00', if_not_exists boolean default false) returns text
create_pipeline(name text, source_table text, event_table text, actions text[] default '{insert,update,delete}', filter text default null, retention interval default null, if_not_exists boolean default false) returns text
create_source(name text, conninfo text) returns text
create_stream(name text, tables text[], mode text default 'rows', sort_column text default null, source text default 'local', if_not_exists boolean default false) returns text
create_webhook(name text, stream text, url text, headers jsonb default '{}', secret text default null, batch_size integer default 1, request_timeout interval default '00:00:30', concurrency integer default 8, filter text default null, transform text default null, actions text[] default '{insert,update,delete}', group_by text[] default null, start_at text default 'now', start_row text default null, ack_wait interval default '00:00:30', max_deliver integer default null, max_ack_pending integer default 10000, backoff interval default '00:00:01', max_backoff interval default '00:05:00', if_not_exists boolean default false) returns text
drop_consumer(name text, if_exists boolean default false) returns text
drop_pipeline(name text, if_exists boolean default false) returns text
drop_source(name text, if_exists boolean default false) returns text
drop_stream(name text, if_exists boolean default false) returns text
extend(consumer text, ack_ids bigint[], ack_wait interval default null) returns bigint
grant_configure(role name) returns text
grant_consume(consumer text, role name) returns text
health() returns table(name text, status text, detail text, hint text)
nack(consumer text, ack_ids bigint[], delay interval default null, error text default null) returns bigint
pause_consumer(name text) returns text
pause_pipeline(name text) returns text
pop(consumer text default null, batch_size integer default 1, wait interval default '00:00:00') returns table(seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb, changes jsonb, committed_at timestamp with time zone, deliver_count integer, metadata jsonb)
receive(consumer text default null, batch_size integer default 1, wait interval default '00:00:00', ack_wait interval default null) returns table(ack_id bigint, seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb, changes jsonb, committed_at timestamp with time zone, deliver_count integer, metadata jsonb)
redrive(consumer text, seqs bigint[] default null) returns bigint
republish(consumer text, query text) returns bigint
resume_consumer(name text) returns text
resume_pipeline(name text) returns text
revoke_configure(role name) returns text
revoke_consume(consumer text, role name) returns text
rewind(consumer text, to_seq bigint default null, to_time timestamp with time zone default null, to_row text default null) returns text
set_retention(keep interval, max_bytes bigint default null) returns text
sync(stream text, inout cursor text default null, batch_size integer default 1000, wait interval default '00:00:00', out seq bigint, out action text, out table_schema text, out table_name text, out record_pk text, out record jsonb, out changes jsonb, out committed_at timestamp with time zone) returns setof record
version() returns text
`

// Columns of views: the same.
const publicViews = `
dead_letters(consumer text, seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb, changes jsonb, committed_at timestamp with time zone, metadata jsonb, deliver_count integer, error text, dead_at timestamp with time zone)
deliveries(consumer text, ack_id bigint, seq bigint, action text, table_schema text, table_name text, record_pk text, deliver_count integer, state text, delivered_at timestamp with time zone, expires_at timestamp with time zone, due_at timestamp with time zone, error text)
messages(stream text, seq bigint, action text, table_schema text, table_name text, record_pk text, record jsonb, changes jsonb, committed_at timestamp with time zone, metadata jsonb)
`

func TestPublicFunctions(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	got := pgtest.Column[string](db, `
		select lower(regexp_replace(
		  p.proname || '(' || pg_get_function_arguments(p.oid) || ') returns ' || pg_get_function_result(p.oid),
		  '::(text\[\]|bigint\[\]|text|interval|integer|bigint|jsonb|timestamp with time zone)', '', 'g'))
		from pg_proc p
		where p.pronamespace = 'sequin'::regnamespace and p.proname !~ '^(_|bridge_)'`)
	wantSameLines(t, "function", got, publicFunctions)

	got = pgtest.Column[string](db, `
		select c.relname || '(' || string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' order by a.attnum) || ')'
		from pg_class c join pg_attribute a on a.attrelid = c.oid
		where c.oid in ('sequin.messages'::regclass, 'sequin.deliveries'::regclass, 'sequin.dead_letters'::regclass) and a.attnum > 0
		group by c.relname`)
	wantSameLines(t, "view", got, publicViews)
}

// What users call and read says what it is for, in psql's \df+ and \dv+.
func TestPublicComments(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	for _, name := range pgtest.Column[string](db, `
		select p.proname::text from pg_proc p
		where p.pronamespace = 'sequin'::regnamespace and p.proname !~ '^_' and obj_description(p.oid, 'pg_proc') is null
		union all
		select c.relname::text from pg_class c
		where c.relnamespace = 'sequin'::regnamespace and c.relkind = 'v' and obj_description(c.oid, 'pg_class') is null`) {
		t.Errorf("%s has no comment", name)
	}
}

func wantSameLines(t *testing.T, what string, got []string, text string) {
	t.Helper()
	want := map[string]bool{}
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		want[line] = true
	}
	for _, line := range got {
		if !want[line] {
			t.Errorf("%s as it is, and not as promised: %s", what, line)
		}
		delete(want, line)
	}
	for line := range want {
		t.Errorf("%s as promised, and not as it is: %s", what, line)
	}
}
