"""Statements of searches: every value is a parameter, and prefixes become ranges that hold nothing else."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from app.autocrud.query import Compare, Query
from app.autocrud.resource_manager.backends.postgres.query import PostgresDialect
from app.autocrud.resource_manager.backends.query_sql import SqlBuilder, prefix_end, quoted
from app.autocrud.resource_manager.backends.sqlite.sql import SqliteBuilder, SqliteDialect
from app.autocrud.testing.strategies import FIELDS, queries

TEXTS = st.text(st.characters(codec="utf-8"), max_size=4)
BUILDERS = {
    "sqlite": SqliteBuilder(SqliteDialect(FIELDS), "resources"),
    "postgres": SqlBuilder(PostgresDialect(FIELDS), "resources"),
}


@given(TEXTS, TEXTS)
@example("a", "")
@example("\ud7ff", "")
@example("a\U0010ffff", "\U0010ffff")
@example("\U0010ffff", "a")
def test_the_range_of_a_prefix_holds_what_begins_with_it(prefix, more):
    end = prefix_end(prefix)
    assert prefix <= prefix + more
    assert end is None or prefix + more < end


@given(TEXTS, TEXTS)
@example("a", "b")
@example("\ud7ff", "\ue000")
def test_the_range_of_a_prefix_holds_nothing_else(prefix, other):
    assume(not other.startswith(prefix))
    end = prefix_end(prefix)
    assert other < prefix or (end is not None and other >= end)


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=60)
@given(queries)
def test_every_parameter_has_a_mark(name, query):
    builder, mark = BUILDERS[name], {"sqlite": "?", "postgres": "%s"}[name]
    resolved = query.resolve(FIELDS)
    for statement in (builder.search(resolved), builder.count(resolved)):
        assert statement.sql.replace("%%", "").count(mark) == len(statement.params)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("op", ["eq", "gte", "starts_with", "ends_with", "contains", "in"])
def test_a_value_is_never_part_of_the_statement(name, op):
    text = "'; DROP TABLE resources; -- %s ? \\"
    query = Query(where=Compare("text", op, (text,) if op == "in" else text)).resolve(FIELDS)
    statement = BUILDERS[name].search(query)
    assert "DROP" not in statement.sql
    assert text in statement.params


@given(TEXTS)
def test_identifiers_are_quoted(name):
    whole = quoted(name)
    assert whole[0] == whole[-1] == '"'
    assert '"' not in whole[1:-1].replace('""', "")
