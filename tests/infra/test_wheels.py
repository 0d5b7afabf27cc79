"""What the zip keeps of the packages: everything, unless the tests run that very version without it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from infra import wheels
from infra.artifact import LAMBDA, ROOT, build, host, interpreter
from infra.pythons import uv
from infra.wheels import TRIED, Tried, without_sections

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: idna\n\nText.\n"


def wheel(directory: Path, name: str, version: str, files: dict[str, str | bytes]) -> str:
    """Write a wheel, and return its lines of a requirements file."""
    top = f"{name.replace('-', '_')}-{version}"
    info = f"{top}.dist-info"
    files = {path.replace("INFO", info).replace("DATA", f"{top}.data"): content for path, content in files.items()}
    files[f"{info}/METADATA"] = METADATA.format(name=name, version=version)
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f'"{path}",,\n' for path in [*files, f"{info}/RECORD"])
    path = directory / f"{top}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in files.items():
            archive.writestr(each, content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"--no-index\n--find-links {directory}\n{name}=={version} --hash=sha256:{digest}\n"


FILES = {
    "mine/__init__.py": "from importlib.metadata import version\n__version__ = version('mine-lib')\n",
    "mine/tests/__init__.py": "fixtures = 1\n",
    "mine/test/data.txt": "data",
    "mine/testclient.py": "",
    "mine/.agents/a.md": "",
    "mine/kernel.c": "int x;",
    "mine/include/kernel.h": "int x;",
    "mine/lib.a": "!<arch>",
    "mine/fast.pyx": "",
    "mine/types.pyi": "x: int",
    "mine/py.typed": "",
    "mine/with, comma.txt": "",
    "tests/__init__.py": "top = 1\n",
    "test/__init__.py": "",
    "bin/__init__.py": "",
    "bin/tool.py": "#!/usr/bin/python3\nanswer = 42\n",
    "space/part/__init__.py": "part = 1\n",
    "INFO/entry_points.txt": "[console_scripts]\nmine = mine:main\n\n[mine.plugins]\nfirst = mine.tests:fixtures\n",
    "INFO/top_level.txt": "mine\n",
    "INFO/licenses/LICENSE": "MIT",
    "INFO/extra.json": "{}",
    "DATA/data/share/mine.dat": "x",
    "DATA/scripts/mine-run": "#!python\nprint('started')\n",
    "DATA/scripts/mine-shell": "#!/bin/sh\n",
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A zip for this machine with a package of the user's own, unpacked."""
    directory = tmp_path_factory.mktemp("wheels")
    requirements = directory / "own.txt"
    other = wheel(directory, "other-part", "1.0", {"space/other/__init__.py": "other = 1\n"})
    requirements.write_text(wheel(directory, "mine-lib", "1.5", FILES) + other)
    app = directory / "project/app"
    app.mkdir(parents=True)
    (app / "__init__.py").write_text("")
    done = build(
        directory / "x.zip", target=host(LAMBDA.python), requirements=[requirements], app=app, cache=directory / "c"
    )
    with zipfile.ZipFile(done.path) as archive:
        archive.extractall(directory / "task")
    return directory / "task"


