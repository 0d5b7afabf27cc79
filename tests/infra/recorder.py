"""Runs the Pulumi program without Pulumi's engine, without AWS and without a network, and keeps what it registers.

    recording = record(lambda: build(StackConfig(), zip=Path("app.zip")))
    recording.one("aws:s3/bucket:Bucket").inputs["forceDestroy"]

It stands where the engine stands, so it sees what the engine would: parents, protection, dependencies, secrets, outputs. Made of the SDK's own
parts; `pulumi.runtime.set_mocks` is not used, because a second program in the same process would wait for ever for the tasks of the first.
"""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pulumi
import pulumi_aws as aws
from google.protobuf import empty_pb2, json_format
from pulumi import _types
from pulumi.runtime import mocks, rpc, settings, stack
from pulumi.runtime.proto import engine_pb2, resource_pb2

from tests.engine.wire import opened
from tests.infra.hcl import attribute, terraform_type

SERVICES = "acm apigatewayv2 budgets cloudwatch ec2 elasticache iam lambda_ mq rds route53 s3 secretsmanager sns vpc"
with warnings.catch_warnings():
    # The SDK loads a service when it is first used, and then warns of its own old names.
    warnings.simplefilter("ignore")
    for service in SERVICES.split():
        getattr(getattr(aws, service), "anything", None)

LIMIT_S = 60
"""For one program. It takes one to five seconds; a mistake in here or in there makes it wait for ever."""
REGION = "eu-central-1"


@dataclass
class Resource:
    """One registration."""

    type: str
    """"aws:s3/bucket:Bucket"."""
    name: str
    urn: str
    parent: str
    """URN; empty for the stack itself."""
    inputs: dict[str, Any]
    """As the provider would get them: camelCase, secrets laid open."""
    secrets: set[str]
    """Names of inputs that hold a secret."""
    protect: bool
    retain: bool
    ignored: list[str]
    replaced_by: list[str]
    """Names of inputs whose change replaces it, beside those that the provider knows."""
    depends: dict[str, list[str]]
    """By input the URNs that it comes from; all others, of depends_on, under ""."""
    outputs: dict[str, Any] = field(default_factory=dict)
    trigger: Any = None
    """What replaces it when it changes."""
    registered: bool = False
    """Whether register_outputs was called; components only."""

    @property
    def component(self) -> str:
        """ "ApiFunction", of "crudstack:aws:ApiFunction"; empty for resources of AWS."""
        return self.type.rpartition(":")[2] if self.type.startswith("crudstack:") else ""


@dataclass
class Recording:
    resources: list[Resource]
    outputs: dict[str, Any]
    """Of the stack; what is secret in it is None."""
    secret_outputs: set[str]
    warnings: list[str]

    def all(self, type: str) -> list[Resource]:
        return [resource for resource in self.resources if resource.type == type]

    def one(self, type: str, suffix: str = "") -> Resource:
        found = [resource for resource in self.all(type) if resource.name.endswith(suffix)]
        assert len(found) == 1, f"{len(found)} of {type} {suffix}: {[resource.name for resource in found]}"
        return found[0]

    @property
    def aws(self) -> list[Resource]:
        return [resource for resource in self.resources if resource.type.startswith("aws:")]

    @property
    def types(self) -> Counter[str]:
        return Counter(resource.type for resource in self.resources)

    def by_urn(self, urn: str) -> Resource:
        return next(resource for resource in self.resources if resource.urn == urn)

    def tree(self) -> str:
        """All resources below their parents, sorted."""

        def below(parent: str, indent: str) -> Iterator[str]:
            children = sorted(
                (child for child in self.resources if child.parent == parent),
                key=lambda child: (child.type, child.name),
            )
            for child in children:
                marks = " protected" * child.protect + " retained" * child.retain
                yield f"{indent}{child.type} {child.name}{marks}"
                yield from below(child.urn, indent + "  ")

        root = next(resource.urn for resource in self.resources if not resource.parent)
        return "\n".join([*below(root, "")]) + "\n"


class Monitor(mocks.MockMonitor):
    """What the SDK takes for the engine."""

    def __init__(self) -> None:
        super().__init__(mock.Mock())
        self.recorded: dict[str, Resource] = {}

    def RegisterResource(self, request: Any) -> Any:
        urn = self.make_urn(request.parent, request.type, request.name)
        if urn in self.recorded:
            raise AssertionError(f"{urn} is registered twice")
        inputs = json_format.MessageToDict(request.object)
        resource = Resource(
            type=request.type,
            name=request.name,
            urn=urn,
            parent=request.parent,
            inputs=opened(inputs),
            secrets={name for name, value in inputs.items() if holds_secret(value)},
            protect=request.protect,
            retain=request.retainOnDelete,
            ignored=list(request.ignoreChanges),
            replaced_by=list(request.replaceOnChanges),
            trigger=opened(json_format.MessageToDict(request.replacement_trigger)),
            depends={name: sorted(found.urns) for name, found in request.propertyDependencies.items() if found.urns},
        )
        implied = {urn for urns in resource.depends.values() for urn in urns}
        resource.depends[""] = sorted(set(request.dependencies) - implied)
        self.recorded[urn] = resource
        if not request.custom:
            return resource_pb2.RegisterResourceResponse(urn=urn)
        resource.outputs = made(resource)
        state = {**resource.outputs, **inputs}
        if (within := NESTED_WITHIN.get(request.type)) is not None:
            state[within[0]] = {**inputs[within[0]], **within[1]}
        answer = resource_pb2.RegisterResourceResponse(urn=urn, id=resource.outputs["id"])
        json_format.ParseDict(state, answer.object)
        return answer

    def RegisterResourceOutputs(self, request: Any) -> Any:
        resource = self.recorded[request.urn]
        resource.outputs = json_format.MessageToDict(request.outputs)
        resource.registered = True
        return empty_pb2.Empty()

    def Invoke(self, request: Any) -> Any:
        if request.tok != "aws:index/getAvailabilityZones:getAvailabilityZones":
            raise AssertionError(f"the program asks AWS: {request.tok}")
        answer = resource_pb2.ResourceInvokeResponse()
        names = [f"{REGION}{zone}" for zone in "abc"]
        answer.__getattribute__("return").update({"names": names, "zoneIds": ["1", "2", "3"], "id": REGION})
        return answer


