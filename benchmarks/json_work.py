"""How many operations each work on JSON does in a second of one CPU: `python -m benchmarks.json_work`.

`deadline.OPERATIONS_PER_S` must be less than the least of them, which is written last. Operations are counted as where
work is refused that might not end in time; the texts are those that cost most for their size.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from app.autocrud.errors import CrudError
from app.autocrud.http import batches, patching
from app.autocrud.http.answers import projected
from app.autocrud.http.json_diff import diff
from app.autocrud.resource_manager.model.codec import Codec, canonical_json
from app.autocrud.resource_manager.model.json_shape import misshapen
from app.autocrud.resource_manager.runtime.deadline import OPERATIONS_PER_S, operations


class Inner(Struct):
    name: str = ""


class Bag(Struct):
    x: Any = None
    author: str = ""
    names: dict[str, Any] = {}
    texts: list[str] = []
    parts: list[Inner] = []
    keys: list[str] = []


CODEC = Codec(Bag, ["author", "keys"])
SMALL = b'{"author":"a"}'

TEXTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "one text": lambda size: {"x": "y" * size},
    "escapes": lambda size: {"x": '\\"' * (size // 4)},
    "no ASCII": lambda size: {"x": "\u00e9" * (size // 2)},
    "commas in a text": lambda size: {"x": ",{[:" * (size // 4)},
    "names": lambda size: {"names": {f"k{at:x}": 1 for at in range(size // 24)}},
    "objects": lambda size: {"names": {f"k{at:x}": {"a": 1} for at in range(size // 60)}},
    "parts": lambda size: {"parts": [{"name": "a"} for _ in range(size // 60)]},
    "lists": lambda size: {"x": [["a", "b", "c", "d"] for _ in range(size // 60)]},
    "empty lists": lambda size: {"x": [[]] * (size // 60)},
    "empty texts": lambda size: {"texts": [""] * (size // 6)},
    "short texts": lambda size: {"texts": [f"a{at}" for at in range(size // 10)]},
    "indexed texts": lambda size: {"keys": [f"a{at}" for at in range(min(10_000, size // 10))]},
    "ones": lambda size: {"x": [1] * (size // 6)},
    "floats": lambda size: {"x": [1.5 + at / 7 for at in range(size // 20)]},
    "nested": lambda size: {"x": [json.loads("[" * 150 + "]" * 150) for _ in range(size // 9_000)]},
}
"""Texts of about so many bytes, within the limits of JSON for up to 6 MB."""


def text_of(name: str, size: int) -> bytes:
    return json.dumps(TEXTS[name](size), separators=(",", ":"), ensure_ascii=False).encode()


def patch_of(text: bytes, media: str) -> Callable[[], Any]:
    """Return the work of a patch with this text on data that equal it."""
    body = text if media == patching.MERGE_PATCH else b'[{"op":"add","path":"/x","value":%b}]' % text
    given = patching.patch_from_body(body, media)

    def work() -> None:
        after = canonical_json(given.apply(msgspec.json.decode(text)))
        misshapen(after)
        misshapen(text)
        CODEC.parse(after)

    return work


def batch(text: bytes) -> bytes:
    return b'{"operations":[{"op":"create","data":%b}]}' % text


def front(text: bytes) -> bytes:
    """A JSON Patch that puts something in front of each list of the text."""
    name = next(iter(json.loads(text)))
    return b"[%b]" % b",".join([b'{"op":"add","path":"/%b/0","value":0}' % name.encode()] * 1000)


def put_in_front(text: bytes) -> Callable[[], Any]:
    given = patching.patch_from_body(front(text), patching.JSON_PATCH)

    def work() -> None:
        with contextlib.suppress(CrudError):  # some have no list
            canonical_json(given.apply(msgspec.json.decode(text)))

    return work


WORK: dict[str, tuple[Callable[[bytes], Callable[[], Any]], Callable[[bytes], int]]] = {
    "shape": (lambda text: lambda: misshapen(text), operations),
    "parse": (lambda text: lambda: CODEC.parse(text), operations),
    "index": (lambda text: lambda: CODEC.index(CODEC.decode(text, "json")), operations),
    "fields": (lambda text: lambda: projected(text, ["author"]), operations),
    "diff": (lambda text: lambda: diff(SMALL, text), operations),
    "diff of two": (
        lambda text: lambda: diff(text, text[:-1] + b',"author":"b"}'),
        lambda text: operations(text, text),
    ),
    "merge patch": (
        lambda text: patch_of(text, patching.MERGE_PATCH),
        lambda text: operations(text) + patching.patch_from_body(text, patching.MERGE_PATCH).work,
    ),
    "JSON Patch": (
        lambda text: patch_of(text, patching.JSON_PATCH),
        lambda text: operations(text) + patching.patch_from_body(text, patching.JSON_PATCH).work,
    ),
    "1,000 times in front": (
        put_in_front,
        lambda text: operations(text) + patching.patch_from_body(front(text), patching.JSON_PATCH).work,
    ),
    "batch": (
        lambda text: lambda: batches.parse(batch(text), CODEC, str, 6 << 20, require_if_match=False),
        lambda text: operations(batch(text)),
    ),
}
"""Each work on a text, and the operations by which it is bounded."""


def main() -> None:
    slowest = (float("inf"), "")
    for name in TEXTS:
        text = text_of(name, 5_500_000)
        for work_name, (work_on, bound) in WORK.items():
            work, count = work_on(text), bound(text)
            gc.collect()
            began = time.process_time()
            work()
            taken = time.process_time() - began
            rate = count / taken
            slowest = min(slowest, (rate, f"{work_name} of {name}"))
            print(f"{name:18} {work_name:22} {count:9,d} operations {taken:6.3f} s {rate / 1e6:8.2f} M/s", flush=True)
    print(f"slowest: {slowest[1]}, {slowest[0] / 1e6:.2f} M/s; expected more than {OPERATIONS_PER_S / 1e6:.2f}")


if __name__ == "__main__":
    main()
