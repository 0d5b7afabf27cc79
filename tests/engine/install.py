"""Get the `pulumi` commands that the tests run: from PATH, from the user's cache, or built from Go's module proxy.

`make pulumi` calls this; `make test` only uses a CLI that exists. Two versions are used, each pinned with all its
modules and their checksums in `cli/*/go.sum`:

    newest   the newest CLI that can be built; a `pulumi` on PATH takes its place if its version is supported
    oldest   the oldest CLI that is supported

A version is built once, into `$XDG_CACHE_HOME/crudstack/pulumi/VERSION/pulumi` (`~/.cache` by default).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests import go_build

MODULES = Path(__file__).with_name("cli")
COMMAND = "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"
NAMES = ("newest", "oldest")


def pinned(name: str) -> str:
    """Return the version of the CLI that a module in `cli/` pins, "3.276.0"."""
    found = re.search(r"github\.com/pulumi/pulumi/pkg/v3 v([\d.]+)", (MODULES / name / "go.mod").read_text())
    assert found is not None, f"cli/{name}/go.mod requires no pulumi"
    return found[1]


def cached(version: str) -> Path:
    """Return the path of a built CLI of this version, also if it does not exist yet."""
    return go_build.cache("pulumi", version, "pulumi")


def find(name: str) -> Path | None:
    """Return the `pulumi` to test with, or None if there is none. `name` is "newest" or "oldest". Never builds."""
    on_path = shutil.which("pulumi")
    if name == "newest" and on_path is not None and _supported(_version(Path(on_path))):
        return Path(on_path)
    built = cached(pinned(name))
    return built if built.exists() else None


def _version(pulumi: Path) -> str:
    with tempfile.TemporaryDirectory() as home:  # the CLI writes a log of each command there
        environment = {**os.environ, "PULUMI_HOME": home, "PULUMI_SKIP_UPDATE_CHECK": "true"}
        done = subprocess.run([pulumi, "version"], env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip().removeprefix("v")


def _supported(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest = re.match(r"(\d+)\.(\d+)", pinned("oldest"))
    assert oldest is not None
    return numbers is not None and tuple(map(int, numbers.groups())) >= tuple(map(int, oldest.groups()))


def build(name: str) -> Path:
    """Build a CLI into the user's cache and return its path. Raises SystemExit with one sentence if that fails."""
    version = pinned(name)
    linked = f"-X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=v{version}"
    return go_build.build(
        f"pulumi {version}", COMMAND, MODULES / name, cached(version), linked=linked, instead=", or pulumi itself"
    )


def main() -> None:
    for name in NAMES:
        pulumi = find(name) or build(name)
        print(f"pulumi {_version(pulumi)} ({name} to be tested): {pulumi}")


if __name__ == "__main__":
    main()
