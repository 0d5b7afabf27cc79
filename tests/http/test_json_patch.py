"""JSON Patch gives the same results as another implementation, and a computed patch gives the new document."""

from __future__ import annotations

import copy
import json

import jsonpatch
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.autocrud.errors import InvalidData, PatchConflict
from app.autocrud.http import json_patch
from app.autocrud.http.json_diff import diff
from app.autocrud.http.json_patch import ChunkedList

NAMES = st.sampled_from(["a", "b", "c", "", "~", "/", "0", "é"])
SCALARS = st.one_of(
    st.none(), st.integers(-3, 10**20), st.sampled_from(["", "x", "0", "ü"]), st.sampled_from([0.5, -1.5])
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
OBJECTS = st.dictionaries(NAMES, TREES, max_size=4)
TOKENS = st.one_of(NAMES, st.sampled_from(["0", "1", "2", "5", "-", "00", "01", "-1", "1e0"]))
POINTERS = st.lists(TOKENS, max_size=3).map(
    lambda tokens: "".join(f"/{token.replace('~', '~0').replace('/', '~1')}" for token in tokens)
)
OPERATIONS = st.one_of(
    st.fixed_dictionaries({"op": st.sampled_from(["add", "replace", "test"]), "path": POINTERS, "value": TREES}),
    st.fixed_dictionaries({"op": st.just("remove"), "path": POINTERS}),
    st.fixed_dictionaries({"op": st.sampled_from(["move", "copy"]), "path": POINTERS, "from": POINTERS}),
)
PATCHES = st.lists(OPERATIONS, min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """Treat lists of more than two items as long, so that examples stay small."""
    monkeypatch.setattr(json_patch, "LONG", 2)


def of_jsonpatch(target, operations):
    """Return the result of the other implementation, or None if it refuses the patch."""
    try:
        return jsonpatch.JsonPatch(operations).apply(copy.deepcopy(target))
    except (
        jsonpatch.JsonPatchException,
        jsonpatch.JsonPointerException,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ):
        return None


def of_ours(target, operations):
    try:
        return json_patch.json_patch(operations)(copy.deepcopy(target))
    except (InvalidData, PatchConflict):
        return None


def differs_by_design(operations) -> bool:
    """Return whether a patch uses rules of RFC 6902 that the other implementation does not follow."""
    return any(
        (operation["op"] in ("remove", "move") and operation.get("from", operation["path"]) == "")  # the whole data
        or (operation["op"] == "move" and operation["path"].startswith(operation["from"] + "/"))  # into itself
        or any(token in ("-1", "00", "01", "1e0") for token in operation["path"].split("/"))  # no index
        or any(token in ("-1", "00", "01", "1e0", "-") for token in operation.get("from", "").split("/"))
        or (operation["op"] != "add" and operation["path"].endswith("/-"))
        for operation in operations
    )


@settings(max_examples=1500, deadline=None)
@given(OBJECTS, PATCHES)
def test_a_patch_gives_the_same_result_as_another_implementation(target, operations):
    ours = of_ours(target, operations)
    if differs_by_design(operations):
        return
    theirs = of_jsonpatch(target, operations)
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)


@settings(max_examples=500, deadline=None)
@given(OBJECTS, PATCHES)
def test_a_patch_can_be_applied_again(target, operations):
    before = json.dumps(operations)
    assert of_ours(target, operations) == of_ours(target, operations)
    assert json.dumps(operations) == before
    try:
        apply = json_patch.json_patch(operations)
        first = apply(copy.deepcopy(target))
    except (InvalidData, PatchConflict):
        return
    said = json.dumps(first)
    assert json.dumps(apply(copy.deepcopy(target))) == said


def test_a_patch_adds_copies_of_its_values():
    value: list = []
    for operation in ({"op": "add", "path": "/a", "value": value}, {"op": "replace", "path": "/b", "value": value}):
        at = operation["path"]
        apply = json_patch.json_patch([operation, {"op": "add", "path": f"{at}/-", "value": 1}])
        assert [apply({"b": 0})[at[1:]] for _ in range(2)] == [[1], [1]]
    assert value == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(), max_size=12),
    st.lists(st.tuples(st.sampled_from(["insert", "pop", "set"]), st.integers(0, 40)), max_size=60),
)
def test_a_chunked_list_behaves_like_a_list(items, steps):
    row, plain = ChunkedList(list(items)), list(items)
    for number, (step, at) in enumerate(steps):
        if step == "insert":
            row.insert(at % (len(plain) + 1), number)
            plain.insert(at % (len(plain) + 1), number)
        elif plain and step == "pop":
            assert row.pop(at % len(plain)) == plain.pop(at % len(plain))
        elif plain:
            row[at % len(plain)] = plain[at % len(plain)] = number
        assert (row.plain(), list(row), len(row)) == (plain, plain, len(plain))
        assert [row[index] for index in range(len(plain))] == plain
        assert all(0 < len(piece) <= 2 * json_patch.LONG for piece in row._chunks) or not plain


