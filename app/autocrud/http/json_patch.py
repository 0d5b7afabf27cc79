"""JSON Patch (RFC 6902) within bounds: what a patch costs follows from its size and the document's, whatever it says.

- P1 *Operations are counted before they are applied.* Each of them takes a walk down its pointer, and a step in a list
  that does not depend on the list's length (see Row).
- P2 *What is made is counted while it is made.* A `copy` may double the document, so the bytes that copies make are
  counted, and the objects and lists in them. A `test` looks at no more than the patch itself holds.
- P3 *A patch can be applied again.* Values of the patch are never part of the document, only copies of them are.
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
"""Operations of the patches of one request."""
MAX_MADE = 6 * 1024 * 1024
"""Bytes of JSON that the `copy` operations of one patch may make."""
MAX_MADE_CONTAINERS = MAX_CONTAINERS
"""Objects and lists that they may make: small ones take more memory than text."""
MAX_QUOTED = 200
"""Characters of a value in an error."""
LONG = 4_000
"""Items of a list that are moved by one step of memory: shorter lists stay as they are."""

_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")
_ESCAPE = re.compile(r"~(?![01])")


class ChunkedList:
    """A long list of JSON in pieces: an item is put in front without moving all others.

    Adding or removing costs one walk over the pieces and one move of at most 2 * LONG items.
    """

    __slots__ = ("_pieces", "_size")

    def __init__(self, items: list[Any]) -> None:
        self._pieces = [items[at : at + LONG] for at in range(0, len(items), LONG)]
        self._size = len(items)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            yield from piece

    def __getitem__(self, at: int) -> Any:
        piece, rest = self._place(at)
        return self._pieces[piece][rest]

    def __setitem__(self, at: int, value: Any) -> None:
        piece, rest = self._place(at)
        self._pieces[piece][rest] = value

    def insert(self, at: int, value: Any) -> None:
        if not self._pieces:
            self._pieces.append([])
        piece, rest = self._place(at)
        items = self._pieces[piece]
        items.insert(rest, value)
        self._size += 1
        if len(items) > 2 * LONG:
            self._pieces[piece : piece + 1] = [items[:LONG], items[LONG:]]

    def pop(self, at: int) -> Any:
        piece, rest = self._place(at)
        value = self._pieces[piece].pop(rest)
        self._size -= 1
        if not self._pieces[piece]:
            del self._pieces[piece]
        return value

    def plain(self) -> list[Any]:
        return [item for piece in self._pieces for item in piece]

    def _place(self, at: int) -> tuple[int, int]:
        """Return the piece of an index, and the index in it; the place after the last item is in the last piece."""
        for number, piece in enumerate(self._pieces):
            if at < len(piece):
                return number, at
            at -= len(piece)
        return len(self._pieces) - 1, at + len(self._pieces[-1])


def _plain(value: Any) -> Any:
    assert isinstance(value, ChunkedList)
    return value.plain()


_encode = msgspec.json.Encoder(order="deterministic", enc_hook=_plain).encode
_decode = msgspec.json.decode


class Operation(NamedTuple):
    """`path` and `from_` are pointers, `tokens` and `from_tokens` their parts."""

    op: str
    path: str
    tokens: list[str]
    from_: str = ""
    from_tokens: Sequence[str] = ()
    value: Any = None


def json_patch(given: Any) -> Callable[[Any], Any]:
    """Return what applies a patch to a tree of JSON, which it may change. Raises InvalidData if it is no patch."""
    operations = parse(given)
    return lambda target: _Application(target).run(operations)


def parse(given: Any) -> list[Operation]:
    """Return the operations of a patch. Raises InvalidData if it is none."""
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
            f"operation {at} of the patch has the {name} {excerpt(pointer)}; expected a JSON Pointer like /tags/0, in which"
            " ~ is written ~0, and / inside of a name ~1",
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
    """The pointer leads to nothing, or to nothing that can be changed."""


class _Application:
    """One application of a patch to a tree. The tree is the only item of a list, so that it has a place as all else."""

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
        container, key = self._place(operation.tokens, operation.path)
        _found(container, key, operation.path)
        container[key] = _copied(operation.value)

    def _move(self, operation: Operation) -> None:
        source, target = operation.from_tokens, operation.tokens
        if list(target[: len(source)]) == list(source):
            if len(target) == len(source):
                _found(*self._place(source, operation.from_), operation.from_)
                return
            raise _NoPlace(f"{_shown(operation.from_)} cannot be moved into itself")
        self._put(target, operation.path, self._take(source, operation.from_))

    def _copy(self, operation: Operation) -> None:
        encoded = _encode(_found(*self._place(operation.from_tokens, operation.from_), operation.from_))
        self._left -= len(encoded)
        if self._left < 0:
            raise invalid(f"the patch copies more than {MAX_MADE} bytes")
        opened = encoded.count(b"[") + encoded.count(b"{")  # some of them in strings
        self._containers_left -= opened if opened <= self._containers_left else containers(encoded)
        if self._containers_left < 0:
            raise invalid(f"the patch copies more than {MAX_MADE_CONTAINERS} objects and lists")
        self._put(operation.tokens, operation.path, _decode(encoded))

    def _test(self, operation: Operation) -> None:
        path = operation.path
        try:
            found = _found(*self._place(operation.tokens, path), path)
        except _NoPlace:
            said = f"there is nothing at {_shown(path)}"
        else:
            if _same(found, operation.value):
                return
            said = f"the value at {_shown(path)} is {excerpt(found)}"
        said += f"; the test expects {excerpt(operation.value)}"
        raise PatchConflict(f"the patch does not apply: {said}", (Violation("", said),))

    def _place(self, tokens: Sequence[str], path: str) -> tuple[Any, Any]:
        """Return the container that a pointer ends in, and the key or index there, which may lead to nothing yet."""
        container: Any = self._holder
        key: Any = 0
        for token in tokens:
            container = _found(container, key, path)
            key = _key(container, token, path)
        return container, key

    def _put(self, tokens: Sequence[str], path: str, value: Any) -> None:
        container, key = self._place(tokens, path)
        if container is self._holder or isinstance(container, dict):
            container[key] = value
        elif key > len(container):
            raise _NoPlace(f"the list at {_shown(path)} has {len(container)} items")
        else:
            self._easily_moved(container, tokens, path).insert(key, value)

    def _take(self, tokens: Sequence[str], path: str) -> Any:
        container, key = self._place(tokens, path)
        if container is self._holder:
            raise _NoPlace("the whole data cannot be taken away")
        _found(container, key, path)
        return self._easily_moved(container, tokens, path).pop(key)

    def _easily_moved(self, container: Any, tokens: Sequence[str], path: str) -> Any:
        """Return what holds the items of a container from here on: a Row in place of a long list."""
        if not isinstance(container, list) or len(container) <= LONG:
            return container
        row = ChunkedList(container)
        owner, key = self._place(tokens[:-1], path)
        owner[key] = row
        self._has_rows = True
        return row


OPERATIONS = ("add", "remove", "replace", "move", "copy", "test")


def _key(container: Any, token: str, path: str) -> Any:
    """Return a token as a key of this container. Raises _NoPlace if it can be none."""
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
    """Whether two values are equal in JSON, where true is not 1. Looks at no more than `expected` holds."""
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
    """Return a value as JSON, cut off where it is long."""
    text = _encode(value)[: 4 * MAX_QUOTED].decode(errors="ignore")
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def invalid(detail: str, pointer: str = "") -> InvalidData:
    return InvalidData(detail, (Violation(pointer, detail),))
