"""Servers on one bucket: kills, stops, races, and a kill of all at once."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading

import boto3
import httpx
import pytest

from tests.services import named
from tests.test_server import write_until_killed


@pytest.fixture
def on_bucket(serve, s3_server, tmp_path):
    """Start servers that share only a bucket."""
    numbers = itertools.count()
    bucket = {"CRUDSTACK_BUCKET": os.environ["TEST_S3_BUCKET"]}
    return lambda: serve(
        "s3-sqlite", tmp_path / str(next(numbers)), s3=s3_server, prefix=tmp_path.name, environment=bucket
    )


def test_a_named_server_without_keys_is_refused(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with pytest.raises(AssertionError, match="expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        named("http://127.0.0.1:1")


def check(url: str, seen: dict[str, str]) -> None:
    """Check that every acknowledged write is stored. The last update of each may have happened without an answer."""
    with httpx.Client(base_url=url, timeout=30) as client:
        for path, title in seen.items():
            found = client.get(f"{path}/data").raise_for_status().json()["title"]
            assert found in (title, f"{title} again"), path
        assert client.get("/article/count").json()["count"] >= len(seen)


@pytest.mark.s3_slice
def test_kill_9_of_servers_on_one_bucket_loses_nothing(on_bucket):
    seen: dict[str, str] = {}
    survivor = on_bucket()
    for _ in range(4):
        doomed = on_bucket()
        acknowledged: list[list[tuple[str, str]]] = [[] for _ in range(4)]
        threads = [
            threading.Thread(target=write_until_killed, args=(doomed.url, f"writer{at}", acknowledged[at]))
            for at in range(4)
        ]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=survivor.url, timeout=30) as client:
            while sum(map(len, acknowledged)) < 100:
                created = client.post("/article", json={"title": "survivor", "content": "", "author": "s"})
                seen[created.headers["location"]] = "survivor"
        doomed.kill()
        for thread in threads:
            thread.join()
        for writer in acknowledged:
            seen.update(writer)
        check(survivor.url, seen)
    check(on_bucket().url, seen)
    survivor.stop()


@pytest.mark.s3_slice
def test_a_server_that_was_suspended_continues_correctly(on_bucket):
    """The server's PUTs arrive late, its local copy is old, and other servers have deleted segments that it knew."""
    frozen, other = on_bucket(), on_bucket()
    acknowledged: list[tuple[str, str]] = []
    writer = threading.Thread(target=write_until_killed, args=(frozen.url, "frozen", acknowledged))
    writer.start()
    seen: dict[str, str] = {}
    with httpx.Client(base_url=other.url, timeout=30) as client:
        for round_ in range(4):
            while len(acknowledged) < 20 * (round_ + 1):
                writer.join(0.01)
            frozen.process.send_signal(signal.SIGSTOP)
            for number in range(60):
                created = client.post("/article", json={"title": f"{number}", "content": "", "author": "o"})
                seen[created.headers["location"]] = f"{number}"
            frozen.process.send_signal(signal.SIGCONT)
    while len(acknowledged) < 100:
        writer.join(0.01)
    frozen.kill()
    writer.join()
    check(other.url, seen | dict(acknowledged))


@pytest.mark.s3_slice
def test_one_of_four_servers_wins_each_round(on_bucket):
    servers = [on_bucket() for _ in range(4)]
    clients = [httpx.Client(base_url=server.url, timeout=30) for server in servers]
    created = clients[0].post("/article", json={"title": "0", "content": "", "author": "a"})
    path, etag = created.headers["location"], created.headers["etag"]
    rounds = 15
    for round_ in range(rounds):
        answers: dict[int, httpx.Response] = {}

        def attempt(at, round_=round_, etag=etag, answers=answers):
            answers[at] = clients[at].patch(path, json={"title": f"{round_}.{at}"}, headers={"if-match": etag})

        threads = [threading.Thread(target=attempt, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers.values()) == [200, 412, 412, 412]
        (winner,) = (answer for answer in answers.values() if answer.status_code == 200)
        etag = winner.headers["etag"]
        for client in clients:  # acknowledged on one server, read on every other
            assert client.get(path).headers["etag"] == etag
    revisions = clients[3].get(f"{path}/revisions?limit=200").json()["items"]
    assert [one["revision"] for one in revisions] == list(range(rounds + 1, 0, -1))
    for client in clients:
        client.close()


def test_everything_killed_at_once_and_started_again(serve, tmp_path):
    seen: dict[str, str] = {}
    for _ in range(2):
        server = serve("s3-sqlite", tmp_path, "--local-s3", "--make-bucket")
        check(server.url, seen)
        acknowledged: list[tuple[str, str]] = []
        writer = threading.Thread(target=write_until_killed, args=(server.url, "writer", acknowledged))
        writer.start()
        while len(acknowledged) < 40:
            writer.join(0.01)
        children = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True)
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        server.kill()
        writer.join()
        seen.update(acknowledged)
    server = serve("s3-sqlite", tmp_path, "--local-s3", "--make-bucket")
    check(server.url, seen)
    server.stop()


