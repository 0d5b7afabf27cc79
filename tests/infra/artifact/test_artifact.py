"""The zip for Lambda: its contents, and that equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from app.autocrud.errors import ConfigError
from infra import artifact
from infra.artifact import LAMBDA, ROOT, build, host, interpreter, report
from infra.pythons import compile_modules
from tests.infra.artifact.directories import names

MAGIC_313 = struct.pack("<H", 3571) + b"\r\n"
UNCHECKED_HASH = 0b01
MAX_SIZE = 13 * 1024 * 1024  # MB as Lambda's quotas count them


def test_every_library_is_for_lambda(contents):
    libraries = {name: content for name, content in contents.items() if re.search(r"\.so\b", name)}
    assert {name.partition("/")[0] for name in libraries} >= {"apsw", "msgspec", "obstore", "pydantic_core"}
    for name, content in libraries.items():
        assert content[:4] == b"\x7fELF", name
        assert struct.unpack_from("<H", content, 18) == (183,), name
        assert name.endswith((".cpython-313-aarch64-linux-gnu.so", ".abi3.so")) or ".libs/" in name, name
    assert not [name for name in contents.keys() - libraries if contents[name].startswith(b"\x7fELF")]


def test_two_builds_from_scratch_are_equal_byte_for_byte(built, app, tmp_path):
    """The second build runs in another directory, process and environment."""
    arguments = {"app": app, "cache": tmp_path / "another cache"}
    program = (
        "import os, sys; from pathlib import Path; from infra.artifact import build\n"
        "list_ = os.listdir; os.listdir = lambda path: list_(path)[::-1]\n"  # file systems have no order
        "class Reversed(list):\n"
        "    __enter__ = lambda self: self\n"
        "    __exit__ = lambda self, *_: None\n"
        "scan = os.scandir; os.scandir = lambda path='.': Reversed(list(scan(path))[::-1])\n"
        "out, app, cache = map(Path, sys.argv[1:]); print(build(out, app=app, cache=cache).sha256)"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "4711",
        "PYTHONOPTIMIZE": "2",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, "another.zip", *map(str, arguments.values())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        umask=0o077,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "another.zip").read_bytes() == built.path.read_bytes()
    assert done.stdout.strip() == built.sha256 == hashlib.sha256(built.path.read_bytes()).hexdigest()


def test_the_same_inputs_again_do_not_ask_uv(built, app, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "install", lambda *_: pytest.fail("the wheels are there"))
    again = build(tmp_path / "new" / "again.zip", app=app, cache=cache)
    assert again == built._replace(path=again.path)
    assert again.path.read_bytes() == built.path.read_bytes()
    assert names(again.path.parent) == ["again.zip"]


def test_other_requirements_are_other_wheels(app, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "install", lambda *_: pytest.fail("asked"))
    changed = tmp_path / "app.txt"
    changed.write_text((ROOT / "requirements/app.txt").read_text() + "# one more line\n")
    with pytest.raises(pytest.fail.Exception, match="asked"):
        build(tmp_path / "x.zip", requirements=[changed], app=app, cache=cache)


def test_entries_tell_nothing_of_when_and_where(built):
    with zipfile.ZipFile(built.path) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted({info.filename for info in infos})
    for info in infos:
        assert info.date_time == (1980, 1, 1, 0, 0, 0)
        assert info.external_attr >> 16 == (0o100755 if info.filename.endswith(".so") else 0o100644)
        assert (info.create_system, info.compress_type, info.extra) == (3, zipfile.ZIP_DEFLATED, b"")
        assert not info.is_dir()


def test_every_module_has_bytecode_that_is_never_checked(contents):
    modules = {name for name in contents if name.endswith(".py")}
    compiled = {name for name in contents if name.endswith(".pyc")}
    assert "app/main.py" in modules
    assert compiled == {re.sub(r"([^/]+)\.py$", r"__pycache__/\1.cpython-313.pyc", name) for name in modules}
    for name in compiled:
        magic, flags, source_hash = struct.unpack_from("<4sI8s", contents[name])
        source = re.sub(r"__pycache__/(.+)\.cpython-313\.pyc$", r"\1.py", name)
        assert (magic, flags) == (MAGIC_313, UNCHECKED_HASH), name
        if importlib.util.MAGIC_NUMBER == MAGIC_313:
            assert source_hash == importlib.util.source_hash(contents[source]), name
        assert f"/var/task/{source}".encode() in contents[name]


def test_no_path_of_this_machine_is_in_any_bytecode(contents, app, built, cache):
    here = {str(path) for path in (ROOT, app, built.path.parent, cache, sys.prefix, interpreter("3.13").parent)}
    here |= {f"{tempfile.gettempdir()}/", f"{Path.home()}/", ".artifact-", ".building-"}
    for name, content in contents.items():
        if name.endswith(".pyc"):
            assert not [path for path in here if path.encode() in content], name


@pytest.mark.parametrize("module", ["app/main.py", "app/autocrud/core.py", "starlette/routing.py"])
def test_bytecode_does_not_depend_on_what_was_compiled_before(contents, module, tmp_path):
    """`marshal` records which objects are shared. A module compiled alone must equal one compiled among hundreds."""
    source = tmp_path / module
    source.parent.mkdir(parents=True)
    source.write_bytes(contents[module])
    assert compile_modules(tmp_path, [module], LAMBDA, interpreter("3.13")) == []
    compiled = f"{source.parent.relative_to(tmp_path)}/__pycache__/{source.stem}.cpython-313.pyc"
    assert (tmp_path / compiled).read_bytes() == contents[compiled]


def test_nothing_is_in_it_that_lambda_does_not_need(contents):
    tops = {name.partition("/")[0].partition("-")[0] for name in contents}
    assert {"app", "fastapi", "msgspec", "apsw", "obstore"} <= tops
    assert not {"boto3", "botocore", "pulumi", "pytest", "uvicorn", "tests", "infra", "bin"} & tops
    parts = {part for name in contents for part in name.split("/")}
    assert not {"tests", "test", ".env", ".lock", "py.typed", "RECORD", "sqlite_extra_binaries"} & parts
    assert (
        not {
            "app/cli.py",
            "app/server/http_answers.py",
            "app/server/http_protocol.py",
            "app/dev/local_s3.py",
            "app/server/overload.py",
            "app/server/serve.py",
        }
        & contents.keys()
    )
    assert not [name for name in contents if name.startswith("app/autocrud/testing/")]
    assert not [name for name in contents if name.endswith((".pyi", ".c", ".h"))]
    assert {name.split(".")[-2] for name in contents if name.endswith(".pyc")} == {"cpython-313"}


def test_licences_are_passed_on(contents):
    described = {name for name in contents if ".dist-info/" in name}
    licences = {
        name
        for name in described
        if re.match(r"(LICEN[CS]E|COPYING|NOTICE|AUTHORS)", name.split("/")[1], re.IGNORECASE)
    }
    assert len({name.partition("/")[0] for name in licences}) >= 15
    assert {name.split("/")[1] for name in described - licences} == {"METADATA", "entry_points.txt"}


def test_it_is_small(built):
    assert built.size == built.path.stat().st_size <= MAX_SIZE


def test_the_report_adds_up(built, contents):
    *rows, total, missing, compiled, where = report(built).splitlines()
    sizes = {name: int(size.replace(",", "")) for size, name in (row.split(maxsplit=1) for row in rows)}
    headers = sizes.pop("(headers of the zip)")
    assert sizes == built.parts
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert sum(sizes.values()) + headers == built.size
    assert total.split() == [f"{built.size:,}", "total,", f"{built.unpacked:,}", "unpacked"]
    assert missing == "nothing was left out"
    assert compiled == f"compiled by Python {built.python}, contents sha256 {built.contents}"
    assert re.fullmatch(r"3\.13\.\d+", built.python)
    assert where == f"{built.path} sha256 {built.sha256}"
    assert built.unpacked == sum(map(len, contents.values()))


def test_files_of_the_app_that_are_private_stay_here(cache, small_app, tmp_path):
    for name in (
        ".env",
        "prod.env",
        "cli.py",
        "dev/local_s3.py",
        "py.typed",
        ".git/config",
        "page.html",
        "more/cli.py",
    ):
        (small_app / name).parent.mkdir(exist_ok=True)
        (small_app / name).write_text("")
    (small_app / ".#edited.py").symlink_to("editor@host")
    with zipfile.ZipFile(build(tmp_path / "x.zip", app=small_app, cache=cache).path) as archive:
        deployed = {name for name in archive.namelist() if name.startswith("app/") and "__pycache__" not in name}
    assert deployed == {"app/__init__.py", "app/page.html", "app/more/cli.py"}


def test_a_zip_that_is_there_is_not_built_again(cache, small_app, tmp_path, monkeypatch):
    (small_app / "prod.env").write_text("secret")
    out = tmp_path / "x.zip"
    first = build(out, app=small_app, cache=cache)
    monkeypatch.setattr(artifact, "compile_modules", None)
    assert build(out, app=small_app, cache=cache) == first
    moved = tmp_path / "y.zip"
    out.rename(moved)
    assert build(moved, app=small_app, cache=cache) == first._replace(path=moved)


@pytest.mark.parametrize("damage", ["the zip", "no zip", "the description", "the app"])
def test_a_zip_that_is_not_that_of_the_inputs_is_built_again(cache, small_app, tmp_path, damage):
    out = tmp_path / "x.zip"
    (small_app / "own.py").write_text(f"text = {damage!r}\n")  # the tests share the cache
    known = set(cache.iterdir())
    first = build(out, app=small_app, cache=cache)
    (description,) = {*cache.iterdir()} - known
    match damage:
        case "the zip":
            out.write_bytes(out.read_bytes()[:-1] + b"x")
        case "no zip":
            out.unlink()
        case "the description":
            description.write_text("{")
        case "the app":
            (small_app / "own.py").write_text(f"text = {damage[::-1]!r}\n")
    again = build(out, app=small_app, cache=cache)
    assert again.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (again == first) == (damage != "the app")


def test_left_out_files_are_reported_and_do_not_change_the_zip(cache, small_app, tmp_path):
    before = build(tmp_path / "x.zip", app=small_app, cache=cache)
    (small_app.parent / ".gitignore").write_text("*.json\n")
    for name in ("a.json", "prod.env", "models.py~", "node_modules/x/i.js"):
        (small_app / name).parent.mkdir(parents=True, exist_ok=True)
        (small_app / name).write_text("secret")
    after = build(tmp_path / "x.zip", app=small_app, cache=cache)
    assert after.sha256 == before.sha256
    assert report(after).splitlines()[-3] == (
        "left out: models.py~ (an editor's or a tool's copy); a.json (git ignores it);"
        " prod.env (may hold secrets); node_modules/ (of Node.js)"
    )


def rewritten(path, target, change=lambda _, content: content, *, level=9):
    """Write the zip with changed contents or another compression level, and return the hash of its contents."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist()[::-1]:
            content = change(info, old.read(info))
            if content is not None:
                new.writestr(info, content, zipfile.ZIP_DEFLATED, level)
    return artifact.contents(target)


