"""Lists and counts over HTTP: filters, sorting, pages, and the errors for invalid queries."""

from __future__ import annotations

import pytest

from .conftest import problem


async def test_search(api):
    for views in range(6):
        data = {"title": f"t{views}", "author": "ab"[views % 2], "views": views, "tags": ["x"] if views < 2 else []}
        await api.post("/note", json=data)

    async def titles(query: str) -> list[str]:
        answer = await api.get(f"/note?{query}")
        assert answer.status_code == 200, answer.text
        return [item["data"]["title"] for item in answer.json()["items"]]

    assert await titles("author=a&sort=-views") == ["t4", "t2", "t0"]
    assert await titles("views[gte]=2&views[lt]=4&sort=views") == ["t2", "t3"]
    assert await titles("tags[contains]=x") == ["t0", "t1"]
    assert await titles("author[in]=b,c&sort=views") == ["t1", "t3", "t5"]
    assert await titles("title[in]=t1&title[in]=t2&sort=views") == ["t1", "t2"]
    assert await titles("inner.code[is_null]=true&limit=2") == ["t0", "t1"]
    assert await titles("meta.created_time[gte]=2026-01-01T00:00:00Z&limit=1") == ["t0"]
    assert await titles("meta.status=draft") == []
    assert (await api.get("/note/count?author=a")).json() == {"count": 3}


async def test_pages(api):
    for views in range(5):
        await api.post("/note", json={"title": f"t{views}", "views": views})
    first = await api.get("/note?sort=-views&limit=2")
    cursor = first.json()["next_cursor"]
    assert first.headers["link"] == f'</note?sort=-views&limit=2&cursor={cursor}>; rel="next"'
    seen, answer = first.json()["items"], first
    while "next" in answer.links:
        answer = await api.get(answer.links["next"]["url"])
        seen += answer.json()["items"]
    assert [item["data"]["views"] for item in seen] == [4, 3, 2, 1, 0]
    for other in ("sort=views", "sort=-views&author=x", "", "sort=-views&include_deleted=true"):
        problem(await api.get(f"/note?{other}&cursor={cursor}"), 400, "invalid-query")
    problem(await api.get("/note?sort=-views&cursor=x"), 400, "invalid-query")


async def test_a_link_header_over_4_kb_is_left_out(api):
    for length in range(2800, 3200, 50):
        await api.post("/note", json={"title": "x" * length})
    path, cursor, links = "/note?sort=title&limit=1&data=false", "", []
    while cursor is not None:
        answer = await api.get(path + cursor)
        links.append(answer.headers.get("link", ""))
        following = answer.json()["next_cursor"]
        cursor = None if following is None else f"&cursor={following}"
    assert len(links) == 8
    assert links[0].endswith('>; rel="next"')
    assert 4000 < max(map(len, links)) <= 4096
    assert links[6] == ""


async def test_a_list_of_indexed_fields_reads_no_body(api, crud, monkeypatch):
    await api.post("/note", json={"title": "Sun", "author": "alice", "tags": ["x"], "inner": {"code": "c"}})

    async def refuse(*_):
        raise AssertionError("a body was read")

    monkeypatch.setattr(crud.managers["note"].storage, "bodies", refuse)
    (item,) = (await api.get("/note?fields=author,inner.code,tags")).json()["items"]
    assert item["data"] == {"author": "alice", "inner": {"code": "c"}, "tags": ["x"]}
    (item,) = (await api.get("/note?data=false")).json()["items"]
    assert list(item) == ["meta"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("authr=a", "?authr"),
        ("limit=201", "?limit"),
        ("limit=0", "?limit"),
        ("limit=ten", "?limit"),
        ("limit=5&limit=6", "?limit"),
        ("sort=nothing", "?sort"),
        ("sort=tags", "?sort"),
        ("views[gte]=many", "?views[gte]"),
        ("views=99999999999999999999", "?views"),
        ("views[like]=1", "?views[like]"),
        ("tags=x", "?tags"),
        ("views[contains]=1", "?views[contains]"),
        ("meta.created_time[gte]=2026-01-01T00:00:00+01:00", "?meta.created_time[gte]"),
        ("meta.nonce=x", "?meta.nonce"),
        ("data=perhaps", "?data"),
        ("data=false&fields=title", "?fields"),
        ("author=%00", "?author"),
    ],
)
async def test_an_invalid_query_is_400_and_names_the_parameter(api, query, names):
    assert problem(await api.get(f"/note?{query}"), 400, "invalid-query")["errors"][0]["pointer"] == names


async def test_the_error_explains_a_plus_that_became_a_space(api):
    answer = await api.get("/note?meta.created_time[gte]=2026-01-01T00:00:00+01:00")
    assert "%2B" in answer.json()["detail"]


async def test_the_error_for_an_unindexed_field_lists_the_indexed_fields(api):
    assert "author, inner.code, slug, tags, title, views" in (await api.get("/note?sort=inner")).json()["detail"]


async def test_a_filter_by_is_deleted_finds_deleted_resources(api, note):
    await api.post("/note", json={"title": "Moon"})
    await api.delete(note[0])
    for query, titles in [
        ("meta.is_deleted=true", {"Sun"}),
        ("meta.is_deleted=false", {"Moon"}),
        ("meta.is_deleted[in]=true,false", {"Sun", "Moon"}),
        ("meta.is_deleted=true&include_deleted=false", set()),
        ("", {"Moon"}),
    ]:
        found = (await api.get(f"/note?{query}")).json()["items"]
        assert {item["data"]["title"] for item in found} == titles
        assert (await api.get(f"/note/count?{query}")).json() == {"count": len(titles)}
