"""The pages about AWS: generated parts are up to date, and the facts and sums in the text agree with the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import boto3
import msgspec
import pytest
import yaml
from botocore import xform_name

from app.autocrud.http.problems import ROUTE
from app.cli import cli
from app.request_log import METRICS, RequestLog
from infra import costs, reference
from infra.artifact import ROOT
from infra.components.http_api import LOGGED
from infra.config import KINDS, StackConfig, read
from infra.deploy import UNRESERVED
from infra.zones import ZONES
from tests.engine.install import pinned
from tests.infra.stacks import CONFIGS, policies, recording

DEPLOY, SECURITY = (ROOT / "docs/deploy.md").read_text(), (ROOT / "docs/security.md").read_text()
COSTS = (ROOT / "docs/costs.md").read_text()
RESULTS = (ROOT / "benchmarks/RESULTS.md").read_text()
SNAPSHOTS = Path(__file__).with_name("snapshots")


def rows(text: str, heading: str, table: int = 0) -> list[list[str]]:
    """The cells of a table below a heading, without its head."""
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1].split("\n## ")[0]
    found = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[table]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found.splitlines()[2:]]


def registered(name: str) -> Counter[str]:
    """The resources of a stack by type, as its snapshot has them."""
    return Counter(line.split()[0] for line in (SNAPSHOTS / f"{name}.txt").read_text().splitlines())


def keys() -> set[str]:
    return {field.name for field in msgspec.structs.fields(StackConfig)}


def nested_keys() -> set[str]:
    return {f"{key}.{field.encode_name}" for key, cls in reference._structs() for field in msgspec.structs.fields(cls)}


# Pages that are made


@pytest.mark.parametrize(("module", "name"), [(reference, "config"), (costs, "costs")])
def test_the_generated_pages_are_current(module, name):
    assert (ROOT / f"docs/{name}.md").read_text() == module.page(), "make docs"


def test_every_key_and_every_nested_one_is_in_the_reference():
    found = set(re.findall(r"^\| `([a-z_.]+)` \|", reference.page(), re.MULTILINE))
    assert keys() | nested_keys() <= found
    assert {"auth.issuer", "domain.zone", "postgres.class", "cache.max_gb", "broker.version"} <= found


# Costs

PAID = {
    "aws:apigatewayv2/api:Api": costs.HTTP_API,
    "aws:cloudwatch/logGroup:LogGroup": costs.LOGS,
    "aws:cloudwatch/metricAlarm:MetricAlarm": costs.ALARM,
    "aws:elasticache/replicationGroup:ReplicationGroup": costs.INSTANCES["cache.t4g.micro"],
    "aws:elasticache/serverlessCache:ServerlessCache": costs.CACHE_GB,
    "aws:lambda/function:Function": costs.LAMBDA,
    "aws:mq/broker:Broker": costs.INSTANCES["mq.m7g.medium"],
    "aws:rds/clusterInstance:ClusterInstance": costs.ACU,
    "aws:rds/instance:Instance": costs.INSTANCES["db.t4g.micro"],
    "aws:rds/proxy:Proxy": costs.PROXY,
    "aws:s3/bucket:Bucket": costs.S3_GB,
    "aws:secretsmanager/secret:Secret": costs.SECRET,
}
FREE = re.compile(
    "aws:(acm|apigatewayv2/(?!api:)|budgets|cloudwatch/event"
    "|ec2/(defaultSecurityGroup|routeTable|securityGroup|subnet|vpc:)|elasticache/(subnet|user)|iam"
    "|lambda/(?!function:)|rds/(?!instance:|clusterInstance:|proxy:)|route53|s3/bucket(?!:)"
    "|secretsmanager/secretVersion|sns|vpc)"
)
"""Types that cost nothing by themselves, at the volumes that the page is about.

