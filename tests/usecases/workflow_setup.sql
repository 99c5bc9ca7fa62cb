alter table orders replica identity full;
select sequin.create_stream('order_changes', '{orders}', mode => 'changes');
select sequin.create_consumer('fulfilment', 'order_changes', max_deliver => 20,
  filter => $$new.status = 'paid' and old.status is distinct from new.status$$);
