// A worker through knex and node-postgres: values are strings with a type that the server makes out.
'use strict';

const assert = require('node:assert');
const knex = require('knex')({ client: 'pg', connection: process.env.DATABASE_URL });

async function main() {
  await knex.raw('insert into orders select i, i * 10 from generate_series(1, 20) i');

  // Receive, and ack with an array.
  const got = [];
  while (got.length < 20) {
    const { rows } = await knex.raw('select * from sequin.receive(?, ?, wait => ?)', ['mailer', 7, '10s']);
    assert(rows.length > 0, 'a long poll has come back with nothing');
    const ids = rows.map((row) => row.ack_id);
    const acked = await knex.raw('select sequin.ack(?, ?) as count', ['mailer', ids]);
    assert.strictEqual(Number(acked.rows[0].count), ids.length);
    got.push(...rows);
  }
  assert.deepStrictEqual(got.map((row) => row.record.id).sort((a, b) => a - b), [...Array(20).keys()].map((i) => i + 1));
  assert(got.every((row) => row.action === 'insert' && row.committed_at instanceof Date));

  // Receive, write and ack in one transaction: a rollback leaves nothing done, and gives the message back.
  await knex('orders').insert({ id: 100, amount: 1 });
  for (const isLast of [false, true]) {
    const work = knex.transaction(async (trx) => {
      const [row] = await trx.select('ack_id', 'record', 'deliver_count').from(trx.raw('sequin.receive(?, 1, ?)', ['mailer', '10s']));
      assert.strictEqual(row.deliver_count, 1);
      await trx('shipments').insert({ order_id: row.record.id, amount: row.record.amount });
      await trx.raw('select sequin.ack(?, ?)', ['mailer', [row.ack_id]]);
      if (!isLast) throw new Error('not this time');
    });
    if (isLast) await work;
    else await assert.rejects(work, /not this time/);
  }
  assert.deepStrictEqual(await knex('shipments').pluck('order_id'), [100]);

  // Pop.
  await knex('orders').insert({ id: 101, amount: 1 });
  const { rows } = await knex.raw('select record from sequin.pop(?, ?, ?)', ['mailer', 10, '10s']);
  assert.deepStrictEqual(rows.map((row) => row.record.id), [101]);
}

main().then(() => knex.destroy(), (err) => {
  console.error(err);
  process.exit(1);
});
