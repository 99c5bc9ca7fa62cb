import json, os, psycopg, redis

cache = redis.Redis.from_url(os.environ["REDIS_URL"])
with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as db:
    while True:
        batch = db.execute(
            "select ack_id, action, record_pk, record from sequin.receive('cache', 100, wait => '10s')").fetchall()
        for _, action, pk, record in batch:
            if action == "delete":
                cache.delete(f"product:{pk}")
            else:
                cache.set(f"product:{pk}", json.dumps(record))
        db.execute("select sequin.ack('cache', %s)", [[row[0] for row in batch]])
