"""The zip that Lambda runs: the wheels of requirements/app*.txt for its machine, the app, and bytecode for both.

The same inputs give the same bytes, so an unchanged app is no change to deploy. `python -m infra.artifact` builds it and says what is large.

>>> artifact = build(Path("dist/lambda.zip"))
>>> print(report(artifact))
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from app.autocrud.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
"""Part of the cache's key: raise it when what this file calls (uv, the compiler) makes something else from the same inputs."""

TASK = "/var/task"
"""Where Lambda unpacks the zip."""


class Target(NamedTuple):
    """What the wheels are for."""

    platform: str | None
    """As uv's --python-platform names it; None is this machine."""
    python: str
    """Major and minor version, "3.13"."""


LAMBDA = Target("aarch64-manylinux_2_28", "3.13")

MACHINES = {"aarch64": 183, "x86_64": 62}
"""`e_machine` of the ELF header by what a platform's name starts with."""


class Artifact(NamedTuple):
    """A zip and what is in it; sizes in bytes."""

    path: Path
    sha256: str
    size: int
    unpacked: int
    parts: dict[str, int]
    """The zipped contents by top-level name: {"obstore": 5110407, "app": ...}. The zip's own headers are not among them."""


# What wheels bring that nothing imports on Lambda: with their tests and metadata a fifth of them, zipped. The tests run the app without it.
UNNEEDED = (
    "bin/*",
    "*.pyi",
    "*/py.typed",
    *(f"*.{suffix}" for suffix in ("a", "c", "cc", "cpp", "h", "hpp", "pxd", "pxi", "pyx", "rs")),
    "*/testclient.py",
    "anyio/_backends/_trio.py",  # the loop is asyncio's
    "anyio/pytest_plugin.py",
    "apsw/__main__.py",
    "apsw/_unicode.*",  # with what imports it: text search and helpers for interactive use
    "apsw/bestpractice.py",
    "apsw/ext.py",
    "apsw/fts*",
    "apsw/shell.py",
    "apsw/speedtest.py",
    "apsw/sqlite_extra*",  # SQLite's command line tools, as programs and extensions
    "apsw/trace.py",
    "apsw/unicode.py",
    "obstore/fsspec.py",
    "pydantic/mypy.py",
    "pydantic/v1/*",  # FastAPI only asks whether a model is one of these, and is content without
)
ELF = b"\x7fELF\x02\x01"
"""How a library for 64 bits, little-endian, begins."""
LICENCES = re.compile(r"LICEN[CS]E|COPYING|NOTICE|AUTHORS", re.IGNORECASE)
ASK_FOR_THEIR_VERSION = ("psycopg-",)
"""Packages that look up their own version at run time."""
NOT_DEPLOYED = (
    "cli.py",
    "connections.py",
    "http_answers.py",
    "http_protocol.py",
    "local_s3.py",
    "overload.py",
    "server.py",
    "stack.py",
)
"""Modules of the app for a person's own machine."""


def host(python: str | None = None) -> Target:
    """A build for this machine and, unless said otherwise, this Python: to try out here what Lambda would run."""
    return Target(None, python or f"{sys.version_info.major}.{sys.version_info.minor}")


def build(
    out: Path,
    *,
    target: Target = LAMBDA,
    requirements: Sequence[Path] = (ROOT / "requirements/app.txt",),
    app: Path = ROOT / "app",
    cache: Path = ROOT / ".local/artifacts",
) -> Artifact:
    """Write the zip to `out`. ConfigError if something is missing or does not fit; then `out` is as it was.

    requirements: files of locked wheels, what all storages need and a file for each driver.

    The wheels are kept below `cache` and made again only when something that they depend on has changed.
    """
    if target.platform is not None and _architecture(target) not in MACHINES:
        raise ConfigError(f"the platform is {target.platform!r}, expected one that starts with {' or '.join(MACHINES)}")
    python, release = _interpreter(target.python)
    wheels = _wheels(target, python, release, requirements, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".artifact-", dir=out.parent) as name:
        scratch, written = Path(name, "scratch"), Path(name, "zip")
        # A copy, because somebody may be editing: source and bytecode in the zip must be of the same state.
        for path in _files(app, _deployed):
            copy = scratch / "app" / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(app / path, copy)
        failed = _compile(scratch, target, python)
        if failed:
            raise ConfigError(f"the app does not compile with Python {release}: {'; '.join(failed)}")
        shutil.copyfile(wheels, written)
        _add(written, scratch)
        artifact = _described(written, target)
        written.replace(out)
    return artifact._replace(path=out)


