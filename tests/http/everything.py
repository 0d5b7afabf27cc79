"""An application with a model of all field types, and one resource."""

from __future__ import annotations

import datetime as dt
import enum
from decimal import Decimal
from typing import Annotated, Literal
from uuid import UUID

from fastapi import FastAPI
from msgspec import UNSET, Meta, Struct, UnsetType

from app.autocrud import AutoCRUD, IndexedField
from app.models import Article

from .albums import Album


class Color(enum.Enum):
    red = "red"
    green = "green"


class Level(enum.IntEnum):
    low = 1
    high = 2


class Point(Struct):
    x: float
    y: float = 0.0


class Circle(Struct, tag="circle"):
    radius: Annotated[float, Meta(gt=0)]


class Square(Struct, tag="square"):
    side: int


class EveryType(Struct, kw_only=True):
    text: str
    number: int
    real: float = 0.0
    flag: bool = False
    at: dt.datetime | None = None
    day: dt.date | None = None
    hour: dt.time | None = None
    span: dt.timedelta | None = None
    key: UUID | None = None
    price: Decimal | None = None
    color: Color = Color.red
    level: Level = Level.low
    choice: Literal["a", "b"] = "a"
    short: Annotated[str, Meta(min_length=1, max_length=8)] = "short"
    point: Point | None = None
    points: list[Point] = []
    tags: list[str] = []
    numbers: set[int] = set()
    pair: tuple[int, str] | None = None
    blob: bytes = b""
    labels: dict[str, int] = {}
    shape: Circle | Square | None = None
    maybe: str | UnsetType = UNSET
    code: str | None = None


KNOWN = "known"
EXAMPLE = EveryType(text="text", number=1, point=Point(1.0), tags=["x"], labels={"a": 1}, shape=Circle(1.0))


def make() -> tuple[FastAPI, AutoCRUD]:
    crud = AutoCRUD()
    crud.add_model(
        EveryType,
        indexed_fields=[
            *("text", "number", "real", "flag", "at", "day", "key", "price", "color", "level", "choice"),
            *("point.x", "tags", "numbers", "maybe", IndexedField("code", unique=True)),
        ],
    )
    crud.add_model(Article, indexed_fields=["author"])
    crud.add_model(Album, indexed_fields=["title"])
    app = FastAPI()
    crud.apply(app)
    return app, crud
