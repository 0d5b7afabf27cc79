"""Find the Python to build for, and compile modules with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from app.autocrud.errors import ConfigError

TASK = "/var/task"
"""The directory that Lambda unpacks the zip into."""


class Target(NamedTuple):
    """The machine and the Python that run the zip."""

    platform: str | None
    """A name of uv's --python-platform; None is this machine."""
    python: str
    """Major and minor version, "3.13"."""


LAMBDA = Target("aarch64-manylinux_2_28", "3.13")


def host(python: str | None = None) -> Target:
    """Return a target for this machine, to run the zip here.

    python    the version of Python, such as "3.13"; None: the version of this process
    """
    return Target(None, python or f"{sys.version_info.major}.{sys.version_info.minor}")


class Interpreter(NamedTuple):
    """A Python on this machine."""

    path: Path
    release: str
    """Its exact version, such as "3.13.0", on which the bytecode depends."""


def interpreter(version: str) -> Path:
    """Return a CPython of this minor version: this one, one on PATH, one of pyenv, or one that uv has or installs.

    Raises ConfigError if there is none.
    """
    return find_interpreter(version).path


def find_interpreter(version: str) -> Interpreter:
    """Return a CPython of this minor version with its exact version. Raises ConfigError if there is none."""
    for candidate in _candidates(version):
        found = _probe(candidate)
        if found is not None and found.release.rpartition(".")[0] == version:
            return found
    raise ConfigError(
        f"Python {version} is needed to compile for Lambda and is not on this machine: "
        f"get it with `uv python install {version}`, then build again"
    )


def _candidates(version: str) -> Iterator[Path]:
    """Yield programs that may be this Python, the fastest to find first."""
    yield Path(sys.executable)
    for directory in os.get_exec_path():
        yield Path(directory or ".") / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    versions = (pyenv / "versions").glob(f"{version}.*/bin/python")
    yield from sorted(versions, key=lambda path: [int(number) for number in re.findall(r"\d+", path.parts[-3])])[::-1]
    # Only Pythons that uv manages: a shim on PATH that does not work, such as pyenv's, would make uv fail.
    yield from _said_by_uv("python", "find", "--managed-python", version)
    _said_by_uv("python", "install", version)
    yield from _said_by_uv("python", "find", "--managed-python", version)


def _said_by_uv(*arguments: str) -> list[Path]:
    """Return the paths that uv prints; none if it fails or is not installed."""
    try:
        done = uv(*arguments)
    except ConfigError:
        return []
    return [Path(line) for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _probe(python: Path) -> Interpreter | None:
    """Return the real path and the exact version of a program if it is a released CPython with the usual ABI.

    Returns None if it is another Python or does not run: programs on PATH may be shims that fail, or that depend on the
    working directory.
    """
    ask = (
        "import json, sys;"
        " print(json.dumps([sys.implementation.name + sys.abiflags, sys.executable, list(sys.version_info)]))"
    )
    try:
        done = subprocess.run([python, "-I", "-S", "-c", ask], capture_output=True, text=True, check=False, timeout=60)
        kind, executable, (major, minor, micro, level, _) = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    is_usual = (kind, level) == ("cpython", "final")
    return Interpreter(Path(executable), f"{major}.{minor}.{micro}") if is_usual else None


def uv(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run uv, and return its result. Blocks until it ends. Raises ConfigError if uv is not installed."""
    program = Path(shutil.which("uv") or Path(sys.executable).with_name("uv"))
    if not program.exists():
        raise ConfigError(f"uv is not on PATH and not at {program}: `make setup` installs it")
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment)


# The header of bytecode says how Python recognizes the source. By the time of the source, as usual, all bytecode would
# be stale, because the times in the zip are fixed, and every cold start would compile all modules again. With an
# unchecked hash Python does not read the source.
#
# The program prints the files that it cannot compile as a list of strings.
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


def compile_modules(tree: Path, paths: Sequence[str], target: Target, python: Path) -> list[str]:
    """Write the bytecode of the modules among these files below `tree`, with the paths that they have on Lambda.

    Returns a line for each file that could not be compiled. Raises ConfigError if the compiler itself fails.
    """
    suffix = f".cpython-{target.python.replace('.', '')}.pyc"
    jobs = []
    for path in paths:
        if path.endswith(".py"):
            source = tree / path
            compiled = source.parent / "__pycache__" / (source.stem + suffix)
            jobs.append((str(source), str(compiled), f"{TASK}/{path}"))
    # The same isolation as -I, which would ignore the hash seed.
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
