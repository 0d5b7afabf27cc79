"""YOURS: the data that this service keeps, and what of it can be searched.

A Struct becomes `/article` with everything that HTTP API says. Index the fields that you filter or sort by; `unique=True` lets no two
resources share a value.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from .autocrud import AutoCRUD, IndexedField
from .autocrud.access import Authorize

authorize: Authorize | None = None
"""What those who are let in may do; None: everything. For example

    Permissions({"article": {"read": anyone, "create": role("writer"), "*": [own, role("editor")]}, "*": {"*": role("admin")}})
"""


class Article(Struct):
    title: Annotated[str, Meta(examples=["On the sun"])]
    content: Annotated[str, Meta(examples=["It shines."])]
    author: Annotated[str, Meta(examples=["alice"])]
    published: bool = False


class Airport(Struct):
    iata: Annotated[str, Meta(examples=["BOS"])]
    name: Annotated[str, Meta(examples=["General Edward Lawrence Logan International"])]
    city: Annotated[str | None, Meta(examples=["Boston"])]
    state: Annotated[str | None, Meta(examples=["MA"])]
    country: Annotated[str, Meta(examples=["USA"])]
    latitude: Annotated[float, Meta(ge=-90, le=90, examples=[42.36435])]
    longitude: Annotated[float, Meta(ge=-180, le=180, examples=[-71.00518])]


class User(Struct):
    username: Annotated[str, Meta(examples=["alice"])]
    email: Annotated[str, Meta(examples=["alice@example.org"])]


def register(crud: AutoCRUD) -> None:
    """Add every model; called once when the app is made."""
    crud.add_model(Article, indexed_fields=["author", "published"])
    crud.add_model(Airport, indexed_fields=[IndexedField("iata", unique=True), "country", "state", "city", "latitude"])
    crud.add_model(User, indexed_fields=["username", IndexedField("email", unique=True)])
