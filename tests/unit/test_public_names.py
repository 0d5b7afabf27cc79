"""The public names of the engine: the list in `app.autocrud`, and a docstring for each name and method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import app.autocrud
from app.autocrud import testing
from tests import conformance

ROOT = Path(__file__).parents[2]
PUBLIC = [
    "AutoCRUD",
    "Blob",
    "ConfigError",
    "CrudError",
    "Encoding",
    "Filter",
    "IndexedField",
    "Permissions",
    "Principal",
    "Query",
    "Resource",
    "ResourceManager",
    "Retention",
    "Unauthenticated",
    "anyone",
    "field",
    "own",
    "role",
]


def test_the_list_of_public_names_is_complete():
    """Removing a name breaks programs of users; adding one is a promise."""
    assert app.autocrud.__all__ == PUBLIC
    assert [name for name in PUBLIC if not hasattr(app.autocrud, name)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name):
    """The docstring is its own and not that of a base class; ruff checks those of methods."""
    text = vars(getattr(app.autocrud, name)).get("__doc__") or getattr(app.autocrud, name).__doc__
    base = getattr(getattr(app.autocrud, name), "__base__", object)
    assert text
    assert text != base.__doc__
    assert text.strip().splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("name", ["AutoCRUD", "IndexedField", "Permissions", "Query", "field"])
def test_the_docstring_of_a_name_that_is_not_obvious_has_an_example(name):
    found = getattr(app.autocrud, name)
    text = found.add_model.__doc__ if name == "AutoCRUD" else found.__doc__
    assert re.search(rf"\b({name}|crud\.add_model)\(", text)


def test_docs_and_examples_import_public_names():
    """Pages and examples import names that are in the list, or import from a module below."""
    imported: dict[str, str] = {}
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.py")]:
        for names in re.findall(r"^from app\.autocrud import (.+)$", path.read_text(), re.MULTILINE):
            imported |= dict.fromkeys((name.strip() for name in names.split(",")), path.name)
    assert "AutoCRUD" in imported
    assert {name: page for name, page in imported.items() if name not in PUBLIC} == {}


def test_the_conformance_suite_has_its_former_name_too():
    assert conformance.__all__ == testing.__all__
    for name in testing.__all__:
        assert getattr(conformance, name) is getattr(testing, name)
