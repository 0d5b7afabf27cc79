"""The zip that Lambda runs: the wheels of requirements/app*.txt for its machine, the app, and bytecode for both.

The same inputs give the same contents on every machine. `Artifact.contents` is a hash of them, so an unchanged app is
not deployed again. `python -m infra.artifact` builds the zip, and lists its largest parts and the files left out.

>>> artifact = build(Path("dist/lambda.zip"))
>>> print(report(artifact))

app_files.py chooses the files of the app, wheels.py those of the packages, pythons.py compiles.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from app.autocrud.errors import ConfigError
from infra import app_files, pythons, wheels
from infra.app_files import LeftOut
from infra.pythons import LAMBDA, Interpreter, Target, compile_modules, find_interpreter, host, interpreter
from infra.wheels import ELF, install, keep_needed

__all__ = ["LAMBDA", "ROOT", "Artifact", "Target", "build", "contents", "host", "interpreter", "left_out", "report"]

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 2
"""Part of the cache's key. Raise it if uv or the compiler make something else from the same inputs."""

MACHINES = {"aarch64": 183, "x86_64": 62}
"""`e_machine` of the ELF header, by the first part of a platform's name."""

MAX_ZIPPED = 50 * 1024 * 1024 - 16 * 1024
"""Bytes of a zip that Lambda accepts in a request: 50 MB, less 16 KB for the rest of the request."""
MAX_UNPACKED = 262_144_000
"""Unpacked bytes that Lambda allows: 250 MB."""
NAMED = 5
"""Number of parts that an error names, the largest first."""


class Artifact(NamedTuple):
    """A zip, and facts about its contents. Sizes are in bytes."""

    path: Path
    sha256: str
    size: int
    unpacked: int
    parts: dict[str, int]
    """The zipped sizes by top-level name, without the zip's own headers: {"obstore": 5110407, "app": ...}."""
    contents: str = ""
    """A hash, see contents()."""
    python: str = ""
    """The release that compiled the modules, "3.13.0"."""
    left_out: tuple[LeftOut, ...] = ()
    """Files of the app that are not in the zip."""


FOUND_AGAIN = ("path", "python", "left_out")
"""Fields of an Artifact that each build finds, also if it does not write a zip."""


def build(
    out: Path,
    *,
    target: Target = LAMBDA,
    requirements: Sequence[Path] = (ROOT / "requirements/app.txt",),
    app: Path = ROOT / "app",
    cache: Path = ROOT / ".local/artifacts",
) -> Artifact:
    """Write the zip to `out`, and return a description of it. Blocks while uv and the compiler run.

    Raises ConfigError if an input is missing, cannot run on the target, or is too large; `out` is unchanged then.

    out             the path of the zip
    target          the machine and the Python that run the zip
    requirements    files of locked wheels: one for all storages, and one for each driver
    app             the package `app`; its parent is the project, with `.gitignore` and pyproject.toml
    cache           the directory of the zipped wheels, which are made again only if one of their inputs has changed,
                    and of the descriptions of zips: if `out` is the zip of the same inputs, it is not built again
    """
    if target.platform is not None and _architecture(target) not in MACHINES:
        raise ConfigError(f"the platform is {target.platform!r}, expected one that starts with {' or '.join(MACHINES)}")
    python = find_interpreter(target.python)
    selection = app_files.select(app)
    packages = _wheels(target, python, requirements, cache)
    _check_unpacked(_sizes(packages), app, selection)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".artifact-", dir=out.parent) as name:
        scratch, written = Path(name, "scratch"), Path(name, "zip")
        # From a copy, because a file may be edited meanwhile: the bytecode in the zip must belong to its source.
        selection = app_files.copy(app, selection, scratch / "app")
        files = [f"app/{path}" for path in selection.files]
        description = cache / f"{_inputs(packages, scratch, files)}.json"
        if (same := _built_before(out, description)) is not None:
            _check_limits(out, same)
            return same._replace(python=python.release, left_out=tuple(selection.left_out))
        failed = compile_modules(scratch, files, target, python.path)
        if failed:
            raise ConfigError(f"the app does not compile with Python {python.release}: {'; '.join(failed)}")
        shutil.copyfile(packages, written)
        _add(written, scratch)
        artifact = _described(written, target)
        _check_limits(written, artifact)
        written.replace(out)
    _keep_description(artifact, description)
    return artifact._replace(path=out, python=python.release, left_out=tuple(selection.left_out))


