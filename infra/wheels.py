"""Install the locked wheels, and remove the files that Lambda does not need.

Every package keeps its modules, its data, `METADATA`, `entry_points.txt` and licences. So `importlib.metadata` knows
its version and finds plugins, as on any machine. More files are removed only from the packages and versions in `TRIED`,
which the tests run without these files. A package of another version, or one that the user added, keeps everything.
"""

from __future__ import annotations

import csv
import fnmatch
import os
import re
import struct
import subprocess
from collections.abc import Iterator, Sequence
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from app.autocrud.errors import ConfigError
from infra.pythons import Target, uv

ADVICE = {
    "wheels": "`make lock` takes newer versions, which may have a wheel",
    "Hash mismatch": "`make lock` writes new hashes",
    "Failed to fetch": "Check the network",
}
"""The advice for an error of uv that contains these words."""


class Tried(NamedTuple):
    """A version of a package that the tests run without the files that these patterns match."""

    version: str
    unneeded: tuple[str, ...] = ()


TYPES = ("*.pyi", "*/py.typed")
SOURCES = ("*.h", "*.pxd", "*.pyx")
TRIED = {
    "aio-pika": Tried("10.2.1", TYPES),
    "aiormq": Tried("7.2.4", TYPES),
    "annotated-doc": Tried("0.0.7", TYPES),
    "annotated-types": Tried("0.8.0", TYPES),
    "anyio": Tried("4.16.0", (*TYPES, "anyio/_backends/_trio.py", "anyio/pytest_plugin.py")),  # the loop is asyncio's
    "apsw": Tried(
        "3.54.1.0",
        (
            *TYPES,
            "apsw/__main__.py",
            "apsw/_unicode.*",  # with what imports it: text search and helpers for interactive use
            "apsw/bestpractice.py",
            "apsw/ext.py",
            "apsw/fts*",
            "apsw/shell.py",
            "apsw/speedtest.py",
            "apsw/sqlite_extra*",  # SQLite's command line tools, as programs and extensions
            "apsw/tests/*",
            "apsw/trace.py",
            "apsw/unicode.py",
        ),
    ),
    "fastapi": Tried("0.165.0", (*TYPES, "fastapi/.agents/*", "fastapi/testclient.py")),
    "idna": Tried("3.20", TYPES),
    "mangum": Tried("0.22.0", TYPES),
    "msgspec": Tried("0.22.0", TYPES),
    "multidict": Tried("7.2.1", (*TYPES, *SOURCES)),
    "obstore": Tried("0.12.1", (*TYPES, "obstore/fsspec.py")),
    "opentelemetry-api": Tried("1.45.2", TYPES),
    "pamqp": Tried("4.0.1", TYPES),
    "propcache": Tried("0.5.4", (*TYPES, *SOURCES)),
    "psycopg": Tried("3.3.9", TYPES),
    "psycopg-binary": Tried("3.3.9", TYPES),
    # FastAPI only asks whether a model is one of v1, and is content without.
    "pydantic": Tried("2.14.3", (*TYPES, "pydantic/mypy.py", "pydantic/v1/*")),
    "pydantic-core": Tried("2.50.4", TYPES),
    "redis": Tried("8.1.0", TYPES),
    "starlette": Tried("1.10.0", (*TYPES, "starlette/testclient.py")),
    "typing-extensions": Tried("4.16.0"),
    "typing-inspection": Tried("0.4.5", TYPES),
    "uuid-utils": Tried("1.2.0", TYPES),
    "yarl": Tried("1.25.1", (*TYPES, *SOURCES)),
}
"""The packages of requirements/app*.txt. A test keeps both equal: after `make lock` run the tests, then change this."""

OF_THIS_INSTALLATION = frozenset({"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json"})
"""Files of a `.dist-info` that differ between machines and installers."""
METADATA = re.compile(r"METADATA$|entry_points\.txt$|LICEN[CS]E|COPYING|NOTICE|AUTHORS", re.IGNORECASE)
"""The files that are kept from the `.dist-info` of a package in `TRIED`."""
ELF = b"\x7fELF\x02\x01"
"""The first bytes of a 64-bit, little-endian library."""


