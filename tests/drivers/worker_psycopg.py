"""A worker through psycopg 3: parameters go by the extended protocol, and are prepared on their way."""

import os

import psycopg

with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as conn:
    conn.execute("insert into orders select i, i * 10 from generate_series(1, 20) i")

    # Receive, and ack with an array.
    got = []
    while len(got) < 20:
        rows = conn.execute("select * from sequin.receive(%s, %s, wait => %s)", ["mailer", 7, "10s"]).fetchall()
        assert rows, "a long poll has come back with nothing"
        ids = [row[0] for row in rows]
        assert conn.execute("select sequin.ack(%s, %s)", ["mailer", ids]).fetchone() == (len(ids),)
        got += rows
    names = [column.name for column in conn.execute("select * from sequin.receive('mailer')").description]
    assert names[:3] == ["ack_id", "seq", "action"], names
    assert sorted(row[6]["id"] for row in got) == list(range(1, 21)), got
    assert all(row[2] == "insert" and row[8].tzinfo is not None for row in got), got

    # Receive, write and ack in one transaction: a rollback leaves nothing done, and gives the message back.
    conn.execute("insert into orders values (100, 1)")
    for is_last in (False, True):
        try:
            with conn.transaction():
                [row] = conn.execute(
                    "select ack_id, record, deliver_count from sequin.receive(%s, wait => %s)", ["mailer", "10s"]
                ).fetchall()
                assert row[2] == 1, row
                conn.execute("insert into shipments values (%s, %s)", [row[1]["id"], row[1]["amount"]])
                conn.execute("select sequin.ack(%s, %s)", ["mailer", [row[0]]])
                if not is_last:
                    raise psycopg.Rollback()
        except psycopg.Rollback:
            pass
    assert conn.execute("select * from shipments").fetchall() == [(100, 1)]

    # Pop, nack and extend.
    conn.execute("insert into orders values (101, 1), (102, 1)")
    popped = []
    while len(popped) < 1:
        popped = conn.execute("select seq, record from sequin.pop(%s, %s, %s)", ["mailer", 1, "10s"]).fetchall()
    [(ack_id,)] = conn.execute("select ack_id from sequin.receive(%s, 1, '10s')", ["mailer"]).fetchall()
    assert conn.execute("select sequin.extend(%s, %s, %s)", ["mailer", [ack_id], "1 minute"]).fetchone() == (1,)
    assert conn.execute("select sequin.nack(%s, %s, %s, %s)", ["mailer", [ack_id], "0s", "no"]).fetchone() == (1,)
    [(again, count)] = conn.execute("select ack_id, deliver_count from sequin.receive(%s, 1, '10s')", ["mailer"]).fetchall()
    assert count == 2 and again != ack_id
    assert conn.execute("select sequin.ack(%s, %s)", ["mailer", [ack_id]]).fetchone() == (0,), "a stale one has counted"
    assert conn.execute("select sequin.ack(%s, %s)", ["mailer", [again]]).fetchone() == (1,)