The bootstraps run once. The first two budgets of an account are free.
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_every_registered_type_has_a_price_or_is_free(name):
    config, types = CONFIGS[name], registered(name)
    found = {line.price: line for line in costs.lines(config, 1) if line.usd}
    there = {price for type_, price in PAID.items() if types[type_]}
    # With a JWT the only secret may be that of the database's master user, which RDS makes.
    assert there == set(PAID.values()) & set(found) - ({costs.SECRET} - there)
    others = {type_ for type_ in types if type_.startswith("aws:") and type_ not in PAID and not FREE.match(type_)}
    assert others <= {"aws:ec2/vpcEndpoint:VpcEndpoint"}
    held = types["aws:secretsmanager/secret:Secret"] + ("postgres" in config.servers)
    assert (costs.SECRET in found) == bool(held)
    assert not held or round(found[costs.SECRET].usd / costs.SECRET.usd) == held
    assert round(found[costs.ALARM].usd / costs.ALARM.usd) == types["aws:cloudwatch/metricAlarm:MetricAlarm"]
    assert (costs.SNAP_START in found) == config.snap_start
    # The one for S3 is free.
    interfaces = max(0, types["aws:ec2/vpcEndpoint:VpcEndpoint"] - 1)
    endpoint = found[costs.ENDPOINT].usd if costs.ENDPOINT in found else 0
    assert endpoint == pytest.approx(interfaces * ZONES * 730 * 0.01)


def test_the_assumed_costs_of_s3_sqlite_were_measured():
    def measured(operation: str) -> tuple[float, float, int]:
        row = next(row for row in rows(RESULTS, "S3-SQLite: one writer") if row[0].startswith(f"{operation}, "))
        asked = {kind: float(count) for count, kind in re.findall(r"([\d.]+) (\w+)", row[4])}
        puts, gets = (sum(asked.get(kind, 0) for kind in kinds) for kinds in (("put", "put_if"), ("get", "get_if")))
        return puts, gets, int(row[5].replace(",", ""))

    assert measured("update") == (pytest.approx(costs.WRITE_PUTS, rel=0.05), 0, pytest.approx(25_000, rel=0.1))
    assert costs.WRITE_KB == 25
    assert measured("get")[:2] == (0, costs.GET_GETS)
    assert measured("count")[1] == 1


async def test_the_assumed_size_of_logs_is_the_written_one():
    written = []

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        pass

    scope = {"type": "http", "method": "GET", ROUTE: "/article/{resource_id}/data"}
    await RequestLog(app, service="crudstack-dev-api-1a2b3c4", write=written.append)(scope, None, send)
    line = len(msgspec.json.encode(written[0]))
    # A start and a report with its trace, as Lambda writes them in JSON: 550. CloudWatch counts 26 for every line.
    lambda_kb = (line + 550 + 3 * 26) / 1000
    access_kb = (len(json.dumps(dict.fromkeys(LOGGED, "x" * 8))) + 26) / 1000
    assert lambda_kb == pytest.approx(costs.LOG_KB["function-url"], abs=0.1)
    assert lambda_kb + access_kb == pytest.approx(costs.LOG_KB["http-api"], abs=0.1)
    assert len(METRICS) == costs.METRICS


def test_an_independent_sum():
    idle = 0.4 + 0.4 + 1 * 0.023  # alarms, the token's secret, a GB
    idle += 730 * (0.20 / 1e6 + 0.5 * 0.0000133334 + 5 / 1e6 + 20 * 0.0000004)  # the hourly housekeeping
    assert costs.total(costs.lines(StackConfig(), 0)) == pytest.approx(idle, abs=0.01)
    database = 730 * 0.016 + 20 * 0.115 + 3 * 0.10 + 0.40
    assert costs.total(costs.lines(StackConfig(storage="postgres-s3"), 0)) == pytest.approx(idle + database, abs=0.01)
    million = 1e6 * (0.20 / 1e6 + 0.05 * 0.5 * 0.0000133334 + 1.00 / 1e6)  # Lambda, HTTP API
    million += 100_000 * 0.000005 + 900_000 * 0.0000004  # a PUT of each body, a GET
    million += 1.6 * 0.50 + 6 * 0.30 + 5.00  # logs, metrics, a trace of each request
    million += 100_000 * 2e-6 * 0.023
    both = idle + database + million
    assert costs.total(costs.lines(StackConfig(storage="postgres-s3"), 1)) == pytest.approx(both, abs=0.01)


