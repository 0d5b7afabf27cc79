"""References to blobs in data: which models can hold them, where they are found, and which are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Generic, NamedTuple, TypedDict, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from app.autocrud import Blob, ConfigError
from app.autocrud.errors import InvalidData
from app.autocrud.resource_manager.basic import Encoding
from app.autocrud.resource_manager.model.blob import (
    MAX_NAME,
    OCTET_STREAM,
    name_error,
    safe_name,
    safe_type,
    type_error,
)
from app.autocrud.resource_manager.model.blob_references import MAX_BLOBS
from app.autocrud.resource_manager.model.codec import Codec

T = TypeVar("T")


def sha(number: int) -> str:
    return f"{number:064x}"


def ref(number: int, **more) -> dict:
    return {"sha256": sha(number), **more}


class Plain(Struct):
    title: str
    tags: list[str] = []


class Box(Struct, Generic[T]):
    inner: T


class Pair(NamedTuple):
    label: str
    blob: Blob


@dataclasses.dataclass
class Data:
    blob: Blob
    count: int = 0


class Typed(TypedDict):
    text: str
    blob: Blob


class Tagged(Struct, tag="a"):
    blob: Blob


class Other(Struct, tag="b"):
    blobs: list[Blob]


class Listed(Struct, array_like=True, tag="listed"):
    number: int
    blob: Blob


class Captioned(Blob, frozen=True, kw_only=True):
    caption: str
    thumbnail: Blob | None = None


class Everything(Struct, kw_only=True):
    required: Blob
    optional: Blob | None = None
    described: Annotated[Blob, Meta(description="with a description")] | None = None
    many: list[Blob] = []
    several: tuple[Blob, ...] = ()
    exact: tuple[int, Blob] | None = None
    by_name: dict[str, Blob] = {}
    lists_by_name: Mapping[str, list[Blob]] = {}
    either: str | Blob | None = None
    shapes: list[Tagged | Other] = []
    data: Data | None = None
    typed: Typed | None = None
    pair: Pair | None = None
    listed: Listed | None = None
    box: Box[Blob] | None = None
    captioned: Captioned | None = None
    parent: Everything | None = None
    renamed: Blob | None = msgspec.field(default=None, name="a/b~c")
    plain: Plain | None = None


EVERYTHING = {
    "required": ref(1),
    "optional": ref(2),
    "described": ref(3),
    "many": [ref(4), ref(5)],
    "several": [ref(6)],
    "exact": [1, ref(7)],
    "by_name": {"x/y": ref(8)},
    "lists_by_name": {"7": [ref(9)]},
    "either": ref(10),
    "shapes": [{"type": "a", "blob": ref(11)}, {"type": "b", "blobs": [ref(12)]}],
    "data": {"blob": ref(13)},
    "typed": {"text": "t", "blob": ref(14)},
    "pair": ["label", ref(15)],
    "listed": ["listed", 3, ref(16)],
    "box": {"inner": ref(17)},
    "captioned": ref(18, caption="c", thumbnail=ref(19)),
    "parent": {"required": ref(20)},
    "a/b~c": ref(21),
    "plain": {"title": "t"},
}
POINTERS = [
    *("/required", "/optional", "/described", "/many/0", "/many/1", "/several/0", "/exact/1", "/by_name/x~1y"),
    *("/lists_by_name/7/0", "/either", "/shapes/0/blob", "/shapes/1/blobs/0", "/data/blob", "/typed/blob", "/pair/1"),
    *("/listed/2", "/box/inner", "/captioned", "/captioned/thumbnail", "/parent/required", "/a~1b~0c"),
]


def test_references_are_found_in_every_type_in_the_order_of_fields():
    codec = Codec(Everything)
    found = codec.references(codec.parse(json.dumps(EVERYTHING).encode()).data)
    assert [(reference.pointer, reference.blob.sha256) for reference in found] == [
        (pointer, sha(number)) for number, pointer in enumerate(POINTERS, 1)
    ]


def test_sizes_are_set_in_every_type_and_in_both_encodings():
    codec = Codec(Everything)
    given = codec.parse(json.dumps(EVERYTHING).encode())
    sized = codec.with_sizes(given, {sha(number): 1000 + number for number in range(1, 22)})
    assert [reference.blob.size for reference in codec.references(sized.data)] == [1000 + at for at in range(1, 22)]
    for encoding in Encoding:
        stored = codec.decode(codec.encode(sized, encoding), encoding)
        assert [reference.blob.size for reference in codec.references(stored)] == [1000 + at for at in range(1, 22)]
    assert codec.with_sizes(sized, {sha(number): 1000 + number for number in range(1, 22)}) is sized
    assert codec.parse(sized.json).json == sized.json


@pytest.mark.parametrize("model", [Plain, Typed, Data, Everything, Captioned])
def test_a_model_knows_if_it_can_hold_blobs(model):
    assert Codec(model).has_blobs == (model is not Plain)


def test_a_dataclass_and_a_typed_dict_can_be_models():
    for model, body in ((Data, b'{"blob":{"sha256":"%b"}}'), (Typed, b'{"text":"t","blob":{"sha256":"%b"}}')):
        codec = Codec(model)
        (reference,) = codec.references(codec.parse(body % sha(5).encode()).data)
        assert reference == ("/blob", Blob(sha256=sha(5)))


def test_a_set_of_blobs_is_refused():
    class Sets(Struct):
        blobs: Annotated[frozenset[Blob], Meta(description="d")]

    with pytest.raises(ConfigError, match=r"Sets has a set of Blob.*use a list"):
        Codec(Sets)


HASHES = ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 63 + "\n", f"{sha(1)}/0-{'0' * 32}", "../" + "a" * 61]


@pytest.mark.parametrize("sha256", HASHES)
def test_a_hash_that_is_none_is_refused(sha256):
    with pytest.raises(InvalidData) as refused:
        Codec(Everything).parse(json.dumps({"required": ref(1), "many": [ref(2), {"sha256": sha256}]}).encode())
    assert [violation.pointer for violation in refused.value.violations] == ["/many/1/sha256"]


HOSTILE_NAMES = [
    *("a/b", "/etc/passwd", "..", ".", "..\\x", "C:\\x.png", "a\x00b", "a\nb", "a\x7fb", "a\x85b", "a\u2028b"),
    *("cod\u202egnp.exe", "\u200fa", "a\u2066b", "\u061ca", "x" * 256, "\u00e4" * 128, "x" * 10240),
]
NAMES = [
    "",
    "a.png",
    "na\u00efve \u5b57.png",
    "x" * 255,
    "\u00e4" * 127,
    "\U0001f468\u200d\U0001f469.png",
    "..a",
    "a:b",
    '"',
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_name_is_refused_where_it_stands(name):
    body = json.dumps({"required": ref(1), "many": [ref(2), ref(3, name=name)]}).encode()
    with pytest.raises(InvalidData) as refused:
        Codec(Everything).parse(body)
    ((pointer, detail),) = refused.value.violations
    assert pointer == "/many/1/name"
    assert not any(character in detail for character in "\x00\n\x7f\x85\u2028\u202e\u200f\u2066\u061c")


@pytest.mark.parametrize("name", NAMES)
def test_an_ordinary_name_is_accepted(name):
    assert name_error(name) is None
    codec = Codec(Everything)
    given = codec.parse(json.dumps({"required": ref(1, name=name)}).encode())
    assert given.data.required.name == name


@pytest.mark.parametrize(
    "content_type",
    [
        *("", "image", "image/", "/png", "image/png\r\nx: y", "image/png;", "image/png; a", "*/*", "image/*"),
        *("im age/png", "image/" + "x" * 250, 'a/b; c="d', "a/b; c=\u00e4", "a/b, c/d"),
    ],
)
def test_a_content_type_that_is_none_is_refused(content_type):
    assert type_error(content_type) is not None
    with pytest.raises(InvalidData) as refused:
        Codec(Everything).parse(json.dumps({"required": ref(1, content_type=content_type)}).encode())
    assert [violation.pointer for violation in refused.value.violations] == ["/required/content_type"]


@pytest.mark.parametrize(
    "content_type", ["image/png", "text/plain; charset=utf-8", 'a/b; c="d e";f=g', "application/vnd.x+json", "A/B"]
)
def test_a_content_type_is_accepted(content_type):
    assert type_error(content_type) is None


def test_all_violations_are_named():
    body = {"required": ref(1, name="a/b", content_type="x"), "many": [ref(2, name="\n")]}
    with pytest.raises(InvalidData) as refused:
        Codec(Everything).parse(json.dumps(body).encode())
    pointers = [violation.pointer for violation in refused.value.violations]
    assert pointers == ["/required/name", "/required/content_type", "/many/0/name"]


def test_a_resource_refers_to_a_bounded_number_of_different_blobs():
    codec = Codec(Everything)
    most = {"required": ref(0), "many": [ref(number % MAX_BLOBS) for number in range(2 * MAX_BLOBS)]}
    assert len(codec.references(codec.parse(json.dumps(most).encode()).data)) == 2 * MAX_BLOBS + 1
    most["many"][-1] = ref(MAX_BLOBS)
    with pytest.raises(InvalidData, match="at most 500 different files") as refused:
        codec.parse(json.dumps(most).encode())
    assert [violation.pointer for violation in refused.value.violations] == [f"/many/{2 * MAX_BLOBS - 1}"]


@given(st.text(max_size=300))
def test_an_accepted_name_is_short_and_has_no_path(name):
    if name_error(name) is None:
        assert len(name.encode()) <= MAX_NAME
        assert not set(name) & set("/\\\x00\r\n\u202e")
        assert name not in (".", "..")


def test_unknown_fields_of_a_reference_are_refused():
    with pytest.raises(InvalidData) as refused:
        Codec(Everything).parse(json.dumps({"required": ref(1, owner="x")}).encode())
    assert [violation.pointer for violation in refused.value.violations] == ["/required/owner"]


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("", ""),
        ("sun.png", "sun.png"),
        ("..", ""),
        (".", ""),
        ("../../x", "x"),
        ("/etc/passwd", "passwd"),
        ("C:\\x\\y.txt", "y.txt"),
        ("x/", ""),
        ("a/..", ""),
        ("a\r\nSet-Cookie: x=1", "a__Set-Cookie: x=1"),
        ("\0", "_"),
        ("\u202egpj.exe", "_gpj.exe"),
        ("x" * 300 + ".png", "x" * 251 + ".png"),
        ("x" * 10_000, "x" * 255),
        ("\u5b57" * 100, "\u5b57" * 85),
        ("\u5b57" * 100 + ".png", "\u5b57" * 83 + ".png"),
        ("x." + "y" * 300, "x." + "y" * 253),
        ("." + "y" * 300, "." + "y" * 254),
    ],
)
def test_safe_names(name, safe):
    assert safe_name(name) == safe


@given(st.text() | st.text("./\\\u202e\ud800\n\u5b57x", max_size=300))
def test_a_safe_name_breaks_no_rule_and_a_good_name_stays(name):
    assert name_error(safe_name(name)) is None
    if name_error(name) is None:
        assert safe_name(name) == name


@pytest.mark.parametrize(
    "wrong", ["", "x", "text/plain;\r\nx-evil: 1", "image/png; " + "a" * 20_000, "text/plain,text/html"]
)
def test_safe_types(wrong):
    assert safe_type(wrong) == OCTET_STREAM
    assert safe_type("text/plain; charset=utf-8") == "text/plain; charset=utf-8"
