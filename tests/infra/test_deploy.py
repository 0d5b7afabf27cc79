"""Deploys recorded stacks to an emulator of AWS, and sends HTTP requests to them.

The last part starts the server with the outputs of each stack, on real databases, caches and brokers.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from botocore.exceptions import ClientError

from app.settings import Pair
from infra import artifact
from infra.config import KINDS, StackConfig
from infra.stack import build
from tests.infra.deploy import MAKERS, NOT_EMULATED, Cloud, Deployed, Protected, apply, emulator, resolved
from tests.infra.planting import statement
from tests.infra.recorder import REGION, Recording, record
from tests.infra.stacks import environment, recording
from tests.lambda_runtime import http_event
from tests.test_readme import tour_script

ARTICLE = {"title": "0", "content": "", "author": "alice"}
FUNCTION = "aws:lambda/function:Function"
TARGET, VERSION = "aws:cloudwatch/eventTarget:EventTarget", "aws:secretsmanager/secretVersion:SecretVersion"


def recorded(**config) -> Recording:
    return record(lambda: build(StackConfig(**config), zip=Path("app.zip")))


class Stack:
    """A deployed stack, and clients of its API."""

    def __init__(self, cloud: Cloud, deployed: Deployed) -> None:
        self.cloud, self.deployed, self.outputs = cloud, deployed, deployed.outputs
        self.bucket = self.outputs["bucket"]
        secret = cloud.secretsmanager.get_secret_value(SecretId=f"{self.bucket}/api-token")
        self.signed_in = {"authorization": f"Bearer {secret['SecretString']}"}

    def client(self, **headers: str) -> httpx.Client:
        """Return a client that sends requests for the API's host name to the emulator."""
        host = {"host": urlsplit(self.outputs["api_url"]).netloc}
        trusted = ssl.create_default_context(cafile=self.cloud.ca)
        return httpx.Client(base_url=self.cloud.url, headers={**host, **headers}, verify=trusted, timeout=60)

    def signed(self) -> httpx.Client:
        return self.client(**self.signed_in)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    with emulator(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    return artifact.build(tmp_path_factory.mktemp("zip") / "host.zip", target=artifact.host()).path.read_bytes()


@pytest.fixture(scope="module", params=["http-api", "function-url"])
def stack(request, cloud, zipped):
    return Stack(cloud, apply(recorded(edge=request.param), cloud, zip=zipped))


def test_the_tour(stack):
    script, check = tour_script(stack.outputs["api_url"])
    there = f"--http1.1 --cacert '{stack.cloud.ca}' --connect-to '::{urlsplit(stack.cloud.url).netloc}'"
    curl = f"curl() {{ command curl {there} -H 'Authorization: {stack.signed_in['authorization']}' \"$@\"; }}\n"
    check(output_of(curl + script))


def test_without_the_token_only_healthz_answers(stack):
    with stack.client() as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/article", "/readyz", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer guessed"}).status_code == 401
    with stack.signed() as client:
        ready = client.get("/readyz").json()
        assert (ready["status"], ready["not_durable"]) == ("ready", [])


def test_two_writers_at_once_lose_nothing(stack):
    """The emulator runs one instance of the function for each. Every increment must be stored exactly once."""
    with stack.signed() as client:
        path = client.post("/article", json=ARTICLE).raise_for_status().headers["location"]
    rounds, refused, failures = 10, [0, 0], []
    barrier = threading.Barrier(2, timeout=60)

    def write(at: int) -> None:
        with stack.signed() as client:
            for _ in range(rounds):
                barrier.wait()
                while True:
                    now = client.get(path)
                    title = f"{int(now.json()['data']['title']) + 1}"
                    changed = client.patch(path, json={"title": title}, headers={"if-match": now.headers["etag"]})
                    if changed.status_code == 200:
                        break
                    assert changed.status_code == 412, changed.text
                    refused[at] += 1

    def noted(at: int) -> None:
        try:
            write(at)
        except Exception as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=noted, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with stack.signed() as client:
        final = client.get(path).json()
    assert (final["data"]["title"], final["meta"]["revision"]) == (f"{2 * rounds}", 2 * rounds + 1)
    assert sum(refused) > 0, "the two writers never conflicted"