def test_a_version_with_snap_start_costs_as_long_as_it_exists():
    idle = [costs.total(costs.lines(StackConfig(snap_start=on), 0)) for on in (True, False)]
    assert idle[0] - idle[1] == pytest.approx(730 * 3600 * 0.5 * 0.0000015046, abs=0.01)
    assert "Each `pulumi up` that changes the function publishes another version" in " ".join(COSTS.split())


def evaluated(arithmetic: str) -> float:
    """Return the value of a sum such as "(1 M × 0.05 s + 730) × 0.20/M". M is a million; KB are converted to GB."""
    python = arithmetic.replace(",", "").replace("×", "*").replace(" M", "*1e6").replace("/M", "*1e-6")
    python = re.sub(r" KB", "*1e-6", python)
    python = re.sub(r" (GB|s|ACU)\b", "", python)
    assert re.fullmatch(r"[\d.e*+/() -]+", python), python
    return float(eval(python))  # noqa: S307 - digits and signs only


def test_every_sum_in_the_page_is_right_and_they_add_up():
    months = {row[0].strip("`"): [float(cell.replace(",", "")) for cell in row[1:]] for row in rows(COSTS, "A month")}
    assert list(months) == list(KINDS)
    found = {kind: [0.0, 0.0, 0.0] for kind in KINDS}
    sums = 0
    for _, kinds, *cells in rows(COSTS, "Arithmetic"):
        for volume, cell in enumerate(cells):
            if not cell:
                continue
            arithmetic, said = cell.split(" = ")
            assert evaluated(arithmetic) == pytest.approx(float(said.replace(",", "")), abs=0.0051), cell
            for kind in KINDS if kinds == "all" else re.findall("`(.*?)`", kinds):
                found[kind][volume] += evaluated(arithmetic)
            sums += 1
    assert sums > 60
    for kind in KINDS:
        assert found[kind] == pytest.approx(months[kind], abs=0.006)


def test_an_unknown_price_is_not_a_price():
    with pytest.raises(KeyError, match=r"db\.r6g\.large"):
        list(costs.lines(read({"storage": "full", "postgres": '{"class": "db.r6g.large"}'}), 1))


# The page about deploying

PULUMI = {
    "login": {"--local"},
    "stack init": set(),
    "stack select": set(),
    "stack output": set(),
    "stack rename": set(),
    "stack rm": {"--preserve-config"},
    "stack": {"--show-urns"},
    "config get": set(),
    "config set": {"--path"},
    "state unprotect": {"--all"},
    "preview": set(),
    "up": {"--replace"},
    "refresh": set(),
    "cancel": set(),
    "import": set(),
    "destroy": {"--exclude-protected", "--target", "--target-dependents"},
}
"""What Pulumi's own pages say of the commands that ours names."""
SEVERAL = {"&&", "|", ";"}


def commands() -> list[list[str]]:
    """All of the page, those within others included."""
    blocks = re.findall(r"```sh\n(.*?)```", DEPLOY, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    lines += re.findall(r"`((?:pulumi|aws|make|\.venv/bin/\w+) [^`]+)`", DEPLOY)
    found = []
    for line in lines:
        found += map(shlex.split, re.findall(r"\$\((.*?)\)", line))
        words: list[str] = []
        for word in [*shlex.split(line), ";"]:
            if word in SEVERAL:
                found.append(words)
                words = []
            else:
                words.append(word)
    return found


def of(program: str) -> list[list[str]]:
    found = [words[1:] for words in commands() if words[0] == program]
    assert found, program
    return found


def test_each_command_comes_after_what_it_needs():
    block = re.findall(r"## Deploy step by step.*?```sh\n(.*?)```", DEPLOY, re.DOTALL)[0]
    starts = ["make setup-infra", "export PULUMI_CONFIG_PASSPHRASE=", "pulumi login", "pulumi stack init"]
    starts += ["pulumi config set aws:region", "pulumi up", "curl"]
    assert [line.startswith(start) for line, start in zip(block.splitlines(), starts, strict=True)] == [True] * 7


def test_no_command_is_of_another_program():
    assert {words[0] for words in commands()} <= {
        "make",
        "pulumi",
        "curl",
        "sh",
        "export",
        "aws",
        ".venv/bin/crudstack",
        ".venv/bin/python",
    }


def test_commands_of_make_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[0] for words in of("make")} <= targets


