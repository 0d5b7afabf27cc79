"""Who is measured, and what each row asks of them."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import httpx

from .article import AUTHOR, COUNT, VIEWS, article
from .load import Requests, on_first_core
from .scripts.floor import SCHEMA

ROOT = Path(__file__).parent.parent
SPECSTAR = ROOT / ".local/bench/specstar/bin/python"
POCKETBASE = ROOT / ".local/bench/pocketbase/bin/pocketbase"
ROWS = ("get", "list 20", "list 100", "filter", "range + sort", "count", "create", "update")
BODY = json.dumps({**article(7), "title": "Title %d"})


class Peer(ABC):
    """A server with the articles in it. `durability` says what an answered write survives."""

    name = ""
    durability = ""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory, self.url = directory, f"http://127.0.0.1:{port}"
        directory.mkdir(parents=True, exist_ok=True)
        self.port = port
        self.ids: list[str] = []

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command that starts the server."""

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        command = self.command()
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=on_first_core)  # noqa: PLW1509
        for _ in range(300):
            try:
                httpx.get(self.url)
            except httpx.TransportError:
                time.sleep(0.1)
                if self.process.poll() is not None:
                    break
            else:
                return
        raise RuntimeError(f"{self.name} did not start")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def load(self) -> None:
        """Put the articles in, and remember their ids."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for number in range(COUNT):
                self.ids.append(self.create(client, article(number)))

    @abstractmethod
    def create(self, client: httpx.Client, body: Mapping[str, object]) -> str:
        """The id of a new article."""

    @abstractmethod
    def requests(self) -> dict[str, Requests]:
        """Return the requests of each row."""

    def of_rest(self, lists: Mapping[str, str], method: str = "PUT") -> dict[str, Requests]:
        """The rows of an API at /article, given the paths of its lists."""
        one = [f"/article/{rid}" for rid in self.ids]
        return {name: Requests("GET", [path]) for name, path in lists.items()} | {
            "get": Requests("GET", one),
            "create": Requests("POST", ["/article"], BODY),
            "update": Requests(method, one, BODY),
        }


OUR_LISTS = {
    "list 20": "/article?limit=20",
    "list 100": "/article?limit=100",
    "filter": f"/article?author={AUTHOR}&limit=20",
    "range + sort": f"/article?views%5Bgte%5D={VIEWS}&sort=-views&limit=20",
    "count": "/article/count",
}


class Ours(Peer):
    name = "crudstack"

    def __init__(self, kind: str, directory: Path, port: int) -> None:
        super().__init__(directory, port)
        self.kind = kind
        self.durability = "none" if kind == "memory" else "synced to disk"

    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.scripts.ours", self.kind, str(self.directory), str(self.port)]

    def create(self, client: httpx.Client, body: Mapping[str, object]) -> str:
        created = client.post("/article", json=body).raise_for_status().json()
        return str(created["meta"]["resource_id"])

    def load(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for start in range(0, COUNT, 100):
                operations = [{"op": "create", "data": article(number)} for number in range(start, start + 100)]
                results = client.post("/article/batch", json={"operations": operations}).raise_for_status().json()
                self.ids += [result["meta"]["resource_id"] for result in results["results"]]

    def requests(self) -> dict[str, Requests]:
        return self.of_rest(OUR_LISTS)


class Floor(Ours):
    """Loaded with the documents that ours answered, so that its answers can be compared byte for byte."""

    name = "floor"
    durability = "synced to disk"

    def __init__(self, ours: Ours, directory: Path, port: int) -> None:
        super().__init__("disk", directory, port)
        self.ours = ours

    def command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.scripts.floor", str(self.directory / "floor.sqlite"), str(self.port)]

    def start(self) -> None:
        with sqlite3.connect(self.directory / "floor.sqlite") as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(SCHEMA)
            with httpx.Client(base_url=self.ours.url, timeout=60) as client:
                self._copy(database, client)
        super().start()

    def _copy(self, database: sqlite3.Connection, client: httpx.Client) -> None:
        for rid in self.ours.ids:
            answer = client.get(f"/article/{rid}")
            meta, _, data = answer.content[len(b'{"meta":') : -1].partition(b',"data":')
            row = json.loads(data)
            values = (rid, meta, data, row["author"], row["views"], answer.headers["etag"])
            database.execute("INSERT INTO article VALUES (?, ?, ?, ?, ?, ?)", values)
        for name, path in (("list", "list 20"), ("filter", "filter"), ("range", "range + sort")):
            cursor = client.get(OUR_LISTS[path]).json()["next_cursor"]
            scope = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))[:9]
            database.execute("INSERT INTO scopes VALUES (?, ?)", (name, scope))

    def load(self) -> None:
        self.ids = self.ours.ids

    def check(self) -> None:
        """The floor's answers must be ours, byte for byte."""
        paths = [*OUR_LISTS.values(), *(f"/article/{rid}" for rid in self.ids[:: COUNT // 10])]
        for path in paths:
            mine, theirs = httpx.get(self.url + path), httpx.get(self.ours.url + path)
            if mine.content != theirs.content:
                raise RuntimeError(f"the floor answers {path} otherwise than crudstack does")


class Specstar(Peer):
    name = "specstar"

    def __init__(self, kind: str, directory: Path, port: int) -> None:
        super().__init__(directory, port)
        self.kind = kind
        self.durability = "none" if kind == "memory" else "written, not synced"

    def command(self) -> list[str]:
        return [
            str(SPECSTAR),
            "benchmarks/scripts/specstar_server.py",
            self.kind,
            str(self.directory),
            str(self.port),
        ]

    def create(self, client: httpx.Client, body: Mapping[str, object]) -> str:
        return str(client.post("/article", json=body).raise_for_status().json()["resource_id"])

    def requests(self) -> dict[str, Requests]:
        author = quote(json.dumps([{"field_path": "author", "operator": "eq", "value": AUTHOR}]))
        views = quote(json.dumps([{"field_path": "views", "operator": "gte", "value": VIEWS}]))
        sort = quote(json.dumps([{"type": "data", "field_path": "views", "direction": "-"}]))
        return self.of_rest(
            {
                "list 20": "/article?limit=20",
                "list 100": "/article?limit=100",
                "filter": f"/article?conditions={author}&limit=20",
                "range + sort": f"/article?conditions={views}&sorts={sort}&limit=20",
                "count": "/article/count",
            }
        )


class PocketBase(Peer):
    name = "pocketbase"
    durability = "written, not synced at every write"
    account: ClassVar[dict[str, str]] = {"identity": "bench@example.org", "password": "benchmarks-only"}

    def command(self) -> list[str]:
        return [str(POCKETBASE), "serve", "--http", f"127.0.0.1:{self.port}", "--dir", str(self.directory)]

    def start(self) -> None:
        create = [str(POCKETBASE), "superuser", "upsert", *self.account.values(), "--dir", str(self.directory)]
        subprocess.run(create, check=True, capture_output=True)
        super().start()
        with httpx.Client(base_url=self.url) as client:
            token = client.post("/api/collections/_superusers/auth-with-password", json=self.account).json()["token"]
            client.post(
                "/api/collections", json=self._collection(), headers={"authorization": token}
            ).raise_for_status()

    @staticmethod
    def _collection() -> dict[str, Any]:
        fields = [{"name": name, "type": "text"} for name in ("title", "content", "author")]
        fields += [{"name": "published", "type": "bool"}, {"name": "views", "type": "number"}]
        fields += [
            {"name": "created", "type": "autodate", "onCreate": True},
            {"name": "updated", "type": "autodate", "onCreate": True, "onUpdate": True},
        ]
        rules = dict.fromkeys(("listRule", "viewRule", "createRule", "updateRule", "deleteRule"), "")
        indexes = ["CREATE INDEX by_author ON article (author)", "CREATE INDEX by_views ON article (views)"]
        return {"name": "article", "type": "base", "fields": fields, "indexes": indexes, **rules}

    def create(self, client: httpx.Client, body: Mapping[str, object]) -> str:
        return str(client.post("/api/collections/article/records", json=body).raise_for_status().json()["id"])

    def requests(self) -> dict[str, Requests]:
        records = "/api/collections/article/records"
        author, views = quote(f"author='{AUTHOR}'"), quote(f"views>={VIEWS}")
        one = [f"{records}/{rid}" for rid in self.ids]
        return {
            "get": Requests("GET", one),
            "list 20": Requests("GET", [f"{records}?perPage=20&skipTotal=1"]),
            "list 100": Requests("GET", [f"{records}?perPage=100&skipTotal=1"]),
            "filter": Requests("GET", [f"{records}?perPage=20&skipTotal=1&filter={author}"]),
            "range + sort": Requests("GET", [f"{records}?perPage=20&skipTotal=1&filter={views}&sort=-views"]),
            "count": Requests("GET", [f"{records}?perPage=1&fields=id"]),
            "create": Requests("POST", [records], BODY),
            "update": Requests("PATCH", one, BODY),
        }
