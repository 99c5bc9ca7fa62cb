-- +goose Up

-- They say where in the expression.
drop function if exists sequin._check_expression(text, text);
drop function if exists sequin._explain_error(text, text, text, text, text);
