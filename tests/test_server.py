"""The server as a process: killed, copied, and two at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading

import httpx


def write_until_killed(url: str, name: str, acknowledged: list[tuple[str, str]]) -> None:
    """Create and update articles, and record each answer. Returns when the server ends."""
    with httpx.Client(base_url=url, timeout=30) as client:
        number = 0
        try:
            while True:
                number += 1
                body = {"title": f"{name} {number}", "content": "", "author": name}
                created = client.post("/article", json=body)
                assert created.status_code == 201
                path = created.headers["location"]
                acknowledged.append((path, body["title"]))
                updated = client.patch(path, json={"title": f"{name} {number} again"})
                assert updated.status_code == 200
                acknowledged.append((path, f"{name} {number} again"))
        except httpx.TransportError:
            return


def test_kill_9_loses_nothing_that_was_acknowledged(serve, tmp_path):
    seen: dict[str, str] = {}
    for _ in range(3):
        server = serve("disk", tmp_path)
        acknowledged: list[list[tuple[str, str]]] = [[] for _ in range(4)]
        threads = [
            threading.Thread(target=write_until_killed, args=(server.url, f"writer{at}", acknowledged[at]))
            for at in range(4)
        ]
        for thread in threads:
            thread.start()
        while sum(map(len, acknowledged)) < 120:
            threads[0].join(0.01)
        server.kill()
        for thread in threads:
            thread.join()
        again = serve("disk", tmp_path)
        for writer in acknowledged:
            seen.update(writer)
        with httpx.Client(base_url=again.url) as client:
            for path, title in seen.items():
                found = client.get(f"{path}/data").json()["title"]
                assert found in (title, f"{title} again"), path  # the last update may have happened without an answer
                seen[path] = found
            assert client.get("/article/count").json()["count"] >= len(seen)
        again.stop()


def test_the_second_server_on_one_directory_is_refused(serve, tmp_path):
    one, two = serve("disk", tmp_path), serve("disk", tmp_path)
    with httpx.Client(base_url=one.url) as first, httpx.Client(base_url=two.url) as second:
        created = first.post("/article", json={"title": "0", "content": "", "author": "a"})
        path, etag = created.headers["location"], created.headers["etag"]
        for round_ in range(30):
            answers = {}

            def attempt(name, client, round_=round_, etag=etag, answers=answers):
                answers[name] = client.patch(path, json={"title": f"{round_} {name}"}, headers={"if-match": etag})

            threads = [threading.Thread(target=attempt, args=pair) for pair in (("one", first), ("two", second))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(answer.status_code for answer in answers.values()) == [200, 412]
            etag = next(answer.headers["etag"] for answer in answers.values() if answer.status_code == 200)
            assert first.get(path).headers["etag"] == second.get(path).headers["etag"] == etag
        assert first.get(path).json()["meta"]["revision"] == 31


def test_a_damaged_model_is_stopped_and_the_others_are_served(serve, tmp_path, capfd):
    server = serve("disk", tmp_path)
    with httpx.Client(base_url=server.url) as client:
        article = {"title": "Sun", "content": "", "author": "a"}
        path = client.post("/article", json=article).headers["location"]
    server.stop()
    (database,) = tmp_path.glob("airport/meta/index.sqlite")
    database.write_bytes(b"x" * 20_000)
    again = serve("disk", tmp_path)
    with httpx.Client(base_url=again.url) as client:
        assert client.get(f"{path}/data").json()["title"] == "Sun"
        assert client.post("/article", json=article).status_code == 201
        stopped = client.get("/airport")
        assert (stopped.status_code, stopped.json()["type"]) == (503, "urn:crudstack:store-damaged")
        ready = client.get("/readyz")
        states = {name: model["status"] for name, model in ready.json()["models"].items()}
        assert (ready.status_code, states["article"]) == (503, "ready")
        assert "damaged" in states["airport"]
    again.stop()
    said = capfd.readouterr().err
    assert said.count("airport is stopped, the other models are served: the database file is damaged") == 1
    assert "Traceback" not in said


def test_a_copied_directory_opens_with_the_same_content(serve, tmp_path):
    server = serve("disk", tmp_path / "here")
    with httpx.Client(base_url=server.url) as client:
        for number in range(20):
            client.post("/article", json={"title": str(number), "content": "", "author": "a"})
        before = client.get("/article?limit=200").content
    server.stop()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    again = serve("disk", tmp_path / "there")
    assert httpx.get(f"{again.url}/article?limit=200").content == before


def test_a_token_is_required_and_each_request_is_logged(serve, tmp_path):
    made = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", "token", "new"],
        capture_output=True,
        text=True,
        check=True,
    )
    token, setting = (line.split(maxsplit=1)[1] for line in made.stdout.splitlines())
    auth = setting.removeprefix("CRUDSTACK_AUTH='").removesuffix("'")
    server = serve("disk", tmp_path, "--access-log", environment={"CRUDSTACK_AUTH": auth})
    signed = {"authorization": f"bearer {token}"}
    body = {"title": "private title", "content": "", "author": "a"}
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/article", "/openapi.json", "/docs", "/nowhere", "/readyz"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": f"Bearer {token}x"}).status_code == 401
        created = client.post("/article", json=body, headers=signed)
        assert created.json()["meta"]["created_by"] == "token"
        assert client.get("/docs", headers=signed).status_code == 200
    server.stop(close=False)
    said = server.process.stdout.read()
    server.process.stdout.close()
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [200, *[401] * 10, 201, 200]
    assert (lines[-2]["route"], lines[-2]["request_id"]) == ("/article", created.headers["x-request-id"])
    assert "_aws" not in lines[0]
    assert "private" not in said
    assert token not in said