def test_how_a_zip_is_compressed_is_no_other_content(built, tmp_path):
    other = tmp_path / "other.zip"
    assert rewritten(built.path, other, level=1) == built.contents == artifact.contents(built.path)
    assert other.read_bytes() != built.path.read_bytes()


def test_bytecode_of_another_patch_release_is_no_other_content(built, tmp_path):
    def recompiled(info, content):
        return content + b"0" if info.filename.endswith(".pyc") else content

    assert rewritten(built.path, tmp_path / "other.zip", recompiled) == built.contents


@pytest.mark.parametrize("name", ["app/models.py", "app/__pycache__/models.cpython-313.pyc"])
@pytest.mark.parametrize("change", ["first byte", "removed", "permissions", "name"])
def test_everything_else_is_other_content(built, tmp_path, name, change):
    def changed(info, content):
        if info.filename != name:
            return content
        if change == "permissions":
            info.external_attr = 0o100755 << 16
        if change == "name":
            info.filename = info.filename.replace("models", "others")
        return {"first byte": b"#" + content[1:], "removed": None}.get(change, content)

    assert rewritten(built.path, tmp_path / "other.zip", changed) != built.contents


def test_bytecode_without_its_source_counts_as_a_whole(cache, small_app, tmp_path):
    """Python runs such bytecode."""
    found = []
    for content in (bytes(32), bytes(31) + b"x"):
        (small_app / "sourceless.pyc").write_bytes(content)
        found.append(build(tmp_path / "x.zip", app=small_app, cache=cache).contents)
    assert found[0] != found[1]


