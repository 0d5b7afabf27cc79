"""Follows the path of tests/test_newcomer.py with the real CLI, its login, salt, state and engine."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.engine.checkout import Checkout
from tests.test_newcomer import PATHS, Clone, assert_served, keep_token, walk

SECRET = "aws:secretsmanager/secret:Secret"  # noqa: S105


class Newcomer:
    """A clone with the real CLI. After a stack is created, requests to its URL go to a local server."""

    def __init__(self, tmp_path, cli, aws, serve) -> None:
        self._checkout = Checkout(tmp_path, cli)
        self._aws, self._serve, self._data = aws, serve, tmp_path / "data"
        self._programs = tmp_path / "programs"
        self.clone = Clone(tmp_path, self._programs, aws, copy=self._checkout.path)
        self._let_login_stay_here(cli)
        given = ("PULUMI_HOME", "PULUMI_DISABLE_AUTOMATIC_PLUGIN_ACQUISITION")
        self.clone.environment |= {name: self._checkout.environment[name] for name in given}
        self.served = 0

    def _let_login_stay_here(self, cli) -> None:
        """Keep the state of `pulumi login --local` in this clone's home.

        The CLI takes the home directory of `file://~` from the user database and not from HOME, so it would write into
        the developer's own ~/.pulumi.
        """
        program = self._programs / "pulumi"
        program.unlink()
        program.write_text(
            f'#!/bin/sh\ncase "$1 $2" in "login --local") shift 2; set -- login "file://$HOME" "$@";; esac\n'
            f'exec "{cli}" "$@"\n'
        )
        program.chmod(0o755)

    def after(self, line: str) -> None:
        if self.served or not line.startswith(("pulumi up", "make deploy")):
            return
        self.served += 1
        done = subprocess.run(
            ["pulumi", "stack", "output", "--json", "--stack", "dev"],
            cwd=self.clone.directory,
            env=self.clone.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs = json.loads(done.stdout)
        (secret,) = [id for id in self._checkout.account.all(SECRET) if "/api-token" in id]
        keep_token(self._aws, outputs["bucket"], self._checkout.account.current_secret(secret))
        server = self._serve("memory", self._data, environment={"CRUDSTACK_AUTH": json.dumps(outputs["auth"])})
        curl = self._programs / "curl"
        # The host name that API Gateway would have made has no server, so curl sends its requests to the local one.
        curl.write_text(
            f"#!/bin/bash\nfrom='{outputs['api_url']}' to='{server.url}' words=()\n"
            'for word; do words+=("${word/"$from"/"$to"}"); done\n'
            f'exec {shutil.which("curl")} "${{words[@]}}"\n'
        )
        curl.chmod(0o755)


def own_state() -> dict[str, int]:
    """Return the modification time in ns of each state file in the developer's own ~/.pulumi."""
    folder = Path(pwd.getpwuid(os.getuid()).pw_dir, ".pulumi")
    parts = [folder / name for name in ("meta.yaml", "stacks", "history", "backups", "locks")]
    files = [file for part in parts for file in (part, *part.rglob("*")) if file.exists()]
    return {str(file): file.stat().st_mtime_ns for file in files}


@pytest.mark.parametrize("path", PATHS)
def test_the_documented_commands_end_with_a_served_request(path, tmp_path, cli, ministack_s3, serve):
    before = own_state()
    newcomer = Newcomer(tmp_path, cli, ministack_s3.url, serve)
    assert_served(path, walk(newcomer.clone, path, newcomer.after))
    assert newcomer.served == 1
    assert (newcomer.clone.directory / "Pulumi.dev.yaml").read_text().count("encryptionsalt: v1:") == 1
    assert list((tmp_path / "home/.pulumi/stacks/crudstack").glob("dev.json")) != []
    assert own_state() == before
