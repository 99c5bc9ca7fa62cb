import json, os, psycopg

with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as source, psycopg.connect(os.environ["TARGET_URL"]) as target:
    cursor = target.execute("select cursor from sync_state").fetchone()[0]
    while True:
        page = source.execute(
            "select cursor, action, record_pk, record from sequin.sync('products', %s, 1000, wait => '10s')", [cursor]).fetchall()
        for cursor, action, pk, record in page:
            if action == "delete":
                target.execute("delete from products where id = %s::bigint", [pk])
            else:
                target.execute(
                    "insert into products select * from jsonb_populate_record(null::products, %s::jsonb) "
                    "on conflict (id) do update set name = excluded.name, price = excluded.price", [json.dumps(record)])
        target.execute("update sync_state set cursor = %s", [cursor])
        target.commit()