def test_every_checkout_has_the_same_bytes(tmp_path):
    """Also with core.autocrlf, as Git for Windows sets it."""
    clone = tmp_path / "clone"
    options = ("-c", "core.autocrlf=true", "-c", "core.eol=crlf")
    subprocess.run(["git", "clone", "--quiet", *options, ROOT, clone], check=True)
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=clone, check=True, capture_output=True, text=True).stdout
    assert not [line for line in listed.splitlines() if "crlf" in line.split("\t")[0].replace("eol=", "")]
    lines = [line for line in listed.splitlines() if line.endswith("app/models.py")]
    assert [line.split()[:2] for line in lines] == [["i/lf", "w/lf"]]


@pytest.mark.parametrize(
    ("arguments", "target", "out"),
    [
        ([], LAMBDA, ROOT / "dist/lambda.zip"),
        (["--host"], host(), ROOT / "dist/lambda-host.zip"),
        (["--host", "--out", "here.zip"], host(), Path("here.zip")),
    ],
)
def test_the_command_line(monkeypatch, capsys, arguments, target, out):
    def pretended(path, *, target):
        asked.append((path, target))
        return artifact.Artifact(path, "00ff", 30, 40, {"app": 20})

    asked = []
    monkeypatch.setattr(artifact, "build", pretended)
    monkeypatch.setattr(sys, "argv", ["artifact", *arguments])
    artifact.main()
    assert asked == [(out, target)]
    assert "total, 40 unpacked" in capsys.readouterr().out


def test_the_command_line_fails_with_a_sentence(monkeypatch, capsys):
    def failing(*_, **__):
        raise ConfigError("something is missing")

    monkeypatch.setattr(artifact, "build", failing)
    monkeypatch.setattr(sys, "argv", ["artifact"])
    with pytest.raises(SystemExit) as ended:
        artifact.main()
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "something is missing\n")
