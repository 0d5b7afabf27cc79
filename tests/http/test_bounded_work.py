"""The work that one request may cause. Each limit has an error that names it, and work grows no faster than a request.

Work is counted in calls of functions, of Python and of C, so that no test depends on the machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from app.autocrud import AutoCRUD
from app.autocrud.errors import InvalidData
from app.autocrud.http import json_patch, patching
from app.autocrud.http.conditions import MAX_ETAGS, InvalidCondition, etags
from app.autocrud.http.json_diff import diff
from app.autocrud.http.json_patch import MAX_OPERATIONS
from app.autocrud.query import MAX_NEEDLE
from app.autocrud.resource_manager import basic
from app.autocrud.resource_manager.model import codec, json_shape
from app.autocrud.resource_manager.model.json_shape import MAX_CONTAINERS, MAX_NAMES, MAX_VALUES
from app.autocrud.resource_manager.runtime import threads
from app.autocrud.resource_manager.storage import disk_pair
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
)

from .bag import Bag, bag_client
from .conftest import client_of

PATCH = {"content-type": "application/json-patch+json"}
ETAG = '"1-0123456789abcdef"'


def calls(work) -> int:
    """Return how many functions are called by this work."""
    count = 0

    def counted(_frame, event, _arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def front(count: int) -> list[dict]:
    return [{"op": "add", "path": "/x/0", "value": number} for number in range(count)]


def grows_like_its_size(work_of) -> bool:
    """Return whether a request of twice the size causes at most a little more than twice the work."""
    return calls(work_of(2)) < 2.6 * calls(work_of(1))


def test_adding_in_front_costs_the_same_at_each_length(monkeypatch):
    monkeypatch.setattr(json_patch, "LONG", 50)

    def work_of(scale: int):
        return lambda: json_patch.json_patch(front(2000 * scale))({"x": []})

    assert grows_like_its_size(work_of)
    moved = []
    insert = json_patch.ChunkedList.insert
    monkeypatch.setattr(
        json_patch.ChunkedList,
        "insert",
        lambda row, at, value: (insert(row, at, value), moved.append(max(map(len, row._chunks)))),
    )
    result = json_patch.json_patch(front(4000))({"x": []})
    assert result == {"x": list(range(3999, -1, -1))}
    assert max(moved) <= 100  # items that one step of memory may move


def test_differences_of_shuffled_lists_are_found_in_linear_work():
    def work_of(scale: int):
        items = [f"item {number}" for number in range(3000 * scale)]
        shuffled = random.Random(1).sample(items, len(items))
        old, new = json.dumps({"x": items}).encode(), json.dumps({"x": shuffled}).encode()
        return lambda: diff(old, new)

    assert grows_like_its_size(work_of)


def test_a_difference_is_no_larger_than_a_patch_may_be():
    items = [f"item {number}" for number in range(24_000)]
    old = json.dumps({"x": items, "y": 1}).encode()
    new = json.dumps({"x": random.Random(2).sample(items, len(items)), "y": 1}).encode()
    assert diff(old, new) == [{"op": "replace", "path": "/x", "value": json.loads(new)["x"]}]
    many = {f"k{number}": 0 for number in range(MAX_OPERATIONS + 1)}
    operations = diff(json.dumps(many).encode(), json.dumps(dict.fromkeys(many, 1)).encode())
    assert [operation["path"] for operation in operations] == [""]


def test_etags_are_read_once():
    def work_of(scale: int):
        header = ", ".join([ETAG] * (MAX_ETAGS // 2 * scale))
        return lambda: etags(header)

    assert grows_like_its_size(work_of)
    with pytest.raises(InvalidCondition, match="at most 100 ETags"):
        etags(",".join([ETAG] * 30_000))
    one = etags(f'  {ETAG} ,\tW/"x"'.strip())
    assert one == [(False, "1-0123456789abcdef"), (True, "x")]


@pytest.fixture
async def api():
    async with bag_client() as client:
        yield client


def lists(count: int) -> bytes:
    return b'{"x":[' + b"[]," * (count - 3) + b"[]]}"


def operations(count: int) -> bytes:
    return json.dumps(front(count)).encode()


def doubling(count: int) -> bytes:
    copies = [{"op": "copy", "from": "/x", "path": "/x/-"} for _ in range(count)]
    return json.dumps(copies).encode()


REFUSED = {
    "operations of a patch": ("PATCH", "/bag/b", operations(100_000), PATCH, 422, "expected at most 10000"),
    "what a patch makes, in lists": ("PATCH", "/bag/b", doubling(22), PATCH, 422, "more than 100000 objects and lists"),
    "what a patch makes, in bytes": (
        "PATCH",
        "/bag/b",
        json.dumps(
            [
                {"op": "add", "path": "/x/-", "value": "y" * 500_000},
                *({"op": "copy", "from": "/x/1", "path": "/x/-"} for _ in range(30)),
            ]
        ).encode(),
        PATCH,
        422,
        "copies more than 6291456 bytes",
    ),
    "what patches of a batch make": (
        "POST",
        "/bag/batch",
        json.dumps(
            {
                "operations": [
                    {"op": "create", "id": "new", "data": {"x": ["y" * 2_000_000]}},
                    *(
                        {"op": "patch", "id": "new", "patch": [{"op": "copy", "from": "/x/0", "path": f"/x/{at}"}]}
                        for at in range(1, 9)
                    ),
                ]
            }
        ).encode(),
        {},
        413,
        "bytes",
    ),
    "operations of a batch of patches": (
        "POST",
        "/bag/batch",
        json.dumps({"operations": [{"op": "patch", "id": "b", "patch": front(2000)} for _ in range(6)]}).encode(),
        {},
        422,
        "at most 10000 operations of JSON Patch in a batch, got 12000",
    ),
    "depth of JSON": ("POST", "/bag", b'{"x":' + b"[" * 300 + b"]" * 300 + b"}", {}, 422, "nested 301 deep"),
    "depth of a patch": ("PATCH", "/bag/b", b'{"x":' + b"[" * 300 + b"]" * 300 + b"}", {}, 422, "nested 301 deep"),
    "depth of a batch": ("POST", "/bag/batch", b"[" * 100_000, {}, 422, "nested 100000 deep"),
    "objects and lists": ("POST", "/bag", lists(MAX_CONTAINERS + 1), {}, 422, "has 100001 objects and lists"),
    "names": ("POST", "/bag", b'{"":0' + b',"a":1' * MAX_NAMES + b"}", {}, 422, "has 250001 names"),
    "values": ("POST", "/bag", b'{"x":[' + b"1," * MAX_VALUES + b"1]}", {}, 422, "has 1000003 values"),
    "strings": ("POST", "/bag", b'{"x":[' + b'"",' * 1_999_990 + b'""]}', {}, 422, "more than 1250000 strings"),
    "digits": (
        "POST",
        "/bag",
        b'{"x":[' + b"1" * 401 + b" " * 70_000 + b"]}",
        {},
        422,
        "a number of more than 400 digits",
    ),
    "parts of a pointer": (
        "PATCH",
        "/bag/b",
        json.dumps([{"op": "test", "path": "/x" * 300_000, "value": 1}]).encode(),
        PATCH,
        422,
        "a path of 300000 parts; expected at most 201",
    ),
    "ETags of If-Match": ("DELETE", "/bag/b", b"", {"if-match": ",".join([ETAG] * 25_000)}, 400, "at most 100 ETags"),
    "ETags of If-None-Match": ("GET", "/bag/b", b"", {"if-none-match": ",".join(['"1"'] * 9000)}, 400, "at most 100"),
    "the query string": ("GET", "/bag?author=" + "x" * 33_000, b"", {}, 414, "has 33007 bytes; expected at most 32768"),
    "parameters": (
        "GET",
        "/bag?" + "&".join(["a=b"] * 1001),
        b"",
        {},
        400,
        "has 1001 parameters; expected at most 1000",
    ),
    "what contains looks for": (
        "GET",
        "/bag?author[contains]=" + "x" * 1001,
        b"",
        {},
        400,
        "at most 1000 bytes to look for",
    ),
    "values of a condition": ("GET", "/bag?author[in]=" + "x," * 1001, b"", {}, 400, "expected at most 1000 values"),
    "sort keys": ("GET", "/bag?sort=" + ",".join(["author"] * 9), b"", {}, 400, "at most 8 keys, got 9"),
    "fields": (
        "GET",
        "/bag?fields=" + ",".join(f"x{at}" for at in range(101)),
        b"",
        {},
        400,
        "at most 100 fields, got 101",
    ),
    "what switch takes": (
        "POST",
        "/bag/b/switch",
        b'{"revision": 1, "x": ' + b"[" * 2000,
        {},
        413,
        "at most 1000 bytes",
    ),
    "an encoded body": (
        "POST",
        "/bag",
        b"\x1f\x8b",
        {"content-encoding": "gzip"},
        415,
        "without Content-Encoding, got 'gzip'",
    ),
    "a body": ("POST", "/bag", b" " * (6 * 1024 * 1024 + 1), {}, 413, "expected at most 6291456 bytes"),
}


@pytest.mark.parametrize("limit", REFUSED)
async def test_each_limit_is_told(api, limit):
    method, path, body, headers, status, says = REFUSED[limit]
    headers = {"content-type": "application/json", **headers}
    before = (await api.get("/bag/b")).headers["etag"]
    answer = await api.request(method, httpx.URL("http://test", raw_path=path.encode()), content=body, headers=headers)
    problem = answer.json()
    assert (answer.status_code, problem["status"]) == (status, status), problem
    assert says in problem["detail"]
    assert len(answer.content) < 5000
    assert (await api.get("/bag/b")).headers["etag"] == before  # nothing is half done
    assert (await api.get("/bag/count")).json() == {"count": 1}


ACCEPTED = {
    "operations of a patch": ("PATCH", "/bag/b", operations(MAX_OPERATIONS), PATCH, 200),
    "depth of JSON": ("POST", "/bag", b'{"x":' + b"[" * 199 + b"]" * 199 + b"}", {}, 201),
    "objects and lists": ("POST", "/bag", lists(MAX_CONTAINERS), {}, 201),
    "digits in a text": ("POST", "/bag", json.dumps({"x": ["1" * 100_000]}).encode(), {}, 201),
    "digits of a number": ("POST", "/bag", b'{"x":[' + b"1" * 400 + b" " * 70_000 + b"]}", {}, 201),
    "brackets and commas in a text": ("POST", "/bag", json.dumps({"x": ["[{,:" * 500_000]}).encode(), {}, 201),
    "what contains looks for": ("GET", "/bag?author[contains]=" + "x" * MAX_NEEDLE, b"", {}, 200),
    "the same field many times": ("GET", "/bag?fields=" + ",".join(["x"] * 1000), b"", {}, 200),
    "an encoding that is none": ("POST", "/bag", b"{}", {"content-encoding": "identity"}, 201),
}


@pytest.mark.parametrize("limit", ACCEPTED)
async def test_a_value_at_a_limit_is_accepted(api, limit):
    method, path, body, headers, status = ACCEPTED[limit]
    headers = {"content-type": "application/json", **headers}
    answer = await api.request(method, httpx.URL("http://test", raw_path=path.encode()), content=body, headers=headers)
    assert answer.status_code == status, answer.text[:300]


async def test_a_patch_makes_no_data_that_no_body_may_be(api):
    grow = [{"op": "add", "path": "/x/-", "value": "y" * 3_000_000}]
    assert (await api.patch("/bag/b", json=grow, headers=PATCH)).status_code == 200
    assert (await api.patch("/bag/b", json=grow, headers=PATCH)).status_code == 200
    refused = await api.patch("/bag/b", json=grow, headers=PATCH)
    assert (refused.status_code, refused.json()["type"]) == (413, "urn:crudstack:data-too-large")


async def test_other_parts_of_data_above_a_limit_can_be_changed(api, monkeypatch):
    monkeypatch.setattr(json_shape, "MAX_DEPTH", 1000)
    deep = b'{"x":' + b"[" * 300 + b"]" * 300 + b"}"
    made = await api.post("/bag", content=deep, headers={"content-type": "application/json"})
    assert made.status_code == 201
    monkeypatch.setattr(json_shape, "MAX_DEPTH", 200)
    path = made.headers["location"]
    assert (await api.get(path)).json()["data"]["x"]
    change = [{"op": "add", "path": "/author", "value": "a"}]
    assert (await api.patch(path, json=change, headers=PATCH)).status_code == 200
    assert (await api.patch(path, json={"author": "b"})).status_code == 200
    assert (await api.post(f"{path}/switch", json={"revision": 1})).status_code == 200
    told = await api.get(f"{path}/diff?from=1&to=2")
    assert (told.status_code, "nested 301 deep" in told.json()["detail"]) == (400, True)


async def test_large_work_waits_in_one_lane_and_no_thread_is_busy_afterwards(api, monkeypatch):
    seen = []
    parse = codec.Codec.parse

    def noting(self, body):
        seen.append((len(body) >= threads.HEAVY_BYTES, threading.current_thread().name))
        return parse(self, body)

    monkeypatch.setattr(codec.Codec, "parse", noting)
    large = json.dumps({"x": ["y" * 100] * 2000}).encode()
    headers = {"content-type": "application/json"}
    answers = await asyncio.gather(
        *(api.post("/bag", content=large, headers=headers) for _ in range(5)), api.post("/bag", json={})
    )
    assert {answer.status_code for answer in answers} == {201}
    assert {name.rpartition("_")[0] for is_large, name in seen if is_large} == {"crudstack-heavy"}
    assert {name for is_large, name in seen if not is_large} == {threading.current_thread().name}
    assert threads.LANE.executor._work_queue.empty()
    assert len([one for one in threading.enumerate() if one.name.startswith("crudstack-heavy")]) == 1
    tried = await api.patch("/bag/b", content=doubling(22), headers=PATCH)
    assert tried.status_code == 422
    done = threading.Event()
    threads.LANE.executor.submit(done.set)
    assert done.wait(30)


@pytest.mark.parametrize("written", ['"copy"', '"c\\u006fpy"'])
def test_a_patch_that_may_make_much_counts_as_much(written):
    body = b"[" + b",".join([b'{"op":%b,"from":"/x","path":"/x/-"}' % written.encode()] * 22) + b"]"
    assert patching.patch_from_body(body, patching.JSON_PATCH).size >= threads.HEAVY_BYTES
    assert patching.patch_from_body(body, patching.MERGE_PATCH).size == len(body)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(st.sampled_from('"\\[]{},:x\u00e9\n'), max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.text(st.sampled_from('"\\[]{},:x'), max_size=4), inner, max_size=4),
    ),
    max_leaves=30,
)


@settings(max_examples=1000, deadline=None)
@given(JSON, st.booleans(), st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")]))
def test_the_shape_of_a_text_is_that_of_what_it_holds(tree, ascii_only, separators):
    body = json.dumps(tree, ensure_ascii=ascii_only, separators=separators).encode()
    shape = json_shape.shape(body)
    values, names, containers, strings, depth, empty = walked(tree)
    assert (shape.names, shape.containers, shape.depth) == (names, containers, depth)
    assert shape.values == values + empty
    assert json_shape.strings(body) == strings
    assert codec.parse_json(body) == tree


def walked(tree) -> tuple[int, int, int, int, int, int]:
    """Values, names, containers, strings, depth, and empty containers."""
    if not isinstance(tree, dict | list):
        return 1, 0, 0, int(isinstance(tree, str)), 0, 0
    inner = [walked(one) for one in (tree.values() if isinstance(tree, dict) else tree)]
    own = len(tree) if isinstance(tree, dict) else 0
    sums = [sum(column) for column in zip(*inner, strict=True)] if inner else [0] * 6
    depth = 1 + max((one[4] for one in inner), default=0)
    return sums[0] + 1, sums[1] + own, sums[2] + 1, sums[3] + own, depth, sums[5] + (not inner)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "\\u0061", "\\\\", '\\"']), JSON), max_size=5))
def test_names_that_stand_twice_are_found(pairs):
    body = ("{" + ",".join(f'"{name}":{json.dumps(value)}' for name, value in pairs) + "}").encode()
    names = [json.loads(f'"{name}"') for name, _ in pairs]
    if len(set(names)) == len(names):
        assert codec.parse_json(body) == json.loads(body)
        return
    with pytest.raises(InvalidData, match="stands twice"):
        codec.parse_json(body)


async def test_a_batch_holds_and_tells_a_bounded_amount(api):
    """Each operation on a large resource has it in memory, and would have it in the answer."""
    data = {"x": ["y" * 3_000_000]}
    assert (await api.put("/bag/large", json=data, headers={"if-none-match": "*"})).status_code == 201
    publish = {"op": "publish", "id": "large"}
    told = await api.post("/bag/batch", json={"operations": [publish]})
    assert told.json()["results"][0]["data"]["x"] == data["x"]
    briefly = await api.post("/bag/batch", json={"operations": [publish] * 2})
    assert (briefly.status_code, [set(result) for result in briefly.json()["results"]]) == (200, [{"meta"}] * 2)
    refused = await api.post("/bag/batch", json={"operations": [publish] * 20})
    assert (refused.status_code, refused.json()["type"]) == (413, "urn:crudstack:data-too-large")
    assert refused.json()["errors"][0]["pointer"].startswith("/operations/16")


@pytest.mark.parametrize("factory", [lambda _: MemoryStorageFactory(), DiskStorageFactory, MemoryDiskStorageFactory])
async def test_a_list_holds_no_more_than_a_page_needs(factory, tmp_path, monkeypatch):
    """The pages go on where bodies were too large to be read, and all that is there is in them once."""
    monkeypatch.setattr(basic, "MAX_READ", 2_000_000)
    monkeypatch.setattr(disk_pair, "MAX_READ", 2_000_000)
    monkeypatch.setattr(basic, "READ_AT_ONCE", 2)
    crud = AutoCRUD(storage_factory=factory(tmp_path))
    crud.add_model(Bag, indexed_fields=["author"])
    app = FastAPI()
    crud.apply(app)
    async with client_of(app) as client:
        for at in range(9):
            body = {"author": f"a{at}", "x": ["y" * (900_000 if at % 3 else 10)]}
            assert (await client.put(f"/bag/{at}", json=body, headers={"if-none-match": "*"})).status_code == 201
        for more in ("", "&fields=author,x"):
            found, pages = await every_item(client, f"/bag?sort=-author&limit=200{more}")
            assert [item["data"]["author"] for item in found] == [f"a{at}" for at in range(8, -1, -1)]
            assert pages > 1
    await crud.close()


async def every_item(client, path: str) -> tuple[list[dict[str, Any]], int]:
    """All items of a list, and how many pages they took."""
    found: list[dict[str, Any]] = []
    cursor, pages = "", 0
    while cursor is not None:
        answer = await client.get(f"{path}{cursor and '&cursor=' + cursor}")
        assert answer.status_code == 200, answer.text
        page = answer.json()
        found += page["items"]
        cursor, pages = page["next_cursor"], pages + 1
    return found, pages
