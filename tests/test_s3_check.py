"""`crudstack s3-check` on good servers, on faulty ones, and with missing permissions."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
import pytest

from app.autocrud.resource_manager.backends.s3_sqlite import race_check
from app.dev.local_s3 import make_bucket
from app.s3_tools.s3_requests import Answer, Timings, clock_skew_s
from tests.check_then_act_proxy import CheckThenActProxy, _answer
from tests.s3_servers.install import SERVERS
from tests.s3_servers.servers import running
from tests.services import BUCKET
from tests.stores.test_s3_errors import tls

__all__ = ["tls"]

KEYS = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local", "AWS_REGION": "us-east-1"}
COMMAND = [sys.executable, "-c", "from app.cli import main; main()", "s3-check"]
QUICK = [*COMMAND[:2], f"import app.s3_tools.s3_check as checks; checks.SAMPLES = 5; {COMMAND[2]}", "s3-check"]
"""The same with few samples of each request."""
PERMISSIONS = ("s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket")


class Proxy(CheckThenActProxy):
    """Answers a request itself if `answers` returns status and code of an error. Waits `pause` before each one."""

    def __init__(self, url, delay=None):
        super().__init__(url, delay)
        self.answers = lambda *_: None
        self.changed = lambda *given: given[-1]
        self.requests = []

    def _serve(self, handler):
        self.requests.append((handler.command, handler.path))
        found = self.answers(handler.command, handler.path)
        if found is None:
            super()._serve(handler)
            return
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        status, code = found
        body = f"<Error><Code>{code}</Code><Message>It is {code}.</Message></Error>".encode()
        _answer(handler, status, {}, body)

    def _ask(self, method, path, body, headers):
        return self.changed(method, path, super()._ask(method, path, body, headers))


def environment(url: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "CRUDSTACK_"))}
    return {**kept, **KEYS, "CRUDSTACK_S3_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", **more}


def check(url: str, store: str, *arguments: str, command=QUICK, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, store, *arguments],
        env=environment(url, **more),
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def found(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Return the result and the sentence of each check, from the output of a run."""
    lines = [re.fullmatch(r"(ok|note|failed|not tested) +([\w: -]+?): (.*)", line) for line in done.stdout.splitlines()]
    return {line[2]: (line[1], line[3]) for line in lines if line is not None}


def client_of(url: str):
    keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local"}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)


def left(url: str, bucket: str) -> list[str]:
    client = client_of(url)
    uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return [one["Key"] for one in [*client.list_objects_v2(Bucket=bucket).get("Contents", []), *uploads]]


def test_a_good_storage_is_fit_and_no_object_stays(ministack_s3, bucket):
    done = check(ministack_s3.url, f"s3://{bucket}/team/app", command=COMMAND)
    results = found(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"s3://{bucket}/team/app/ is fit"
    assert {name for name, (result, _) in results.items() if result == "failed"} == set()
    expected = {"TLS", "keys", "region", "clock", "conditions", "race", "large objects", "ranges", "listing", "reads"}
    expected |= {"presigned URLs", "downloads", "checksums", "second use", "copies"}
    assert {name for name, (result, _) in results.items() if result == "ok"} >= {*expected, *PERMISSIONS, "clean-up"}
    assert results["access"][0] == "note"  # ministack answers requests without a signature
    assert done.stdout.count("(p50) and") == 6
    assert left(ministack_s3.url, bucket) == []


def test_a_server_that_checks_signatures_is_fit_and_presigned_urls_work(seaweed_s3):
    done = check(
        seaweed_s3.url,
        f"s3://{BUCKET}/s3-check-test",
        "--json",
        AWS_ACCESS_KEY_ID=seaweed_s3.access_key_id,
        AWS_SECRET_ACCESS_KEY=seaweed_s3.secret_access_key,
    )
    report = json.loads(done.stdout)
    assert (done.returncode, report["fit"], done.stderr) == (0, True, "")
    results = {finding["check"]: finding["result"] for finding in report["findings"]}
    assert (results["ranges"], "access" in results) == ("ok", False)
    assert {name: results[name] for name in DIRECT} == dict.fromkeys(DIRECT, "ok")
    assert [one["count"] >= 1 and one["p50_ms"] <= one["p99_ms"] for one in report["requests"]] == [True] * 6
    writes = report["writes"]
    assert writes["swaps_per_second"] > writes["writes_per_second_of_one_client"] > 0
    assert "one swap of HEAD" in writes["assumption"]


DIRECT = ("presigned URLs", "downloads", "checksums", "lengths", "second use", "copies")
"""The checks about direct transfers."""
NOT_CHECKED = {"rclone-1.75.2": {"checksums", "copies"}, "s3rver-3.7.1": {"checksums", "lengths", "copies"}}
"""The checks about direct transfers that each server fails. Wrong content is found by reading it again."""
UNFIT = {
    "versitygw-1.7.0": {"race"},
    "rclone-1.75.2": {"conditions", "race", "ranges"},
    "s3rver-3.7.1": {"conditions", "race"},
}


@pytest.mark.parametrize("name", SERVERS)
def test_every_server_of_the_docs_has_the_documented_result(name, tmp_path, monkeypatch):
    with running(name, tmp_path) as server:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.s3.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.s3.secret_access_key)
        make_bucket("check", server.s3.url, "us-east-1")
        done = check(
            server.s3.url,
            "s3://check/team",
            AWS_ACCESS_KEY_ID=server.s3.access_key_id,
            AWS_SECRET_ACCESS_KEY=server.s3.secret_access_key,
        )
    results = found(done)
    assert {check for check in DIRECT if results[check][0] != "ok"} == NOT_CHECKED.get(name, set()), done.stdout
    failed = {check for check, (result, _) in results.items() if result == "failed"}
    if name.startswith("rclone"):
        failed.discard("clean-up")  # after a race of writers, rclone sometimes keeps a deleted object
    assert (done.returncode, failed) == (1 if name in UNFIT else 0, UNFIT.get(name, set()))


