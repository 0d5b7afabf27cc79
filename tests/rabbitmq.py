"""A RabbitMQ server for the tests: a process on free loopback ports, in a temporary directory, stopped by its pid.

An installed rabbitmq-server is used. Without one, apt-get fetches the packages of this Debian or Ubuntu, and they are
unpacked below `.local/rabbitmq`, where the state and the cache of apt-get lie too. That happens once, without root, and
changes nothing in the system. `python -m tests.rabbitmq` does it in advance.

`TEST_AMQP_URL` names another server to use. `TEST_RABBITMQ` has the address of the server in use, for processes that a
test starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from tests.debian import Missing, libraries, unpacked

START_TIMEOUT_S = 90.0
INSTALLED = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""The script that the command of the packages starts. Users other than rabbitmq need it."""
NEEDED = ("rabbitmq-server", "erlang-", "libssl", "libsctp", "libtinfo")
"""The packages that the server depends on and that a system with Python may lack."""


# The programs


class Programs(NamedTuple):
    """The commands that start the server and its port mapper."""

    server: Sequence[str]
    epmd: str
    environment: Mapping[str, str]


def programs() -> Programs:
    command = INSTALLED if os.access(INSTALLED, os.X_OK) else shutil.which("rabbitmq-server")
    if command is not None:
        epmd = shutil.which("epmd") or next(map(str, Path("/usr/lib/erlang").glob("erts-*/bin/epmd")), None)
        if epmd is None:
            raise Missing(f"{command} is there, but Erlang's epmd is not on PATH")
        return Programs([command], epmd, {})
    notice = "RabbitMQ for the tests: fetching the packages of this system, 35 MB, once ..."
    return _unpacked(unpacked("rabbitmq-server", "rabbitmq", NEEDED, notice))


def _unpacked(root: Path) -> Programs:
    """Return the programs of the unpacked packages, and the environment that their shell scripts would set.

    The scripts themselves only work in the directory that the packages are meant for, and with paths without spaces.
    """
    erlang, (home,) = root / "usr/lib/erlang", (root / "usr/lib/rabbitmq/lib").glob("rabbitmq_server-*")
    (binaries,) = (path.parent for path in erlang.glob("erts-*/bin/erlexec"))
    environment = {
        "ROOTDIR": str(erlang),
        "BINDIR": str(binaries),
        "EMU": "beam",
        "PROGNAME": "erl",
        "ERL_LIBS": str(home / "plugins"),
        "ERL_MAX_ETS_TABLES": "50000",
        "RABBITMQ_HOME": str(home),
        "RABBITMQ_PLUGINS_DIR": str(home / "plugins"),
        "SYS_PREFIX": "",
        "LD_LIBRARY_PATH": libraries(root),
    }
    boot = "-noinput -s rabbit boot -boot start_sasl +W w +sbwt none +sbwtdcpu none +sbwtdio none"
    quiet = ["-syslog", "logger", "[]", "-syslog", "syslog_error_logger", "false"]
    command = [str(binaries / "erlexec"), *boot.split(), *quiet, "-kernel", "prevent_overlapping_partitions", "false"]
    return Programs(command, str(binaries / "epmd"), environment)


# The server


