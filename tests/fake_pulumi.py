"""A stand-in for the program `pulumi`: it answers, refuses and writes files as the real CLI does.

Its exit codes, its lines on stderr and the salt in Pulumi.STACK.yaml were compared with those of pulumi 3.276.0.
It creates no resources. Its state is in the directory of the program, so a test can look at it and change it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROGRAM = """#!{python}
import hashlib, json, os, pathlib, sys
import yaml

here = pathlib.Path(__file__).parent
arguments = [word for word in sys.argv[1:] if word != "--non-interactive"]
with (here / "asked").open("a") as file:
    print(json.dumps({{"arguments": arguments, "environment": dict(os.environ)}}), file=file)
state = json.loads((here / "state.json").read_text())
project = yaml.safe_load(pathlib.Path("Pulumi.yaml").read_text()) if os.path.exists("Pulumi.yaml") else {{}}
stack = state["selected"]
if "--stack" in arguments:
    at = arguments.index("--stack")
    stack = arguments[at + 1]
    del arguments[at : at + 2]
words = [word for word in arguments if not word.startswith("--")]


def fail(message, code=1):
    print("error: " + message, file=sys.stderr)
    sys.exit(code)


def save():
    (here / "state.json").write_text(json.dumps(state))


def backend():
    url = os.environ.get("PULUMI_BACKEND_URL") or state["login"]
    if url is None:
        fail("this command requires logging in; try running `pulumi login` first", 3)
    return url


def selected():
    if stack is None:
        fail("no stack selected; please use `pulumi stack select` or `pulumi stack init` to choose one")
    if stack not in state["stacks"]:
        fail(f"no stack named {{stack!r}} found", 6)
    return state["stacks"][stack]


def file(name):
    return pathlib.Path(f"Pulumi.{{name}}.yaml")


def content(name):
    return (yaml.safe_load(file(name).read_text()) if file(name).exists() else None) or {{}}


def salt():
    phrase = os.environ.get("PULUMI_CONFIG_PASSPHRASE")
    if phrase is None and os.environ.get("PULUMI_CONFIG_PASSPHRASE_FILE"):
        phrase = pathlib.Path(os.environ["PULUMI_CONFIG_PASSPHRASE_FILE"]).read_text().strip()
    if phrase is None:
        return None
    return "v1:" + hashlib.sha256(phrase.encode()).hexdigest()


def full(key):
    return key if ":" in key else f"{{project['name']}}:{{key}}"


def config(name):
    usual = {{full(key): value.get("default", value.get("value")) for key, value in project["config"].items()}}
    return {{**usual, **{{full(key): value for key, value in (content(name).get("config") or {{}}).items()}}}}


def shown(value):
    if isinstance(value, dict) and "secure" in json.dumps(value):
        return {{"secret": True}}
    return {{"value": text(value), "secret": False}}


def text(value):
    return value if isinstance(value, str) else json.dumps(value)


def opened(prefix):
    if salt() is None:
        fail(prefix + "passphrase must be set with PULUMI_CONFIG_PASSPHRASE or PULUMI_CONFIG_PASSPHRASE_FILE"
             " environment variables")
    if content(stack).get("encryptionsalt", salt()) != salt():
        fail(prefix + "incorrect passphrase")


match words:
    case ["version"]:
        print(state["version"])
    case ["login"]:
        state["login"] = "file://~"
        print("Logged in to here as you (file://~)")
        save()
    case ["whoami"]:
        print(json.dumps({{"user": "you", "url": backend()}}))
    case ["stack", "ls"]:
        backend()
        print(json.dumps([
            {{"name": name, "current": name == state["selected"], "resourceCount": 34 if each["outputs"] else 0}}
            for name, each in state["stacks"].items()
        ]))
    case ["stack", "select", stack]:
        backend()
        selected()
        state["selected"] = stack
        save()
    case ["stack", "init", stack]:
        backend()
        if stack in state["stacks"]:
            fail(f"stack {{stack!r}} already exists")
        opened("could not create secrets manager for new stack: ")
        file(stack).write_text(yaml.safe_dump({{**content(stack), "encryptionsalt": salt()}}))
        state["stacks"][stack], state["selected"] = {{"outputs": None}}, stack
        print(f"Created stack {{stack!r}}")
        save()
    case ["config"]:
        backend()
        selected()
        print(json.dumps({{key: shown(value) for key, value in config(stack).items()}}))
    case ["config", "set", key, value]:
        backend()
        selected()
        key = full(key)
        new = content(stack)
        new["config"] = {{**(new.get("config") or {{}}), key: value}}
        file(stack).write_text(yaml.safe_dump(new))
    case ["preview" | "up" as operation]:
        backend()
        made = selected()
        opened("getting stack configuration: get stack secrets manager: ")
        if operation == "up" and "--yes" not in arguments and os.environ.get("PULUMI_SKIP_CONFIRMATIONS") != "true":
            fail("--yes or --skip-preview must be passed in to proceed when running in non-interactive mode")
        if "aws:region" not in config(stack):
            fail("unable to find a configured AWS Region")
        if (here / f"fails-{{operation}}").exists():
            fail("update failed")
        print("Previewing update" if operation == "preview" else "Updating")
        if operation == "up":
            made["outputs"] = json.loads((here / "outputs.json").read_text())
        save()
    case ["stack", "export"]:
        backend()
        name = "crudstack-" + ((selected()["outputs"] or {{}}).get("stage") or "none") + "-data"
        bucket = {{"urn": "urn:pulumi:dev::x::aws:s3/bucket:Bucket::" + name, "type": "aws:s3/bucket:Bucket"}}
        print(json.dumps({{"deployment": {{"resources": [bucket] if selected()["outputs"] else []}}}}))
    case ["stack", "output", *name]:
        backend()
        found = selected()["outputs"] or {{}}
        if not name:
            print(json.dumps(found))
        elif name[0] in found:
            print(found[name[0]])
        else:
            fail(f"current stack does not have output property {{name[0]!r}}")
    case _:
        fail(f"unknown command {{arguments}}")
"""


class FakePulumi:
    """A directory with the program, for PATH."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        program = directory / "pulumi"
        program.write_text(PROGRAM.format(python=sys.executable))
        program.chmod(0o755)
        self.state: dict[str, Any] = {"version": "v3.276.0", "login": None, "selected": None, "stacks": {}}

    @property
    def state(self) -> dict[str, Any]:
        """Login, stacks with their outputs, the selected one, and the version."""
        state: dict[str, Any] = json.loads((self.directory / "state.json").read_text())
        return state

    @state.setter
    def state(self, new: dict[str, Any]) -> None:
        (self.directory / "state.json").write_text(json.dumps(new))

    def will_output(self, outputs: dict[str, Any]) -> None:
        """Set the outputs of the stack after the next `up`."""
        (self.directory / "outputs.json").write_text(json.dumps(outputs))

    def fails(self, operation: str) -> None:
        (self.directory / f"fails-{operation}").touch()

    def _asked(self) -> list[dict[str, Any]]:
        file = self.directory / "asked"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def asked(self) -> list[str]:
        """Return the commands so far, without --non-interactive."""
        return [" ".join(each["arguments"]) for each in self._asked()]

    def environments(self) -> list[dict[str, str]]:
        """Return the environment of each command so far."""
        return [each["environment"] for each in self._asked()]