def test_of_a_package_that_was_not_tried_everything_stays(task):
    there = {path.relative_to(task).as_posix() for path in task.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    info = "mine_lib-1.5.dist-info"
    expected = {name.replace("INFO", info) for name in FILES if not name.startswith("DATA")}
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD")} | {"share/mine.dat", "bin/mine-shell"}
    expected |= {"app/__init__.py", "space/other/__init__.py"}
    expected |= {f"other_part-1.0.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
    # Scripts that start the Python of this machine, bin/mine and bin/mine-run, are of no use on Lambda.
    assert there == expected
    for path in expected - {f"{info}/RECORD", "other_part-1.0.dist-info/RECORD"}:
        assert str(ROOT).encode() not in (task / path).read_bytes()


def test_importlib_finds_what_it_finds_elsewhere(task):
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from importlib import metadata, resources
import mine, mine.tests, tests, bin.tool, space.part, space.other
assert mine.__version__ == metadata.version("mine_lib") == "1.5"
assert metadata.requires("mine-lib") == ["idna"]
plugin, = metadata.entry_points(group="mine.plugins")
assert plugin.load() == 1 and plugin.dist.name == "mine-lib"
files = {str(file) for file in metadata.files("mine-lib")}
assert "mine/kernel.c" in files and "mine/with, comma.txt" in files and "mine_lib-1.5.dist-info/RECORD" in files
assert all(file.locate().exists() for file in metadata.files("mine-lib"))
assert metadata.packages_distributions()["mine"] == ["mine-lib"]
assert metadata.packages_distributions()["space"] == ["other-part"]
assert resources.files("mine").joinpath("test/data.txt").read_text() == "data"
"""
    done = subprocess.run(
        [interpreter(LAMBDA.python), "-I", "-S", "-c", program, task], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All locked packages as they are installed for Lambda."""
    directory = tmp_path_factory.mktemp("everything")
    requirements = sorted((ROOT / "requirements").glob("app*.txt"))
    wheels.install(directory / "installed", LAMBDA, interpreter(LAMBDA.python), requirements)
    return directory / "installed"


def test_the_tried_versions_are_the_locked_ones(everything):
    """After `make lock`: run the tests with the new versions, then write them into TRIED."""
    installed = dict(wheels._name_and_version(info) for info in everything.glob("*.dist-info"))
    assert {name: tried.version for name, tried in TRIED.items()} == installed


def test_every_pattern_is_of_use(everything):
    for info in everything.glob("*.dist-info"):
        name, _ = wheels._name_and_version(info)
        unmatched = set(TRIED[name].unneeded) - set(wheels.TYPES) - set(wheels.SOURCES)
        for path in wheels._recorded(info):
            unmatched = {pattern for pattern in unmatched if not wheels.fnmatch.fnmatchcase(path, pattern)}
        assert not unmatched, name


@pytest.mark.parametrize(("version", "stripped"), [("1.0", True), ("1.1", False)])
def test_another_version_of_a_package_that_was_tried_keeps_everything(tmp_path, monkeypatch, version, stripped):
    monkeypatch.setitem(TRIED, "mine-lib", Tried("1.0", ("mine/tests/*",)))
    files = {"mine/__init__.py": "", "mine/tests/__init__.py": "", "mine/test.so": elf_with_sections()}
    line = wheel(tmp_path, "Mine.Lib", version, files)
    (tmp_path / "own.txt").write_text(line)
    python = interpreter(LAMBDA.python)
    wheels.install(tmp_path / "installed", host(LAMBDA.python), python, [tmp_path / "own.txt"])
    kept = wheels.keep_needed(tmp_path / "installed", tmp_path / "tree", python)
    assert ("mine/tests/__init__.py" in kept) is not stripped
    assert "Mine.Lib" in (tmp_path / "tree" / next(path for path in kept if path.endswith("METADATA"))).read_text()
    expected = without_sections(elf_with_sections()) if stripped else elf_with_sections()
    assert (tmp_path / "tree/mine/test.so").read_bytes() == expected


def elf_with_sections() -> bytes:
    """A library with one segment of 128 bytes, and bytes behind it that no loader reads."""
    header = bytearray(b"\x7fELF\x02\x01\x01" + bytes(57))
    header[32:40] = (64).to_bytes(8, "little")
    header[54:58] = (56).to_bytes(2, "little") + (1).to_bytes(2, "little")
    segment = bytearray(56)
    segment[32:40] = (128).to_bytes(8, "little")
    return bytes(header + segment) + bytes(80)


def test_two_machines_install_the_same_files(tmp_path):
    """Nothing of the installer, of its version, or of this machine's paths is in it, and no order of its own."""
    python = interpreter(LAMBDA.python)
    line = wheel(tmp_path, "mine-lib", "1.5", FILES)
    (tmp_path / "own.txt").write_text(line)
    trees = []
    for name in ("one", "two"):
        wheels.install(tmp_path / name, host(LAMBDA.python), python, [tmp_path / "own.txt"])
        info = tmp_path / name / "mine_lib-1.5.dist-info"
        if name == "two":
            (info / "INSTALLER").write_text("another installer")
            (info / "uv_cache.json").write_text('{"timestamp": 1}')
            lines = (info / "RECORD").read_text().splitlines()
            (info / "RECORD").write_text("\n".join([*lines[::-1], "mine_lib-1.5.dist-info/uv_cache.json,sha256=x,1"]))
        kept = wheels.keep_needed(tmp_path / name, tmp_path / f"{name}-tree", python)
        trees.append({path: (tmp_path / f"{name}-tree" / path).read_bytes() for path in kept})
    assert trees[0] == trees[1]
    assert not [path for path, content in trees[0].items() if str(tmp_path).encode() in content]


def test_a_package_that_asks_for_the_version_of_another_works(tmp_path):
    """`EmailStr` of pydantic asks for the version of email-validator when it is used."""
    lock = (ROOT / "requirements/app.txt").read_text()
    (tmp_path / "in.txt").write_text("email-validator\n")
    done = uv(
        *("pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-header"),
        *("--no-annotate", "--no-emit-index-url", "-c", ROOT / "requirements/app.txt", tmp_path / "in.txt"),
    )
    assert done.returncode == 0, done.stderr
    blocks = re.findall(r"^\S+==(?:.*\\\n)*.*\n", done.stdout, re.MULTILINE)
    new = [block for block in blocks if block.partition("==")[0] in ("email-validator", "dnspython")]
    assert len(new) == 2
    (tmp_path / "app.txt").write_text(lock + "".join(new))
    app = tmp_path / "project/app"
    app.mkdir(parents=True)
    (app / "__init__.py").write_text("")
    done = build(tmp_path / "x.zip", target=host(LAMBDA.python), requirements=[tmp_path / "app.txt"], app=app)
    with zipfile.ZipFile(done.path) as archive:
        archive.extractall(tmp_path / "task")
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from pydantic import BaseModel, EmailStr
class A(BaseModel): e: EmailStr
print(A(e="a@example.com"))
"""
    ran = subprocess.run(
        [interpreter(LAMBDA.python), "-I", "-S", "-c", program, tmp_path / "task"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "a@example.com" in ran.stdout
