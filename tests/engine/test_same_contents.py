"""A zip with the same contents is not deployed again, even if its bytes differ. A zip with new contents is."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from infra.artifact import Artifact, contents
from infra.config import StackConfig
from infra.deployed_code import FUNCTION, PROGRAM, Package, running
from infra.protected import export
from infra.stack import build
from tests.engine.checkout import Checkout
from tests.engine.engine import PROJECT
from tests.engine.test_cli import SETUP
from tests.engine.test_life import assert_unchanged

OTHER_MACHINE = """
import zlib
compress = zlib.compressobj
zlib.compressobj = lambda level=-1, *arguments: compress(1, *arguments)  # another zlib makes other bytes
from infra import artifact
compile_modules = artifact.compile_modules
def other_release(tree, paths, *arguments):
    failed = compile_modules(tree, paths, *arguments)
    for path in tree.rglob("*.pyc"):
        path.write_bytes(path.read_bytes() + b"0")  # another patch release of Python makes other bytecode
    return failed
artifact.compile_modules = other_release
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_cli_deploys_only_changed_contents(tmp_path, cli):
    checkout = Checkout(tmp_path, cli)
    checkout.run(SETUP)
    checkout.run("pulumi up --yes")
    first, main = checkout.path / "dist/lambda.zip", checkout.path / "infra/__main__.py"
    before = sha256(first)

    # Another machine, where the directory, zlib and the release of Python differ, but not the sources.
    checkout.path.rename(checkout.directory / "elsewhere")
    checkout.path = checkout.directory / "elsewhere"
    first, main = checkout.path / "dist/lambda.zip", checkout.path / "infra/__main__.py"
    here = main.read_text()
    main.write_text(here.replace("\ntry:\n    keys =", f"\n{OTHER_MACHINE}\ntry:\n    keys ="))
    assert main.read_text() != here
    first.unlink()
    checkout.run("pulumi stack select dev")
    checkout.run("pulumi preview --expect-no-changes")
    checkout.run("pulumi up --yes --expect-no-changes")
    checkout.run("pulumi up --yes --refresh --expect-no-changes")
    assert sha256(first) != before

    # Another change of the function does not need the first machine's zip.
    checkout.run("pulumi config set memory_mb 1024")
    assert "~ 2 updated" in checkout.run("pulumi up --yes")
    checkout.run("pulumi up --yes --expect-no-changes")

    # A change of the app is deployed from either machine, and so is its revert.
    models = checkout.path / "app/models.py"
    source = models.read_text()
    models.write_text(f"{source}# changed\n")
    assert "~ 2 updated" in checkout.run("pulumi up --yes")
    main.write_text(here)
    checkout.run("pulumi up --yes --expect-no-changes")
    models.write_text(source)
    assert "~ 2 updated" in checkout.run("pulumi up --yes")
    assert sha256(first) == before


def write(path: Path, files: dict[str, str], level: int) -> Artifact:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(info, text, zipfile.ZIP_DEFLATED, level)
    return Artifact(path, sha256(path), 1, 1, {}, contents(path))


@pytest.fixture
def stack(engine):
    """Return a stack whose program registers `stack.built` as infra/__main__.py does, but under another path."""
    made = engine.stack("test", StackConfig())

    def run():
        state = export(f"organization/{PROJECT}/test", made._work)
        built = made.built
        return build(made.config, zip=Package(str(built.path), built.contents, running(state, built.contents)))

    made.program = run
    return made


def text_of(number: int) -> dict[str, str]:
    return {"app/models.py": f"{number} " * 1000}


def deployed(engine, stack) -> tuple[str, str]:
    """Return the hash of the zip that the provider uploaded last, and the version on AWS."""
    (function,) = engine.account.all(FUNCTION).values()
    (resource,) = [each for each in stack.exported()["deployment"]["resources"] if each["type"] == FUNCTION]
    return resource["outputs"]["code"]["hash"], function["version"]


def test_a_stack_of_an_earlier_release_is_updated_once(engine, stack):
    write(engine.zip, text_of(1), 9)
    current, stack.program = stack.program, None
    assert stack.up().error == ""
    stack.program = current
    stack.built = write(engine.zip, text_of(1), 9)
    done = stack.up()
    assert done.error == ""
    assert {step.op for step in done.steps} == {"same", "update"}
    stack.built = write(engine.zip, text_of(1), 1)
    assert_unchanged(stack.up())


def test_the_contents_decide_and_not_the_bytes(engine, stack, tmp_path):
    stack.built = write(engine.zip, text_of(1), 9)
    assert stack.up().error == ""
    before = deployed(engine, stack)
    stack.built = write(engine.zip, text_of(1), 1)
    assert stack.built.sha256 != before[0]
    assert_unchanged(stack.preview())
    assert_unchanged(stack.up())
    assert_unchanged(stack.up(refresh=True))
    assert deployed(engine, stack) == before

    # If the zip of the state is not on this machine, the new one is deployed: the provider reads it at each update.
    stack.built = write(tmp_path / "elsewhere.zip", text_of(1), 1)
    engine.zip.unlink()
    assert stack.up().error == ""
    assert deployed(engine, stack) == (stack.built.sha256, str(int(before[1]) + 1))


@pytest.mark.parametrize("fault", ["update", "cut"])
def test_after_a_failed_update_the_new_contents_are_deployed(engine, stack, fault):
    stack.built = write(engine.zip, text_of(1), 9)
    assert stack.up().error == ""
    stack.built = write(engine.zip, text_of(2), 9)
    engine.faults.set(update="Function::crudstack-dev-api")
    assert stack.up().error != ""
    engine.faults.clear()
    if fault == "cut":
        stack.built = write(engine.zip, text_of(2), 1)  # continued on another machine
    assert stack.up().error == ""
    assert deployed(engine, stack)[0] == stack.built.sha256
    stack.built = write(engine.zip, text_of(2), 5)
    assert_unchanged(stack.up())


def state_of(**changes) -> dict:
    code = {"hash": "00ff", "path": str(PROGRAM / "stack.py")}
    resource = {
        "urn": "urn:pulumi:dev::crudstack::crudstack:aws:ApiFunction$aws:lambda/function:Function::crudstack-dev-api",
        "type": FUNCTION,
        "inputs": {"code": code, "sourceCodeHash": "c"},
        "outputs": {"code": code, "sourceCodeHash": "c"},
    }
    resource |= {name: value for name, value in changes.items() if name != "pending"}
    pending = [{"resource": {"urn": resource["urn"]}, "type": "updating"}] if "pending" in changes else []
    return json.loads(json.dumps({"deployment": {"resources": [resource], "pending_operations": pending}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"delete": True},
        {"initErrors": ["it failed"]},
        {"pending": True},
        {"type": "aws:lambda/alias:Alias"},
        {"outputs": {"code": {"hash": "00ff"}, "sourceCodeHash": "before"}},
        {"outputs": {"code": {"hash": "before"}, "sourceCodeHash": "c"}},
        {"outputs": {"sourceCodeHash": "c"}},
        {"outputs": None},
        {"inputs": {"code": {"hash": "00ff", "path": "/nowhere/x.zip"}, "sourceCodeHash": "c"}},
        {"inputs": {"code": {"hash": "00ff"}, "sourceCodeHash": "c"}},
        {"inputs": {"sourceCodeHash": "c"}},
    ],
)
def test_the_code_is_deployed_if_the_state_is_in_doubt(changes):
    assert running(state_of(), "c") == {"crudstack-dev-api"}
    assert running(state_of(**changes), "c") == frozenset()
    assert running(state_of(), "d") == running(None, "c") == running({}, "c") == frozenset()