def test_commands_of_crudstack_are_understood():
    named = set()
    for words in of(".venv/bin/crudstack"):
        command, bound, _ = cli.parse_args(words, exit_on_error=False, print_error=False)
        named.add(command.__name__)
        assert bound is not None
    assert named == {"outputs", "serve", "show", "rotate"}
    used = set(
        re.findall(r"^\| `([a-z ]+)(?: --\w+)?` \| ", DEPLOY.split("## Use a stack")[1].split("\n## ")[0], re.MULTILINE)
    )
    assert used == {"outputs", "serve", "token show", "token rotate"}


def test_commands_of_pulumi_are_known():
    for words in of("pulumi"):
        known = next((name for name in sorted(PULUMI, key=len, reverse=True) if " ".join(words).startswith(name)), None)
        assert known, words
        assert {word for word in words if word.startswith("--")} <= PULUMI[known], words


def test_keys_that_are_set_are_keys():
    number = 0
    for words in of("pulumi"):
        if words[:2] != ["config", "set"]:
            continue
        *_, key, value = words
        if not key.startswith("aws:"):
            name, _, nested = key.partition(".")
            assert name in keys()
            read({name: json.dumps({nested: json.loads(value)}) if nested else value})
            number += 1
    assert number >= 3
    for block in re.findall(r"```yaml\n(.*?)```", DEPLOY, re.DOTALL):
        # Without a namespace, they are true of a project of any name.
        values = yaml.safe_load(block)["config"]
        read({key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()})
    for page in (DEPLOY, SECURITY):
        for name in re.findall(r"`((?:auth|domain|postgres|cache|broker)\.\w+)`", page):
            assert name in nested_keys()


def test_commands_of_aws_are_what_its_own_models_say():
    sessions: dict[str, object] = {}
    # `aws configure` is of the command line itself.
    for service, command, *words in (words for words in of("aws") if words[0] != "configure"):
        client = sessions.setdefault(service, boto3.client(service, region_name="us-east-1"))
        model = client.meta.service_model
        if command == "wait":
            assert words[0].replace("-", "_") in client.waiter_names
            command = {"db-instance-deleted": "describe-db-instances"}[words.pop(0)]
        operation = next(name for name in model.operation_names if xform_name(name, "-") == command)
        shape = model.operation_model(operation).input_shape
        members = {xform_name(name, "-"): member for name, member in shape.members.items()}
        for word in words:
            if word.startswith("--"):
                name = word.removeprefix("--")
                no = name.removeprefix("no-")
                assert name in {*members, "query"} or members[no].type_name == "boolean", word


def test_counts_are_those_of_the_snapshots():
    counted = set()
    for kinds, resources, all_of_them, *_ in rows(DEPLOY, "Deploy step by step"):
        for kind in re.findall("`(.*?)`", kinds):
            counted.add(kind)
            for stage in ("dev", "prod", "local", "pr-7"):
                types = registered(f"{kind}-{stage}")
                assert int(resources) == sum(count for type_, count in types.items() if type_.startswith("aws:"))
                assert int(all_of_them) == types.total() + 1  # the stack itself
    assert counted == set(KINDS)


