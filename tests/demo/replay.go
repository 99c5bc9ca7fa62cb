package main

// beginning: a consumer that chooses, and begins with the rows that exist.
func (s *story) beginning(shop *session) {
	s.say("A consumer for invoices comes late. It wants every order from the first on, of 10 or more, and of each what an\n" +
		"invoice needs: filter and transform are SQL over the row. A bridge reads the table, beside whatever goes on.")
	r := shop.run("select sequin.create_consumer('invoices', 'orders',\n" +
		"  filter => 'new.amount >= 10',\n" +
		"  transform => $$jsonb_build_object('order', new.id, 'cents', (new.amount * 100)::int)$$,\n" +
		"  group_by => '{}', start_at => 'beginning')")
	s.expect(r.rows("create_consumer") == "created", "create_consumer gives %q", r.rows("create_consumer"))
	const progress = `select consumer, state, rows_done, rows_total from sequin.backfills`
	shop.await(progress, "state", "done")
	r = shop.run(progress)
	s.expect(r.rows("rows_done", "rows_total") == "5 5", "it has read %q", r.rows("rows_done", "rows_total"))
	r = shop.run("select seq, action, record\nfrom sequin.pop('invoices', 100, wait => '5s')\norder by seq")
	s.expect(r.rows("action", "record") == `read {"cents": 4500, "order": 1}`+"\n"+`read {"cents": 9950, "order": 3}`+"\n"+
		`read {"cents": 1000, "order": 4}`+"\n"+`read {"cents": 2000, "order": 5}`, "it got %q", r.rows("action", "record"))

	s.say("After the rows that there were come the changes. The small order is none of its business.")
	shop.run(`insert into orders values (7, 'bob', 8), (8, 'cyd', 70)`)
	shop.run(`update orders set amount = 12 where id = 7`)
	// Both have come, and the filter has let both through.
	shop.await(`select pending || ' ' || sequin._is_feed_behind(c) as left from sequin.consumer_status join sequin.consumer c using (name)
		where name = 'invoices'`, "left", "2 false")
	r = shop.run("select seq, action, record\nfrom sequin.pop('invoices', 100, wait => '5s')\norder by seq")
	s.expect(r.rows("action", "record") == `insert {"cents": 7000, "order": 8}`+"\n"+`update {"cents": 1200, "order": 7}`,
		"it got %q", r.rows("action", "record"))
}

// again: what has come comes again.
func (s *story) again(shop *session) {
	s.say("Yesterday's invoices were wrong? Back to when order 8 came: from there on everything is delivered again, to this\n" +
		"consumer alone. A seq will do as well as a time; and to_row goes back in the table, further than the log is kept.")
	r := shop.run("select sequin.rewind('invoices', to_time => (\n" +
		"  select committed_at from sequin.messages\n  where stream = 'orders' and record_pk = '8'))")
	s.expect(r.rows("rewind") == "rewound", "rewind gives %q", r.rows("rewind"))
	r = shop.run("select seq, action, record\nfrom sequin.pop('invoices', 100, wait => '5s')\norder by seq")
	s.expect(r.rows("action", "record") == `insert {"cents": 7000, "order": 8}`+"\n"+`update {"cents": 1200, "order": 7}`,
		"it got %q", r.rows("action", "record"))

	s.say("Or only ann's, whatever has become of them: any query that returns rows of the table, or seqs of messages.")
	r = shop.run(`select sequin.republish('invoices', $$select * from orders where customer = 'ann' and amount >= 10$$)`)
	s.expect(r.rows("republish") == "3", "republish gives %q", r.rows("republish"))
	r = shop.run("select record_pk, record\nfrom sequin.pop('invoices', 100, wait => '5s')\norder by record_pk")
	s.expect(r.rows("record_pk") == "1\n3\n4", "it got %q", r.rows("record_pk"))
}

// sync: a reader that keeps its place itself.
func (s *story) sync(shop *session) {
	s.say("A reader that keeps its place itself needs no consumer: sync gives a page, and with each row the cursor to go on\n" +
		"from. Nothing is held for it; it works in a read-only transaction, and on a replica.")
	shop.run("create table page as\nselect row_number() over () as n, s.* from sequin.sync('orders', batch_size => 5) s")
	r := shop.run(`select action, record_pk, record from page order by n`)
	s.expect(r.rows("action", "record_pk") == "read 1\nread 3\nread 4\nread 5\nread 6", "it has %q", r.rows("action", "record_pk"))

	s.say("Orders change behind its back and before its eyes. It goes on from where it was: with the rest of the rows, and\n" +
		"then with what has changed since it began.")
	shop.run(`delete from orders where id = 4`)
	shop.await(`select count(*) from sequin.messages where stream = 'orders' and record_pk = '4' and action = 'delete'`, "count", "1")
	r = shop.run("select action, record_pk, record\nfrom sequin.sync('orders', (select cursor from page order by n desc limit 1), wait => '5s')")
	s.expect(r.rows("action", "record_pk") == "read 7\nread 8\ndelete 4", "it has %q", r.rows("action", "record_pk"))
}

// pipeline: every change, in a table.
func (s *story) pipeline(shop *session) {
	s.say("A change capture pipeline writes every change of a table into another: an audit log that plain SQL can ask, with\n" +
		"what each value was before.")
	r := shop.run(`select sequin.create_pipeline('audit', 'orders', 'order_events')`)
	s.expect(r.rows("create_pipeline") == "created", "create_pipeline gives %q", r.rows("create_pipeline"))
	shop.run(`update orders set amount = 9 where id = 5`)
	shop.run(`delete from orders where id = 6`)
	shop.await(`select count(*) from order_events`, "count", "2")
	r = shop.run("select action, record_pk, changes, record ->> 'customer' as customer\nfrom order_events\norder by id")
	s.expect(r.rows("action", "record_pk", "changes", "customer") == `update 5 {"amount": 20} bob`+"\ndelete 6  ann",
		"it has %q", r.rows("action", "record_pk", "changes", "customer"))
}
