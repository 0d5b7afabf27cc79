"""`make` sets up a checkout in any directory, also after a move, and names the reason if it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.artifact import ROOT
from tests.engine.checkout import copy_project

NAMES = ['it\'s "one" do$lar', "ha#sh per%cent ünï", "back\\slash am&p;x $(touch x)"]
"""Names of directories with characters that are special to shells, make or Python's launchers."""
NO_ENSUREPIP = """\
The virtual environment was not created successfully because ensurepip is not
available.  On Debian/Ubuntu systems, you need to install the python3-venv
package using the following command.

    apt install python3.11-venv

Failing command: /x/.venv/bin/python3
"""
"""The output of Debian's Python without its package python3-venv."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    directory = tmp_path / "one"
    copy_project(directory)
    (directory / ".venv").unlink(missing_ok=True)
    return directory


def make(directory: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Run make, and return its output. Raises AssertionError for another exit code."""
    # The make that runs the tests passes its own flags on.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", f"PYTHON={sys.executable}", *arguments],
        cwd=directory,
        env={**outer, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def runs(directory: Path) -> bool:
    """Return True if the command of a checkout starts, and runs the code of this checkout."""
    command = directory / ".venv/bin/crudstack"
    if subprocess.run([command, "--help"], cwd="/", capture_output=True, check=False).returncode:
        return False
    where = [directory / ".venv/bin/python", "-c", "import app; print(app.__path__[0])"]
    return subprocess.run(where, cwd="/", capture_output=True, text=True, check=True).stdout.startswith(f"{directory}/")


def test_a_checkout_that_was_moved_is_set_up_again(checkout: Path) -> None:
    make(checkout, ".venv/.local")
    assert runs(checkout)
    moved = checkout.rename(checkout.with_name("two"))
    make(moved, ".venv/.local")
    assert runs(moved)
    assert "is up to date" in make(moved, ".venv/.local")


def test_a_copy_of_a_checkout_does_not_change_the_original(checkout: Path) -> None:
    make(checkout, ".venv/.local")
    other = checkout.with_name("two")
    subprocess.run(["cp", "-a", checkout, other], check=True)
    make(other, ".venv/.local")
    assert runs(other)
    assert runs(checkout)
    assert "is up to date" in make(checkout, ".venv/.local")


def test_an_environment_of_another_checkout_is_not_cleared(checkout: Path) -> None:
    """The environment is a link to that of a checkout that was moved, so it does not work unchanged."""
    make(checkout, ".venv/.venv")
    other = checkout.with_name("two")
    copy_project(other)
    (other / ".venv").unlink(missing_ok=True)
    (other / ".venv").symlink_to(checkout / ".venv")
    (checkout / ".venv/.venv").write_text("elsewhere\n")
    (checkout / ".venv/kept").touch()
    make(other, ".venv/.venv")
    assert (checkout / ".venv/kept").exists()
    assert not (other / ".venv").is_symlink()


def python_is_gone(venv: Path) -> None:
    for program in venv.glob("bin/python*"):
        program.unlink()
        program.symlink_to("/usr/lib/a-python-that-was-removed")


def python_is_another(venv: Path) -> None:
    """Break the environment as an upgrade of python3 does: packages are below the old version number."""
    (library,) = (venv / "lib").glob("python3*")
    library.rename(library.with_name("python3.2"))


def setup_was_interrupted(venv: Path) -> None:
    (venv / ".venv").write_text("")


def it_is_no_environment(venv: Path) -> None:
    (venv / "pyvenv.cfg").unlink()


@pytest.mark.parametrize("damage", [python_is_gone, python_is_another, setup_was_interrupted, it_is_no_environment])
def test_an_environment_that_does_not_work_is_made_again(checkout: Path, damage: Callable[[Path], None]) -> None:
    make(checkout, ".venv/.local")
    damage(checkout / ".venv")
    make(checkout, ".venv/.local")
    assert runs(checkout)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkout_works_in_a_directory_of_any_name(checkout: Path, name: str) -> None:
    (checkout.parent / name).mkdir()
    moved = checkout.rename(checkout.parent / name / "c")
    make(moved, ".venv/.local")
    assert runs(moved)
    assert [path.name for path in moved.parent.iterdir()] == ["c"]


def test_a_path_with_a_colon_is_refused_by_name(checkout: Path) -> None:
    moved = checkout.rename(checkout.with_name("10:15"))
    said = make(moved, "setup-infra", code=2)
    assert f"this checkout lies in {moved}, and Python makes no virtual environment below a path with a colon" in said
    assert "venv:" not in said


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (NO_ENSUREPIP, "it has no ensurepip, which is in the package python3-venv of Debian and Ubuntu"),
        ("Some words first.\nError: [Errno 28] No space left on device", "Error: [Errno 28] No space left on device"),
    ],
)
def test_the_reason_of_the_tool_is_shown(checkout: Path, printed: str, reason: str) -> None:
    python = checkout.parent / "python3"
    python.write_text(f"#!/bin/sh\n[ \"$1\" != -m ] || {{ cat <<'END'\n{printed}\nEND\nexit 1; }}\n")
    python.chmod(0o755)
    said = make(checkout, f"PYTHON={python}", ".venv/.venv", code=2)
    assert said.splitlines()[0] == f"'{python}' cannot make a virtual environment: {reason}"
    assert not (checkout / ".venv").exists()