@pytest.mark.parametrize(("key", "secret"), [(None, "wrong-secret"), ("wrong-key", "wrong-secret")])
def test_wrong_keys_are_named(seaweed_s3, key, secret):
    done = check(
        seaweed_s3.url,
        f"s3://{BUCKET}",
        AWS_ACCESS_KEY_ID=key or seaweed_s3.access_key_id,
        AWS_SECRET_ACCESS_KEY=secret,
    )
    assert done.returncode == 1
    assert found(done)["keys"][0] == "failed"
    assert len(done.stdout.splitlines()) == 2
    assert secret not in done.stdout + done.stderr


def test_a_server_that_checks_first_and_writes_afterwards_is_unfit(ministack_s3, bucket):
    with Proxy(ministack_s3.url, 0.003) as proxy:
        done = check(proxy.url, f"s3://{bucket}")
        results = found(done)
        assert (done.returncode, results["conditions"][0], results["race"][0]) == (1, "ok", "failed")
        assert "concurrent PUTs" in results["race"][1]
        assert done.stdout.splitlines()[-1] == f"s3://{bucket}/ is not fit: race failed"
    assert left(ministack_s3.url, bucket) == []


def test_a_server_that_ignores_conditions_is_unfit(ministack_s3, bucket):
    class Ignoring(Proxy):
        def _ask(self, method, path, body, headers):
            kept = {name: value for name, value in headers.items() if not name.startswith("if-")}
            return super()._ask(method, path, body, kept)

    with Ignoring(ministack_s3.url) as proxy:
        done = check(proxy.url, f"s3://{bucket}")
        status, sentence = found(done)["conditions"]
        assert (done.returncode, status) == (1, "failed")
        for wrong in (
            "If-None-Match: * on a key with an object overwrote the object",
            "If-Match with an old ETag overwrote the object",
            "was not answered 304",
        ):
            assert wrong in sentence
    assert left(ministack_s3.url, bucket) == []


def _is_list(method, path):
    return method == "GET" and "list-type" in path


DENIED = {
    "s3:PutObject": lambda method, _: method == "PUT",
    "s3:GetObject": lambda method, path: method == "GET" and not _is_list(method, path),
    "s3:DeleteObject": lambda method, path: method == "DELETE" or (method == "POST" and path.endswith("?delete")),
    "s3:ListBucket": lambda method, path: _is_list(method, path) or path.endswith("/missing"),
}


@pytest.mark.parametrize("permission", PERMISSIONS)
def test_a_permission_that_is_missing_is_named(ministack_s3, bucket, permission):
    with Proxy(ministack_s3.url) as proxy:
        proxy.answers = lambda method, path: (403, "AccessDenied") if DENIED[permission](method, path) else None
        done = check(proxy.url, f"s3://{bucket}/team")
        results = found(done)
        assert done.returncode == 1
        assert {one: results[one][0] for one in PERMISSIONS} == {
            one: "failed" if one == permission else "ok" for one in PERMISSIONS
        }
        on = f"arn:aws:s3:::{bucket}" if permission == "s3:ListBucket" else f"arn:aws:s3:::{bucket}/team/*"
        assert results[permission][1].endswith(f"allow {permission} on {on}")
        assert "AccessDenied" in results[permission][1]
        assert results["race"] == ("not tested", "the permissions above are needed first")
    stayed = left(ministack_s3.url, bucket)
    if permission == "s3:DeleteObject":
        assert results["clean-up"][0] == "failed"
        assert all(key.startswith("team/s3-check/") for key in stayed)
        assert stayed
    else:
        assert stayed == []


