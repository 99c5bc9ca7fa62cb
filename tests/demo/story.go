package main

import (
	"context"
	"fmt"
	"io"

	"sequin/bridge/dev"
)

// tell tells the story, and checks it.
func tell(ctx context.Context, out io.Writer, server dev.Server) error {
	s := &story{ctx: ctx, out: out, server: server}
	shop, ann, bob := s.connect("shop"), s.connect("worker_a"), s.connect("worker_b")
	defer shop.close()
	defer ann.close()
	defer bob.close()

	s.stream(shop)
	s.crash(shop, ann, bob)
	s.changes(shop)
	s.exactlyOnce(shop)
	s.beginning(shop)
	s.again(shop)
	s.sync(shop)
	s.pipeline(shop)
	s.look(shop)
	s.say("That is all. The server is stopped and its directory removed.")
	return s.err
}

// stream: a table, a stream, a consumer, and a first change.
func (s *story) stream(shop *session) {
	s.say(fmt.Sprintf("PostgreSQL %d with the schema sequin in it, and the bridge beside it. A table, as anyone has it;\n"+
		"its deletes are to say whose order it was.", s.server.Binaries.Major))
	shop.run(`create table orders (id int primary key, customer text not null, amount numeric not null)`)
	shop.run(`alter table orders replica identity full`)

	s.say("A stream of its rows, and a consumer that ships: one customer's orders one after the other. Who takes an order\n" +
		"has two seconds for it.")
	r := shop.run(`select sequin.create_stream('orders', '{orders}')`)
	s.expect(r.rows("create_stream") == "created", "create_stream gives %q", r.rows("create_stream"))
	r = shop.run("select sequin.create_consumer('shipping', 'orders',\n" +
		"  group_by => '{customer}', ack_wait => '2 seconds', backoff => '100 milliseconds')")
	s.expect(r.rows("create_consumer") == "created", "create_consumer gives %q", r.rows("create_consumer"))

	s.say("An order comes in, by plain SQL. What is rolled back never happened.")
	shop.run(`begin`)
	shop.run(`insert into orders values (0, 'eve', 1000000)`)
	shop.run(`rollback`)
	shop.run(`insert into orders values (1, 'ann', 40)`)
}

// crash: a worker that takes a message and is not heard of again, until it is.
func (s *story) crash(shop, a, b *session) {
	s.say("A worker takes it.")
	taken := a.run("select ack_id, seq, action, record, deliver_count\nfrom sequin.receive('shipping', wait => '5s')")
	s.expect(taken.rows("action", "deliver_count") == "insert 1", "it got %q", taken.rows("action", "deliver_count"))
	s.expect(taken.rows("record") == `{"id": 1, "amount": 40, "customer": "ann"}`, "it got %q", taken.rows("record"))

	s.say("More orders come in, and the worker crashes with the first in its hands.")
	shop.run(`insert into orders values (2, 'bob', 15), (3, 'ann', 99.50)`)
	r := shop.run(`select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'worker_a'`)
	s.expect(r.rows("pg_terminate_backend") == "t", "the worker is still there")

	s.say("Another worker asks. It gets bob's order at once, and none of ann's: her first is out, and the other comes after it.")
	r = b.run("select ack_id, seq, record, deliver_count\nfrom sequin.receive('shipping', 10, wait => '5s')")
	s.expect(r.rows("record", "deliver_count") == `{"id": 2, "amount": 15, "customer": "bob"} 1`, "it got %q", r.rows("record"))
	r = b.run(fmt.Sprintf(`select sequin.ack('shipping', '%s')`, r.list("ack_id")))
	s.expect(r.rows("ack") == "1", "ack counted %s", r.rows("ack"))

	s.say("It waits for more. The two seconds end, and ann's first order comes again: the seq it had, another ack_id.")
	again := b.run("select ack_id, seq, record, deliver_count\nfrom sequin.receive('shipping', 1, wait => '20s')")
	s.expect(again.rows("seq") == taken.rows("seq"), "it got seq %q", again.rows("seq"))
	s.expect(again.rows("deliver_count") == "2", "its deliver_count is %s", again.rows("deliver_count"))
	s.expect(again.rows("ack_id") != taken.rows("ack_id"), "its ack_id is %s again", again.rows("ack_id"))

	s.say("The first worker was not dead, only slow. Its ack comes too late and counts for nothing; the other's does.")
	a = s.connect("worker_a")
	defer a.close()
	r = a.run(fmt.Sprintf(`select sequin.ack('shipping', '%s')`, taken.list("ack_id")))
	s.expect(r.rows("ack") == "0", "ack counted %s", r.rows("ack"))
	r = b.run(fmt.Sprintf(`select sequin.ack('shipping', '%s')`, again.list("ack_id")))
	s.expect(r.rows("ack") == "1", "ack counted %s", r.rows("ack"))

	s.say("And then her second.")
	r = b.run("select ack_id, seq, record, deliver_count\nfrom sequin.receive('shipping', 10, wait => '5s')")
	s.expect(r.rows("record", "deliver_count") == `{"id": 3, "amount": 99.50, "customer": "ann"} 1`, "it got %q", r.rows("record"))
	r = b.run(fmt.Sprintf(`select sequin.ack('shipping', '%s')`, r.list("ack_id")))
	s.expect(r.rows("ack") == "1", "ack counted %s", r.rows("ack"))
}

