"""Every storage kind on real servers, compared with raw clients and with specstar's equivalents: `--parts backends`."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
from rich.progress import Progress

from . import report
from .article import AUTHOR, COUNT, HOT, article
from .servers import Servers, running
from .workers import Figures, Worker

SECONDS = 0.2
"""How long a peer runs a row in a round."""
ROUNDS = 3
"""How often all kinds run in turn, at most: there are eighteen processes."""
SCRIPTS = Path("benchmarks/scripts")
KINDS: dict[str, str | None] = {
    "memory": "memory",
    "disk": "disk",
    "memory-disk": "memory-disk",
    "s3-sqlite": "s3-sqlite",
    "postgres-s3": "postgres-s3",
    "redis-postgres": "redis-postgres",
    "cached-s3": "cached-s3",
    "memory + cached-s3": "cached-s3",
}
WITH_BROKER: dict[str, str | None] = {"mq-cached-s3": None, "memory + mq-cached-s3": "cached-s3", "full": None}
"""Kinds and pairs of ours, and which of specstar's stands beside each."""
STRONG = ("s3-sqlite", "cached-s3", "mq-cached-s3")
"""Kinds that look at S3 at every read, which specstar's do not: the rows say so."""
ROWS = ("get", "list 20", "equality", "range + sort", "count", "create", "update")
SEARCHES = ("list 20", "equality", "range + sort", "count")
LARGE = 100_000
LIMITS = (
    "PostgreSQL create / transaction()",
    "PostgreSQL create / in one pipeline",
    "PostgreSQL create / as one statement",
    "PostgreSQL update / transaction()",
    "PostgreSQL update / in one pipeline",
    "PostgreSQL update / as one statement",
    "Redis hit / GET and decode",
    "Redis hit, not decoded / GET",
    "Redis as the truth / HGET and decode",
    "body in memory, 380 bytes / dict",
    "body in memory, 4 KB / dict",
    "body in memory, 64 KB / dict",
    "body on disk, 380 bytes / SELECT in a thread",
    "body on disk, 64 KB / SELECT in a thread",
    "S3 get / obstore",
    "S3 put / obstore",
)


def sections(progress: Progress, rounds: int, specstar: Path) -> list[str]:
    """Tables, each followed by its raw numbers."""
    task = progress.add_task("backends: servers", total=1)
    with running() as servers, tempfile.TemporaryDirectory() as directory:
        progress.advance(task)
        parts = _Parts(progress, rounds, specstar, servers, Path(directory))
        return [*parts.limits(), *parts.kinds(), *parts.searches()]


def expected(count: int) -> dict[str, Any]:
    """Return what every peer must find among so many articles."""
    highest = sorted((int(str(article(number)["views"])) for number in range(count)), reverse=True)
    return {
        "get": "Title 0",
        "list 20": 20,
        "equality": [20, AUTHOR],
        "range + sort": highest[:20],
        "count": count,
        "create": True,
        "update": True,
    }


def storage_of(kind: str) -> str:
    """Return the value of CRUDSTACK_STORAGE for a kind, or for a pair that is written with a plus."""
    meta, pair, resource = kind.partition(" + ")
    return json.dumps({"meta": meta, "resource": resource}) if pair else kind