def test_a_403_to_a_get_of_a_missing_object_is_a_missing_permission_to_list(ministack_s3, bucket):
    with Proxy(ministack_s3.url) as proxy:
        proxy.answers = lambda _, path: (403, "AccessDenied") if path.endswith("/missing") else None
        done = check(proxy.url, f"s3://{bucket}")
        assert done.returncode == 1
        assert [one for one in PERMISSIONS if found(done)[one][0] == "failed"] == ["s3:ListBucket"]


@pytest.mark.parametrize(
    ("status", "code", "named"),
    [
        (400, "AuthorizationHeaderMalformed", "region"),
        (301, "PermanentRedirect", "region"),
        (403, "InvalidAccessKeyId", "keys"),
        (403, "ExpiredToken", "keys"),
        (403, "RequestTimeTooSkewed", "clock"),
    ],
)
def test_a_permanent_error_ends_the_check_with_its_reason(ministack_s3, status, code, named):
    with Proxy(ministack_s3.url) as proxy:
        proxy.answers = lambda *_: (status, code)
        done = check(proxy.url, "s3://some-bucket")
        assert (done.returncode, list(found(done))) == (1, [named])
        assert code in found(done)[named][1] or "set AWS_REGION" in found(done)[named][1]
        assert {method for method, _ in proxy.requests} == {"GET"}


def test_a_missing_bucket_is_named(ministack_s3):
    done = check(ministack_s3.url, "s3://no-such-bucket")
    assert (done.returncode, list(found(done))) == (1, ["bucket"])
    assert "NoSuchBucket" in done.stdout


def test_no_server_is_one_sentence():
    done = check("http://127.0.0.1:1", "s3://some-bucket")
    assert (done.returncode, done.stderr) == (1, "")
    assert found(done)["server"][1].endswith("Connection refused")


@pytest.mark.parametrize(("status", "body"), [(200, b"hello"), (403, b"<html>"), (404, b""), (501, b"<html>")])
def test_a_web_server_that_is_not_s3_is_reported(status, body):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        done = check(f"http://127.0.0.1:{server.server_port}", "s3://some-bucket")
        assert (done.returncode, list(found(done))) == (1, ["server"])
        assert found(done)["server"][1].endswith("is this the address of an S3 server?")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("trusted", [True, False])
def test_a_private_ca_must_be_trusted(ministack_s3, bucket, tls, trusted):
    proxy = Proxy(ministack_s3.url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "leaf.pem", tls / "leaf.key")
    proxy._server.socket = context.wrap_socket(proxy._server.socket, server_side=True)
    proxy._server.handle_error = lambda *_: None
    with proxy:
        more = {"AWS_CA_BUNDLE": str(tls / "ca.pem")} if trusted else {}
        done = check(proxy.url.replace("http:", "https:"), f"s3://{bucket}", **more)
        results = found(done)
        assert (done.returncode, results["TLS"][0]) == ((0, "ok") if trusted else (1, "failed"))
        assert ("clock" in results) is trusted
        assert trusted or "set AWS_CA_BUNDLE" in results["TLS"][1]


def test_another_clock_is_noted(ministack_s3, bucket):
    def later(*given):
        status, headers, content = given[-1]
        date = parsedate_to_datetime(headers["date"]) + timedelta(hours=2)
        return status, {**headers, "date": format_datetime(date.astimezone(UTC), usegmt=True)}, content

    with Proxy(ministack_s3.url) as proxy:
        proxy.changed = later
        done = check(proxy.url, f"s3://{bucket}")
        status, sentence = found(done)["clock"]
        assert (done.returncode, status) == (0, "note")
        seconds = int(re.search(r"is (\d+) s ahead", sentence)[1])
        assert 7190 <= seconds <= 7200


