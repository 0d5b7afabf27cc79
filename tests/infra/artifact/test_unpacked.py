"""The zip unpacked: it runs on this machine, and compiles nothing."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from infra.artifact import LAMBDA, ROOT, build, host, interpreter


@pytest.fixture(scope="session", params=sorted({host().python, LAMBDA.python}))
def python(request):
    """The versions of Python to build for: the one that runs these tests, and the one of Lambda."""
    return request.param


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory, app, python):
    """The directory of a build for this machine, unpacked as on Lambda."""
    directory = tmp_path_factory.mktemp("host")
    done = build(directory / "host.zip", target=host(python), app=app)
    with zipfile.ZipFile(done.path) as archive:
        archive.extractall(directory / "task")
    return directory / "task"


RUN = """
import sys
task = sys.argv[1]
sys.path.insert(0, task)
from importlib.machinery import SourceFileLoader
compile_it = SourceFileLoader.source_to_code
def refuse(self, data, path, **options):
    if path.startswith(task):
        raise AssertionError(f"{path} is compiled from source")
    return compile_it(self, data, path, **options)
SourceFileLoader.source_to_code = refuse

import fastapi, msgspec, apsw, obstore, app.main

for module in list(sys.modules.values()):
    file = getattr(module, "__file__", None) or ""
    assert "site-packages" not in file, file
for module in (fastapi, msgspec, apsw, obstore, app.main):
    assert module.__file__.startswith(task), module
"""


def run(python: str, unpacked: Path, program: str, **environment: str) -> None:
    """Run a program that can import only the unpacked files and the standard library."""
    done = subprocess.run(
        [interpreter(python), "-I", "-S", "-c", RUN + program, unpacked],
        env={name: value for name, value in os.environ.items() if not name.startswith(("CRUDSTACK_", "AWS_"))}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "unpacked and running" in done.stdout


def test_unpacked_it_runs_and_compiles_nothing(python, unpacked):
    run(python, unpacked, "print('unpacked and running')")


def test_unpacked_a_changed_source_is_not_even_looked_at(python, unpacked, tmp_path):
    """This shows that the hashes are unchecked, and that RUN notices a module that is compiled from source."""
    changed = tmp_path / "task"
    shutil.copytree(unpacked, changed)
    (changed / "app/main.py").write_text("raise AssertionError('this was read')\n")
    run(python, changed, "print('unpacked and running')")
    shutil.rmtree(changed / "app/__pycache__")
    with pytest.raises(AssertionError, match=r"__init__\.py is compiled from source"):
        run(python, changed, "print('unpacked and running')")


RUNTIME = {"boto3", "botocore", "snapshot_restore_py"}
"""Packages that the runtime of Lambda provides."""
DRIVERS = {"aio_pika", "psycopg", "redis", "yarl"}
"""Packages of single storages. Only the zips for those storages contain them."""


UNUSED = {"backports", "compression"}
"""Packages that no handler needs: archives of functions are compressed by gzip. The second is part of Python 3.14."""


def imported(unpacked):
    """Return the modules that the app imports, also inside of functions."""
    modules = set()
    for path in (unpacked / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module)
    return {module for module in modules if module.partition(".")[0] not in RUNTIME | UNUSED}


def test_unpacked_all_that_the_app_imports_is_there(python, unpacked):
    """This holds too for wheels that the zip contains only in part."""
    modules = {module for module in imported(unpacked) if module.partition(".")[0] not in DRIVERS}
    assert {"apsw", "mangum", "obstore.store"} <= modules
    program = f"import importlib\nfor name in {sorted(modules)}: importlib.import_module(name)\n"
    run(python, unpacked, program + "print('unpacked and running')")


def test_with_all_drivers_all_of_them_are_there(app, tmp_path):
    requirements = sorted((ROOT / "requirements").glob("app*.txt"))
    done = build(tmp_path / "host.zip", target=host(LAMBDA.python), requirements=requirements, app=app)
    with zipfile.ZipFile(done.path) as archive:
        archive.extractall(tmp_path / "task")
    modules = imported(tmp_path / "task")
    assert {module.partition(".")[0] for module in modules} >= DRIVERS
    program = f"import importlib\nfor name in {sorted(modules)}: importlib.import_module(name)\n"
    run(LAMBDA.python, tmp_path / "task", program + "print('unpacked and running')")


def test_with_all_drivers_it_is_for_lambda_too(app, tmp_path):
    """`build` checks the architecture of every library."""
    requirements = sorted((ROOT / "requirements").glob("app*.txt"))
    assert len(requirements) == 4
    done = build(tmp_path / "lambda.zip", requirements=requirements, app=app)
    assert done.parts.keys() >= {"psycopg_binary", "redis", "aio_pika"}
    assert done.size < 20 * 1024 * 1024


ANSWERS = """
import asyncio, json
async def call(api, method, path, body=None):
    sent = []
    async def receive():
        return {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}
    async def send(message):
        sent.append(message)
    headers = [(b"content-type", b"application/json"), (b"host", b"x")] + [(b"if-none-match", b"*")] * (method == "PUT")
    path, _, query = path.partition("?")
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
             "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": query.encode(),
             "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("x", 80)}
    await api(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)
async def main():
    api = app.main.create_app()
    async with api.router.lifespan_context(api):
        status, _ = await call(api, "PUT", "/article/sun", {"title": "Sun", "content": "", "author": "a"})
        assert status == 201, status
        status, body = await call(api, "GET", "/article?author=a")
        assert status == 200 and b"Sun" in body, body
        status, _ = await call(api, "GET", "/article?titel=Sun")
        assert status == 400, status
        status, body = await call(api, "GET", "/openapi.json")
        assert status == 200 and b"Article" in body, body
asyncio.run(main())
print("unpacked and running")
"""


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_unpacked_it_answers(python, unpacked, tmp_path, storage):
    run(python, unpacked, ANSWERS, CRUDSTACK_STORAGE=storage, CRUDSTACK_DATA_DIR=str(tmp_path))


def test_a_host_build_is_for_this_machine(python, unpacked):
    tag = f"cpython-{python.replace('.', '')}"
    assert {path.suffixes[0] for path in unpacked.rglob("*.pyc")} == {f".{tag}"}
    assert list((unpacked / "apsw").glob(f"__init__.{tag}-*.so"))
