"""Errors contain status, code and message of the S3 answer, and no secrets."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.autocrud.errors import ConfigError, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.errors import describe, s3_answer
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore, Unknown
from app.autocrud.resource_manager.basic import ModelSpec
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore

DENIED = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error>
  <Code>AccessDenied</Code>
  <Message>User &quot;reader&quot; may not
  s3:PutObject</Message>
  <StringToSign>the-secret</StringToSign>
</Error>"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(DENIED)))
        self.end_headers()
        self.wfile.write(DENIED)

    def log_message(self, *_):
        pass


@pytest.fixture
def answers():
    """Start servers that answer every PUT with this status."""
    started = []

    def start(status: int, context: ssl.SSLContext | None = None) -> int:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.status = status
        server.handle_error = lambda *_: None  # clients that do not trust it hang up
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        started.append((server, thread))
        return server.server_port

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Create a private CA, and a certificate for 127.0.0.1 that it signed."""
    directory = tmp_path_factory.mktemp("tls")
    openssl = shutil.which("openssl")
    assert openssl, "openssl is not installed"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=directory, check=True, capture_output=True)

    for name in ("ca", "other"):
        run("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "3")
    run("req", *key, "-keyout", "leaf.key", "-out", "leaf.csr", "-subj", "/CN=leaf")
    (directory / "leaf.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    sign = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "3", "-extfile", "leaf.ext"]
    run("x509", "-req", "-in", "leaf.csr", "-out", "leaf.pem", *sign)
    return directory


def put(url: str) -> StoreUnavailable:
    """Return the error of an unconditional PUT."""
    with pytest.raises(StoreUnavailable) as raised:
        asyncio.run(S3ObjectStore("b", url, "a", "the-secret", "us-east-1").put("k", b"x"))
    return raised.value


def test_only_status_code_and_message_of_an_answer_are_kept(answers):
    url = f"http://127.0.0.1:{answers(403)}"
    cause = put(url).__cause__
    assert describe(cause) == f'PUT {url}/b/k: 403 Forbidden, AccessDenied: User "reader" may not s3:PutObject'
    assert s3_answer(cause) == (403, "AccessDenied")


def test_a_conditional_put_without_permission_says_so(answers):
    url = f"http://127.0.0.1:{answers(403)}"
    outcome = asyncio.run(S3ObjectStore("b", url, "a", "the-secret", "us-east-1").put_if("k", b"x", None))
    assert isinstance(outcome, Unknown)
    assert outcome.reason == "403 Forbidden, AccessDenied"


async def test_a_store_says_that_its_key_may_not_write():
    class ReadOnly(MemoryObjectStore):
        async def put_if(self, key, body, etag):
            return Unknown("403 Forbidden, AccessDenied")

    objects = ReadOnly()
    for _ in range(2):  # a new store, and an existing one
        meta = S3SqliteMetaStore("b", "meta/a.sqlite", object_store=objects)
        meta.bind(ModelSpec("a"))
        with pytest.raises(ConfigError, match=r"may read but not write: .*403 Forbidden, AccessDenied to a PUT"):
            await meta.generation()
        await meta.close()
        writable = MemoryObjectStore()
        created = S3SqliteMetaStore("b", "meta/a.sqlite", object_store=writable)
        created.bind(ModelSpec("a"))
        await created.generation()
        await created.close()
        objects.objects = writable.objects


def test_a_wrong_region_names_the_setting(answers):
    assert "set AWS_REGION" in describe(put(f"http://127.0.0.1:{answers(301)}").__cause__)


def test_a_connection_that_is_refused_says_so():
    error = ValueError(
        "Generic S3 error: Error performing PUT http://a:b@127.0.0.1:1/b/k?X-Amz-Signature=s in 1.5ms - HTTP error:"
        " error sending request\n\nDebug source:\nOs { code: 111, kind: ConnectionRefused, message:"
        ' "Connection refused" }'
    )
    assert describe(error) == "PUT http://127.0.0.1:1/b/k: Connection refused"
    assert s3_answer(error) is None


@pytest.mark.parametrize("trusted", [None, "other.pem"])
def test_a_certificate_of_an_unknown_ca_says_tls_and_the_setting(answers, tls, monkeypatch, trusted):
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3.clients.RETRIES", 0)
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    if trusted is not None:
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tls / trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "leaf.pem", tls / "leaf.key")
    text = describe(put(f"https://127.0.0.1:{answers(403, context)}").__cause__)
    assert "TLS: the certificate of the server is not accepted (UnknownIssuer)" in text
    assert "set AWS_CA_BUNDLE" in text


@pytest.mark.parametrize("several", [False, True])
def test_aws_ca_bundle_alone_makes_a_private_ca_trusted(answers, tls, monkeypatch, tmp_path, several):
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes((tls / "other.pem").read_bytes() * several + (tls / "ca.pem").read_bytes())
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "leaf.pem", tls / "leaf.key")
    assert "403 Forbidden" in describe(put(f"https://127.0.0.1:{answers(403, context)}").__cause__)


def test_https_to_a_port_without_tls_says_so(answers, monkeypatch):
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3.clients.RETRIES", 0)
    assert "the server does not speak TLS" in describe(put(f"https://127.0.0.1:{answers(403)}").__cause__)


def test_an_invalid_ca_bundle_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"AWS_CA_BUNDLE names .*nothing', which cannot be read: No such file"):
        S3ObjectStore("b", "https://127.0.0.1:1")
    (tmp_path / "nothing").write_text("nothing")
    with pytest.raises(ConfigError, match="expected a PEM file"):
        S3ObjectStore("b", "https://127.0.0.1:1")