def report(artifact: Artifact) -> str:
    """What is in the zip, the largest first, in zipped bytes."""
    rows = sorted(artifact.parts.items(), key=lambda part: (-part[1], part[0]))
    rows.append(("(headers of the zip)", artifact.size - sum(artifact.parts.values())))
    lines = [f"{size:>12,}  {name}" for name, size in rows]
    total = f"{artifact.size:>12,}  total, {artifact.unpacked:,} unpacked"
    return "\n".join([*lines, total, f"{artifact.path} sha256 {artifact.sha256}"])


def interpreter(version: str) -> Path:
    """A CPython of this minor version: this one, one on PATH, pyenv's, or uv's, which installs it if it can. ConfigError without one."""
    return _interpreter(version)[0]


def _interpreter(version: str) -> tuple[Path, str]:
    """With its exact version, which decides about the bytecode."""
    for candidate in _candidates(version):
        found = _probe(candidate)
        if found is not None and found[1].rpartition(".")[0] == version:
            return found
    raise ConfigError(
        f"Python {version} is needed to compile for Lambda and is not on this machine: "
        f"get it with `uv python install {version}`, then build again"
    )


def _candidates(version: str) -> Iterator[Path]:
    """Programs that may be this Python, the cheapest to ask first."""
    yield Path(sys.executable)
    for directory in os.get_exec_path():
        yield Path(directory or ".") / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    versions = (pyenv / "versions").glob(f"{version}.*/bin/python")
    yield from sorted(versions, key=lambda path: [int(number) for number in re.findall(r"\d+", path.parts[-3])])[::-1]
    # Only its own: others are on PATH, and a shim there that does not work (pyenv's) makes uv give up.
    yield from _said_by_uv("python", "find", "--managed-python", version)
    _said_by_uv("python", "install", version)
    yield from _said_by_uv("python", "find", "--managed-python", version)