def install(directory: Path, target: Target, python: Path, requirements: Sequence[Path]) -> None:
    """Install locked wheels into a directory. Raises ConfigError if uv cannot install one of them."""
    cross = ("--python-platform", target.platform, "--python-version", target.python) if target.platform else ()
    done = uv(
        *("pip", "install", "--quiet", "--python", python, *cross, "--only-binary", ":all:"),
        *("--target", directory, "--require-hashes", "--no-deps"),
        *(argument for path in requirements for argument in ("-r", path.absolute())),
    )
    if done.returncode:
        raise ConfigError(
            f"uv cannot install the wheels of {', '.join(map(str, requirements))} for"
            f" {target.platform or 'this machine'} and Python {target.python}: {_reason(done)}"
        )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the error of uv in one line, with advice if there is any for it."""
    lines = [re.sub(r"^[^\w`]*((error|cause): )?", "", line) for line in done.stderr.splitlines()]
    said = "; ".join(line.rstrip(" .") for line in lines if line) or f"it ended with {done.returncode}"
    advice = next((advice for words, advice in ADVICE.items() if words in said), None)
    return f"{said}. {advice}" if advice else said


def keep_needed(installed: Path, tree: Path, python: Path) -> list[str]:
    """Move the files that Lambda needs from the installed packages to `tree`. Return their sorted paths."""
    moved = []
    for info in sorted(installed.glob("*.dist-info")):
        name, version = _name_and_version(info)
        tried = TRIED.get(name)
        if tried is not None and tried.version != version:
            tried = None
        kept = [path for path in _recorded(info) if _is_needed(installed, path, tried, python)]
        for path in kept:
            # A file that two packages share has been moved already.
            if (installed / path).exists():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (installed / path).rename(tree / path)
                if tried is not None:
                    _drop_sections(tree / path)
                moved.append(path)
        if tried is None:
            # The files in the zip, sorted and without hashes, so that RECORD does not depend on the installer.
            record = f"{info.name}/RECORD"
            (tree / info.name).mkdir(parents=True, exist_ok=True)
            lines = [f"{_quoted(path)},,\n" for path in sorted({*kept, record})]
            (tree / record).write_text("".join(lines), encoding="utf-8")
            moved.append(record)
    if not moved:
        raise ConfigError(f"{installed} holds no packages, expected those of the requirements")
    return sorted(moved)


def _name_and_version(info: Path) -> tuple[str, str]:
    """Return the name of a package, normalized, and its version."""
    try:
        headers = HeaderParser().parsestr((info / "METADATA").read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(f"the wheel of {info.name} has no METADATA that can be read: {error.strerror}") from None
    return re.sub(r"[-_.]+", "-", str(headers["Name"])).lower(), str(headers["Version"])


def _recorded(info: Path) -> Iterator[str]:
    """Yield the files of a package that lie below the directory of the installation."""
    try:
        with (info / "RECORD").open(encoding="utf-8", newline="") as record:
            paths = sorted({PurePosixPath(row[0]).as_posix() for row in csv.reader(record) if row})
    except OSError as error:
        raise ConfigError(f"the wheel of {info.name} has no RECORD that can be read: {error.strerror}") from None
    yield from (path for path in paths if not path.startswith(("/", "../")) and (info.parent / path).is_file())


def _quoted(path: str) -> str:
    return f'"{path.replace(chr(34), chr(34) * 2)}"' if {",", '"', "\n"} & set(path) else path


def _is_needed(installed: Path, path: str, tried: Tried | None, python: Path) -> bool:
    """Return whether a file of a wheel is used at run time, or its licence requires it in the zip."""
    top, *below = path.split("/")
    if top.endswith(".dist-info"):
        if tried is not None:
            return METADATA.match(below[0]) is not None
        return below[0] not in OF_THIS_INSTALLATION
    if "__pycache__" in below or top == "__pycache__":
        return False
    if top == "bin" and below and _starts(installed / path, python):
        return False
    return tried is None or not any(fnmatch.fnmatchcase(path, pattern) for pattern in tried.unneeded)


def _starts(script: Path, python: Path) -> bool:
    """Return whether a script starts the Python that installed the packages. Lambda does not have this Python."""
    with script.open("rb") as file:
        head = file.read(1024)
    return head.startswith(b"#!") and any(
        os.fsencode(path) in head for path in (python.parent, python.resolve().parent)
    )


def _drop_sections(path: Path) -> None:
    content = path.read_bytes()
    if (without := without_sections(content)) != content:
        # A new file: the installed one may be a hard link into uv's cache.
        mode = path.stat().st_mode
        path.unlink()
        path.write_bytes(without)
        path.chmod(mode)


def without_sections(content: bytes) -> bytes:
    """Return a library without the sections after its segments, which only linkers and debuggers read.

    Returns other files unchanged. `strip` is not used, because the one for another architecture is rarely installed.
    """
    if content[:6] != ELF:
        return content
    headers, size, count = *struct.unpack_from("<Q", content, 32), *struct.unpack_from("<HH", content, 54)
    if not count:
        return content
    ends = (struct.unpack_from("<QQQQ", content, headers + at * size + 8) for at in range(count))
    stripped = bytearray(content[: max(offset + length for offset, _, _, length in ends)])
    struct.pack_into("<Q", stripped, 40, 0)  # the offset of the section headers,
    struct.pack_into("<HHH", stripped, 58, 0, 0, 0)  # and their number: none
    return bytes(stripped)
