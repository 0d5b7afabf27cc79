"""The commands of README and the examples of the docs work unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def steps() -> list[tuple[str, list[str]]]:
    """Return each command of the tour, with the texts that its answer must contain.

    A command ends with a line without a backslash at its end or an open quote.
    """
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        command = ""
        for line in block.splitlines():
            if line.startswith("#> "):
                found[-1][1].append(line.removeprefix("#> "))
                continue
            command += line + "\n"
            if not line.endswith("\\") and command.count("'") % 2 == 0:
                found.append((command, []))
                command = ""
    return found


def tour_script(url: str) -> tuple[str, Callable[[str], None]]:
    """Return the tour as a script against a server, and a function that checks its output."""
    tour = steps()
    assert len(tour) >= 22
    script = "set -euo pipefail\n" + "".join(
        f"{command}\nprintf '\\n=== {at} ===\\n'\n" for at, (command, _) in enumerate(tour)
    )

    def check(output: str) -> None:
        answers = re.split(r"\n=== \d+ ===\n", output)
        for (command, expected), answer in zip(tour, answers, strict=False):
            for text in expected:
                assert text in answer, f"{command}\nanswered\n{answer}"

    return script.replace("localhost:8000", url), check


@pytest.mark.parametrize("kind", ["s3-sqlite", "disk", "postgres-s3", "redis-postgres", "cached-s3"])
def test_the_tour(serve, tmp_path, kind, database, valkey):
    take_it(serve, kind, tmp_path, CRUDSTACK_PG_DSN=database, CRUDSTACK_REDIS_URL=valkey)


@pytest.mark.rabbitmq
@pytest.mark.parametrize("kind", ["mq-cached-s3", "full"])
def test_the_tour_with_a_broker(serve, tmp_path, kind, database, valkey, rabbitmq):
    take_it(
        serve,
        kind,
        tmp_path,
        CRUDSTACK_PG_DSN=database,
        CRUDSTACK_REDIS_URL=valkey,
        CRUDSTACK_AMQP_URL=rabbitmq,
    )


def take_it(serve, kind, tmp_path, **environment: str) -> None:
    environment["CRUDSTACK_PREFIX"] = tmp_path.name
    server = serve(kind, tmp_path, "--local-s3", "--make-bucket", environment=environment)
    script, check = tour_script(server.url)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check(done.stdout)


def test_the_commands_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)) <= targets


def test_the_modules_of_the_readme_exist():
    for path in re.findall(r"^\| `([^`]+/[^`]*)`", README, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_the_airports(serve, tmp_path):
    server = serve("disk", tmp_path)
    command = [sys.executable, str(ROOT / "examples/airports.py"), "--url", server.url]
    for revisions in (3, 5):  # a second run loads nothing twice, and continues the history
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={"COLUMNS": "100"})
        assert done.returncode == 0, done.stderr
        assert "3,376 airports" in done.stdout
        assert f"│ {revisions} " in done.stdout


def test_the_examples_of_the_pages_run():
    """Each example runs as if it were pasted: with its own imports, and nothing before it."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        assert blocks or page.name not in ("README.md", "custom-stores.md", "s3-sqlite.md", "security.md")
        for block in blocks:
            code = compile(block, page.name, "exec", dont_inherit=True)
            exec(code, {"__name__": "page"})  # noqa: S102 - it is our own page


def test_links_have_targets():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", re.sub(r"`[^`]*`", "", page.read_text())):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_servers_of_compose_listen_on_the_documented_loopback_ports():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    published = {port for service in services.values() for port in service["ports"]}
    assert all(port.startswith("127.0.0.1:") for port in published)
    section = (ROOT / "docs/storage.md").read_text().partition("## Servers here")[2]
    named = set(re.findall(r"127\.0\.0\.1:\d+", section))
    assert named == {port.rpartition(":")[0] for port in published} - {"127.0.0.1:9001", "127.0.0.1:4566"}
    local = (ROOT / "docs/local.md").read_text()
    assert "http://127.0.0.1:9001>" in local  # MinIO's console
    assert "CRUDSTACK_S3_ENDPOINT_URL=http://127.0.0.1:4566 " in local  # LocalStack
    assert f"version {services['localstack']['image'].rpartition(':')[2]}," in local
    login = services["postgres"]["environment"]
    assert f"postgresql://{login['POSTGRES_USER']}:{login['POSTGRES_PASSWORD']}@" in section
    assert f"AWS_ACCESS_KEY_ID={services['minio']['environment']['MINIO_ROOT_USER']} " in section
