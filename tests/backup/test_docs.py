"""The commands and the code of docs/backup.md work as they stand there."""

from __future__ import annotations

import ast
import asyncio
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app import models
from app.autocrud import AutoCRUD
from app.autocrud.access import Principal
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, MemoryStorageFactory

from .test_commands import disk, environment

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/backup.md").read_text()
SEED_EXPORT = 'await crud.export_all(output_path="./backup.tar.gz")'
SEED_IMPORT = 'await crud.import_all(input_path="./backup.tar.gz")'
"""Lines of the document that the system is built from, as written there."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def steps() -> list[tuple[str, list[str]]]:
    """Return the commands, each with the texts that its output must contain."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks("bash")).splitlines():
        if line.startswith("#> "):
            found[-1][1].append(line.removeprefix("#> "))
        else:
            found.append((line, []))
    return found


async def two_articles(data_dir: Path) -> None:
    crud = disk(data_dir)
    for name in ("one", "two"):
        await crud.resource_manager(models.Article).create(models.Article(name, "x", "alice"), resource_id=name)
    await crud.close()


@pytest.mark.slow
def test_the_commands_of_the_page(serve, tmp_path: Path):
    asyncio.run(two_articles(tmp_path / "data"))
    server = serve("memory", tmp_path / "server")
    for name in ("one", "two"):
        article = {"title": name, "content": "x", "author": "alice"}
        httpx.post(f"{server.url}/article", json=article).raise_for_status()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "crudstack").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from app.cli import main; main()' \"$@\"\n"
    )
    (programs / "crudstack").chmod(0o755)
    given = environment(tmp_path / "nowhere", "memory", PYTHONPATH=str(ROOT))
    given["PATH"] = f"{programs}:{given['PATH']}"
    commands = steps()
    assert len(commands) >= 12
    script = "set -euo pipefail\n" + "".join(f"{line}\nprintf '\\n=== \\n'\n" for line, _ in commands)
    script = script.replace("http://localhost:8000", server.url)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=given, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for (line, expected), output in zip(commands, done.stdout.split("\n=== \n"), strict=False):
        for text in expected:
            assert text in output, f"{line}\nprinted\n{output}"
    assert (tmp_path / "article.tar.gz").stat().st_size > 300
    server.stop()


async def test_the_code_of_the_page(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, permissions = blocks("python")
    names = {}
    exec(calls + permissions, names)  # noqa: S102 - the code of our own page
    crud = AutoCRUD(storage_factory=DiskStorageFactory("./data"))
    models.register(crud)
    await crud.resource_manager(models.Article).create(models.Article("t", "x", "alice"), resource_id="one")
    await names["back_up"](crud)
    other = AutoCRUD(storage_factory=MemoryStorageFactory())
    models.register(other)
    await names["restore"](other)
    assert (await other.resource_manager(models.Article).get("one")).data.author == "alice"
    allowed = names["authorize"](Principal(name="a", roles=frozenset({"backup"})), "export", "article")
    assert allowed is True
    await crud.close()


async def test_the_code_of_the_document_as_written(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crud = AutoCRUD(storage_factory=DiskStorageFactory("./data"))
    manager = crud.add_model(models.Article)
    await manager.create(models.Article("t", "x", "alice"), resource_id="one")
    await run(SEED_EXPORT, crud=crud)
    await crud.close()
    shutil.rmtree("data")
    restored = AutoCRUD(storage_factory=DiskStorageFactory("./data"))
    manager = restored.add_model(models.Article)
    await run(SEED_IMPORT, crud=restored)
    assert (await manager.get("one")).data == models.Article("t", "x", "alice")
    await restored.close()


async def run(code: str, **names: object) -> None:
    """Run code that awaits."""
    compiled = compile(code, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(compiled, names)  # noqa: S307 - the code of our own page
    if result is not None:
        await result


def test_every_option_of_the_commands_is_on_the_page():
    for command in ("export", "import", "snapshot"):
        done = subprocess.run(
            [sys.executable, "-c", "from app.cli import main; main()", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        for option in set(re.findall(r"--[a-z0-9-]+", done.stdout)) - {"--help", "--archive", "--directory"}:
            assert option in PAGE, f"{command} {option}"
