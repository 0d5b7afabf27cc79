"""Applies a recording to an emulator of AWS (ministack) through boto3, and destroys it.

It makes the resources as Pulumi's provider would make them on AWS.

    with emulator(directory) as cloud:
        stack = apply(recording("s3-sqlite-dev"), cloud, zip=...)
        stack.outputs["api_url"]
        stack.destroy()

The emulator is reached by TLS and enforces IAM: a function may do what its role and the bucket's policy allow.
botocore sends the requests; it refuses arguments that AWS does not have.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.config import Config

from tests.infra.hcl import MAPS, terraform_type
from tests.infra.recorder import REGION, Recording, Resource
from tests.rabbitmq import _die_with_parent

ACCOUNT = "000000000000"
NOT_EMULATED = {
    "Function.runtime": "the function runs on this machine's Python, from a zip that is built for it",
    "Function.architectures": "the function runs on this machine's processor",
    "Function.memorySize": "the function may use all memory of this machine",
    "Function.ephemeralStorage": "the function may use all disk space of this machine",
    "Function.tracingConfig": "there is no X-Ray",
    "Permission.principal": "every API and every rule may call every function; the tests check the policy itself",
    "Stage.defaultRouteSettings": "nothing is throttled",
    "Stage.accessLogSettings": "no access log is written",
    "EventRule.scheduleExpression": "the rule never fires; the tests invoke the target with its input",
    "MetricAlarm.threshold": "the metrics have no data, so no alarm is raised",
}
"""Arguments that ministack stores but does not act on, with what happens instead.

All other arguments of the types in `MAKERS` take effect.
"""


def certificates(directory: Path, *names: str) -> Path:
    """Write a certificate for this machine and `names` into the directory, and return the directory.

    The files are server.pem, its key server.key, and ca.pem, the authority that signed it.
    """
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    known = ",".join(["DNS:localhost", "IP:127.0.0.1", *(f"DNS:{name}" for name in names)])
    (directory / "names").write_text(f"subjectAltName={known}\nauthorityKeyIdentifier=keyid\n")
    signs = ["-addext", "keyUsage=critical,keyCertSign"]  # Python 3.13 refuses an authority without it
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"]
    for command in (
        ["req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=crudstack tests", *signs],
        ["req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost"],
        ["x509", "-req", "-in", "server.csr", "-out", "server.pem", "-extfile", "names", *signed],
    ):
        done = subprocess.run(["openssl", *command], cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return directory


@contextlib.contextmanager
def emulator(directory: Path) -> Iterator[Cloud]:
    """Run a ministack with TLS and IAM. The ministack of the other tests has no TLS and ignores policies."""
    certificates(directory, "*.execute-api.localhost", f"*.lambda-url.{REGION}.on.aws")
    ca, server, key = (str(directory / name) for name in ("ca.pem", "server.pem", "server.key"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # The functions inherit this environment: the trusted certificate, and none of the developer's AWS settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "CRUDSTACK_"))}
    environment |= {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "LOG_LEVEL": "WARNING"}
    environment |= {"AUTH": "true", "USE_SSL": "1", "MINISTACK_SSL_CERT": server, "MINISTACK_SSL_KEY": key}
    environment |= {"SSL_CERT_FILE": ca, "TMPDIR": str(directory)}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ministack"))],
            env=environment,
            cwd=directory,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - as in app.dev.local_s3
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, "ministack does not listen"
            time.sleep(0.05)
        yield Cloud(f"https://127.0.0.1:{port}", ca)
    finally:
        # Kills the functions too. After SIGTERM it would wait half a minute for connections to close.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Cloud:
    """Clients of an emulator, with the rights of the account's owner.

    ca    path of the authority that verifies the emulator's certificate
    """

    def __init__(self, url: str, ca: str) -> None:
        self.url, self.ca = url, ca
        self._session = boto3.Session(ACCOUNT, "any", region_name=REGION)

    def __getattr__(self, service: str) -> Any:
        """Return the client of a service. The name of Lambda's is `lambda_`."""
        path_style = Config(s3={"addressing_style": "path"}, read_timeout=60)
        client = self._session.client(service.rstrip("_"), endpoint_url=self.url, verify=self.ca, config=path_style)
        setattr(self, service, client)
        return client

    def inventory(self) -> set[str]:
        """Return all resources of the types that `MAKERS` makes, such as "bucket NAME"."""
        found = {
            "bucket": [each["Name"] for each in self.s3.list_buckets()["Buckets"]],
            "log group": [each["logGroupName"] for each in self.logs.describe_log_groups()["logGroups"]],
            "role": [each["RoleName"] for each in self.iam.list_roles()["Roles"]],
            "function": [each["FunctionName"] for each in self.lambda_.list_functions()["Functions"]],
            "api": [each["ApiId"] for each in self.apigatewayv2.get_apis()["Items"]],
            "secret": [each["Name"] for each in self.secretsmanager.list_secrets()["SecretList"]],
            "rule": [each["Name"] for each in self.events.list_rules()["Rules"]],
            "topic": [each["TopicArn"] for each in self.sns.list_topics()["Topics"]],
            "alarm": [each["AlarmName"] for each in self.cloudwatch.describe_alarms()["MetricAlarms"]],
        }
        return {f"{kind} {name}" for kind, names in found.items() for name in names}


