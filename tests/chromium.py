"""A real browser for the tests: headless Chromium, one process for each page, stopped by its pid.

An installed chromium is used. Otherwise the packages of this Debian or Ubuntu are fetched and unpacked below
`.local/chromium`, once, without root. `python -m tests.chromium` does that in advance.

The browser resolves only the host names that a test gives it, all of them to 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.debian import Missing, libraries, unpacked
from tests.not_run import not_run

OPTIONS = (
    "--headless",
    "--no-sandbox",  # it shows only pages of these tests, and containers have no user namespaces
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
NAMES = ("localhost", "evil.example", "app.example")
# The C library of the system is used, because it fits the system's loader.
WITHOUT = ("libc6", "libc-bin", "libgcc", "gcc-", "debconf", "dpkg")
PAGE_TIMEOUT_S = 60


@functools.cache
def program() -> tuple[str, Mapping[str, str]]:
    """Return Chromium's executable and the environment that it needs. Raises Missing if it cannot be installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found, {}
    notice = "Chromium for the tests: fetching the packages, 200 MB, once ..."
    root = unpacked("chromium", "chromium", ("",), notice, WITHOUT)
    below = [str(path) for path in root.glob("usr/lib/*-linux-gnu*/pulseaudio")]
    return str(root / "usr/lib/chromium/chromium"), {"LD_LIBRARY_PATH": ":".join([*below, libraries(root)])}


@contextlib.contextmanager
def browser(url: str, *options: str) -> Iterator[Path]:
    """Show the page of a URL inside the context. Yields the file with the browser's output and the page's console."""
    try:
        executable, environment = program()
    except Missing as error:
        not_run(f"a browser: {error}")
    with tempfile.TemporaryDirectory(prefix="crudstack-chromium-", ignore_cleanup_errors=True) as home:
        said = Path(home, "said")
        names = ", ".join(f"MAP {name} 127.0.0.1" for name in NAMES)
        arguments = (
            *(f"--user-data-dir={home}/profile", f"--host-resolver-rules={names}, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
            *("--remote-debugging-port=0", *OPTIONS, *options, url),
        )
        with said.open("w") as log:
            process = subprocess.Popen(
                [executable, *arguments],
                env={**os.environ, **environment, "HOME": home, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield said
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it
            process.wait()


def dumped(url: str) -> tuple[str, str]:
    """Return the document of a page after its scripts ran, and the output of the browser."""
    try:
        executable, environment = program()
    except Missing as error:
        not_run(f"a browser: {error}")
    with tempfile.TemporaryDirectory(prefix="crudstack-chromium-", ignore_cleanup_errors=True) as home:
        done = subprocess.run(
            [
                *(executable, f"--user-data-dir={home}/profile", *OPTIONS),
                *("--virtual-time-budget=20000", "--dump-dom", url),
            ],
            env={**os.environ, **environment, "HOME": home, "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=PAGE_TIMEOUT_S,
            check=True,
        )
    return done.stdout, done.stderr


if __name__ == "__main__":
    print(program()[0])