def record(program: Callable[[], Mapping[str, Any]], *, preview: bool = False) -> Recording:
    """Run a program that returns the outputs of a stack. Whatever it raises is raised here; TimeoutError after LIMIT_S."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    monitor = Monitor()
    engine = mock.Mock(wraps=mocks.MockEngine(None))
    settings.SETTINGS.rpc_manager.clear()
    settings.SETTINGS.outputs.clear()
    settings.set_root_resource(None)
    features = set(monitor.GetDeploymentInfo(empty_pb2.Empty()).supportedFeatures)
    settings.configure(
        mocks.MockSettings(
            monitor=monitor,
            monitor_features=features,
            engine=engine,
            project="crudstack",
            stack="test",
            dry_run=preview,
            organization="none",
            root_directory=str(Path.cwd()),
            callbacks=None,
        )
    )

    ended: list[SystemExit] = []

    def run() -> None:
        try:
            for name, value in program().items():
                pulumi.export(name, value)
        except SystemExit as end:
            # asyncio would raise it from the loop, and again from each task that waits for the one that ended.
            ended.append(end)

    try:
        loop.run_until_complete(asyncio.wait_for(stack.run_in_stack(run), LIMIT_S))
    finally:
        settings.SETTINGS.rpc_manager.clear()
        settings.SETTINGS.outputs.clear()
        settings.set_root_resource(None)
        _end(loop)
        asyncio.set_event_loop(None)
    if ended:
        raise ended[0]
    root, *resources = monitor.recorded.values()
    logged = [call.args[0] for call in engine.Log.call_args_list]
    said = [entry.message for entry in logged if entry.severity >= engine_pb2.WARNING]
    return Recording(
        [root, *resources],
        {name: opened(value) for name, value in root.outputs.items()},
        {name for name, value in root.outputs.items() if holds_secret(value)},
        said,
    )


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Nothing goes on after a program, also if it failed."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.set_exception_handler(lambda *_: None)  # of what nobody asks for any more
    loop.close()


def holds_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get(rpc._special_sig_key, "") == rpc._special_secret_sig or any(map(holds_secret, value.values()))
    return isinstance(value, list) and any(map(holds_secret, value))


def made(resource: Resource) -> dict[str, Any]:
    """What AWS and the provider would fill in, as references in the language of Terraform: `${aws_s3_bucket.NAME.bucket}`.

    So whoever prints the recording in that language has its relations. Lists and objects are filled in where the program looks into them.
    """
    kind = terraform_type(resource.type)
    label = resource.name

    def of(attribute: str) -> str:
        return f"${{{kind}.{label}.{attribute}}}"

    outputs: dict[str, Any] = {"id": of("id"), "arn": of("arn")}
    cls = resource_class(resource.type)
    for wire, type_ in _types.resource_types(cls).items():
        if _types.unwrap_optional_type(type_) is str:
            outputs.setdefault(wire, of(attribute(kind, pythonic(cls)[wire])))
    outputs.update(NESTED[kind](of) if kind in NESTED else {})
    return outputs


@functools.cache
def pythonic(cls: type) -> dict[str, str]:
    """snake_case by camelCase, for the properties of one of the SDK's classes."""
    return {wire: name for name, wire, _ in _types._py_properties(cls)}


NESTED: dict[str, Callable[[Callable[[str], str]], dict[str, Any]]] = {
    "aws_acm_certificate": lambda _: {
        "domainValidationOptions": [
            {
                "domainName": "api.example.org",
                "resourceRecordName": "_x.api.example.org.",
                "resourceRecordType": "CNAME",
                "resourceRecordValue": "_y.acm-validations.aws.",
            }
        ]
    },
    "aws_db_instance": lambda of: {
        "masterUserSecrets": [
            {"secretArn": of("master_user_secret[0].secret_arn"), "kmsKeyId": "", "secretStatus": "active"}
        ],
    },
    "aws_rds_cluster": lambda of: {
        "masterUserSecrets": [
            {"secretArn": of("master_user_secret[0].secret_arn"), "kmsKeyId": "", "secretStatus": "active"}
        ],
    },
    "aws_elasticache_serverless_cache": lambda of: {
        "endpoints": [{"address": of("endpoint[0].address"), "port": 6379}]
    },
    "aws_mq_broker": lambda of: {
        "instances": [{"endpoints": [f"amqps://{of('id')}.mq.{REGION}.on.aws:5671"], "consoleUrl": "", "ipAddress": ""}]
    },
}


NESTED_WITHIN = {
    "aws:apigatewayv2/domainName:DomainName": (
        "domainNameConfiguration",
        {"targetDomainName": "d-x.execute-api.example.org", "hostedZoneId": "Z0000000000000"},
    )
}
"""What is filled in beside what was given."""


def resource_class(token: str) -> type:
    """The SDK's class of "aws:s3/bucket:Bucket"."""
    module, _, name = token.partition(":")[2].partition("/")[0], "", token.rpartition(":")[2]
    return getattr(getattr(aws, {"lambda": "lambda_"}.get(module, module)), name)