class Protected(Exception):
    """The stack has resources that Pulumi refuses to delete."""


class Made(NamedTuple):
    outputs: dict[str, str]
    """Attributes that references may name, by Terraform's names."""
    delete: Callable[[], Any]


class Deployed:
    """A deployed stack. `given` has the arguments of each resource by type and name, with references resolved."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._made: dict[str, Made] = {}
        self.given: dict[tuple[str, str], dict[str, Any]] = {}
        self.outputs: dict[str, Any] = {}

    def of(self, type: str, suffix: str = "") -> dict[str, Any]:
        """Return the arguments of the only resource of a type whose name ends with `suffix`."""
        return self.given[type, self._recording.one(type, suffix).name]

    def destroy(self) -> None:
        """Delete all resources in reverse order, as `pulumi destroy` does, but those with `retain`.

        Raises Protected if the recording has a protected resource.
        """
        if kept := [resource.name for resource in self._recording.aws if resource.protect]:
            raise Protected(f"{', '.join(kept)}: unprotect first")
        for urn, made in reversed(self._made.items()):
            if not self._recording.by_urn(urn).retain:
                made.delete()
        self._made.clear()


def apply(recording: Recording, cloud: Cloud, *, zip: bytes) -> Deployed:
    """Make all resources, each after those that it depends on. `zip` is the code of all functions.

    Raises KeyError if `MAKERS` lacks the type of a resource.
    """
    deployed, known = Deployed(recording), {resource.urn: resource for resource in recording.resources}
    references: dict[str, str] = {}
    needs = {urn: [need for needs in each.depends.values() for need in needs] for urn, each in known.items()}
    for urn in TopologicalSorter(needs).static_order():
        resource = known[urn]
        if not resource.type.startswith("aws:"):
            continue
        given = resolved(resource.inputs, references)
        deployed.given[resource.type, resource.name] = given
        made = MAKERS[resource.type](cloud, resource, given, zip)
        deployed._made[urn] = made
        label = f"{terraform_type(resource.type)}.{resource.name}"
        references |= {f"{label}.{name}": value for name, value in made.outputs.items()}
    deployed.outputs = resolved(recording.outputs, references)
    return deployed


def resolved(value: Any, references: Mapping[str, str]) -> Any:
    """Replace references such as `${aws_s3_bucket.NAME.bucket}`. Raises KeyError if a reference is unknown."""
    if isinstance(value, dict):
        return {name: resolved(item, references) for name, item in value.items()}
    if isinstance(value, list):
        return [resolved(item, references) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{([^{}]+)\}", lambda found: references[found[1]], value)
    return value


def asked(given: Mapping[str, Any], *without: str, **renamed: str) -> dict[str, Any]:
    """Rename arguments as boto3 names them: memorySize is MemorySize, unless `renamed` has another name."""

    def inner(value: Any) -> Any:
        if isinstance(value, list):
            return [inner(item) for item in value]
        return asked(value, **renamed) if isinstance(value, dict) else value

    return {
        renamed.get(name, name[0].upper() + name[1:]): value if name in MAPS else inner(value)
        for name, value in given.items()
        if name not in without
    }


def tag_list(given: Mapping[str, Any], key: str = "Tags") -> dict[str, Any]:
    return {key: [{"Key": name, "Value": value} for name, value in given.get("tags", {}).items()]}


def own_name(resource: Resource, given: Mapping[str, Any]) -> str:
    """Return the given name. Without one, make it from the logical name as Pulumi does."""
    return given.get("name") or f"{resource.name}-{secrets.token_hex(4)[:7]}"


# How each type of resource is made


def _bucket(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    name = own_name(resource, given)
    cloud.s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    cloud.s3.put_bucket_tagging(Bucket=name, Tagging=tag_list(given, "TagSet"))

    def delete() -> None:
        if given["forceDestroy"]:
            for page in cloud.s3.get_paginator("list_object_versions").paginate(Bucket=name):
                for version in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
                    cloud.s3.delete_object(Bucket=name, Key=version["Key"], VersionId=version["VersionId"])
        cloud.s3.delete_bucket(Bucket=name)

    return Made({"id": name, "bucket": name, "arn": f"arn:aws:s3:::{name}", "region": REGION}, delete)


def _of_bucket(put: str, argument: str, remove: str | None, body: Callable[[dict[str, Any]], Any]) -> Any:
    """Return the maker of a setting of a bucket. `remove` is None if S3 cannot delete the setting."""

    def make(cloud: Cloud, _: Resource, given: dict[str, Any], __: bytes) -> Made:
        bucket = given["bucket"]
        getattr(cloud.s3, put)(Bucket=bucket, **{argument: body(given)})
        return Made({"id": bucket}, lambda: getattr(cloud.s3, remove)(Bucket=bucket) if remove else None)

    return make


def _lifecycle(given: dict[str, Any]) -> dict[str, Any]:
    return {"Rules": [asked(rule, id="ID") for rule in given["rules"]]}


def _log_group(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    prefix = given.get("namePrefix")
    name = f"{prefix}{secrets.token_hex(4)}" if prefix else own_name(resource, given)
    cloud.logs.create_log_group(logGroupName=name, tags=given["tags"])
    cloud.logs.put_retention_policy(logGroupName=name, retentionInDays=given["retentionInDays"])
    arn = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:{name}"
    return Made({"name": name, "arn": arn}, lambda: cloud.logs.delete_log_group(logGroupName=name))


def _role(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    name = own_name(resource, given)
    made = cloud.iam.create_role(RoleName=name, AssumeRolePolicyDocument=given["assumeRolePolicy"], **tag_list(given))
    return Made({"name": name, "arn": made["Role"]["Arn"]}, lambda: cloud.iam.delete_role(RoleName=name))


def _role_policy(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    of = {"RoleName": given["role"], "PolicyName": own_name(resource, given)}
    cloud.iam.put_role_policy(**of, PolicyDocument=given["policy"])
    return Made({}, lambda: cloud.iam.delete_role_policy(**of))


def _function(cloud: Cloud, resource: Resource, given: dict[str, Any], zip: bytes) -> Made:
    name = own_name(resource, given)
    arguments = asked(given, "code", "reservedConcurrentExecutions")
    made = cloud.lambda_.create_function(FunctionName=name, Code={"ZipFile": zip}, **arguments)
    if (reserved := given.get("reservedConcurrentExecutions")) is not None:
        cloud.lambda_.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=reserved)
    unqualified = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}"
    outputs = {"function_name": name, "arn": unqualified, "version": made["Version"]}
    return Made(outputs, lambda: cloud.lambda_.delete_function(FunctionName=name))


def _alias(cloud: Cloud, _: Resource, given: dict[str, Any], __: bytes) -> Made:
    arn = cloud.lambda_.create_alias(**asked(given))["AliasArn"]
    of = {"FunctionName": given["functionName"], "Name": given["name"]}
    invoke = f"arn:aws:apigateway:{REGION}:lambda:path/2015-03-31/functions/{arn}/invocations"
    return Made({"arn": arn, "name": given["name"], "invoke_arn": invoke}, lambda: cloud.lambda_.delete_alias(**of))


def _permission(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    of = {"FunctionName": given["function"], "Qualifier": given["qualifier"], "StatementId": own_name(resource, given)}
    cloud.lambda_.add_permission(**asked(given, "function", "qualifier"), **of)
    return Made({}, lambda: cloud.lambda_.remove_permission(**of))


def _function_url(cloud: Cloud, _: Resource, given: dict[str, Any], __: bytes) -> Made:
    made = cloud.lambda_.create_function_url_config(**asked(given, authorizationType="AuthType"))
    of = {"FunctionName": given["functionName"], "Qualifier": given["qualifier"]}
    url = made["FunctionUrl"].removesuffix("/")  # the program removes the slash from the reference only
    return Made({"function_url": url}, lambda: cloud.lambda_.delete_function_url_config(**of))


def _api(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    made = cloud.apigatewayv2.create_api(Name=own_name(resource, given), **asked(given))
    id = made["ApiId"]
    outputs = {
        "id": id,
        "api_endpoint": made["ApiEndpoint"],
        "execution_arn": f"arn:aws:execute-api:{REGION}:{ACCOUNT}:{id}",
    }
    return Made(outputs, lambda: cloud.apigatewayv2.delete_api(ApiId=id))


def _integration(cloud: Cloud, _: Resource, given: dict[str, Any], __: bytes) -> Made:
    id = cloud.apigatewayv2.create_integration(**asked(given, timeoutMilliseconds="TimeoutInMillis"))["IntegrationId"]
    return Made({"id": id}, lambda: cloud.apigatewayv2.delete_integration(ApiId=given["apiId"], IntegrationId=id))


def _route(cloud: Cloud, _: Resource, given: dict[str, Any], __: bytes) -> Made:
    id = cloud.apigatewayv2.create_route(**asked(given))["RouteId"]
    return Made({"id": id}, lambda: cloud.apigatewayv2.delete_route(ApiId=given["apiId"], RouteId=id))


def _stage(cloud: Cloud, _: Resource, given: dict[str, Any], __: bytes) -> Made:
    cloud.apigatewayv2.create_stage(**asked(given, name="StageName"))
    of = {"ApiId": given["apiId"], "StageName": given["name"]}
    return Made({"id": given["name"]}, lambda: cloud.apigatewayv2.delete_stage(**of))


def _secret(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    arn = cloud.secretsmanager.create_secret(
        Name=own_name(resource, given), Description=given["description"], **tag_list(given)
    )["ARN"]
    days = given["recoveryWindowInDays"]
    how: dict[str, Any] = {"RecoveryWindowInDays": days} if days else {"ForceDeleteWithoutRecovery": True}
    return Made({"id": arn, "arn": arn}, lambda: cloud.secretsmanager.delete_secret(SecretId=arn, **how))


def _secret_version(cloud: Cloud, _: Resource, given: dict[str, Any], __: bytes) -> Made:
    cloud.secretsmanager.put_secret_value(
        SecretId=given["secretId"], SecretString=given["secretString"], VersionStages=given["versionStages"]
    )
    return Made({"secret_arn": given["secretId"]}, lambda: None)  # it is deleted together with its secret


def _rule(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    name = own_name(resource, given)
    arn = cloud.events.put_rule(Name=name, **asked(given, "tags"), **tag_list(given))["RuleArn"]
    return Made({"name": name, "arn": arn}, lambda: cloud.events.delete_rule(Name=name))


def _target(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    id = own_name(resource, given)
    answer = cloud.events.put_targets(Rule=given["rule"], Targets=[{"Id": id, **asked(given, "rule")}])
    assert answer["FailedEntryCount"] == 0, answer
    return Made({}, lambda: cloud.events.remove_targets(Rule=given["rule"], Ids=[id]))


def _topic(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    arn = cloud.sns.create_topic(Name=own_name(resource, given), **tag_list(given))["TopicArn"]
    return Made({"arn": arn}, lambda: cloud.sns.delete_topic(TopicArn=arn))


def _alarm(cloud: Cloud, resource: Resource, given: dict[str, Any], _: bytes) -> Made:
    name = own_name(resource, given)
    dimensions = [{"Name": key, "Value": value} for key, value in given["dimensions"].items()]
    cloud.cloudwatch.put_metric_alarm(
        AlarmName=name,
        Dimensions=dimensions,
        **asked(given, "tags", "dimensions", okActions="OKActions"),
        **tag_list(given),
    )
    return Made({}, lambda: cloud.cloudwatch.delete_alarms(AlarmNames=[name]))


MAKERS: dict[str, Callable[[Cloud, Resource, dict[str, Any], bytes], Made]] = {
    "aws:s3/bucket:Bucket": _bucket,
    "aws:s3/bucketOwnershipControls:BucketOwnershipControls": _of_bucket(
        "put_bucket_ownership_controls",
        "OwnershipControls",
        "delete_bucket_ownership_controls",
        lambda given: {"Rules": [asked(given["rule"])]},
    ),
    "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock": _of_bucket(
        "put_public_access_block",
        "PublicAccessBlockConfiguration",
        "delete_public_access_block",
        lambda given: asked(given, "bucket"),
    ),
    "aws:s3/bucketVersioning:BucketVersioning": _of_bucket(
        "put_bucket_versioning",
        "VersioningConfiguration",
        None,
        lambda given: asked(given["versioningConfiguration"]),
    ),
    "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration": _of_bucket(
        "put_bucket_encryption",
        "ServerSideEncryptionConfiguration",
        "delete_bucket_encryption",
        lambda given: {"Rules": [asked(rule, sseAlgorithm="SSEAlgorithm") for rule in given["rules"]]},
    ),
    "aws:s3/bucketLifecycleConfiguration:BucketLifecycleConfiguration": _of_bucket(
        "put_bucket_lifecycle_configuration", "LifecycleConfiguration", "delete_bucket_lifecycle", _lifecycle
    ),
    "aws:s3/bucketCorsConfiguration:BucketCorsConfiguration": _of_bucket(
        "put_bucket_cors",
        "CORSConfiguration",
        "delete_bucket_cors",
        lambda given: {"CORSRules": [asked(rule) for rule in given["corsRules"]]},
    ),
    "aws:s3/bucketPolicy:BucketPolicy": _of_bucket(
        "put_bucket_policy", "Policy", "delete_bucket_policy", lambda given: given["policy"]
    ),
    "aws:cloudwatch/logGroup:LogGroup": _log_group,
    "aws:iam/role:Role": _role,
    "aws:iam/rolePolicy:RolePolicy": _role_policy,
    "aws:lambda/function:Function": _function,
    "aws:lambda/alias:Alias": _alias,
    "aws:lambda/permission:Permission": _permission,
    "aws:lambda/functionUrl:FunctionUrl": _function_url,
    "aws:apigatewayv2/api:Api": _api,
    "aws:apigatewayv2/integration:Integration": _integration,
    "aws:apigatewayv2/route:Route": _route,
    "aws:apigatewayv2/stage:Stage": _stage,
    "aws:secretsmanager/secret:Secret": _secret,
    "aws:secretsmanager/secretVersion:SecretVersion": _secret_version,
    "aws:cloudwatch/eventRule:EventRule": _rule,
    "aws:cloudwatch/eventTarget:EventTarget": _target,
    "aws:sns/topic:Topic": _topic,
    "aws:cloudwatch/metricAlarm:MetricAlarm": _alarm,
}
