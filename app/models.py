"""YOUR MODELS: the data of this service, and the fields that can be searched.

Each Struct becomes a path like `/article` with the whole HTTP API. Index the fields that you filter or sort by.
`unique=True` makes the values of a field unique.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from .autocrud import AutoCRUD, IndexedField
from .autocrud.access import Authorize

authorize: Authorize | None = None
"""What authenticated callers may do; None permits everything. For example:

    Permissions(
        {
            "article": {"read": anyone, "create": role("writer"), "*": [own, role("editor")]},
            "*": {"*": role("admin")},
        }
    )
"""


class Article(Struct):
    """An article."""

    title: Annotated[str, Meta(examples=["On the sun"])]
    content: Annotated[str, Meta(examples=["It shines."])]
    author: Annotated[str, Meta(examples=["alice"])]
    published: bool = False


class Airport(Struct):
    """An airport, as `examples/airports.py` loads it."""

    iata: Annotated[str, Meta(examples=["BOS"])]
    name: Annotated[str, Meta(examples=["General Edward Lawrence Logan International"])]
    city: Annotated[str | None, Meta(examples=["Boston"])]
    state: Annotated[str | None, Meta(examples=["MA"])]
    country: Annotated[str, Meta(examples=["USA"])]
    latitude: Annotated[float, Meta(ge=-90, le=90, examples=[42.36435])]
    longitude: Annotated[float, Meta(ge=-180, le=180, examples=[-71.00518])]


class User(Struct):
    """A user of a service."""

    username: Annotated[str, Meta(examples=["alice"])]
    email: Annotated[str, Meta(examples=["alice@example.org"])]


def register(crud: AutoCRUD) -> None:
    """Add every model. Called once, when the app is created."""
    crud.add_model(Article, indexed_fields=["author", "published"])
    crud.add_model(Airport, indexed_fields=[IndexedField("iata", unique=True), "country", "state", "city", "latitude"])
    crud.add_model(User, indexed_fields=["username", IndexedField("email", unique=True)])