def test_the_schedule_calls_the_housekeeping(stack):
    functions, target = stack.cloud.lambda_, stack.deployed.of(TARGET)
    (there,) = stack.cloud.events.list_targets_by_rule(Rule=target["rule"])["Targets"]
    answer = functions.invoke(FunctionName=there["Arn"], Payload=there["Input"].encode())
    told = json.loads(answer["Payload"].read())
    assert "FunctionError" not in answer, told
    assert told["maintained"] == ["airport", "article", "user"]


def test_only_the_rule_and_the_edge_may_call_the_function(stack):
    name = stack.outputs["function_name"]
    policy = stack.cloud.lambda_.get_policy(FunctionName=name, Qualifier="live")["Policy"]
    allowed = [(each["Principal"], each.get("Condition")) for each in json.loads(policy)["Statement"]]
    rule = stack.cloud.events.describe_rule(Name=stack.deployed.of(TARGET)["rule"])["Arn"]
    expected = [({"Service": "events.amazonaws.com"}, {"ArnLike": {"AWS:SourceArn": rule}})]
    if "execute-api" in stack.outputs["api_url"]:
        api = urlsplit(stack.outputs["api_url"]).netloc.partition(".")[0]
        source = f"arn:aws:execute-api:{REGION}:000000000000:{api}/*/*"
        expected.append(({"Service": "apigateway.amazonaws.com"}, {"ArnLike": {"AWS:SourceArn": source}}))
    else:
        expected.append(("*", {"StringEquals": {"lambda:FunctionUrlAuthType": "NONE"}}))
        expected.append(("*", {"Bool": {"lambda:InvokedViaFunctionUrl": "true"}}))
    assert sorted(map(str, allowed)) == sorted(map(str, expected))


def test_the_function_cannot_write_without_the_permission_of_its_role(cloud, zipped):
    less = recorded()
    statement(3, Action=["s3:GetObject"])(less)
    stack = Stack(cloud, apply(less, cloud, zip=zipped))
    with stack.signed() as client:
        assert client.post("/article", json=ARTICLE).status_code >= 500
    stack.deployed.destroy()


def test_destroy_deletes_every_resource(cloud, zipped):
    before = cloud.inventory()
    stack = Stack(cloud, apply(recorded(), cloud, zip=zipped))
    with stack.signed() as client:
        client.post("/article", json=ARTICLE).raise_for_status()
    assert len(cloud.inventory() - before) == 13
    stack.deployed.destroy()
    assert cloud.inventory() == before


def test_in_prod_destroy_keeps_the_bucket_and_it_stays_private(cloud, zipped):
    before, recording = cloud.inventory(), recorded(stage="prod")
    stack = Stack(cloud, apply(recording, cloud, zip=zipped))
    with stack.signed() as client:
        client.post("/article", json=ARTICLE).raise_for_status()
    made = cloud.inventory()
    with pytest.raises(Protected, match="crudstack-prod-data"):
        stack.deployed.destroy()
    assert cloud.inventory() == made
    for resource in recording.resources:  # as a person does who unprotects everything
        resource.protect = False
    stack.deployed.destroy()
    assert cloud.inventory() - before == {f"bucket {stack.bucket}"}
    assert cloud.s3.list_objects_v2(Bucket=stack.bucket)["KeyCount"] > 0
    closed = cloud.s3.get_public_access_block(Bucket=stack.bucket)["PublicAccessBlockConfiguration"]
    assert all(closed.values())
    assert "TlsOnly" in cloud.s3.get_bucket_policy(Bucket=stack.bucket)["Policy"]
    assert cloud.s3.get_bucket_versioning(Bucket=stack.bucket)["Status"] == "Enabled"
    with pytest.raises(ClientError, match="BucketNotEmpty"):  # destroy has not emptied the bucket
        cloud.s3.delete_bucket(Bucket=stack.bucket)


