"""3,376 airports over HTTP: load them, search, edit some, show their history.

make run                                  # in one terminal
.venv/bin/python examples/airports.py     # in another (make setup first)
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BATCH = 100


class Api:
    """A minimal HTTP client with the standard library."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[Any, str | None]:
        """Send a request. Return the response as JSON, and its ETag."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"content-type": "application/json", **headers}, method=method)
        with urlopen(request) as answer:
            text = answer.read()
            return (json.loads(text) if text else None), answer.headers.get("etag")

    def find(self, **query: Any) -> list[Any]:
        """Return the items of one page of a search."""
        return list(self.call("GET", "/airport?" + urlencode(query))[0]["items"])


def airports() -> list[dict[str, Any]]:
    """Return the airports of the package vega-datasets, without importing it, because it needs pandas."""
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or spec.origin is None:
        sys.exit("the airports are in a package that is not installed: run `make setup`")
    with (Path(spec.origin).parent / "_data/airports.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["latitude"], row["longitude"] = float(row["latitude"]), float(row["longitude"])  # type: ignore[assignment]
    return rows  # type: ignore[return-value]


def load(api: Api, console: Console) -> None:
    """Create missing airports in batches of a hundred."""
    rows = airports()
    with Progress(console=console) as progress:
        task = progress.add_task("loading airports", total=len(rows))
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            codes = ",".join(row["iata"] for row in batch)
            there = {item["data"]["iata"] for item in api.find(**{"iata[in]": codes, "fields": "iata", "limit": 200})}
            operations = [{"op": "create", "data": row} for row in batch if row["iata"] not in there]
            if operations:
                api.call("POST", "/airport/batch", {"operations": operations})
            progress.advance(task, len(batch))


def search(api: Api, console: Console) -> None:
    """Count all airports, and show the northernmost ones."""
    count = api.call("GET", "/airport/count")[0]["count"]
    table = Table("IATA", "name", "city", "state", "latitude", title=f"The northernmost of {count:,} airports")
    for item in api.find(**{"latitude[gte]": 60, "sort": "-latitude", "limit": 5}):
        data = item["data"]
        table.add_row(data["iata"], data["name"], data["city"], data["state"], f"{data['latitude']:.2f}")
    console.print(table)


def edit(api: Api, console: Console) -> None:
    """Rename an airport, only if no other client has changed it since it was read."""
    (found,) = api.find(iata="BOS")
    path = f"/airport/{found['meta']['resource_id']}"
    for name in ("Boston Logan", found["data"]["name"]):
        etag = api.call("GET", path)[1]
        api.call("PATCH", path, {"name": name}, **{"if-match": etag or ""})
    table = Table("revision", "parent", "changed", title="The history of BOS")
    for info in api.call("GET", f"{path}/revisions?limit=5")[0]["items"]:
        parent = info["parent"]
        changed = "created"
        if parent is not None:
            patch, _ = api.call("GET", f"{path}/diff?from={parent}&to={info['revision']}")
            changed = ", ".join(f"{change['path']} = {change['value']}" for change in patch)
        table.add_row(str(info["revision"]), str(parent or ""), changed)
    console.print(table)


def main() -> None:
    """Run the example against a server."""
    parser = argparse.ArgumentParser(description="Load, search and edit airports over HTTP.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where `make run` serves (%(default)s)")
    api, console = Api(parser.parse_args().url), Console()
    try:
        load(api, console)
        search(api, console)
        edit(api, console)
    except HTTPError as error:
        sys.exit(f"{error.url} answered {error.code}: {error.read().decode()[:500]}")
    except URLError as error:
        sys.exit(f"{api.url} does not answer ({error.reason}): start it with `make run`")


if __name__ == "__main__":
    main()
