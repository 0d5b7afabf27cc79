"""The zip for Lambda: what is in it, that it is the same every time, and that it runs."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from app.autocrud.errors import ConfigError
from infra import app_files, artifact
from infra.artifact import LAMBDA, ROOT, Target, build, host, interpreter, report
from infra.pythons import compile_modules

MAGIC_313 = struct.pack("<H", 3571) + b"\r\n"
UNCHECKED_HASH = 0b01
MAX_SIZE = 12 * 1024 * 1024  # MB as Lambda's quotas count them


def elf(machine: int) -> bytes:
    """The start of a 64-bit little-endian library."""
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HH", 3, machine) + bytes(44)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="session")
def app(tmp_path_factory):
    """The app as it is now: somebody may edit it while the tests run."""
    copy = tmp_path_factory.mktemp("source") / "app"
    shutil.copytree(ROOT / "app", copy)
    return copy


@pytest.fixture(scope="session")
def built(tmp_path_factory, app):
    """The zip for Lambda, from scratch."""
    directory = tmp_path_factory.mktemp("built")
    return build(directory / "out" / "lambda.zip", app=app, cache=directory / "cache")


@pytest.fixture(scope="session")
def cache(built):
    """Where the wheels of `built` are."""
    return built.path.parents[1] / "cache"


@pytest.fixture(scope="session")
def contents(built):
    with zipfile.ZipFile(built.path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.fixture
def small_app(tmp_path):
    """An app of one module."""
    directory = tmp_path / "small" / "app"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("answer = 42\n")
    return directory


def test_every_library_is_for_lambda(contents):
    libraries = {name: content for name, content in contents.items() if re.search(r"\.so\b", name)}
    assert {name.partition("/")[0] for name in libraries} >= {"apsw", "msgspec", "obstore", "pydantic_core"}
    for name, content in libraries.items():
        assert content[:4] == b"\x7fELF", name
        assert struct.unpack_from("<H", content, 18) == (183,), name
        assert name.endswith((".cpython-313-aarch64-linux-gnu.so", ".abi3.so")) or ".libs/" in name, name
    assert not [name for name in contents.keys() - libraries if contents[name].startswith(b"\x7fELF")]


def test_two_builds_from_scratch_are_equal_byte_for_byte(built, app, tmp_path):
    """The second in another directory, by another process, in another environment."""
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
    """`marshal` writes down which objects are shared: a module alone must not come out otherwise than among hundreds."""
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fast.cpython-313-aarch64-linux-gnu.so", elf(62), "is for x86_64, expected aarch64"),
        ("plain.so", elf(62), "is for x86_64, expected aarch64"),
        ("libz-1a2b.so.1.3", elf(62), "is for x86_64, expected aarch64"),
        ("program", elf(62), "is for x86_64, expected aarch64"),
        ("odd.abi3.so", elf(243), "is for ELF machine 243, expected aarch64"),
        ("text.abi3.so", b"# no library\n", "is no 64-bit ELF library"),
        (
            "old.cpython-312-aarch64-linux-gnu.so",
            elf(183),
            "is for cpython-312-aarch64-linux-gnu, expected cpython-313-",
        ),
        (
            "free.cpython-313t-aarch64-linux-gnu.so",
            elf(183),
            "is for cpython-313t-aarch64-linux-gnu, expected cpython-313-",
        ),
        (
            "musl.cpython-313-aarch64-linux-musl.so",
            elf(183),
            "is for cpython-313-aarch64-linux-musl, expected cpython-313-",
        ),
    ],
)
def test_a_library_that_lambda_cannot_load_is_found(cache, small_app, tmp_path, name, content, message):
    (small_app / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^app/{re.escape(name)} {message}"):
        build(tmp_path / "x.zip", app=small_app, cache=cache)
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize("name", ["a.abi3.so", "a.cpython-313-aarch64-linux-gnu.so", "libz-1a2b.so.1.3"])
def test_a_library_that_lambda_can_load_is_accepted(cache, small_app, tmp_path, name):
    (small_app / name).write_bytes(elf(183))
    assert build(tmp_path / "x.zip", app=small_app, cache=cache).size > 0


def test_a_wheel_for_another_machine_is_found_and_not_kept(small_app, tmp_path, monkeypatch):
    def install(directory, *_):
        info = directory / "fast-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fast\nVersion: 1.0\n")
        (info / "RECORD").write_text("fast.abi3.so,,\n")
        (directory / "fast.abi3.so").write_bytes(elf(62))

    monkeypatch.setattr(artifact, "install", install)
    with pytest.raises(ConfigError, match=r"^fast\.abi3\.so is for x86_64, expected aarch64"):
        build(tmp_path / "x.zip", app=small_app, cache=tmp_path / "cache")
    assert names(tmp_path) == ["cache", "small"]
    assert names(tmp_path / "cache") == []


ZEROS = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("requirement", "environment", "reason", "advice"),
    [
        ("LOCKED", {}, f"Hash mismatch for .*{ZEROS}", "`make lock` writes new hashes"),
        ("docopt==0.6.2", {}, "docopt==0.6.2 has no usable wheels", "`make lock` takes newer versions, .*"),
        ("msgspec==99.0", {}, "there is no version of msgspec==99.0", None),
        ("LOCKED", {"UV_INDEX_URL": "http://127.0.0.1:9/", "UV_NO_CACHE": "1"}, "Failed to fetch", "Check the network"),
    ],
)
def test_what_uv_says_of_a_requirement_is_one_sentence_and_leaves_nothing(
    app, tmp_path, monkeypatch, requirement, environment, reason, advice
):
    for name, value in {"UV_HTTP_RETRIES": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    requirements = tmp_path / "app.txt"
    version = re.search(r"^msgspec==\S+", (ROOT / "requirements/app.txt").read_text(), re.MULTILINE)[0]
    requirements.write_text(f"{requirement.replace('LOCKED', version)} --hash={ZEROS}\n")
    with pytest.raises(ConfigError) as raised:
        build(tmp_path / "x.zip", requirements=[requirements], app=app, cache=tmp_path / "cache")
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.startswith(
        f"uv cannot install the wheels of {requirements} for aarch64-manylinux_2_28 and Python 3.13: "
    )
    assert re.search(reason, sentence), sentence
    assert ". " not in sentence if advice is None else re.search(rf"\. {advice}$", sentence), sentence
    assert names(tmp_path) == ["app.txt", "cache"]
    assert names(tmp_path / "cache") == []


def test_a_build_that_is_interrupted_leaves_nothing(app, cache, tmp_path, monkeypatch):
    out = tmp_path / "out" / "lambda.zip"
    out.parent.mkdir()
    out.write_bytes(b"the last one")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "_described", interrupted)
    before = names(cache)
    with pytest.raises(KeyboardInterrupt):
        build(out, app=app, cache=cache)
    assert names(cache) == before
    assert names(out.parent) == ["lambda.zip"]
    assert out.read_bytes() == b"the last one"


def test_without_the_interpreter_there_is_a_sentence(app, tmp_path):
    with pytest.raises(ConfigError) as raised:
        build(tmp_path / "x.zip", target=Target(LAMBDA.platform, "3.99"), app=app, cache=tmp_path / "cache")
    assert str(raised.value) == (
        "Python 3.99 is needed to compile for Lambda and is not on this machine: "
        "get it with `uv python install 3.99`, then build again"
    )
    assert names(tmp_path) == []


def test_programs_that_are_not_the_interpreter_they_are_named_after_are_passed_over(tmp_path, monkeypatch):
    for place, says in {
        "fails": "exit 127",
        "lies": 'echo \'["cpython", "/bin/false", [3, 12, 1, "final", 0]]\'',
    }.items():
        shim = tmp_path / place / "python3.13"
        shim.parent.mkdir()
        shim.write_text(f"#!/bin/sh\n{says}\n")
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "fails"), str(tmp_path / "lies"), os.environ["PATH"]]))
    found = interpreter("3.13")
    assert tmp_path not in found.parents
    assert subprocess.check_output([found, "-V"], text=True).startswith("Python 3.13.")


def test_an_unknown_platform_is_refused(app, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^the platform is 'windows', expected one that starts with aarch64 or x86_64$"
    ):
        build(tmp_path / "x.zip", target=Target("windows", "3.13"), app=app)


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
    (small_app / ".#edited.py").symlink_to("somebody@somewhere")
    with zipfile.ZipFile(build(tmp_path / "x.zip", app=small_app, cache=cache).path) as archive:
        deployed = {name for name in archive.namelist() if name.startswith("app/") and "__pycache__" not in name}
    assert deployed == {"app/__init__.py", "app/page.html", "app/more/cli.py"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: os.urandom(artifact.MAX_ZIPPED),
            (
                r"^the zip has 6[0-9,]+ bytes zipped, and Lambda takes 52,412,416 at most; the largest parts are"
                r" app/data 5[0-9,]+, obstore 4,[0-9,]+, pydantic_core [0-9,]+, "
            ),
        ),
        (
            lambda: bytes(artifact.MAX_UNPACKED),
            (
                r"^the zip has 2[0-9,]+ bytes unpacked, and Lambda takes 262,144,000 at most; the largest parts are"
                r" app/data 262,144,000, obstore "
            ),
        ),
    ],
    ids=["zipped", "unpacked"],
)
def test_what_lambda_would_refuse_is_refused_here(cache, small_app, tmp_path, content, message):
    (small_app / "data").mkdir()
    (small_app / "data/a.bin").write_bytes(content())
    out = tmp_path / "out" / "x.zip"
    out.parent.mkdir()
    out.write_bytes(b"the last one")
    with pytest.raises(ConfigError, match=message) as raised:
        build(out, app=small_app, cache=cache)
    assert "\n" not in str(raised.value)
    assert names(out.parent) == ["x.zip"]
    assert out.read_bytes() == b"the last one"


def test_what_is_too_large_unpacked_is_not_even_copied(cache, small_app, tmp_path, monkeypatch):
    monkeypatch.setattr(app_files, "copy", lambda *_: pytest.fail("it copies"))
    with (small_app / "sparse.bin").open("wb") as file:
        file.truncate(artifact.MAX_UNPACKED)
    with pytest.raises(ConfigError, match=r"the largest parts are app/sparse\.bin 262,144,000, "):
        build(tmp_path / "x.zip", app=small_app, cache=cache)
    assert names(tmp_path) == ["small"]


def test_bytecode_counts_for_the_limit(cache, small_app, tmp_path, monkeypatch):
    """Its size is not known before it is made."""
    packages = build(tmp_path / "x.zip", app=small_app, cache=cache).unpacked
    monkeypatch.setattr(artifact, "MAX_UNPACKED", packages - 1)
    with pytest.raises(ConfigError, match="bytes unpacked, and Lambda takes"):
        build(tmp_path / "x.zip", app=small_app, cache=cache)


def test_what_was_left_out_is_reported_and_makes_no_other_zip(cache, small_app, tmp_path):
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
    """The zip with other contents, or compressed otherwise."""
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
    """It is what runs then."""
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


@pytest.mark.parametrize("target", ["file", "directory"])
def test_links_are_not_followed(cache, small_app, tmp_path, target):
    secret = tmp_path / "secret" / "key.py"
    secret.parent.mkdir()
    secret.write_text("key = 1")
    (small_app / "link").symlink_to(secret if target == "file" else secret.parent)
    with pytest.raises(ConfigError, match="/app/link is a symbolic link, expected a file"):
        build(tmp_path / "x.zip", app=small_app, cache=cache)


def test_an_app_that_does_not_compile_is_not_deployed(cache, small_app, tmp_path):
    (small_app / "broken.py").write_text("def f(:\n")
    with pytest.raises(
        ConfigError, match=r"^the app does not compile with Python 3\.13\.\d+: /var/task/app/broken\.py: invalid"
    ):
        build(tmp_path / "x.zip", app=small_app, cache=cache)


def test_an_app_that_is_not_there_is_a_sentence(cache, tmp_path):
    with pytest.raises(ConfigError, match="/nothing holds no files"):
        build(tmp_path / "x.zip", app=tmp_path / "nothing", cache=cache)
    with pytest.raises(ConfigError, match=r"/none\.txt cannot be read: No such file"):
        build(tmp_path / "x.zip", requirements=[tmp_path / "none.txt"], cache=cache)


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


@pytest.fixture(scope="session", params=sorted({host().python, LAMBDA.python}))
def python(request):
    """Versions to run on this machine: this one, which runs the app here, and Lambda's."""
    return request.param


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory, app, python):
    """A build for this machine, as it would lie on Lambda."""
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
    """Isolated: only the unpacked files and the standard library can be imported."""
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
    """This is what tells unchecked hashes from the others, and that the check above would notice."""
    changed = tmp_path / "task"
    shutil.copytree(unpacked, changed)
    (changed / "app/main.py").write_text("raise AssertionError('this was read')\n")
    run(python, changed, "print('unpacked and running')")
    shutil.rmtree(changed / "app/__pycache__")
    with pytest.raises(AssertionError, match=r"__init__\.py is compiled from source"):
        run(python, changed, "print('unpacked and running')")


RUNTIME = {"boto3", "botocore", "snapshot_restore_py"}
"""What Lambda's own machine has."""
DRIVERS = {"aio_pika", "psycopg", "redis", "yarl"}
"""Of single storages: only the zips for those have them."""


def imported(unpacked):
    """What the app imports, also late."""
    modules = set()
    for path in (unpacked / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module)
    return {module for module in modules if module.partition(".")[0] not in RUNTIME}


def test_unpacked_all_that_the_app_imports_is_there(python, unpacked):
    """Also from wheels of which parts were left out."""
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
    """`build` looks at every library."""
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
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
             "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "headers": headers,
             "client": ("127.0.0.1", 1), "server": ("x", 80)}
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
