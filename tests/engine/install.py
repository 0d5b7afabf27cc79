"""Get the `pulumi` commands that the tests run: from PATH, from the user's cache, or built from Go's module proxy.

`make pulumi` calls this; `make test` only looks for what is there. Two versions are used, each pinned with all its
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
import sys
import tempfile
import time
from pathlib import Path

MODULES = Path(__file__).with_name("cli")
COMMAND = "github.com/pulumi/pulumi/pkg/v3/cmd/pulumi"
NAMES = ("newest", "oldest")


def pinned(name: str) -> str:
    """Return the version of the CLI that a module in `cli/` pins, "3.276.0"."""
    found = re.search(r"github\.com/pulumi/pulumi/pkg/v3 v([\d.]+)", (MODULES / name / "go.mod").read_text())
    assert found is not None, f"cli/{name}/go.mod requires no pulumi"
    return found[1]


def cached(version: str) -> Path:
    """Return where a built CLI of this version lies, whether or not it is there."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "crudstack/pulumi" / version / "pulumi"


def find(name: str) -> Path | None:
    """Return the `pulumi` to test with, or None. `name`: "newest" or "oldest". Never builds."""
    on_path = shutil.which("pulumi")
    if name == "newest" and on_path is not None and _supported(_version(Path(on_path))):
        return Path(on_path)
    built = cached(pinned(name))
    return built if built.exists() else None


def _version(pulumi: Path) -> str:
    with tempfile.TemporaryDirectory() as home:  # where it writes a log of each command
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
    target = cached(version)
    if shutil.which("go") is None:
        raise SystemExit(
            f"pulumi {version} is not in {target.parent} and cannot be built, because there is no `go` on PATH: install"
            " Go, or pulumi itself, and run `make pulumi` again"
        )
    module = MODULES / name
    # Neither a workspace nor flags of the user change what is built.
    environment = {**os.environ, "GOWORK": "off", "GOFLAGS": "-mod=readonly", "CGO_ENABLED": "0"}
    print(f"pulumi {version}: fetching its modules", file=sys.stderr, flush=True)
    listed = subprocess.run(
        ["go", "list", "-deps", COMMAND], cwd=module, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if listed.returncode:
        raise SystemExit(f"pulumi {version} cannot be built: go could not fetch its modules, as it says above")
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    # Under its own name it is complete: a build that is killed leaves nothing there.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as scratch:
        built = Path(scratch, "pulumi")
        flags = f"-s -w -X github.com/pulumi/pulumi/sdk/v3/go/common/version.Version=v{version}"
        command = ["go", "build", "-v", "-trimpath", "-ldflags", flags, "-o", str(built), COMMAND]
        _watched(command, module, environment, len(listed.stdout.split()), f"pulumi {version}")
        built.replace(target)
    print(f"pulumi {version}: built in {time.monotonic() - start:.0f} s, {target}", file=sys.stderr)
    return target


def _watched(command: list[str], module: Path, environment: dict[str, str], packages: int, label: str) -> None:
    """Run `go build -v`, which names each package that it compiled, and show how far it is."""
    said: list[str] = []
    shown, terminal = -1, sys.stderr.isatty()
    with subprocess.Popen(command, cwd=module, env=environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            said.append(line.rstrip())
            tenth = 10 * len(said) // packages
            if terminal:
                bar = "#" * (3 * tenth)
                print(f"\r{label}: [{bar:<30}] {len(said)} of up to {packages} packages", end="", file=sys.stderr)
            elif tenth > shown:
                print(f"{label}: {len(said)} of up to {packages} packages", file=sys.stderr, flush=True)
            shown = tenth
    if terminal and said:
        print(file=sys.stderr)
    if running.returncode:
        raise SystemExit("\n".join([*said[-5:], f"{label} could not be built, see above"]))


def main() -> None:
    for name in NAMES:
        pulumi = find(name) or build(name)
        print(f"pulumi {_version(pulumi)} ({name} to be tested): {pulumi}")


if __name__ == "__main__":
    main()
