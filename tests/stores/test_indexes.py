"""Every search by one field uses an index, also in memory, which makes an index when a search first needs it."""

from __future__ import annotations

import contextlib

import apsw
import pytest

from app.autocrud.query import Query, Sort, field
from app.autocrud.resource_manager.backends.sqlite.tables import ResourceTables
from app.autocrud.resource_manager.basic import ModelSpec
from app.autocrud.values import SCALARS

FIELDS = {"author": SCALARS[str], "views": SCALARS[int]}
QUERIES = {
    "equality": (Query(where=field("author").eq("a")), "f:author"),
    "one of": (Query(where=field("author").in_(["a", "b"])), "f:author"),
    "prefix": (Query(where=field("author").starts_with("a")), "f:author"),
    "range and sort": (Query(where=field("views").gte(3), sort=(Sort("views", descending=True),)), "f:views"),
    "sort by creation": (Query(sort=("-meta.created_time",)), "created"),
    "sort by update": (Query(sort=("meta.updated_time",)), "updated"),
    "by id": (Query(), "sqlite_autoindex_resources_1"),
}


@pytest.mark.parametrize("lazy", [False, True], ids=["all at once", "on first use"])
@pytest.mark.parametrize("name", QUERIES)
def test_a_search_uses_its_index(name: str, lazy: bool) -> None:
    query, index = QUERIES[name]
    tables = ResourceTables(ModelSpec("article", FIELDS), lazy=lazy)
    with contextlib.closing(apsw.Connection(":memory:")) as connection:
        tables.create(connection)
        resolved = query.resolve(FIELDS)
        tables.search(connection, resolved)
        statement, params = tables._sql.search(resolved)
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", params))
    assert f"USING INDEX {'' if index.startswith('sqlite') else 'by_'}{index}" in plan
    if query.sort:  # only resources with equal values may be sorted, by id
        assert "TEMP B-TREE FOR ORDER BY" not in plan


def test_uids_are_found_through_an_index() -> None:
    tables = ResourceTables(ModelSpec("article", FIELDS), lazy=True)
    with contextlib.closing(apsw.Connection(":memory:")) as connection:
        tables.create(connection)
        assert tables.unreferenced(connection, ["0/a"]) == ["0/a"]
        plan = " ".join(
            row[3] for row in connection.execute("EXPLAIN QUERY PLAN SELECT 1 FROM revisions WHERE uid = ?", ("a",))
        )
    assert "by_uid" in plan
