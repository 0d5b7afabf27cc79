"""Builds that fail: each with one sentence, and without a file that is left behind."""

from __future__ import annotations

import os
import re
import struct
import subprocess

import pytest

from app.autocrud.errors import ConfigError
from infra import app_files, artifact
from infra.artifact import LAMBDA, ROOT, Target, build, interpreter
from tests.infra.artifact.directories import names


def elf(machine: int) -> bytes:
    """Return the start of a 64-bit little-endian ELF library."""
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HH", 3, machine) + bytes(44)


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
def test_an_error_of_uv_is_one_sentence_and_leaves_nothing(
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
def test_a_zip_that_lambda_would_refuse_is_refused(cache, small_app, tmp_path, content, message):
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


def test_files_that_are_too_large_unpacked_are_not_copied(cache, small_app, tmp_path, monkeypatch):
    monkeypatch.setattr(app_files, "copy", lambda *_: pytest.fail("it copies"))
    with (small_app / "sparse.bin").open("wb") as file:
        file.truncate(artifact.MAX_UNPACKED)
    with pytest.raises(ConfigError, match=r"the largest parts are app/sparse\.bin 262,144,000, "):
        build(tmp_path / "x.zip", app=small_app, cache=cache)
    assert names(tmp_path) == ["small"]


def test_bytecode_counts_for_the_limit(cache, small_app, tmp_path, monkeypatch):
    """The size of bytecode is unknown until the modules are compiled."""
    packages = build(tmp_path / "x.zip", app=small_app, cache=cache).unpacked
    monkeypatch.setattr(artifact, "MAX_UNPACKED", packages - 1)
    with pytest.raises(ConfigError, match="bytes unpacked, and Lambda takes"):
        build(tmp_path / "x.zip", app=small_app, cache=cache)


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