def test_a_given_endpoint_with_real_signatures(serve, seaweed_s3, tmp_path):
    server = serve("s3-sqlite", tmp_path, "--make-bucket", "--local-s3", s3=seaweed_s3, prefix=tmp_path.name)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        created = client.post("/article", json={"title": "Sun", "content": "", "author": "a"})
        assert created.status_code == 201
        assert client.get(created.headers["location"]).json()["data"]["title"] == "Sun"
        assert client.get("/readyz").json()["not_durable"] == []
    assert not list(tmp_path.rglob("ministack*"))
    server.stop()


def test_wrong_keys_are_reported_in_one_sentence(seaweed_s3, tmp_path):
    environment = {
        "PATH": os.environ["PATH"],
        "CRUDSTACK_STORAGE": "s3-sqlite",
        "CRUDSTACK_BUCKET": "tests",
        "CRUDSTACK_DATA_DIR": str(tmp_path),
        "CRUDSTACK_S3_ENDPOINT_URL": seaweed_s3.url,
        "AWS_ACCESS_KEY_ID": seaweed_s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": "wrong-secret",
    }
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("crudstack: the object storage cannot be used right now")
    assert done.stderr.count("\n") == 1
    assert "wrong-secret" not in done.stderr


def test_a_second_local_s3_on_one_directory_is_refused_with_the_remedy(serve, tmp_path):
    first = serve("s3-sqlite", tmp_path, "--local-s3", "--make-bucket")
    article = {"title": "Sun", "content": "", "author": "a"}
    new = {"if-none-match": "*"}
    httpx.put(f"{first.url}/article/a", json=article, headers=new).raise_for_status()
    environment = {"PATH": os.environ["PATH"], "CRUDSTACK_STORAGE": "s3-sqlite", "CRUDSTACK_BUCKET": "b"}
    environment["CRUDSTACK_DATA_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0", "--local-s3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    told = dict(re.findall(r"(\w+)=(\S+)", done.stderr.partition("or share it, with ")[2]))
    assert told.keys() == {"CRUDSTACK_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    second = serve("s3-sqlite", tmp_path, "--local-s3", environment=told)  # `make run` does the same
    assert httpx.get(f"{second.url}/article/a/data").json()["title"] == "Sun"
    assert httpx.put(f"{second.url}/article/a", json=article, headers=new).status_code == 412
    second.stop()
    first.stop()


def test_after_a_loss_of_data_the_start_names_the_command_that_removes_local_copies(
    serve, ministack_s3, bucket, tmp_path
):
    directory = tmp_path / "a directory"
    first = serve("s3-sqlite", directory, s3=ministack_s3, environment={"CRUDSTACK_BUCKET": bucket})
    article = {"title": "Sun", "content": "", "author": "a"}
    httpx.put(f"{first.url}/article/a", json=article, headers={"if-none-match": "*"}).raise_for_status()
    first.stop()
    keys = {"aws_access_key_id": ministack_s3.access_key_id, "aws_secret_access_key": ministack_s3.secret_access_key}
    client = boto3.client("s3", endpoint_url=ministack_s3.url, region_name="us-east-1", **keys)
    for listed in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=listed["Key"])
    environment = {
        "PATH": os.environ["PATH"],
        "CRUDSTACK_STORAGE": "s3-sqlite",
        "CRUDSTACK_BUCKET": bucket,
        "CRUDSTACK_DATA_DIR": str(directory),
        "CRUDSTACK_S3_ENDPOINT_URL": ministack_s3.url,
        "AWS_ACCESS_KEY_ID": ministack_s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ministack_s3.secret_access_key,
    }
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "HEAD is missing" in done.stderr
    removal = shlex.split(done.stderr.partition("remove the local copies: ")[2])
    assert removal[:2] == ["rm", "-r"]
    assert len(removal) == 2 + 3  # one for each model of app/models.py
    subprocess.run(removal, check=True)
    again = serve("s3-sqlite", directory, s3=ministack_s3, environment={"CRUDSTACK_BUCKET": bucket})
    assert httpx.get(f"{again.url}/article/count").json() == {"count": 0}
    again.stop()


def test_a_removed_head_of_an_existing_store_does_not_recommend_removing_copies(serve, ministack_s3, bucket, tmp_path):
    first = serve("s3-sqlite", tmp_path / "first", s3=ministack_s3, environment={"CRUDSTACK_BUCKET": bucket})
    first.stop()
    httpx.delete(f"{ministack_s3.url}/{bucket}/meta/article.sqlite/HEAD").raise_for_status()
    environment = {
        "PATH": os.environ["PATH"],
        "CRUDSTACK_STORAGE": "s3-sqlite",
        "CRUDSTACK_BUCKET": bucket,
        "CRUDSTACK_DATA_DIR": str(tmp_path / "second"),
        "CRUDSTACK_S3_ENDPOINT_URL": ministack_s3.url,
        "AWS_ACCESS_KEY_ID": ministack_s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ministack_s3.secret_access_key,
    }
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.endswith("put it back, or remove the whole store\n")
