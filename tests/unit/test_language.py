"""Plain technical English: words and forms of sentences that do not come back."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_code_layout import ROOT, tracked

WORDS = (
    *("nobody", "somebody", "anybody", "everybody", "whoever", "whomever", "whosoever", "he", "his", "him"),
    *("upon", "surely", "nor", "hence", "hereby", "thereby", "wherever", "thereof", "therein", "whilst", "lest"),
    *("misfits?", "heeds?", "heeded", "owed", "birth", "dearest", "anew", "amiss"),
    *("had it", "were it", "be it", "is none that", "the one who", "those who"),
    *("stands? still", "stood still", "keeps? (?:its|their) word"),
)
"""Private metaphors, and forms that readers whose first language is not English stumble over."""
FORBIDDEN = re.compile(rf"(?<![-\w])({'|'.join(WORDS)})\b", re.IGNORECASE)
CLAUSE = re.compile(r"(What|Whether|Who|Whom|Whose|Where|Which|As [`A-Z]|See `?[A-Z])\b")
"""How a docstring does not begin: with a clause as its subject, or as a pointer to another docstring."""


EXEMPT = {"app/autocrud/resource_manager/backends/postgres/schema.py", "tests/postgres.py"}
"""The first has SQL that databases store under a hash of its text, the second the name of a user of the system."""


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of comments, docstrings and texts, or all lines of a page, with their numbers."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for below, line in enumerate(token.string.splitlines()):
                yield token.start[0] + below, line


@pytest.mark.slow
def test_words_that_do_not_come_back():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()!r}"
        for path in tracked("*.py", "*.md", "Makefile")
        if path != Path(__file__) and str(path.relative_to(ROOT)) not in EXEMPT
        for number, line in prose(path)
        if (match := FORBIDDEN.search(line))
    ]
    assert not found


@pytest.mark.slow
def test_docstrings_do_not_begin_with_a_clause():
    found = []
    for path in tracked("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                docstring = ast.get_docstring(node)
                if docstring and CLAUSE.match(docstring):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {docstring.splitlines()[0]}")
    assert not found


def test_names_of_tests_say_the_behaviour():
    """A name is not a clause like `test_what_is_...`, and has none of the words."""
    clause = re.compile(r"test_(what|whether|who|whom|whose|where|which|whoever|whatever|whichever)_")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in tracked("tests/*.py", "app/autocrud/testing/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if clause.match(node.name) or FORBIDDEN.search(node.name.replace("_", " "))
    ]
    assert not found


def test_subjects_and_words_are_found():
    assert [
        word for word in ("nobody", "Upon", "keeps its word", "had it") if not FORBIDDEN.search(f"x {word} y")
    ] == []
    assert FORBIDDEN.search("the snobody") is None
    assert CLAUSE.match("What is not confirmed is kept.")
    assert CLAUSE.match("As `other`.")
    assert CLAUSE.match("Return what was kept.") is None
