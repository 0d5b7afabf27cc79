"""The page docs/config.md: a table of every key of StackConfig. `python -m infra.reference` prints it.

config.py and choices.py hold the meaning and the allowed values of each key, and check them. This module lays them out.
"""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct
from msgspec import inspect as kinds_of

from app.autocrud.errors import ConfigError
from app.settings import Pair
from infra.config import KINDS, StackConfig, descriptions, read

REFUSED: tuple[dict[str, str], ...] = (
    {"edge": "function-url", "domain": '{"name": "api.example.org", "zone": "Z0123456789"}'},
    {"edge": "function-url", "auth": '{"mode": "jwt", "issuer": "https://login.example.org", "audiences": ["api"]}'},
    {"timeout_s": "60"},
    {"snap_start": "true", "ephemeral_mb": "1024"},
    {"stage": "prod", "cors": '["*"]'},
    {"budget_usd": "50"},
    {"storage": "postgres-s3", "concurrency": "100"},
    {"storage": "postgres-s3", "postgres": '{"mode": "aurora", "class": "db.r6g.large"}'},
    {"storage": "mq-cached-s3", "broker": '{"instance": "mq.m5.large"}'},
)
"""Examples of combinations that are refused although each of their values is allowed."""

PAGE = """\
# The config of a stack

`make docs` writes this page from `infra/config.py` and `infra/choices.py`; change it there. [Deploy to AWS](deploy.md)
says how to set a key.

In `Pulumi.STACK.yaml` write a key alone or after the name of the project: `storage` or `crudstack:storage`. A key that
begins with another name than the one in `Pulumi.yaml` is refused. A value that is set with `--secret` is refused too,
because no key holds a secret.

Every key has a default. If a key, a value or a combination of values is wrong, nothing is created, and one sentence
says what was found and what is allowed. Write versions in quotes (`"4.2"`), because YAML would read them as numbers.

| key | allowed | default | meaning |
| --- | --- | --- | --- |
{keys}

## Nested values

| key | allowed | default | meaning |
| --- | --- | --- | --- |
{nested}

## Kinds

A kind is a name for a pair of a MetaStore and a ResourceStore. A stack has the servers that any storage in `storage`
and `storage_overrides` needs.

| kind | meta | resource | servers beside the bucket | drivers in the zip beside S3 |
| --- | --- | --- | --- | --- |
{kinds}

## Combinations that are refused

| config | why, and what is expected |
| --- | --- |
{refused}
"""


def page() -> str:
    """Return the text of docs/config.md."""
    return PAGE.format(
        keys="\n".join(_keys()),
        nested="\n".join(_nested()),
        kinds="\n".join(_kinds()),
        refused="\n".join(_refused()),
    )


def _keys() -> Iterator[str]:
    texts = descriptions()
    for field in msgspec.structs.fields(StackConfig):
        allowed, meaning = texts[field.name].split("\n")
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        yield _row(f"`{field.name}`", allowed, "see below" if isinstance(default, Struct) else _code(default), meaning)


def _structs() -> list[tuple[str, type]]:
    """Return the classes of nested values by key.

    Pair is left out: the stack allows fewer pairs than the app does, and the table of keys lists them.
    """
    described = kinds_of.type_info(StackConfig)
    assert isinstance(described, kinds_of.StructType)
    return [
        (field.name, type_.cls)
        for field in described.fields
        for type_ in (field.type.types if isinstance(field.type, kinds_of.UnionType) else (field.type,))
        if isinstance(type_, kinds_of.StructType) and type_.cls is not Pair
    ]


def _nested() -> Iterator[str]:
    for key, cls in _structs():
        texts, described = _texts(cls), kinds_of.type_info(cls)
        assert isinstance(described, kinds_of.StructType)
        yield _row(f"`{key}`", "", "", " ".join((cls.__doc__ or "").split()))
        if described.tag_field:
            yield _row(f"`{key}.{described.tag_field}`", f"`{described.tag}`", "required", "")
        for field in described.fields:
            default = "required" if field.required else "none" if field.default == "" else _code(field.default)
            yield _row(f"`{key}.{field.encode_name}`", _allowed(field.type), default, texts.get(field.name, ""))


def _texts(cls: type) -> dict[str, str]:
    """Return the text below each field in the source of a class, by the name of the field."""
    body = next(node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef))
    return {
        ast.unparse(field.target): " ".join(str(text.value.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _allowed(type_: kinds_of.Type) -> str:
    match type_:
        case kinds_of.LiteralType(values=values):
            return ", ".join(f"`{value}`" for value in values)
        case kinds_of.BoolType():
            return "`true`, `false`"
        case kinds_of.IntType(ge=least, le=most) | kinds_of.FloatType(ge=least, le=most):
            return f"{least} to {most}"
        case kinds_of.StrType(pattern=pattern):
            return f"`{pattern}`" if pattern else "text"
        case kinds_of.ListType(item_type=item):
            return f"a list of {_allowed(item)}"
        case _:
            raise TypeError(f"_allowed has no case for {type_}: add one")


def _kinds() -> Iterator[str]:
    for kind, pair in KINDS.items():
        config = StackConfig(storage=kind)
        yield _row(f"`{kind}`", pair.meta, pair.resource, _list(config.servers), _list(config.extras))


def _refused() -> Iterator[str]:
    for values in REFUSED:
        try:
            read(values)
        except ConfigError as error:
            # Without the key and the value, which are in the first cell.
            why = error.detail.partition(": ")[2]
            yield _row("<br>".join(f"`{key}: {value}`" for key, value in values.items()), why)
        else:
            raise ValueError(f"{values} is accepted: remove it from REFUSED")


def _list(names: frozenset[Any]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else msgspec.json.encode(value).decode()}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