def _said_by_uv(*arguments: str) -> list[Path]:
    """The path that uv prints; none if it fails, or is not here."""
    try:
        done = _uv(*arguments)
    except ConfigError:
        return []
    return [Path(line) for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _probe(python: Path) -> tuple[Path, str] | None:
    """Where this program really is and its exact version, if it runs and is a released CPython with the usual ABI.

    Programs on PATH may be shims that fail, or that depend on the directory they are called in.
    """
    ask = "import json, sys; print(json.dumps([sys.implementation.name + sys.abiflags, sys.executable, list(sys.version_info)]))"
    try:
        done = subprocess.run([python, "-I", "-S", "-c", ask], capture_output=True, text=True, check=False, timeout=60)
        kind, executable, (major, minor, micro, level, _) = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return (Path(executable), f"{major}.{minor}.{micro}") if (kind, level) == ("cpython", "final") else None


def _uv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    uv = Path(shutil.which("uv") or Path(sys.executable).with_name("uv"))
    if not uv.exists():
        raise ConfigError(f"uv is neither on PATH nor at {uv}: `make setup` installs it")
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return subprocess.run([uv, *arguments], capture_output=True, text=True, check=False, env=environment)


def _wheels(target: Target, python: Path, release: str, requirements: Sequence[Path], cache: Path) -> Path:
    """A zip of the installed wheels without what is not needed, with bytecode. Most of the time goes into it, so it is kept."""
    try:
        wanted = [path.read_bytes() for path in requirements]
    except OSError as error:
        raise ConfigError(f"the requirements {error.filename} cannot be read: {error.strerror}") from None
    machine = target.platform or sysconfig.get_platform()
    key = repr((FORMAT, Path(__file__).read_bytes(), target, machine, release, zlib.ZLIB_RUNTIME_VERSION, wanted))
    kept = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.zip"
    if kept.exists():
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    # Under its name it is complete: a build that is killed leaves none, and two at once write the same.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as name:
        installed, tree, written = Path(name, "installed"), Path(name, "tree"), Path(name, "zip")
        _install(installed, target, python, requirements)
        for path in _files(installed, _needed):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (installed / path).rename(tree / path)
        _compile(tree, target, python)  # what fails is no module: packages may hold templates
        _add(written, tree)
        _described(written, target)
        written.replace(kept)
    return kept


def _install(directory: Path, target: Target, python: Path, requirements: Sequence[Path]) -> None:
    cross = ("--python-platform", target.platform, "--python-version", target.python) if target.platform else ()
    done = _uv(
        *("pip", "install", "--quiet", "--python", python, *cross, "--only-binary", ":all:"),
        *("--target", directory, "--require-hashes", "--no-deps"),
        *(argument for path in requirements for argument in ("-r", path.absolute())),
    )
    if done.returncode:
        # The first line says what failed, the last one how.
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [
            f"it ended with {done.returncode}"
        ]
        reason = said[-1] if len(said) == 1 else f"{said[0]} ... {said[-1]}"
        raise ConfigError(
            f"uv cannot install the wheels of {', '.join(map(str, requirements))} for {target.platform or 'this machine'} and Python {target.python}, "
            f"check the network, or run `make lock` if a version has no wheel: {reason}"
        )


def _files(root: Path, wanted: Callable[[str], bool] = lambda _path: True) -> list[str]:
    """The files below `root`, as sorted paths with slashes. Links are refused: where they lead may not be ours to publish."""
    found = []
    for directory, directories, files in os.walk(root):
        links = [name for name in directories if Path(directory, name).is_symlink()]
        for name in files + links:
            path = Path(directory, name)
            relative = path.relative_to(root).as_posix()
            if not wanted(relative):
                continue
            if path.is_symlink():
                raise ConfigError(f"{path} is a symbolic link, expected a file: put what it leads to in its place")
            found.append(relative)
    if not found:
        raise ConfigError(f"{root} holds no files, expected those of the zip")
    return sorted(found)


def _needed(path: str) -> bool:
    """Whether a file of a wheel is used at run time, or must be passed on with it."""
    top, *below = path.split("/")
    if top.endswith(".dist-info"):
        return bool(LICENCES.match(below[0])) or (below[0] == "METADATA" and top.startswith(ASK_FOR_THEIR_VERSION))
    if not {"__pycache__", "tests", "test", ".agents", ".lock"}.isdisjoint((top, *below)):
        return False
    return not any(fnmatch.fnmatchcase(path, pattern) for pattern in UNNEEDED)


def _deployed(path: str) -> bool:
    """Whether a file of the app is for Lambda. Secrets and what editors leave behind are hidden files."""
    if path in NOT_DEPLOYED or path.endswith((".env", ".pyi", "py.typed")):
        return False
    return not any(part == "__pycache__" or part.startswith(".") for part in path.split("/"))


# Bytecode says how its source is recognized. By time, as usual, all of it would count as stale, because the zip's times are fixed, and every
# cold start would compile everything again. By an unchecked hash the source is not even looked at.
#
# It reports what it cannot compile as a list of strings.
COMPILER = """
import json, py_compile, sys
failed = []
for source, compiled, shown in json.load(sys.stdin):
    try:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(source, compiled, shown, doraise=True, invalidation_mode=mode)
    except py_compile.PyCompileError as error:
        failed.append(f"{shown}: {error.exc_value}")
print(json.dumps(failed))
"""


def _compile(tree: Path, target: Target, python: Path) -> list[str]:
    """Put bytecode beside every module below `tree`, as if it lay where Lambda unpacks it. What could not be compiled."""
    suffix = f".cpython-{target.python.replace('.', '')}.pyc"
    jobs = []
    for path in _files(tree):
        if path.endswith(".py"):
            source = tree / path
            compiled = source.parent / "__pycache__" / (source.stem + suffix)
            jobs.append((str(source), str(compiled), f"{TASK}/{path}"))
    # Isolated as by -I, but for the hash seed, which -I would not let through.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-s", "-P", "-S", "-W", "ignore", "-c", COMPILER],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONHASHSEED": "0"},
    )
    if done.returncode:
        raise ConfigError(
            f"Python {target.python} failed while compiling: {done.stderr.strip().rpartition(chr(10))[2]}"
        )
    failed: list[str] = json.loads(done.stdout)
    return failed