def test_numbers_are_those_of_the_program():
    reserved = StackConfig(storage="postgres-s3").reserved_concurrency
    assert f"gets {reserved} instances" in DEPLOY
    assert f"the default of {reserved} needs a quota of {reserved + UNRESERVED}" in DEPLOY
    assert f"a quota of {reserved + UNRESERVED} concurrent executions" in DEPLOY
    required = yaml.safe_load((ROOT / "Pulumi.yaml").read_text())["requiredPulumiVersion"].removeprefix(">=")
    tested = f"tested with {pinned('oldest')} and {pinned('newest')}"
    assert f"`pulumi` command, {required.removesuffix('.0')} or later; {tested}" in DEPLOY


def test_a_bucket_that_is_left_goes_with_all_its_versions(ministack_s3):
    (script,) = [words for words in of(".venv/bin/python") if words[0] == "-c"]
    keys = {"aws_access_key_id": ministack_s3.access_key_id, "aws_secret_access_key": ministack_s3.secret_access_key}
    s3 = boto3.client("s3", endpoint_url=ministack_s3.url, region_name="us-east-1", **keys)
    s3.create_bucket(Bucket="left")
    s3.put_bucket_versioning(Bucket="left", VersioningConfiguration={"Status": "Enabled"})
    for body in (b"old", b"new"):
        s3.put_object(Bucket="left", Key="HEAD", Body=body)
    s3.delete_object(Bucket="left", Key="HEAD")
    environment = {name.upper(): value for name, value in keys.items()}
    environment |= {"AWS_ENDPOINT_URL": ministack_s3.url, "AWS_DEFAULT_REGION": "us-east-1"}
    subprocess.run([sys.executable, *script[:-1], "left"], check=True, env={**os.environ, **environment})
    assert "left" not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}


# The page about security


def test_permissions_follow_the_roles():
    found: dict[str, set[str]] = {}
    for who, actions, *_ in rows(SECURITY, "On AWS"):
        found.setdefault(who.strip("`"), set()).update(re.findall("`(.*?)`", actions))
    each = found.pop("each function")
    network = found.pop("functions in the network")
    assert found.pop("backup") == set(), "the same as the app"
    of_exports = {"s3:ListBucketVersions", "s3:DeleteObjectVersion"}  # which the app alone removes
    expected = {
        "the app": found["the app"] | each | network,
        "backup": found["the app"] - of_exports | each | network,
        "bootstrap-inside": each | network,
        "bootstrap-outside": found["bootstrap-outside"] | each,
        "the proxy": found["the proxy"],
    }
    names = {"api": "the app", "proxy": "the proxy"}
    roles: dict[str, set[str]] = {}
    for name, statements in policies(recording("everything-prod")).items():
        who = name.removeprefix("crudstack-prod-")
        whose = who.removesuffix("-network")  # a policy of its own, of the same role
        roles.setdefault(names.get(whose, whose), set()).update(
            action for statement in statements for action in statement["Action"]
        )
    assert roles == expected


@pytest.mark.parametrize("name", ["deploy", "config", "costs", "security"])
def test_links_lead_somewhere(name):
    page = ROOT / f"docs/{name}.md"
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`]*`", "", page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_old_versions_of_a_function_go_and_the_one_that_serves_stays(tmp_path):
    """The block of docs/lambda.md, with an `aws` that has three versions and notes what is deleted."""
    (block,) = re.findall(r"```sh\n( *NAME=.*?)```", (ROOT / "docs/lambda.md").read_text(), re.DOTALL)
    programs = {
        "pulumi": "echo crudstack-dev-api-1",
        "aws": """case "$2" in
          get-alias) echo 2 ;;
          list-versions-by-function) printf '$LATEST\\t1\\t2\\t3\\n' ;;
          delete-function) echo "$@" >> "$(dirname "$0")/deleted" ;;
        esac""",
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    subprocess.run(["bash", "-euc", block], check=True, env=environment)
    deleted = (tmp_path / "deleted").read_text().splitlines()
    assert deleted == [f"lambda delete-function --function-name crudstack-dev-api-1 --qualifier {n}" for n in (1, 3)]
