"""Applies JSON Patches (RFC 6902) at a bounded cost, which the sizes of the patch and the document limit.

- P1 *Operations are counted before they are applied.* Each operation walks along its pointer. The cost of a step in a
  list does not depend on the length of the list (see ChunkedList).
- P2 *The output is counted while it is produced.* A `copy` can double the document, so the bytes, objects and lists
  that copies produce are counted. A `test` looks at no more values than the patch itself has.
- P3 *A patch can be applied again.* The document gets copies of the values of the patch, never the values themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from ..errors import InvalidData, PatchConflict, Violation
from ..resource_manager.model.json_shape import MAX_CONTAINERS, MAX_DEPTH, containers
from .problems import shortened

MAX_OPERATIONS = 10_000
"""The largest number of operations in the patches of one request."""
MAX_MADE = 6 * 1024 * 1024
"""Bytes of JSON that the `copy` operations of one patch may make."""
MAX_MADE_CONTAINERS = MAX_CONTAINERS
"""Objects and lists that the copies of one patch may make: small ones take more memory than their text."""
MAX_QUOTED = 200
"""Characters of a value in an error."""
LONG = 4_000
"""The number of items up to which a list is not split: inserting into it moves little memory."""

_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")
_ESCAPE = re.compile(r"~(?![01])")


class ChunkedList:
    """A long JSON list in chunks, so that inserting an item does not move all other items.

    Inserting or removing an item walks over the chunks, and moves at most 2 * LONG items.
    """

    __slots__ = ("_chunks", "_size")

    def __init__(self, items: list[Any]) -> None:
        self._chunks = [items[at : at + LONG] for at in range(0, len(items), LONG)]
        self._size = len(items)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from chunk

    def __getitem__(self, at: int) -> Any:
        chunk, rest = self._position(at)
        return self._chunks[chunk][rest]

    def __setitem__(self, at: int, value: Any) -> None:
        chunk, rest = self._position(at)
        self._chunks[chunk][rest] = value

    def insert(self, at: int, value: Any) -> None:
        """Insert a value before the index."""
        if not self._chunks:
            self._chunks.append([])
        chunk, rest = self._position(at)
        items = self._chunks[chunk]
        items.insert(rest, value)
        self._size += 1
        if len(items) > 2 * LONG:
            self._chunks[chunk : chunk + 1] = [items[:LONG], items[LONG:]]

    def pop(self, at: int) -> Any:
        """Remove the item at the index, and return it."""
        chunk, rest = self._position(at)
        value = self._chunks[chunk].pop(rest)
        self._size -= 1
        if not self._chunks[chunk]:
            del self._chunks[chunk]
        return value

    def plain(self) -> list[Any]:
        """Return the items as an ordinary list."""
        return [item for chunk in self._chunks for item in chunk]

    def _position(self, at: int) -> tuple[int, int]:
        """Return the chunk of an index, and the index in it. The last chunk has the position after the last item."""
        for number, chunk in enumerate(self._chunks):
            if at < len(chunk):
                return number, at
            at -= len(chunk)
        return len(self._chunks) - 1, at + len(self._chunks[-1])


def _plain(value: Any) -> Any:
    assert isinstance(value, ChunkedList)
    return value.plain()


_encode = msgspec.json.Encoder(order="deterministic", enc_hook=_plain).encode
_decode = msgspec.json.decode


class Operation(NamedTuple):
    """One operation. `path` and `from_` are pointers; `tokens` and `from_tokens` are their parts."""

    op: str
    path: str
    tokens: list[str]
    from_: str = ""
    from_tokens: Sequence[str] = ()
    value: Any = None


def json_patch(given: Any) -> Callable[[Any], Any]:
    """Return a function that applies a patch to a JSON tree, which the function may change.

    Raises InvalidData if the patch is invalid. The function raises PatchConflict if the patch does not apply.
    """
    operations = parse(given)
    return lambda target: _Application(target).run(operations)


def parse(given: Any) -> list[Operation]:
    """Return the operations of a patch. Raises InvalidData if it is invalid."""
    if not isinstance(given, list) or not all(isinstance(operation, dict) for operation in given):
        raise invalid("a JSON Patch is a list of operations")
    if len(given) > MAX_OPERATIONS:
        raise invalid(f"the patch has {len(given)} operations; expected at most {MAX_OPERATIONS}")
    return [_operation(at, operation) for at, operation in enumerate(given)]


def _operation(at: int, given: dict[str, Any]) -> Operation:
    op = given.get("op")
    if not isinstance(op, str) or op not in OPERATIONS:
        raise invalid(
            f"operation {at} of the patch has the op {excerpt(op)}; expected one of {', '.join(OPERATIONS)}",
            f"/{at}/op",
        )
    tokens = _pointer(at, given, "path")
    if op in ("move", "copy"):
        return Operation(op, given["path"], tokens, given.get("from", ""), _pointer(at, given, "from"))
    if op != "remove" and "value" not in given:
        raise invalid(f"operation {at} of the patch is {op} and has no value", f"/{at}/value")
    return Operation(op, given["path"], tokens, value=given.get("value"))


def _pointer(at: int, given: dict[str, Any], name: str) -> list[str]:
    """Return the tokens of a JSON Pointer (RFC 6901)."""
    pointer = given.get(name)
    if not isinstance(pointer, str) or (pointer and not pointer.startswith("/")) or _ESCAPE.search(pointer):
        raise invalid(
            f"operation {at} of the patch has the {name} {excerpt(pointer)}; expected a JSON Pointer like /tags/0,"
            " in which ~ is written ~0, and / inside of a name ~1",
            f"/{at}/{name}",
        )
    if (parts := pointer.count("/")) > MAX_DEPTH + 1:
        raise invalid(
            f"operation {at} of the patch has a {name} of {parts} parts; expected at most {MAX_DEPTH + 1}",
            f"/{at}/{name}",
        )
    tokens = pointer.split("/")[1:]
    return [token.replace("~1", "/").replace("~0", "~") for token in tokens] if "~" in pointer else tokens


class _NoPlace(Exception):
    """A pointer names a location that does not exist or cannot be changed."""


class _Application:
    """One application of a patch. The tree is the only item of a list, so that its root has a container too."""

    def __init__(self, target: Any) -> None:
        self._holder = [target]
        self._left, self._containers_left = MAX_MADE, MAX_MADE_CONTAINERS
        self._has_rows = False

    def run(self, operations: Sequence[Operation]) -> Any:
        for at, operation in enumerate(operations):
            try:
                getattr(self, f"_{operation.op}")(operation)
            except _NoPlace as error:
                said = shortened(f"operation {at} ({operation.op}): {error}")
                raise PatchConflict(f"the patch does not apply: {said}", (Violation(f"/{at}", said),)) from None
        (result,) = self._holder
        return msgspec.to_builtins(result, enc_hook=_plain) if self._has_rows else result

    def _add(self, operation: Operation) -> None:
        self._put(operation.tokens, operation.path, _copied(operation.value))

    def _remove(self, operation: Operation) -> None:
        self._take(operation.tokens, operation.path)

    def _replace(self, operation: Operation) -> None:
        container, key = self._position(operation.tokens, operation.path)
        _found(container, key, operation.path)
        container[key] = _copied(operation.value)

    def _move(self, operation: Operation) -> None:
        source, target = operation.from_tokens, operation.tokens
        if list(target[: len(source)]) == list(source):
            if len(target) == len(source):
                _found(*self._position(source, operation.from_), operation.from_)
                return
            raise _NoPlace(f"{_shown(operation.from_)} cannot be moved into itself")
        self._put(target, operation.path, self._take(source, operation.from_))

    def _copy(self, operation: Operation) -> None:
        encoded = _encode(_found(*self._position(operation.from_tokens, operation.from_), operation.from_))
        self._left -= len(encoded)
        if self._left < 0:
            raise invalid(f"the patch copies more than {MAX_MADE} bytes")
        opened = encoded.count(b"[") + encoded.count(b"{")  # brackets in strings are counted too
        self._containers_left -= opened if opened <= self._containers_left else containers(encoded)
        if self._containers_left < 0:
            raise invalid(f"the patch copies more than {MAX_MADE_CONTAINERS} objects and lists")
        self._put(operation.tokens, operation.path, _decode(encoded))

    def _test(self, operation: Operation) -> None:
        path = operation.path
        try:
            found = _found(*self._position(operation.tokens, path), path)
        except _NoPlace:
            said = f"there is nothing at {_shown(path)}"
        else:
            if _same(found, operation.value):
                return
            said = f"the value at {_shown(path)} is {excerpt(found)}"
        said += f"; the test expects {excerpt(operation.value)}"
        raise PatchConflict(f"the patch does not apply: {said}", (Violation("", said),))

    def _position(self, tokens: Sequence[str], path: str) -> tuple[Any, Any]:
        """Return the container that a pointer ends in, and the key or index, at which there may be no value yet."""
        container: Any = self._holder
        key: Any = 0
        for token in tokens:
            container = _found(container, key, path)
            key = _key(container, token, path)
        return container, key

    def _put(self, tokens: Sequence[str], path: str, value: Any) -> None:
        container, key = self._position(tokens, path)
        if container is self._holder or isinstance(container, dict):
            container[key] = value
        elif key > len(container):
            raise _NoPlace(f"the list at {_shown(path)} has {len(container)} items")
        else:
            self._easily_moved(container, tokens, path).insert(key, value)

    def _take(self, tokens: Sequence[str], path: str) -> Any:
        container, key = self._position(tokens, path)
        if container is self._holder:
            raise _NoPlace("the whole data cannot be taken away")
        _found(container, key, path)
        return self._easily_moved(container, tokens, path).pop(key)

    def _easily_moved(self, container: Any, tokens: Sequence[str], path: str) -> Any:
        """Return a container for inserting and removing: a ChunkedList replaces a long list."""
        if not isinstance(container, list) or len(container) <= LONG:
            return container
        row = ChunkedList(container)
        owner, key = self._position(tokens[:-1], path)
        owner[key] = row
        self._has_rows = True
        return row


OPERATIONS = ("add", "remove", "replace", "move", "copy", "test")


def _key(container: Any, token: str, path: str) -> Any:
    """Return a token as a key of this container. Raises _NoPlace if it cannot be one."""
    if isinstance(container, dict):
        return token
    if not isinstance(container, list | ChunkedList):
        raise _NoPlace(f"there is nothing at {_shown(path)}")
    if token == "-":  # noqa: S105 - the place after the last item
        return len(container)
    if _INDEX.fullmatch(token) is None:
        raise _NoPlace(f"{_shown(token)} in {_shown(path)} is no index of a list")
    return int(token)


def _found(container: Any, key: Any, path: str) -> Any:
    if isinstance(container, dict):
        if key in container:
            return container[key]
    elif key < len(container):
        return container[key]
    raise _NoPlace(f"there is nothing at {_shown(path)}")


def _copied(value: Any) -> Any:
    return _decode(_encode(value)) if isinstance(value, dict | list) else value


def _same(found: Any, expected: Any) -> bool:
    """Return whether two JSON values are equal; true is not 1. Looks at no more values than `expected` has."""
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and len(found) == len(expected)
            and all(key in found and _same(found[key], value) for key, value in expected.items())
        )
    if isinstance(expected, list):
        return (
            isinstance(found, list | ChunkedList)
            and len(found) == len(expected)
            and all(map(_same, iter(found), expected))
        )
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    return bool(found == expected)


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}...")


def excerpt(value: Any) -> str:
    """Return the JSON of a value, cut after MAX_QUOTED characters."""
    text = _encode(value)[: 4 * MAX_QUOTED].decode(errors="ignore")
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def invalid(detail: str, pointer: str = "") -> InvalidData:
    """Return the error for an invalid patch."""
    return InvalidData(detail, (Violation(pointer, detail),))