// changes: what becomes of a row.
func (s *story) changes(shop *session) {
	s.say("Updates and deletes are messages too. pop is receive and ack in one.")
	shop.run(`begin`)
	shop.run(`update orders set amount = 45 where id = 1`)
	shop.run(`delete from orders where id = 2`)
	shop.run(`commit`)
	r := shop.run("select seq, action, record_pk, record\nfrom sequin.pop('shipping', 10, wait => '5s')\norder by seq")
	s.expect(r.rows("action", "record_pk") == "update 1\ndelete 2", "it got %q", r.rows("action", "record_pk"))
}

// exactlyOnce: the work and the messages in one transaction.
func (s *story) exactlyOnce(shop *session) {
	s.say("A consumer that keeps a total a customer, of the orders from now on: in the transaction that takes the messages.")
	shop.run(`create table totals (customer text primary key, amount numeric not null)`)
	r := shop.run(`select sequin.create_consumer('totals', 'orders', actions => '{insert}')`)
	s.expect(r.rows("create_consumer") == "created", "create_consumer gives %q", r.rows("create_consumer"))
	shop.run(`insert into orders values (4, 'ann', 10), (5, 'bob', 20), (6, 'ann', 3.50)`)
	const add = "insert into totals\n" +
		"select record ->> 'customer', sum((record ->> 'amount')::numeric)\n" +
		"from sequin.pop('totals', 100, wait => '5s')\n" +
		"group by 1\n" +
		"on conflict (customer) do update set amount = totals.amount + excluded.amount"
	const show = `select * from totals order by customer`
	const want = "ann 13.50\nbob 20"

	s.say("Something goes wrong, and a rollback gives the messages back.")
	shop.run(`begin`)
	shop.run(add)
	r = shop.run(show)
	s.expect(r.rows("customer", "amount") == want, "the totals are %q", r.rows("customer", "amount"))
	shop.run(`rollback`)
	r = shop.run(show)
	s.expect(r.rows("customer", "amount") == "", "the totals are %q", r.rows("customer", "amount"))

	s.say("Again, and a commit keeps both: each order is in the totals exactly once.")
	shop.run(`begin`)
	shop.run(add)
	shop.run(`commit`)
	r = shop.run(show)
	s.expect(r.rows("customer", "amount") == want, "the totals are %q", r.rows("customer", "amount"))
	r = shop.run(`select count(*) from sequin.pop('totals', 100)`)
	s.expect(r.rows("count") == "0", "there are %s messages left", r.rows("count"))
}

// look: what there is to look at.
func (s *story) look(shop *session) {
	s.say("The log can be read as it is, without a consumer: what became of order 1?")
	r := shop.run("select seq, action, record from sequin.messages\nwhere stream = 'orders' and record_pk = '1'\norder by seq")
	s.expect(r.rows("action") == "insert\nupdate", "it has %q", r.rows("action"))

	s.say("A mistake is told with the way out.")
	shop.fail("42704", `select * from sequin.receive('shiping')`)

	s.say("Is all well?")
	r = shop.run(`select split_part(name, ' ', 1) as what, status, count(*) from sequin.health() group by 1, 2 order by 1`)
	s.expect(len(r) > 0, "health has nothing to say")
	for _, line := range r {
		s.expect(line["status"] == "ok", "%s is %s", line["what"], line["status"])
	}
}
