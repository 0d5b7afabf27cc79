"""docs/archive-format.md: a program that knows only the page and the standard library reads an archive."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import msgspec

from app.autocrud import Encoding
from app.autocrud.backup import archive_format, entries
from app.autocrud.resource_manager.basic import StoredKey

from .archives import Content, blob, resource, write

PAGE = Path(__file__).parents[2] / "docs/archive-format.md"


def read(path: Path) -> dict[str, Any]:
    """Return the resources, keys and files of an archive, by model. Uses the standard library only."""
    with tarfile.open(path) as tar:
        names = [entry.name for entry in tar]
        files = {name: tar.extractfile(name).read() for name in names}
    assert json.loads(files[names[0]]) == {"format": "crudstack-archive", "version": 1}
    manifest = json.loads(files[names[-1]])
    assert (names[0], names[-1], manifest["version"]) == ("format.json", "manifest.json", 1)
    models = {}
    for model in manifest["models"]:
        for part in model["parts"]:
            content = files[part["name"]]
            assert (len(content), hashlib.sha256(content).hexdigest()) == (part["size"], part["sha256"])
        models[model["name"]] = read_model(model, files)
    return models


def read_model(model: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    resources, keys, blobs = {}, {}, {}
    for part in model["parts"]:
        kind, number = re.fullmatch(r"models/[^/]+/([a-z]+)-([0-9]+)\..+", part["name"]).groups()
        if kind == "bodies":
            continue
        for line in map(json.loads, files[part["name"]].splitlines()):
            if kind == "resources" and "resource" in line:
                resource_id = line["resource"]["resource_id"]
                resources[resource_id] = (line["resource"], [])
            elif kind == "resources":
                bodies = files[f"models/{model['name']}/bodies-{number}.bin"]
                offset, size = line["body"]["offset"], line["body"]["size"]
                resources[resource_id][1].append((line["revision"], bodies[offset : offset + size]))
            elif kind == "keys":
                keys.setdefault(line["key"], []).append(line["result"])
            else:
                content = files[f"models/{model['name']}/blobs/{line['key']}"]
                assert hashlib.sha256(content).hexdigest() == line["key"].partition("/")[0]
                blobs[line["key"]] = content
    counts = (len(resources), sum(len(revisions) for _, revisions in resources.values()), len(keys), len(blobs))
    assert counts == (model["resources"], model["revisions"], model["keys"], model["blobs"])
    for absent in model["absent"]:
        resources.pop(absent, None)
    return {"resources": resources, "keys": keys, "blobs": blobs}


def as_json(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


async def test_another_program_reads_an_archive_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.setattr("app.autocrud.backup.archive_writer.MAX_PART", 3000)  # so that there are several parts
    row = blob(b"content" * 1000)
    content = Content(
        resources=[
            resource("a", [{"n": number} for number in range(10)], blobs=[[row[0].key]] * 10),
            resource("b", ["ü"], encoding=Encoding.msgpack, is_deleted=True),
        ],
        blobs=[row],
    )
    metas = tuple(meta for meta, _ in content.resources)
    content.keys = [StoredKey(key="0" * 64, request="1" * 64, time=5, results=(None, *metas))]
    await write(tmp_path / "a.tar.gz", {"article": content, "empty": Content()})
    found = read(tmp_path / "a.tar.gz")
    assert found["empty"] == {"resources": {}, "keys": {}, "blobs": {}}
    article = found["article"]
    for meta, revisions in content.resources:
        found_meta, found_revisions = article["resources"][meta.resource_id]
        assert found_meta == as_json(meta)
        assert [one for one, _ in found_revisions] == [as_json(record) for record, _ in revisions]
        assert [body for _, body in found_revisions] == [body for _, body in revisions]
    assert article["keys"] == {"0" * 64: [None, *map(as_json, metas)]}
    assert article["blobs"] == {row[0].key: row[1]}


def test_the_page_has_every_field_and_limit():
    text = PAGE.read_text()
    structs = [
        archive_format.ArchivedMeta,
        archive_format.ArchivedRevision,
        archive_format.KeyLine,
        archive_format.BlobLine,
        archive_format.ModelEntry,
        archive_format.Manifest,
        archive_format.Part,
    ]
    names = {name for struct in structs for name in struct.__struct_fields__}
    assert sorted(name for name in names if f"`{name}`" not in text and f'"{name}"' not in text) == []
    numbers = [
        archive_format.MAX_PART,
        archive_format.MAX_LINE,
        archive_format.MAX_BLOB,
        archive_format.MAX_PARTS,
        archive_format.BLOB_ROWS,
        entries.MAX_OPERATIONS,
    ]
    assert [number for number in numbers if f"{number:,}" not in text] == []
    for number in (archive_format.MAX_BODY, archive_format.MAX_MANIFEST):
        assert f"{number >> 20} MB" in text
