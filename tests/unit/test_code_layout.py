"""The structure of the code: imports, lengths of modules and of lines."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "app/autocrud/resource_manager"
MOST_PAIRS = 45
MOST_LINES = 500
MOST_COLUMNS = 120


def tracked(*patterns: str) -> list[Path]:
    """Return the files of this checkout that git knows, or would with the next `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.splitlines() if (path := ROOT / name).is_file()]


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the modules and names that a module imports, as parts of dotted names."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            yield from ((*module, name.name) for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(name.name.split(".")) for name in node.names)


def test_packages_of_the_engine_import_few_others():
    """At most 45 ordered pairs (A imports B) of packages and modules directly below resource_manager.

    import-linter forbids cycles.
    """
    below = ENGINE.relative_to(ROOT).parts
    pairs = set()
    for path in ENGINE.rglob("*.py"):
        own = path.relative_to(ENGINE).with_suffix("").parts[0]
        for name in imported(path):
            if name[: len(below)] == below and len(name) > len(below) and name[len(below)] != own != "__init__":
                pairs.add((own, name[len(below)]))
    assert len(pairs) > 20
    assert len(pairs) <= MOST_PAIRS, sorted(pairs)


@pytest.mark.slow
def test_imports_point_down():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_modules_are_short():
    long = {str(path.relative_to(ROOT)): count for path in tracked("*.py") if (count := lines(path)) > MOST_LINES}
    assert not long


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_lines_are_short():
    """In Markdown, tables and lines that hold a link are left out; locks and snapshots are written by tools."""
    long = []
    for path in tracked("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "Makefile", "*.example"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if path.suffix == ".md" and (line.startswith("|") or re.search(r"\]\(\S+\)|https?://\S+", line)):
                continue
            if len(line) > MOST_COLUMNS and "snapshots" not in path.parts:
                long.append(f"{path.relative_to(ROOT)}:{number}: {len(line)} columns")
    assert not long
