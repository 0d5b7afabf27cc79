"""The data: 10,000 articles of about 350 bytes, a hundred by each author, views from 0 to 9,999. Imports no peer."""

from __future__ import annotations

COUNT = 10_000
CONTENT = "lorem ipsum dolor sit amet " * 11


def article(number: int) -> dict[str, object]:
    return {
        "title": f"Title {number}",
        "content": CONTENT,
        "author": f"author{number % 100:02}",
        "published": number % 3 == 0,
        "views": number * 7919 % COUNT,
    }


AUTHOR = "author07"
VIEWS = 5_000
HOT = 100
"""How many articles are read again and again, the first ones; changes are made to others."""


def fresh(number: int) -> dict[str, object]:
    """An article that no search for an author or views finds, so that all answers stay what they were."""
    return article(number) | {"author": "another", "views": -1}


def changed(at: int, number: int) -> dict[str, object]:
    """The article `at` with another title; searches find it where it was."""
    return article(at) | {"title": f"Title {number}"}