def _add(path: Path, tree: Path) -> None:
    """Add the files below `tree` to a zip, in which nothing tells when, where or by whom it was made."""
    with zipfile.ZipFile(path, "a") as archive:
        there = set(archive.namelist())
        for name in _files(tree):
            if name in there:
                raise ConfigError(f"{name} is in the app and in a wheel: rename one of them")
            content = _stripped((tree / name).read_bytes())
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix: the permissions count
            info.external_attr = (0o100755 if _is_native(name, content) else 0o100644) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED, 9)
        archive.filelist.sort(key=lambda info: info.filename)  # the order of the directory that closes the zip


def _stripped(content: bytes) -> bytes:
    """A library without what no loader reads: the sections behind its segments, which only linkers and debuggers look at. Other files as they
    are. (`strip` for another architecture than this machine's is rarely installed.)"""
    if content[:6] != ELF:
        return content
    headers, size, count = *struct.unpack_from("<Q", content, 32), *struct.unpack_from("<HH", content, 54)
    if not count:
        return content
    ends = (struct.unpack_from("<QQQQ", content, headers + at * size + 8) for at in range(count))
    stripped = bytearray(content[: max(offset + length for offset, _, _, length in ends)])
    struct.pack_into("<Q", stripped, 40, 0)  # where the sections are described,
    struct.pack_into("<HHH", stripped, 58, 0, 0, 0)  # and how many there are: none
    return bytes(stripped)


def _described(path: Path, target: Target) -> Artifact:
    """What is in a zip. ConfigError if Lambda could not load it."""
    parts: dict[str, int] = {}
    unpacked = 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                _verify(info.filename, file.read(20), target)
            part = info.filename.partition("/")[0]
            parts[part] = parts.get(part, 0) + info.compress_size
            unpacked += info.file_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Artifact(path, digest, path.stat().st_size, unpacked, parts)


def _architecture(target: Target) -> str:
    return (target.platform or "").partition("-")[0]


def _is_native(name: str, head: bytes) -> bool:
    return head.startswith(b"\x7fELF") or re.search(r"\.so(\.\d+)*$", name) is not None


def _verify(name: str, head: bytes, target: Target) -> None:
    """ConfigError if this is a library that the target cannot load, by its ELF header (20 bytes) and the tag in its name."""
    if target.platform is None or not _is_native(name, head):
        return
    architecture = _architecture(target)
    if head[:6] != ELF:
        raise ConfigError(f"{name} is no 64-bit ELF library, expected one for {architecture}: it does not fit Lambda")
    machine = int.from_bytes(head[18:20], "little")
    if machine != MACHINES[architecture]:
        found = next((known for known, number in MACHINES.items() if number == machine), f"ELF machine {machine}")
        raise ConfigError(f"{name} is for {found}, expected {architecture}: it does not fit Lambda")
    # A library without a tag is not imported but linked to, like those of `*.libs`.
    tag = re.search(r"\.(cpython-[^.]+|abi\d[^.]*|pypy[^.]+)\.so$", name)
    expected = f"cpython-{target.python.replace('.', '')}-{architecture}-linux-gnu"
    if tag is not None and tag[1] not in (expected, "abi3"):
        raise ConfigError(f"{name} is for {tag[1]}, expected {expected} or abi3: it does not fit Lambda")


def main() -> None:
    """Build the zip and say what is in it; one sentence on stderr and exit status 2 if that is not possible."""
    parser = argparse.ArgumentParser(prog="python -m infra.artifact", description="Build the zip that Lambda runs.")
    parser.add_argument("--host", action="store_true", help="for this machine and this Python instead of Lambda's")
    parser.add_argument("--out", type=Path, help="default: dist/lambda.zip, or dist/lambda-host.zip with --host")
    arguments = parser.parse_args()
    out = arguments.out or ROOT / "dist" / ("lambda-host.zip" if arguments.host else "lambda.zip")
    try:
        artifact = build(out, target=host() if arguments.host else LAMBDA)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(report(artifact))


if __name__ == "__main__":
    main()
