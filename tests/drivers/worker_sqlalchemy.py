"""A worker through SQLAlchemy and psycopg2: parameters are written into the statement by the client."""

import os

from sqlalchemy import create_engine, text

engine = create_engine(os.environ["DATABASE_URL"].replace("postgres://", "postgresql+psycopg2://"))

receive = text("select ack_id, seq, record, deliver_count from sequin.receive(:consumer, :size, wait => '10s')")
ack = text("select sequin.ack(:consumer, :ids)")

with engine.begin() as conn:
    conn.execute(text("insert into orders select i, i * 10 from generate_series(1, 20) i"))

# Receive, and ack with an array.
got = []
while len(got) < 20:
    with engine.begin() as conn:
        rows = conn.execute(receive, {"consumer": "mailer", "size": 7}).fetchall()
    assert rows, "a long poll has come back with nothing"
    with engine.begin() as conn:
        ids = [row.ack_id for row in rows]
        assert conn.execute(ack, {"consumer": "mailer", "ids": ids}).scalar() == len(ids)
    got += rows
assert sorted(row.record["id"] for row in got) == list(range(1, 21)), got

# Receive, write and ack in one transaction: a rollback leaves nothing done, and gives the message back.
with engine.begin() as conn:
    conn.execute(text("insert into orders values (100, 1)"))
for is_last in (False, True):
    with engine.connect() as conn:
        transaction = conn.begin()
        [row] = conn.execute(receive, {"consumer": "mailer", "size": 1}).fetchall()
        assert row.deliver_count == 1, row
        conn.execute(
            text("insert into shipments values (:id, :amount)"), {"id": row.record["id"], "amount": row.record["amount"]}
        )
        assert conn.execute(ack, {"consumer": "mailer", "ids": [row.ack_id]}).scalar() == 1
        if is_last:
            transaction.commit()
        else:
            transaction.rollback()
with engine.begin() as conn:
    assert conn.execute(text("select order_id from shipments")).fetchall() == [(100,)]

# Pop.
with engine.begin() as conn:
    conn.execute(text("insert into orders values (101, 1)"))
with engine.begin() as conn:
    [row] = conn.execute(text("select record from sequin.pop(:consumer, 10, '10s')"), {"consumer": "mailer"}).fetchall()
    assert row.record["id"] == 101
