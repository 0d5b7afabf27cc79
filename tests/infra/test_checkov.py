"""Checks the recordings with checkov's rules, after printing them in the language of Terraform."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from typing import NamedTuple

import pytest

from infra.artifact import ROOT
from tests.infra.hcl import printed
from tests.infra.planting import change, nested, statement, without
from tests.infra.stacks import recording

CHECKOV = ROOT / ".local/checkov/bin/checkov"
STACKS = ("s3-sqlite-dev", "s3-sqlite-prod", "function-url-dev", "full-dev", "full-prod", "everything-prod")


class Skip(NamedTuple):
    reason: str
    where: str = ""
    """A regular expression that matches the beginning of STACK/RESOURCE."""


SKIPS = {
    "CKV2_AWS_11": Skip("flow logs cost more than the network, which is not reachable from outside"),
    "CKV2_AWS_23": Skip("the record is an alias for the API's own domain name, which checkov does not look for"),
    "CKV2_AWS_27": Skip("statements hold data, and data does not belong into logs; slow ones are logged"),
    "CKV2_AWS_5": Skip("the group belongs to the proxy, which checkov does not look at", r".*-proxy$"),
    "CKV2_AWS_57": Skip("RabbitMQ's password cannot be changed by AWS; the API token is replaced by token_generation"),
    "CKV2_AWS_62": Skip("no component uses events of the bucket"),
    "CKV2_AWS_75": Skip("cors: ['*'], which is refused in prod", "function-url-dev/"),
    "CKV2_AWS_8": Skip("the cluster makes its own backups"),
    "CKV_AWS_115": Skip(
        "concurrency null means the account's limit; with a database it has a limit of its own; backups run by hand",
        r".*(-sqlite-|bootstrap|-backup)",
    ),
    "CKV_AWS_116": Skip("a failed request gets an error response; housekeeping runs again within the hour"),
    "CKV_AWS_117": Skip("a function that uses no database needs no network", r"(s3-sqlite|function-url)|.*-outside$"),
    "CKV_AWS_118": Skip("enhanced monitoring costs by the metric; CloudWatch has what the alarms need"),
    "CKV_AWS_144": Skip("versions protect from mistakes; a copy in another region doubles the price"),
    "CKV_AWS_145": Skip("a customer managed key costs per request, and an S3-SQLite commit makes several"),
    "CKV_AWS_149": Skip("AWS's own key encrypts it"),
    "CKV_AWS_157": Skip("postgres.multi_az is off by default: it doubles the price"),
    "CKV_AWS_158": Skip("AWS's own key encrypts them, and no data is in them"),
    "CKV_AWS_173": Skip("nothing secret is in the environment"),
    "CKV_AWS_18": Skip("only the function accesses the bucket, and it has a log"),
    "CKV_AWS_191": Skip("AWS's own key encrypts it"),
    "CKV_AWS_209": Skip("AWS's own key encrypts it"),
    "CKV_AWS_233": Skip("Pulumi always creates before it deletes"),
    "CKV_AWS_258": Skip("edge function-url: the app checks the token", "function-url-dev/"),
    "CKV_AWS_26": Skip("CloudWatch could not write to an encrypted topic, and alarms hold no data"),
    "CKV_AWS_272": Skip("the zip is built from pinned hashes and deployed by the person who builds it"),
    "CKV_AWS_290": Skip("Lambda's network interfaces know no single resources", r"(full|everything)-.*-network$"),
    "CKV_AWS_293": Skip("only stage prod protects its data from deletion", "full-dev/"),
    "CKV_AWS_301": Skip("edge function-url: the URL is public, the app checks the token", "function-url-dev/"),
    "CKV_AWS_309": Skip(
        "the app checks the token; with JWT only /healthz and the preflight of browsers have none",
        r"(s3-sqlite|full)|.*(preflight|healthz)$",
    ),
    "CKV_AWS_327": Skip("AWS's own key encrypts it"),
    "CKV_AWS_338": Skip("log_days is 30 by default; keeping the logs for a year is not worth its price"),
    "CKV_AWS_353": Skip("not every class has performance insights"),
    "CKV_AWS_355": Skip("Lambda's network interfaces know no single resources", r"(full|everything)-.*-network$"),
}

PLANTED = {
    "public bucket": ("s3-sqlite-dev", without("aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock"), "CKV2_AWS_6"),
    "no versions": (
        "s3-sqlite-dev",
        nested("aws:s3/bucketVersioning:BucketVersioning", "versioningConfiguration", "status", to="Suspended"),
        "CKV_AWS_21",
    ),
    "no lifecycle": (
        "s3-sqlite-dev",
        without("aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration"),
        "CKV2_AWS_61",
    ),
    "all actions": ("s3-sqlite-dev", statement(3, Action=["*"], Resource=["*"]), "CKV_AWS_62"),
    "all resources": ("s3-sqlite-dev", statement(3, Resource=["*"]), "CKV_AWS_355"),
    "logs for ever": ("s3-sqlite-dev", change("aws:cloudwatch/logGroup:LogGroup", retentionInDays=...), "CKV_AWS_66"),
    "not traced": ("s3-sqlite-dev", change("aws:lambda/function:Function", tracingConfig=...), "CKV_AWS_50"),
    "no access log": ("s3-sqlite-dev", change("aws:apigatewayv2/stage:Stage", accessLogSettings=...), "CKV_AWS_76"),
    "open network": (
        "full-dev",
        change(
            "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule",
            cidrIpv4="0.0.0.0/0",
            referencedSecurityGroupId=...,
            fromPort=0,
            toPort=65535,
        ),
        "CKV_AWS_24",
    ),
    "clear database": ("full-dev", change("aws:rds/instance:Instance", storageEncrypted=...), "CKV_AWS_16"),
    "public database": ("full-dev", change("aws:rds/instance:Instance", publiclyAccessible=True), "CKV_AWS_17"),
    "passwords": ("full-dev", change("aws:rds/instance:Instance", iamDatabaseAuthenticationEnabled=...), "CKV_AWS_161"),
    "no backups": ("full-dev", change("aws:rds/instance:Instance", backupRetentionPeriod=0), "CKV_AWS_133"),
    "public broker": ("full-dev", change("aws:mq/broker:Broker", publiclyAccessible=True), "CKV_AWS_69"),
    "clear cache": (
        "everything-prod",
        change("aws:elasticache/replicationGroup:ReplicationGroup", transitEncryptionEnabled=...),
        "CKV_AWS_30",
    ),
    "clear cache at rest": (
        "everything-prod",
        change("aws:elasticache/replicationGroup:ReplicationGroup", atRestEncryptionEnabled=...),
        "CKV_AWS_29",
    ),
    "unprotected cluster": (
        "everything-prod",
        change("aws:rds/cluster:Cluster", deletionProtection=...),
        "CKV_AWS_139",
    ),
}


@pytest.fixture(scope="session")
def failed(tmp_path_factory):
    """Return pairs of a failed check and a resource, by the name of a stack or of a planted mistake.

    checkov runs once for all of them, because its start takes longer than its checks.
    """
    assert CHECKOV.exists(), f"{CHECKOV} does not exist: `make test` installs it"
    root = tmp_path_factory.mktemp("hcl")
    texts = {name: printed(recording(name)) for name in STACKS}
    for planted, (name, plant, _) in PLANTED.items():
        stack = copy.deepcopy(recording(name))
        plant(stack)
        texts[planted] = printed(stack)
    for name, text in texts.items():
        (root / name).mkdir()
        (root / name / "main.tf").write_text(text)
    done = subprocess.run(
        [CHECKOV, "-d", root, "--framework", "terraform", "--compact", "--quiet", "--skip-download", "-o", "json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = json.loads(done.stdout)
    assert said["summary"]["parsing_errors"] == 0
    found = {name: set() for name in texts}
    for check in said["results"]["failed_checks"]:
        found[check["file_path"].split("/")[1]].add((check["check_id"], check["resource"]))
    return found


@pytest.mark.parametrize("name", STACKS)
def test_checkov_finds_only_what_skips_lists(failed, name):
    assert [
        (check, resource)
        for check, resource in failed[name]
        if check not in SKIPS or not re.match(SKIPS[check].where, f"{name}/{resource}")
    ] == []


def test_skips_lists_only_checks_that_fail(failed):
    assert SKIPS.keys() - {check for name in STACKS for check, _ in failed[name]} == set()


@pytest.mark.parametrize("planted", PLANTED)
def test_checkov_finds_each_planted_mistake(failed, planted):
    name, _, check = PLANTED[planted]
    assert check in {found for found, _ in failed[planted] - failed[name]}
