"""Pulumi's language host for Python programs, for machines that have the CLI alone.

The real one, `pulumi-language-python`, is part of Pulumi's installation and cannot be had from Go's module proxy. This
one does the same for programs in a virtual environment that exists: it names the provider's plugin of the installed
SDK, and runs the program by the SDK's own `pulumi-language-python-exec`, which lies beside this file as the module
github.com/pulumi/pulumi/sdk/v3 has it (Apache License 2.0). It does not install dependencies.

The CLI starts it as `pulumi-language-python ENGINE_ADDRESS` from PATH, and reads its port from stdout.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2, json_format
from pulumi.runtime.proto import language_pb2, language_pb2_grpc, plugin_pb2

EXEC = Path(__file__).with_name("pulumi-language-python-exec")
SHOWN = 32
"""Exit code of a program that has already reported its error to the user."""
FIND_PLUGIN = """
import importlib.util, pathlib
print((pathlib.Path(importlib.util.find_spec("pulumi_aws").origin).parent / "pulumi-plugin.json").read_text())
"""


class LanguageHost(language_pb2_grpc.LanguageRuntimeServicer):
    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._running: subprocess.Popen[bytes] | None = None

    def Handshake(self, request: Any, context: Any) -> Any:
        self._engine = request.engine_address or self._engine
        return language_pb2.LanguageHandshakeResponse()

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo(version="3.0.0")

    def GetRequiredPackages(self, request: Any, context: Any) -> Any:
        command = [_python(request.info), "-c", FIND_PLUGIN]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, found.stderr.strip().rpartition("\n")[2])
        plugin = json.loads(found.stdout)
        package = {"name": plugin["name"], "kind": "resource", "version": "v" + plugin["version"]}
        return json_format.ParseDict({"packages": [package]}, language_pb2.GetRequiredPackagesResponse())

    def Run(self, request: Any, context: Any) -> Any:
        arguments = {
            "monitor": request.monitor_address,
            "engine": self._engine,
            "project": request.project,
            "root_directory": request.info.root_directory,
            "stack": request.stack,
            "pwd": request.pwd,
            "dry_run": str(request.dryRun).lower(),
            "parallel": str(request.parallel),
            "organization": request.organization,
        }
        python = _python(request.info)
        command = [python, str(EXEC)]
        command += [part for name, value in arguments.items() if value for part in (f"--{name}", value)]
        environment = {
            **os.environ,
            "VIRTUAL_ENV": str(Path(python).parent.parent),
            "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
            "PULUMI_CONFIG": json.dumps(dict(request.config)),
            "PULUMI_CONFIG_SECRET_KEYS": json.dumps(list(request.configSecretKeys)),
        }
        command += [request.info.entry_point, *request.args]
        self._running = subprocess.Popen(command, cwd=request.info.program_directory, env=environment)
        code = self._running.wait()
        if code == SHOWN:
            return language_pb2.RunResponse(bail=True)
        return language_pb2.RunResponse(error=f"program exited with non-zero exit code: {code}" if code else "")

    def InstallDependencies(self, request: Any, context: Any) -> Any:
        return iter(())

    def RuntimeOptionsPrompts(self, request: Any, context: Any) -> Any:
        return language_pb2.RuntimeOptionsResponse()

    def About(self, request: Any, context: Any) -> Any:
        return language_pb2.AboutResponse(executable=sys.executable, version=sys.version.split()[0])

    def GetProgramDependencies(self, request: Any, context: Any) -> Any:
        return language_pb2.GetProgramDependenciesResponse()

    def Cancel(self, request: Any, context: Any) -> Any:
        if self._running is not None:
            self._running.terminate()
        return empty_pb2.Empty()


def _python(info: Any) -> str:
    """Return the interpreter of the virtual environment that Pulumi.yaml names."""
    options = json_format.MessageToDict(info.options)
    return str(Path(info.root_directory) / options["virtualenv"] / "bin/python")


def main() -> None:
    addresses = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=8))
    language_pb2_grpc.add_LanguageRuntimeServicer_to_server(LanguageHost(addresses[-1] if addresses else ""), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    signal.pause()


if __name__ == "__main__":
    main()