def test_clock_skew_is_reported_as_far_as_whole_seconds_prove_it():
    noon = datetime(2026, 11, 28, 12, tzinfo=UTC)
    date, at = format_datetime(noon, usegmt=True), noon.timestamp()

    def skew(sent, received):
        return clock_skew_s(Answer(200, b"", date, at + sent, at + received))

    assert (skew(0.2, 0.4), skew(-3, 2), skew(1.0, 1.5)) == (0, 0, 0)
    assert (skew(5.0, 6.0), skew(-9.0, -8.0)) == (-4, 8)
    assert clock_skew_s(Answer(200, b"", None, at, at)) is None


def test_percentiles_are_by_nearest_rank():
    timings = Timings.of("GET", [number / 1000 for number in range(100, 0, -1)])
    assert (timings.count, timings.p50_ms, timings.p99_ms) == (100, 50, 99)
    assert Timings.of("GET", [0.007]).p99_ms == 7


def test_an_outdated_listing_is_noted(ministack_s3, bucket):
    """Listings of the five objects are half a second old."""
    past: dict[str, list[tuple[float, object]]] = {}

    def old(method, path, answer):
        if not (_is_list(method, path) and "listed" in path):
            return answer
        now = time.monotonic()
        known = past.setdefault(path, [])
        known.append((now, answer))
        return next((one for at, one in reversed(known) if at <= now - 0.5), known[0][1])

    with Proxy(ministack_s3.url) as proxy:
        proxy.changed = old
        done = check(proxy.url, f"s3://{bucket}")
        assert (done.returncode, found(done)["listing"][0]) == (0, "note")
        assert "s old" in found(done)["listing"][1]
    assert left(ministack_s3.url, bucket) == []


def test_a_bucket_that_keeps_versions_is_noted(ministack_s3, bucket):
    client = client_of(ministack_s3.url)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    done = check(ministack_s3.url, f"s3://{bucket}")
    assert (done.returncode, found(done)["versions"][0]) == (0, "note")
    assert left(ministack_s3.url, bucket) == []


def test_progress_is_shown_on_a_terminal_only(ministack_s3, bucket):
    person, terminal = os.openpty()
    running = subprocess.Popen(
        [*QUICK, f"s3://{bucket}"],
        env=environment(ministack_s3.url),
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    said, _ = running.communicate(timeout=120)
    shown = os.read(person, 2**16).decode()
    os.close(person)
    assert running.returncode == 0
    assert "testing race..." in shown
    assert "measuring LIST, 4 of 5..." in shown
    assert "..." not in said


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("last", ["conditions", "race", "listing", "latency"])
def test_an_interrupted_check_deletes_its_objects_and_those_under_way(ministack_s3, bucket, last, sent):
    """The signal is sent after the result `last`. The proxy writes 20 ms after it compared, so PUTs are under way."""
    with Proxy(ministack_s3.url, None) as proxy:
        proxy.changed = lambda *given: (time.sleep(0.02), given[-1])[1]
        running = subprocess.Popen(
            [*COMMAND, f"s3://{bucket}/team"],
            env=environment(proxy.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in running.stdout:
            if re.match(rf"\w+ +{last}: ", line):
                break
        before = len(proxy.requests)
        while len(proxy.requests) < before + 3 and running.poll() is None:
            time.sleep(0.005)
        running.send_signal(sent)
        rest, said = running.communicate(timeout=120)
        assert running.returncode == 130, said
        assert "every object that was written below" in rest
        assert said.startswith("stopped")
        assert "is fit" not in rest
        assert any(method == "PUT" for method, _ in proxy.requests)
    assert left(ministack_s3.url, bucket) == []


def test_a_put_that_takes_effect_after_an_interrupt_is_deleted_too(ministack_s3, bucket):
    """The PUT takes effect a second after Ctrl-C. If the check did not wait, its object would stay."""
    arrived, held = threading.Event(), []

    def hold(method, path):
        if method == "PUT" and "/race/" in path:
            held.append(urlsplit(path).path)
            arrived.set()
            time.sleep(1)

    with Proxy(ministack_s3.url) as proxy:
        proxy.answers = hold
        running = subprocess.Popen(
            [*COMMAND, f"s3://{bucket}"], env=environment(proxy.url), stdout=subprocess.PIPE, text=True
        )
        assert arrived.wait(60)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=120)
        assert running.returncode == 130
        assert len(held) >= race_check.OBJECTS
    assert left(ministack_s3.url, bucket) == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["bucket"], ["http://bucket"], ["s3://"], ["s3://key:secret@bucket"], ["s3://b/../x"], ["s3://b", "--xml"]],
)
def test_a_wrong_argument_is_one_sentence(arguments):
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment("http://127.0.0.1:1"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("crudstack: ")