@settings(max_examples=1500, deadline=None)
@given(OBJECTS, OBJECTS)
def test_the_computed_patch_turns_one_document_into_the_other(old, new):
    check_difference(old, new)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40), st.data())
def test_the_computed_patch_of_lists(old, data):
    """Items are moved, repeated, removed and added, and one field of an object changes."""
    new = data.draw(st.permutations(old)) if data.draw(st.booleans()) else list(old)
    for _ in range(data.draw(st.integers(0, 5))):
        at = data.draw(st.integers(0, len(new)))
        new[at : at + data.draw(st.integers(0, 3))] = data.draw(st.lists(st.integers(0, 30), max_size=3))
    check_difference({"x": old}, {"x": new})
    check_difference({"x": [{"n": item} for item in old]}, {"x": [{"n": item, "m": [item]} for item in new]})


def check_difference(old, new) -> None:
    operations = diff(json.dumps(old).encode(), json.dumps(new).encode())
    for apply in (of_ours, of_jsonpatch):
        assert json.dumps(apply(old, operations), sort_keys=True) == json.dumps(new, sort_keys=True), operations
    assert bool(operations) is (json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True))


def test_the_computed_patch_leaves_out_unchanged_values():
    old = {"list": [{"id": number, "text": "t" * 50} for number in range(1000)], "other": {"a": 1}}
    new = copy.deepcopy(old)
    new["list"][500]["text"] = "u"
    del new["list"][10]
    new["list"].insert(700, {"id": -1})
    assert diff(json.dumps(old).encode(), json.dumps(new).encode()) == [
        {"op": "remove", "path": "/list/10"},
        {"op": "replace", "path": "/list/499/text", "value": "u"},
        {"op": "add", "path": "/list/700", "value": {"id": -1}},
    ]


def test_true_is_not_one():
    assert diff(b'{"a":true}', b'{"a":1}') == [{"op": "replace", "path": "/a", "value": 1}]
    with pytest.raises(PatchConflict):
        json_patch.json_patch([{"op": "test", "path": "/a", "value": 1}])({"a": True})
    json_patch.json_patch([{"op": "test", "path": "/a", "value": 1.0}])({"a": 1})


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ({"op": "fly", "path": ""}, 'the op "fly"; expected one of add, remove, replace, move, copy, test'),
        ({"op": ["add"], "path": ""}, 'the op ["add"]'),
        ({"path": ""}, "the op null"),
        ({"op": "add", "path": "a", "value": 1}, 'the path "a"; expected a JSON Pointer'),
        ({"op": "add", "path": "/~2", "value": 1}, "expected a JSON Pointer"),
        ({"op": "add", "path": 1, "value": 1}, "the path 1"),
        ({"op": "add", "path": "/a"}, "is add and has no value"),
        ({"op": "copy", "path": "/a"}, "the from null"),
    ],
)
def test_an_invalid_patch_is_refused_with_the_reason(operation, says):
    with pytest.raises(InvalidData) as caught:
        json_patch.json_patch([operation])
    assert says in caught.value.detail
    assert "operation 0 of the patch" in caught.value.detail


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ({"op": "remove", "path": ""}, "the whole data cannot be taken away"),
        ({"op": "remove", "path": "/b"}, "there is nothing at '/b'"),
        ({"op": "add", "path": "/a/3", "value": 0}, "the list at '/a/3' has 1 items"),
        ({"op": "add", "path": "/a/01", "value": 0}, "'01' in '/a/01' is no index of a list"),
        ({"op": "replace", "path": "/a/-", "value": 0}, "there is nothing at '/a/-'"),
        ({"op": "move", "from": "/a", "path": "/a/0"}, "'/a' cannot be moved into itself"),
        ({"op": "add", "path": "/a/0/x", "value": 0}, "there is nothing at '/a/0/x'"),
    ],
)
def test_a_patch_that_does_not_apply_is_refused_with_the_reason(operation, says):
    with pytest.raises(PatchConflict) as caught:
        json_patch.json_patch([operation])({"a": ["x"]})
    assert says in caught.value.detail
