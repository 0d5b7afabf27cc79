"""Two servers on an S3 whose conditional writes stop being atomic during a run.

The S3 then compares first and writes afterwards. No acknowledged write is lost silently.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx

from tests.check_then_act_proxy import CheckThenActProxy
from tests.conftest import Server
from tests.services import S3Server
from tests.test_server import write_until_killed
from tests.test_server_s3 import check

WRITERS = 4
MOST = 4000
"""The largest number of creates of one writer. A fork mostly happens within the first hundred."""


class Creator(threading.Thread):
    """Creates articles until the test stops it, or until its server refuses because of a fork."""

    def __init__(self, url: str, name: str, stop: threading.Event) -> None:
        super().__init__()
        self.url, self.prefix, self.stop = url, name, stop
        self.acknowledged: set[str] = set()
        self.errors: set[str] = set()

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for number in range(MOST):
                if self.stop.is_set():
                    return
                name = f"{self.prefix}-{number}"
                body = {"title": name, "content": "", "author": "a"}
                answer = client.put(f"/article/{name}", json=body, headers={"If-None-Match": "*"})
                if answer.status_code == 201:
                    self.acknowledged.add(name)
                else:
                    self.errors.add(answer.json()["type"])
                    if answer.json()["type"] == "urn:crudstack:history-forked":
                        self.stop.set()


def run(*arguments: str, directory: Path, s3: S3Server, prefix: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CRUDSTACK_", "AWS_"))}
    environment |= {
        "CRUDSTACK_STORAGE": "s3-sqlite",
        "CRUDSTACK_DATA_DIR": str(directory),
        "CRUDSTACK_BUCKET": os.environ["TEST_S3_BUCKET"],
        "CRUDSTACK_PREFIX": prefix,
        "CRUDSTACK_S3_ENDPOINT_URL": s3.url,
        "AWS_ACCESS_KEY_ID": s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.secret_access_key,
    }
    command = [sys.executable, "-c", "from app.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_fork_during_a_run_is_detected_and_repaired_by_the_rescue(serve, ministack_s3, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_S3_BUCKET", bucket)
    on_bucket = {"CRUDSTACK_BUCKET": bucket}
    with CheckThenActProxy(ministack_s3.url, None) as proxy:
        s3 = S3Server(proxy.url, ministack_s3.access_key_id, ministack_s3.secret_access_key)
        directories = [tmp_path / "one", tmp_path / "two"]
        servers = [serve("s3-sqlite", at, s3=s3, prefix="p", environment=on_bucket) for at in directories]

        # The conditions are atomic first. Then they become check-then-act.
        stop = threading.Event()
        writers = [
            Creator(server.url, f"{at}-{number}", stop)
            for at, server in enumerate(servers)
            for number in range(WRITERS)
        ]
        for writer in writers:
            writer.start()
        while min(len(writer.acknowledged) for writer in writers) < 3:
            assert not stop.wait(0.01), "a fork on a correct storage"
        assert not set().union(*(writer.errors for writer in writers))
        proxy.delay = (
            0.03  # much longer than a rival needs from one swap to the next, or both may keep out of step for long
        )
        for writer in writers:
            writer.join()
        proxy.delay = None
        told = [(writer.prefix, len(writer.acknowledged), writer.errors) for writer in writers]
        assert stop.is_set(), f"no fork was noticed: {told}"

        # Each server serves every write that it acknowledged, or it has stopped.
        acknowledged = [
            set().union(*(writer.acknowledged for writer in writers if writer.url == server.url)) for server in servers
        ]
        stopped = []
        for at, server in enumerate(servers):
            ready = httpx.get(f"{server.url}/readyz", timeout=30)
            answer = httpx.get(f"{server.url}/article/count", timeout=30)
            stopped.append(answer.status_code == 503)
            assert (answer.status_code == 503) == (ready.status_code == 503)
            if stopped[at]:
                assert answer.json()["type"] == "urn:crudstack:history-forked"
                assert "s3-rescue FILE" in ready.json()["models"]["article"]["status"]
        assert any(stopped)
        fresh = serve("s3-sqlite", tmp_path / "fresh", s3=s3, prefix="p", environment=on_bucket)
        kept = names(fresh.url)
        for at in range(2):
            assert stopped[at] or acknowledged[at] <= kept, "an acknowledged write was lost silently"

        # A restart does not repair the store. The rescue does.
        for at, server in enumerate(servers):
            server.kill()
            if not stopped[at]:
                continue
            settings = {"directory": directories[at], "s3": s3, "prefix": "p"}
            again = run("serve", "--port", "0", **settings)
            assert (again.returncode, again.stdout) == (2, "")
            assert "run `crudstack s3-rescue FILE`" in again.stderr
            file = tmp_path / f"lost-{at}.jsonl"
            for more in ([], ["--resume"]):
                done = run("s3-rescue", str(file), *more, **settings)
                assert done.returncode == 0, done  # it may say that old segments are gone
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            lost = {line["resource_id"]: line["data"] for line in lines}
            assert acknowledged[at] - kept <= lost.keys()
            assert not lost.keys() & kept
            resumed = serve("s3-sqlite", directories[at], s3=s3, prefix="p", environment=on_bucket)
            for name, data in lost.items():
                sent = httpx.put(f"{resumed.url}/article/{name}", json=data, headers={"If-None-Match": "*"})
                assert sent.status_code == 201, sent.text
            kept = names(resumed.url)
            resumed.stop()
        assert acknowledged[0] | acknowledged[1] <= names(fresh.url)
        fresh.stop()


def names(url: str) -> set[str]:
    """Return the ids of all articles."""
    with httpx.Client(base_url=url, timeout=30) as client:
        found: set[str] = set()
        page = client.get("/article", params={"limit": 100, "data": "false"}).raise_for_status().json()
        while True:
            found |= {item["meta"]["resource_id"] for item in page["items"]}
            if page["next_cursor"] is None:
                return found
            page = client.get("/article", params={"limit": 100, "data": "false", "cursor": page["next_cursor"]}).json()


def test_a_rescue_without_a_data_directory_is_refused():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CRUDSTACK_")}
    environment |= {"CRUDSTACK_STORAGE": "s3-sqlite", "CRUDSTACK_BUCKET": "b"}
    command = [sys.executable, "-c", "from app.cli import main; main()", "s3-rescue", "lost.jsonl"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "CRUDSTACK_DATA_DIR is not set" in done.stderr


def test_kills_and_restarts_on_a_correct_s3_are_not_taken_for_a_fork(serve, ministack_s3, bucket, tmp_path):
    """Two servers share a data directory; a third has its own. Each is killed during its commits and started again."""
    on_bucket = {"CRUDSTACK_BUCKET": bucket}
    directories = [tmp_path / "shared", tmp_path / "shared", tmp_path / "alone"]

    def start(at: int) -> Server:
        return serve("s3-sqlite", directories[at], s3=ministack_s3, prefix="p", environment=on_bucket)

    seen: dict[str, str] = {}
    servers = [start(at) for at in range(3)]
    for round_ in range(6):
        doomed = servers[round_ % 3]
        acknowledged: list[list[tuple[str, str]]] = [[] for _ in servers]
        writers = [
            threading.Thread(target=write_until_killed, args=(doomed.url, f"writer{at}", acknowledged[at]))
            for at in range(3)
        ]
        for writer in writers:
            writer.start()
        while sum(map(len, acknowledged)) < 30:
            for server in servers:
                created = httpx.post(f"{server.url}/article", json={"title": "t", "content": "", "author": "a"})
                assert created.status_code == 201, created.text
                seen[created.headers["location"]] = "t"
        doomed.kill()
        for writer in writers:
            writer.join()
        for one in acknowledged:
            seen.update(one)
        servers[round_ % 3] = start(round_ % 3)
        for server in servers:
            assert httpx.get(f"{server.url}/readyz").status_code == 200
    for server in servers:
        check(server.url, seen)
        server.stop()
    assert not list(tmp_path.rglob("fork-*"))
