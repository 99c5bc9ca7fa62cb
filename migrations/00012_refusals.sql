-- +goose Up

-- What refuses a call is told whose call it is.
drop function if exists sequin._refuse_wait(int, interval);
drop function if exists sequin._refuse_receive(int, interval, interval);
drop function if exists sequin._republish_query(text);
