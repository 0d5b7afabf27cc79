"""The zip as a Lambda function behind an HTTP API, on S3 in the same emulator (ministack)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from urllib.parse import urlsplit

import boto3
import httpx
import pytest

from infra import artifact
from tests.services import BUCKET
from tests.test_readme import tour_script

TOKEN = "another-secret-token-0123456789"  # noqa: S105 - of these tests
SIGNED_IN = {"authorization": f"Bearer {TOKEN}"}
ARTICLE = {"title": "0", "content": "", "author": "alice"}


class Deployed:
    """A function and its API. Requests go to the host name of the API."""

    def __init__(self, s3, prefix: str, zipped: bytes) -> None:
        given = {"endpoint_url": s3.url, "region_name": "us-east-1"}
        keys = {"aws_access_key_id": s3.access_key_id, "aws_secret_access_key": s3.secret_access_key}
        self.functions = boto3.client("lambda", **given, **keys)
        apis = boto3.client("apigatewayv2", **given, **keys)
        token = {"mode": "token", "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}
        outputs = {"version": 1, "storage": "s3-sqlite", "bucket": BUCKET, "prefix": prefix, "auth": token}
        self.name = f"crudstack-{prefix}"[:60]
        function = self.functions.create_function(
            FunctionName=self.name,
            Runtime="python3.13",
            Role="arn:aws:iam::000000000000:role/crudstack",
            Handler="app.handler.handler",
            Code={"ZipFile": zipped},
            Timeout=29,
            MemorySize=512,
            Environment={"Variables": {"CRUDSTACK_OUTPUTS": json.dumps(outputs)}},
        )
        api = apis.create_api(Name=self.name, ProtocolType="HTTP")["ApiId"]
        integration = apis.create_integration(
            ApiId=api,
            IntegrationType="AWS_PROXY",
            IntegrationUri=function["FunctionArn"],
            PayloadFormatVersion="2.0",
        )["IntegrationId"]
        apis.create_route(ApiId=api, RouteKey="$default", Target=f"integrations/{integration}")
        apis.create_stage(ApiId=api, StageName="$default", AutoDeploy=True)
        self.host = f"{api}.execute-api.localhost:{urlsplit(s3.url).port}"
        self.url = s3.url

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={**SIGNED_IN, "host": self.host}, timeout=60)


@pytest.fixture(scope="module")
def deployed(ministack_s3, tmp_path_factory):
    directory = tmp_path_factory.mktemp("deployed")
    built = artifact.build(directory / "host.zip", target=artifact.host())
    function = Deployed(ministack_s3, directory.name, built.path.read_bytes())
    yield function
    function.functions.delete_function(FunctionName=function.name)


def test_the_tour(deployed):
    script, check = tour_script(f"http://{deployed.host}")
    signed = f"curl() {{ command curl -H 'Authorization: Bearer {TOKEN}' \"$@\"; }}\n"
    done = subprocess.run(["bash", "-c", signed + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check(done.stdout)


def test_without_the_token_only_healthz_answers(deployed):
    with deployed.client() as client:
        del client.headers["authorization"]
        assert client.get("/healthz").status_code == 200
        for path in ("/article", "/readyz", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401


def test_two_writers_at_once_lose_nothing(deployed):
    """The emulator runs an instance for each writer. Each increment must be stored once."""
    with deployed.client() as client:
        path = client.post("/article", json=ARTICLE).raise_for_status().headers["location"]
    rounds, wins, created = 25, [0, 0], [[], []]
    barrier = threading.Barrier(2, timeout=60)

    def write(at: int) -> None:
        with deployed.client() as client:
            for number in range(rounds):
                barrier.wait()
                answer = client.post("/article", json=ARTICLE | {"title": f"{at}.{number}"})
                created[at].append((answer.raise_for_status().headers["location"], f"{at}.{number}"))
                while True:
                    now = client.get(path)
                    title = f"{int(now.json()['data']['title']) + 1}"
                    changed = client.patch(path, json={"title": title}, headers={"if-match": now.headers["etag"]})
                    if changed.status_code == 200:
                        break
                    assert changed.status_code == 412
                wins[at] += 1

    threads = [threading.Thread(target=write, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with deployed.client() as client:
        assert wins == [rounds, rounds]
        final = client.get(path).json()
        assert (final["data"]["title"], final["meta"]["revision"]) == (f"{2 * rounds}", 2 * rounds + 1)
        for location, title in [*created[0], *created[1]]:
            assert client.get(f"{location}/data").json()["title"] == title


def test_the_scheduled_event(deployed):
    event = {"version": "0", "detail-type": "Scheduled Event", "source": "aws.events", "detail": {}}
    answer = deployed.functions.invoke(FunctionName=deployed.name, Payload=json.dumps(event).encode())
    assert "FunctionError" not in answer
    assert json.loads(answer["Payload"].read())["maintained"] == ["airport", "article", "user"]


def test_paths_and_links(deployed):
    with deployed.client() as client:
        made = client.put("/article/a%7Eb", json=ARTICLE, headers={"if-none-match": "*"})
        assert (made.status_code, made.headers["location"]) == (201, "/article/a~b")
        for number in range(3):
            client.post("/article", json=ARTICLE | {"author": f"ä&{number % 1}"}).raise_for_status()
        page = client.get("/article", params={"author": "ä&0", "limit": "2"})
        assert len(page.json()["items"]) == 2
        following = page.headers["link"].partition(">")[0].removeprefix("<")
        assert len(client.get(following).json()["items"]) == 1


def test_every_store_is_ready(deployed):
    with deployed.client() as client:
        ready = client.get("/readyz").json()
        assert (ready["status"], ready["not_durable"]) == ("ready", [])