def test_a_failure_of_ensurepip_is_not_its_absence(checkout: Path) -> None:
    """Python itself names only the command that failed."""
    python = checkout.parent / "python3"
    command = (
        "Error: Command '['/x/.venv/bin/python', '-m', 'ensurepip', '--upgrade']' returned non-zero exit status 1."
    )
    full = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    made = (
        f"#!/bin/sh\necho '{full}'\necho\necho Traceback\necho '  File'\necho subprocess.CalledProcessError\nexit 1\n"
    )
    (checkout.parent / "made").write_text(made)
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] || exit 0\nmkdir -p .venv/bin\n'
        "cp ../made .venv/bin/python\nchmod +x .venv/bin/python\n"
        f'echo "{command}"\nexit 1\n'
    )
    python.chmod(0o755)
    said = make(checkout, f"PYTHON={python}", ".venv/.venv", code=2)
    assert said.splitlines()[0] == f"'{python}' cannot make a virtual environment: {full}"
    assert not (checkout / ".venv").exists()


def test_the_error_of_pip_is_shown(checkout: Path) -> None:
    """The program uv is not installed, and no package index answers."""
    path = checkout.parent / "bin"
    path.mkdir()
    for program in ("sh", "make", "cat", "test", "rm", "mv", "tail"):
        (path / program).symlink_to(next(p for d in ("/usr/bin", "/bin") if (p := Path(d, program)).exists()))
    closed = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1", "PIP_FIND_LINKS": ""}
    said = make(checkout, ".venv/.venv", code=2, PATH=str(path), **closed)
    assert "ERROR: No matching distribution found for uv" in said
    assert "pip cannot install uv, for the reason above" in said


def test_the_error_of_uv_is_shown(checkout: Path) -> None:
    make(checkout, ".venv/.venv")
    (checkout / "requirements/local.txt").write_text("no-such-package==1.0 --hash=sha256:" + "0" * 64 + "\n")
    said = make(checkout, ".venv/.local", code=2, UV_OFFLINE="1")
    assert "no-such-package" in said


def test_a_uv_that_does_not_work_is_ignored(checkout: Path) -> None:
    """Version managers leave such programs on PATH."""
    shims = checkout.parent / "shims"
    shims.mkdir()
    (shims / "uv").write_text("#!/bin/sh\necho 'pyenv: uv: command not found' >&2\nexit 127\n")
    (shims / "uv").chmod(0o755)
    # This replaces the uv that pip would install, which needs an index.
    (checkout / "requirements/uv.txt").write_text("")
    uv = Path(subprocess.run(["sh", "-c", "command -v uv"], capture_output=True, text=True, check=False).stdout.strip())
    make(checkout, ".venv/.venv")
    (checkout / ".venv/bin/uv").symlink_to(uv if uv.name else ROOT / ".venv/bin/uv")
    make(checkout, ".venv/.local", PATH=os.pathsep.join([str(shims), os.environ["PATH"]]))
    assert runs(checkout)