class _Parts:
    def __init__(self, progress: Progress, rounds: int, specstar: Path, servers: Servers, directory: Path) -> None:
        self.progress, self.rounds, self.specstar = progress, rounds, str(specstar)
        self.servers, self.directory = servers, directory

    def _directory(self, name: str) -> Path:
        made = self.directory / name
        made.mkdir()
        return made

    def _module(self, name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.scripts.{name}", *arguments]

    def _tables(self, title: str, note: str, figures: Figures, base: str, peers: Sequence[str]) -> list[str]:
        """Wall time, CPU time of the client, and time in the server where it is known."""
        found = []
        for name, table, what in (
            ("wall", figures.wall, "Microseconds of one call, the median of a round."),
            ("CPU of the client", figures.cpu, "CPU microseconds of the client for one call, all threads."),
            ("time in the server", figures.server, "Microseconds in PostgreSQL for one call: planning and execution."),
        ):
            if table:
                made = report.markdown(f"{title}, {name}", f"{what} {note}", table, base, peers)
                found += [made, report.raw(f"{title}, {name}", figures.with_calls(table))]
        return found

    def limits(self) -> list[str]:
        figures = Figures.none()
        task = self.progress.add_task("backends: raw clients", total=self.rounds * len(LIMITS))
        command = self._module("limits", str(self._directory("limits")))
        with Worker(command, self.servers.environment("limits", self.directory)) as worker:
            worker.ready()
            for _, row in itertools.product(range(self.rounds), LIMITS):
                for peer, sample in worker.ask(row, SECONDS).items():
                    figures.add(row, peer, sample, expected=True)
                self.progress.advance(task)
        note = (
            "After the slash: the operation of the raw client with the same result. Two statements: the row of the"
            " resource and the record of the revision, in tables with the same columns and indexes. PostgreSQL:"
            f" {self.servers.settings}. Targets: create and update 1.3 x, Redis hit 1.5 x, body in memory 2 x."
        )
        return self._tables("Limits", note, figures, "raw client", ["raw client", "crudstack"])

    def kinds(self) -> list[str]:
        figures, peers = Figures.none(), ["crudstack", "specstar"]
        kinds = KINDS if self.servers.amqp is None else KINDS | WITH_BROKER
        sides = [(peer, one) for pair in kinds.items() for peer, one in zip(peers, pair, strict=True) if one]
        with contextlib.ExitStack() as stack:
            workers: dict[tuple[str, str | None], Worker] = {}
            loading = self.progress.add_task("backends: loading", total=len(set(sides)))
            for peer, kind in dict.fromkeys(sides):  # specstar's cached-s3 stands beside several
                worker = workers[peer, kind] = stack.enter_context(self._kind(kind, peer))
                worker.ready()
                self.progress.advance(loading)
            rounds = min(self.rounds, ROUNDS)
            task = self.progress.add_task("backends: kinds", total=rounds * len(ROWS) * len(sides))
            truth = expected(COUNT)
            for _, pair, row in itertools.product(range(rounds), kinds.items(), ROWS):
                label = f"{pair[0]} (strong)" if pair[0] in STRONG else pair[0]
                for side in zip(peers, pair, strict=True):
                    if side in workers:
                        (sample,) = workers[side].ask(row, SECONDS).values()
                        figures.add(f"{label}: {row}", side[0], sample, expected=truth[row])
                        self.progress.advance(task)
        return self._tables("Engines per kind", self._note_of_kinds(), figures, "crudstack", peers)

    def _kind(self, kind: str, peer: str) -> Worker:
        name = f"{peer}-{kind}".replace(" + ", "-")
        environment = self.servers.environment(name, self._directory(name)) | {"CRUDSTACK_STORAGE": storage_of(kind)}
        if kind == "redis-postgres":  # bodies on this machine, so that S3 hides nothing of the two
            del environment["CRUDSTACK_BUCKET"]
        if peer == "crudstack":
            return Worker(self._module("kinds_ours"), environment)
        return Worker([self.specstar, str(SCRIPTS / "kinds_specstar.py"), str(self.directory)], environment)

    def _note_of_kinds(self) -> str:
        broker = (
            "There is no RabbitMQ on this machine, so what needs one is missing."
            if self.servers.amqp is None
            else "RabbitMQ informs the copy of memory + mq-cached-s3, which is behind by 1 s at most. specstar was not"
            " measured with RabbitMQ; the table compares this pair with its cached-s3."
        )
        return (
            "10,000 articles, with each engine's ResourceManager, one call at a time, data decoded; the servers have"
            f" the other core. `get` reads the same {HOT} articles again and again. S3 is ministack with its data in"
            f" memory. PostgreSQL: {self.servers.settings}. redis-postgres has its bodies on disk.\n\n"
            "Durability differs. An acknowledged write of crudstack survives a crash of machine and servers, except for"
            " memory. specstar's memory-disk loses its metadata with the process; its disk and the bodies of its"
            " redis-postgres are written but not synced; the metadata of its redis-postgres is in Redis only for up to"
            " a second before it is copied to PostgreSQL. specstar's s3-sqlite and cached-s3 upload the whole database"
            " at every write, and read a copy that looks for other writers' changes once a second at most. Our rows"
            " called strong look at every read and miss no change, so those rows compare unlike things."
            " The equivalent of specstar's cached-s3 is memory + cached-s3: its index is on S3 as well, and its copy"
            f" looks once in 5 s at most. {broker}"
        )

    def searches(self) -> list[str]:
        figures, peers = Figures.none(), ["crudstack", "specstar"]
        commands = {
            "crudstack": self._module("search_ours", str(LARGE)),
            "specstar": [self.specstar, str(SCRIPTS / "search_specstar.py"), str(LARGE)],
        }
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            loading = self.progress.add_task("backends: loading 100,000", total=len(peers))
            for peer, command in commands.items():
                environment = self.servers.environment(f"search-{peer}", self.directory)
                workers[peer] = stack.enter_context(Worker(command, environment))
                workers[peer].ready()
                self.progress.advance(loading)
            connection = stack.enter_context(psycopg.connect(self.servers.postgres, autocommit=True))
            task = self.progress.add_task("backends: searches", total=self.rounds * len(SEARCHES) * len(peers))
            truth = expected(LARGE)
            for _, row, peer in itertools.product(range(self.rounds), SEARCHES, peers):
                connection.execute("SELECT pg_stat_statements_reset()")
                (sample,) = workers[peer].ask(row, SECONDS).values()
                spent = _in_server(connection, f"search-{peer}") / (sample["calls"] + 2)  # it checked, and tried once
                figures.add(row, peer, sample | {"server": spent}, expected=truth[row])
                self.progress.advance(task)
        note = (
            "The same rows in each engine's schema, VACUUM ANALYZE for both; metadata only, decoded. specstar has its"
            f" SortIndex on views. PostgreSQL: {self.servers.settings}."
        )
        return self._tables("Search at 100,000 rows, PostgreSQL", note, figures, "crudstack", peers)


def _in_server(connection: psycopg.Connection, database: str) -> float:
    """Microseconds that statements took there since the statistics were emptied."""
    row = connection.execute(
        "SELECT coalesce(sum(total_plan_time + total_exec_time), 0) * 1000 FROM pg_stat_statements"
        " WHERE dbid = (SELECT oid FROM pg_database WHERE datname = %s)",
        (database,),
    ).fetchone()
    return float(row[0]) if row is not None else 0.0