class RabbitMQ:
    """A server that can be stopped and started again on its port, without data of before. `url` contains a password.

    With `certificates` (ca.pem, server.pem, server.key in that directory) there is `tls_url` too.
    """

    def __init__(self, directory: Path, certificates: Path | None = None) -> None:
        self._directory, self._programs, self._certificates = directory, programs(), certificates
        self.port, self.tls_port, self._dist_port, self._epmd_port = _free_ports(4)
        self.key = "mq-secret/1"  # with a character that URLs must encode
        login = f"crud:{quote(self.key, safe='')}"
        self.url = f"amqp://{login}@127.0.0.1:{self.port}/"
        self.tls_url = f"amqps://{login}@localhost:{self.tls_port}/"
        self.process: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        data, home = self._directory / "data", self._directory / "home"
        shutil.rmtree(data, ignore_errors=True)
        home.mkdir(exist_ok=True)
        (self._directory / "rabbitmq.conf").write_text(self._settings())
        (self._directory / "enabled_plugins").write_text("[].\n")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_", "NOTIFY_"))
        } | {
            **self._programs.environment,
            "HOME": str(home),  # where the cookie is
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_CRASH_DUMP": str(self._directory / "crash"),
            "RABBITMQ_NODENAME": f"crudstack-{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(data),
            "RABBITMQ_LOG_BASE": str(self._directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(self._directory / "rabbitmq"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self._directory / "advanced"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._directory / "enabled_plugins"),
        }
        with (self._directory / "output").open("w") as output:
            if self._epmd is None:  # without one, Erlang starts its own, which no test stops
                command = [self._programs.epmd, "-address", "127.0.0.1", "-port", str(self._epmd_port)]
                self._epmd = subprocess.Popen(
                    command,
                    env=environment,
                    cwd="/",
                    stdout=output,
                    stderr=output,
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
                )
                _until_it_listens(self._epmd_port, self._epmd, self._log)
            loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
            command = list(self._programs.server)
            if len(command) > 1:
                command += loopback.split()
            else:
                environment["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] = loopback
            # A session of its own, because the script of an installed server starts it as its child.
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509
            )

    def _settings(self) -> str:
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "default_user": "crud",
            "default_pass": self.key,
            "disk_free_limit.absolute": "1MB",  # no alarm stops it on a small machine
            "vm_memory_high_watermark.relative": "0.9",
            "log.file.level": "warning",
            "log.console": "false",
        }
        if self._certificates is not None:
            settings |= {
                "listeners.ssl.1": f"127.0.0.1:{self.tls_port}",
                "ssl_options.cacertfile": self._certificates / "ca.pem",
                "ssl_options.certfile": self._certificates / "server.pem",
                "ssl_options.keyfile": self._certificates / "server.key",
                "ssl_options.verify": "verify_none",
            }
        return "".join(f"{name} = {value}\n" for name, value in settings.items())

    def wait(self) -> None:
        assert self.process is not None
        for port in (self.port, self.tls_port) if self._certificates else (self.port,):
            _until_it_listens(port, self.process, self._log)

    def _log(self) -> str:
        files = [self._directory / "output", *sorted((self._directory / "log").glob("*.log"))]
        return "".join(file.read_text(errors="replace")[-2000:] for file in files if file.exists())

    def kill(self, with_: int = signal.SIGKILL) -> None:
        """Kill the server."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, with_)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop(self) -> None:
        """Kill the server and its port mapper."""
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None

    def restart(self) -> None:
        self.kill()
        self.start()


def _die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (prctl PR_SET_PDEATHSIG, SIGKILL)."""
    ctypes.CDLL(None).prctl(1, 9)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def _until_it_listens(port: int, process: subprocess.Popen[bytes], log) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"RabbitMQ did not start: {log()}")
        time.sleep(0.05)


@contextlib.contextmanager
def running(directory: Path, certificates: Path | None = None) -> Iterator[RabbitMQ]:
    """Run a server for one test or module. The test fails if no server can be started."""
    try:
        server = RabbitMQ(directory, certificates)
    except Missing as error:
        pytest.fail(
            f"{error}\nInstall the package rabbitmq-server, name a server in TEST_AMQP_URL, or deselect these tests:"
            " make test ARGS=\"-m 'not rabbitmq'\"",
            pytrace=False,
        )
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server."""
    if given := os.environ.get("TEST_AMQP_URL"):
        os.environ["TEST_RABBITMQ"] = given
        yield given
        return
    with running(tmp_path_factory.mktemp("rabbitmq")) as server:
        os.environ["TEST_RABBITMQ"] = server.url
        yield server.url


def main() -> None:
    """Fetch the packages if they are missing, and check that the server starts."""
    with tempfile.TemporaryDirectory(prefix="crudstack-rabbitmq-") as directory:
        try:
            server = RabbitMQ(Path(directory))
        except Missing as error:
            sys.exit(f"{error}\nInstall the package rabbitmq-server.")
        try:
            server.start()
            print(f"RabbitMQ starts: {server._programs.server[0]}")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
