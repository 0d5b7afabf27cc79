"""A client that is generated from the OpenAPI document uses the whole API: the document is correct and complete."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys

import httpx
import pytest

from .albums import sha256_of

CONFIG = "package_name_override: generated_client\npost_hooks: []\n"


def description(url: str) -> dict:
    """Return the document without JSON Patch: its isinstance(body, list[...]) is refused by Python."""
    document = httpx.get(f"{url}/openapi.json").json()
    for item in document["paths"].values():
        if "patch" in item:
            del item["patch"]["requestBody"]["content"]["application/json-patch+json"]
    return document


@pytest.fixture(params=[("disk", "app.cli")])
def generated(serve, tmp_path, monkeypatch, request):
    storage, module = request.param
    s3 = {} if storage == "disk" else {"s3": request.getfixturevalue("seaweed_s3"), "prefix": tmp_path.name}
    server = serve(storage, tmp_path / "data", module=module, **s3)
    (tmp_path / "openapi.json").write_text(json.dumps(description(server.url)))
    (tmp_path / "config.yml").write_text(CONFIG)
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--fail-on-warning"]
    command += ["--path", "openapi.json", "--config", "config.yml", "--output-path", "generated_client"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    yield server
    for name in [name for name in sys.modules if name.startswith("generated_client")]:
        del sys.modules[name]


def api(name: str, tag: str = "article"):
    return importlib.import_module(f"generated_client.api.{tag}.{name}")


def test_the_generated_client_uses_the_whole_api(generated):
    models = importlib.import_module("generated_client.models")
    client_module = importlib.import_module("generated_client")
    with client_module.Client(base_url=generated.url) as client:
        article = models.Article(title="Sun", content="It shines.", author="alice")
        created = api("create_article").sync_detailed(client=client, body=article)
        assert created.status_code == 201
        rid, etag = created.parsed.meta.resource_id, created.headers["etag"]
        assert created.parsed.data.title == "Sun"
        assert created.parsed.meta.status == "stable"

        found = api("get_article").sync(rid, client=client)
        assert found.data.content == "It shines."

        page = api("list_article").sync(client=client, author="alice", sort=[models.ListArticleSortItem("-author")])
        assert [item.data.title for item in page.items] == ["Sun"]
        assert page.next_cursor is None
        assert api("count_article").sync(client=client, authorin=["alice", "bob"]).count == 1

        changed = models.Article(title="Moon", content="It glows.", author="alice", published=True)
        updated = api("update_article").sync_detailed(rid, client=client, body=changed, if_match=etag)
        assert (updated.status_code, updated.parsed.meta.revision) == (200, 2)
        conflict = api("update_article").sync_detailed(rid, client=client, body=article, if_match=etag)
        assert conflict.status_code == 412
        assert conflict.parsed.type_ == "urn:crudstack:version-conflict"

        patch = models.ArticleMergePatch.from_dict({"title": "Stars"})
        patched = api("patch_article").sync(rid, client=client, body=patch)
        assert patched.data.title == "Stars"

        history = api("list_revisions_of_article").sync(rid, client=client)
        assert [info.revision for info in history.items] == [3, 2, 1]
        assert api("get_revision_of_article").sync(rid, 1, client=client).data.title == "Sun"
        switched = api("switch_article").sync(rid, client=client, body=models.SwitchBody(revision=1))
        assert switched.data.title == "Sun"

        assert api("delete_article").sync_detailed(rid, client=client).status_code == 204
        assert api("get_article").sync_detailed(rid, client=client).status_code == 410
        assert api("restore_article").sync(rid, client=client).meta.is_deleted is False
        assert api("purge_article").sync_detailed(rid, client=client).status_code == 202
        assert api("get_article").sync_detailed(rid, client=client).status_code == 404


@pytest.mark.parametrize("generated", [("s3-sqlite", "tests.http.album_server")], indirect=True)
def test_the_generated_client_sends_and_reads_files(generated):
    """On S3 a model has all routes of files. Those of models on disk are a part of them."""
    models = importlib.import_module("generated_client.models")
    types = importlib.import_module("generated_client.types")
    client_module = importlib.import_module("generated_client")
    redirect = models.GetBlobOfAlbumRedirect.FALSE
    with client_module.Client(base_url=generated.url) as client:
        file = types.File(payload=io.BytesIO(b"content"), file_name="sun.png", mime_type="image/png")
        name = 'attachment; filename="sun.png"'
        raw = api("upload_blob_of_album", "album").sync_detailed(client=client, body=file, content_disposition=name)
        assert (raw.status_code, raw.parsed.size, raw.parsed.name) == (201, 7, "sun.png")
        form = models.UploadBlobOfAlbumFilesBody(file=file)
        ref = api("upload_blob_of_album", "album").sync(client=client, body=form)
        assert (ref.sha256, ref.content_type) == (raw.parsed.sha256, "image/png")
        rid = created(client, models.Album(title="Sun", cover=ref))
        get = api("get_blob_of_album", "album").sync_detailed
        found = get(rid, ref.sha256, client=client, redirect=redirect)
        assert found.parsed.payload.read() == b"content"
        part = get(rid, ref.sha256, client=client, redirect=redirect, range_="bytes=1-2")
        assert (part.status_code, part.parsed.payload.read()) == (206, b"on")
        missing = get(rid, "0" * 64, client=client)
        assert missing.parsed.type_ == "urn:crudstack:blob-not-found"

        content = b"straight to S3"
        announced = models.UploadAnnouncement(
            size=len(content), sha256=sha256_of(content), content_type="image/png", name="sun.png"
        )
        upload = api("begin_upload_of_album", "album").sync(client=client, body=announced)
        assert api("get_upload_of_album", "album").sync(upload.id, client=client).status == "open"
        early = api("complete_upload_of_album", "album").sync(upload.id, client=client)
        assert early.type_ == "urn:crudstack:upload-incomplete"
        httpx.put(upload.url, content=content, headers=upload.headers.to_dict()).raise_for_status()
        ref = api("complete_upload_of_album", "album").sync(upload.id, client=client)
        assert (ref.size, ref.name) == (len(content), "sun.png")
        assert api("get_upload_of_album", "album").sync(upload.id, client=client).blob == ref
        elsewhere = get(created(client, models.Album(title="Sun", cover=ref)), ref.sha256, client=client)
        assert elsewhere.status_code == 303
        assert httpx.get(elsewhere.headers["location"]).content == content


def created(client, album) -> str:
    """Create an album and return its id."""
    return api("create_album", "album").sync(client=client, body=album).meta.resource_id
