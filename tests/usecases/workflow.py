import json, os, psycopg, urllib.request

with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as db:
    while True:
        for ack_id, seq, order in db.execute(
                "select ack_id, seq, record from sequin.receive('fulfilment', wait => '10s')").fetchall():
            start = urllib.request.Request(os.environ["WORKFLOW_URL"], json.dumps(order).encode(), {
                "Content-Type": "application/json", "Idempotency-Key": str(seq)})
            try:
                urllib.request.urlopen(start, timeout=10)
                db.execute("select sequin.ack('fulfilment', %s)", [[ack_id]])
            except OSError as error:
                db.execute("select sequin.nack('fulfilment', %s, error => %s)", [[ack_id], str(error)])