def test_every_type_of_resource_has_a_maker():
    stacks = [recording("s3-sqlite-dev"), recording("function-url-dev")]
    resources = [resource for stack in stacks for resource in stack.aws]
    assert {resource.type for resource in resources} == MAKERS.keys()
    arguments = {f"{each.type.rpartition(':')[2]}.{name}" for each in resources for name in each.inputs}
    assert arguments >= NOT_EMULATED.keys()


# The outputs of each stack, with real servers

OVERRIDES = {"user": "postgres-s3", "airport": Pair(meta="s3-sqlite", resource="cached-s3")}


class Elsewhere(dict):
    """Values for references. A host that exists on AWS only has a name that cannot be resolved."""

    def __missing__(self, reference: str) -> str:
        return "nowhere.invalid"


@pytest.mark.parametrize(
    "config",
    [
        *(
            pytest.param(
                {"storage": kind}, id=kind, marks=[pytest.mark.rabbitmq] if pair.resource == "mq-cached-s3" else []
            )
            for kind, pair in KINDS.items()
        ),
        pytest.param({"storage_overrides": OVERRIDES}, id="overrides"),
    ],
)
def test_the_outputs_serve_the_tour(request, serve, tmp_path, ministack_s3, database, valkey, config):
    """`crudstack serve` with the outputs of the stack and the function with its environment find the same data."""
    stack = recorded(**config)
    bucket = f"aws_s3_bucket.{stack.one('aws:s3/bucket:Bucket').name}"
    there = Elsewhere({f"{bucket}.bucket": f"own-{database.rpartition('_')[2]}", f"{bucket}.region": REGION})
    servers = {
        "CRUDSTACK_PG_DSN": database,
        "CRUDSTACK_REDIS_URL": valkey,
        "CRUDSTACK_S3_ENDPOINT_URL": ministack_s3.url,
        "AWS_ACCESS_KEY_ID": ministack_s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ministack_s3.secret_access_key,
    }
    if "broker" in stack.outputs:
        servers["CRUDSTACK_AMQP_URL"] = request.getfixturevalue("rabbitmq")
    printed = tmp_path / "outputs.json"
    printed.write_text(json.dumps(resolved(stack.outputs, there)))
    instead = {
        "CRUDSTACK_STORAGE": "",
        "CRUDSTACK_BUCKET": "",
        "CRUDSTACK_DATA_DIR": "",
        "CRUDSTACK_OUTPUTS": str(printed),
    }
    server = serve("", tmp_path, "--make-bucket", environment={**servers, **instead})
    token = stack.one(VERSION, "token-1").inputs["secretString"]
    script, check = tour_script(server.url)
    check(output_of(f"curl() {{ command curl -H 'Authorization: Bearer {token}' \"$@\"; }}\n{script}"))

    told = resolved(environment(stack.one(FUNCTION, "-api")), there)
    event = http_event("GET", "/article/stars/data", headers={"authorization": f"Bearer {token}"})
    answer = answered(event, {**servers, **told})
    assert answer["statusCode"] == 200, answer
    assert json.loads(answer["body"])["title"] == "Stars"


ANSWER = """
import json, os, sys
from app.handler import handler
context = type("Context", (), {"aws_request_id": "1", "get_remaining_time_in_millis": lambda _: 29000})()
print(json.dumps(handler(json.load(sys.stdin), context)), flush=True)
os._exit(0)  # Lambda ends a process without notice
"""


def answered(event, told):
    """Run the function in a process with this environment, and return its answer to the event."""
    command = [sys.executable, "-c", ANSWER]
    given = {"PATH": os.environ["PATH"], **told}
    done = subprocess.run(command, input=json.dumps(event), env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def output_of(script: str) -> str:
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