def report(artifact: Artifact) -> str:
    """Return a list of the zip's parts in zipped bytes, the largest first, and of the files that were left out."""
    rows = sorted(artifact.parts.items(), key=lambda part: (-part[1], part[0]))
    rows.append(("(headers of the zip)", artifact.size - sum(artifact.parts.values())))
    lines = [f"{size:>12,}  {name}" for name, size in rows]
    total = f"{artifact.size:>12,}  total, {artifact.unpacked:,} unpacked"
    compiled = f"compiled by Python {artifact.python}, contents sha256 {artifact.contents}"
    return "\n".join([*lines, total, left_out(artifact), compiled, f"{artifact.path} sha256 {artifact.sha256}"])


def left_out(artifact: Artifact) -> str:
    """Return in one line which files of the app are not in the zip, and why."""
    return app_files.listed(artifact.left_out)


BYTECODE = re.compile(r"(?:(.*)/)?__pycache__/([^/]+)\.cpython-\d+\.pyc")
PYC_HEADER = 16
"""Bytes before the bytecode itself: its format, how Python recognizes its source, and the hash of the source."""


def contents(path: Path) -> str:
    """Return a hash of the files in a zip: of their names, permissions and bytes, independent of the compression.

    Of a module's bytecode only the header is hashed if the module is in the zip: other patch releases of the same
    Python compile the same source to other bytes with the same meaning.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            compiled = BYTECODE.fullmatch(info.filename)
            source = compiled and "/".join(filter(None, (compiled[1], f"{compiled[2]}.py")))
            with archive.open(info) as file:
                if source in names:
                    hashed = hashlib.sha256(file.read(PYC_HEADER))
                else:
                    hashed = hashlib.sha256()
                    while block := file.read(app_files.BLOCK):
                        hashed.update(block)
            digest.update(f"{info.filename}\0{info.external_attr >> 16:o}\0{hashed.hexdigest()}\n".encode())
    return digest.hexdigest()


def _inputs(packages: Path, scratch: Path, files: Sequence[str]) -> str:
    """Return a hash of what a zip is made from: the wheels, whose name tells their inputs, and the files of the app."""
    hashes = [(name, hashlib.sha256((scratch / name).read_bytes()).hexdigest()) for name in files]
    return hashlib.sha256(repr((packages.name, hashes)).encode()).hexdigest()


def _keep_description(artifact: Artifact, description: Path) -> None:
    """Write the description of a zip for `_built_before`, in one step."""
    facts = {name: value for name, value in artifact._asdict().items() if name not in FOUND_AGAIN}
    with tempfile.TemporaryDirectory(prefix=".building-", dir=description.parent) as scratch:
        written = Path(scratch, description.name)
        written.write_text(json.dumps(facts))
        written.replace(description)


def _built_before(out: Path, description: Path) -> Artifact | None:
    """Return the description of `out` if that is the zip that an earlier build described there."""
    try:
        found = Artifact(**{**json.loads(description.read_text()), "path": out})
        with out.open("rb") as file:
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == found.sha256
    except (OSError, ValueError, TypeError):  # there is none, or it is damaged
        return None
    return found if is_same else None


def _wheels(target: Target, python: Interpreter, requirements: Sequence[Path], cache: Path) -> Path:
    """Return a zip of the wheels with bytecode, without unneeded files. It is cached, because it is slow."""
    try:
        wanted = [path.read_bytes() for path in requirements]
    except OSError as error:
        raise ConfigError(f"the requirements {error.filename} cannot be read: {error.strerror}") from None
    machine = target.platform or sysconfig.get_platform()
    code = [Path(module).read_bytes() for module in (__file__, wheels.__file__, pythons.__file__)]
    key = repr((FORMAT, code, target, machine, python.release, zlib.ZLIB_RUNTIME_VERSION, wanted))
    kept = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.zip"
    if kept.exists():
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    # A zip gets its name when it is complete. A killed build leaves none, and two builds at once write the same zip.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as name:
        installed, tree, written = Path(name, "installed"), Path(name, "tree"), Path(name, "zip")
        install(installed, target, python.path, requirements)
        files = keep_needed(installed, tree, python.path)
        compile_modules(tree, files, target, python.path)  # packages may hold templates, which do not compile
        _add(written, tree)
        _described(written, target)
        written.replace(kept)
    return kept


def _add(path: Path, tree: Path) -> None:
    """Add the files below `tree` to a zip, with fixed times, owners and permissions."""
    with zipfile.ZipFile(path, "a") as archive:
        there = set(archive.namelist())
        for file in sorted(found for found in tree.rglob("*") if found.is_file()):
            name = file.relative_to(tree).as_posix()
            if name in there:
                raise ConfigError(f"{name} is in the app and in a wheel: rename one of them")
            content = file.read_bytes()
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, so that the permissions are read
            is_program = _is_native(name, content) or file.stat().st_mode & 0o100
            info.external_attr = (0o100755 if is_program else 0o100644) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED, 9)
        archive.filelist.sort(key=lambda info: info.filename)  # the order of the central directory, which ends the zip


def _sizes(path: Path) -> dict[str, int]:
    """Return the unpacked bytes of a zip by part: a package, or an entry of the app."""
    sizes: dict[str, int] = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            sizes[_part(info.filename)] = sizes.get(_part(info.filename), 0) + info.file_size
    return sizes


def _part(name: str) -> str:
    return "/".join(name.split("/")[: 2 if name.startswith("app/") else 1])


def _check_unpacked(packages: Mapping[str, int], app: Path, selection: app_files.Selection) -> None:
    """Raise ConfigError, before anything is written, if the zip would have too many unpacked bytes."""
    if sum(packages.values()) + selection.size <= MAX_UNPACKED:
        return
    sizes = dict(packages)
    for path in selection.files:
        part = _part(f"app/{path}")
        sizes[part] = sizes.get(part, 0) + (app / path).stat().st_size
    _refuse(sum(sizes.values()), MAX_UNPACKED, "unpacked", sizes)


def _check_limits(path: Path, artifact: Artifact) -> None:
    """Raise ConfigError if Lambda would refuse this zip."""
    if artifact.unpacked > MAX_UNPACKED:
        _refuse(artifact.unpacked, MAX_UNPACKED, "unpacked", _sizes(path))
    if artifact.size > MAX_ZIPPED:
        sizes: dict[str, int] = {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                sizes[_part(info.filename)] = sizes.get(_part(info.filename), 0) + info.compress_size
        _refuse(artifact.size, MAX_ZIPPED, "zipped", sizes)


def _refuse(found: int, limit: int, how: str, sizes: Mapping[str, int]) -> None:
    largest = sorted(sizes.items(), key=lambda part: (-part[1], part[0]))[:NAMED]
    named = ", ".join(f"{app_files.shown(name)} {size:,}" for name, size in largest)
    raise ConfigError(
        f"the zip has {found:,} bytes {how}, and Lambda takes {limit:,} at most; the largest parts are {named}:"
        " keep data in the bucket, and remove packages that the app does not need"
    )


def _described(path: Path, target: Target) -> Artifact:
    """Return the sizes and hashes of a zip. Raises ConfigError if the target cannot load one of its libraries."""
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
    return Artifact(path, digest, path.stat().st_size, unpacked, parts, contents(path))


def _architecture(target: Target) -> str:
    return (target.platform or "").partition("-")[0]


def _is_native(name: str, head: bytes) -> bool:
    return head.startswith(b"\x7fELF") or re.search(r"\.so(\.\d+)*$", name) is not None


def _verify(name: str, head: bytes, target: Target) -> None:
    """Raise ConfigError if this is a library that the target cannot load.

    head    the first 20 bytes of the file, with the ELF header
    """
    if target.platform is None or not _is_native(name, head):
        return
    architecture = _architecture(target)
    if head[:6] != ELF:
        raise ConfigError(f"{name} is no 64-bit ELF library, expected one for {architecture}: it does not fit Lambda")
    machine = int.from_bytes(head[18:20], "little")
    if machine != MACHINES[architecture]:
        found = next((known for known, number in MACHINES.items() if number == machine), f"ELF machine {machine}")
        raise ConfigError(f"{name} is for {found}, expected {architecture}: it does not fit Lambda")
    # A library without a tag in its name is linked to and not imported, as in `*.libs`.
    tag = re.search(r"\.(cpython-[^.]+|abi\d[^.]*|pypy[^.]+)\.so$", name)
    expected = f"cpython-{target.python.replace('.', '')}-{architecture}-linux-gnu"
    if tag is not None and tag[1] not in (expected, "abi3"):
        raise ConfigError(f"{name} is for {tag[1]}, expected {expected} or abi3: it does not fit Lambda")


def main() -> None:
    """Build the zip and print a report. If that fails, print one sentence on stderr and exit with status 2."""
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
