"""Runs the Pulumi program without Pulumi's engine, without AWS and without a network, and keeps what it registers.

    recording = record(lambda: build(StackConfig(), zip=Path("app.zip")))
    recording.one("aws:s3/bucket:Bucket").inputs["forceDestroy"]

It takes the place of the engine, so it receives what the engine would receive: parents, protection, dependencies,
secrets, outputs. It consists of the SDK's own parts. `pulumi.runtime.set_mocks` is not used, because a second program
in the same process would wait for ever for the tasks of the first.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pulumi
from google.protobuf import empty_pb2, json_format
from pulumi import _types
from pulumi.runtime import mocks, rpc, settings, stack
from pulumi.runtime.proto import engine_pb2, resource_pb2

from tests.engine.wire import opened
from tests.infra.hcl import attribute, terraform_type
from tests.infra.sdk_classes import load_services, resource_class

load_services()

LIMIT_S = 60
"""The timeout of one program. A program takes 1 to 5 s, but may wait for ever after a mistake."""
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
    """As the provider would get them: names in camelCase, secrets in plain text."""
    secrets: set[str]
    """Names of inputs that hold a secret."""
    protect: bool
    retain: bool
    ignored: list[str]
    replaced_by: list[str]
    """Names of inputs whose change replaces the resource, in addition to those of the provider."""
    depends: dict[str, list[str]]
    """By input the URNs that it depends on. URNs of `depends_on` alone are under ""."""
    outputs: dict[str, Any] = field(default_factory=dict)
    trigger: Any = None
    """A change of this value replaces the resource."""
    registered: bool = False
    """Whether register_outputs was called; components only."""

    @property
    def component(self) -> str:
        """Return "ApiFunction" for "crudstack:aws:ApiFunction", and "" for AWS resources."""
        return self.type.rpartition(":")[2] if self.type.startswith("crudstack:") else ""


@dataclass
class Recording:
    resources: list[Resource]
    outputs: dict[str, Any]
    """Outputs of the stack, with secrets in plain text."""
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
        """Print all resources as a tree of parents and children, sorted by type and name."""

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
    """Answers the SDK's requests in place of the engine."""

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
    """Run a program that returns the outputs of a stack, and return its recording.

    Errors of the program are raised here. Raises TimeoutError if the program takes longer than LIMIT_S.
    """
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
            # asyncio would raise SystemExit from the loop, and again from each task that waits for the ended one.
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
    """Cancel all tasks that are left after a program, also after a failed one."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.set_exception_handler(lambda *_: None)  # results that are no longer needed
    loop.close()


def holds_secret(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get(rpc._special_sig_key, "") == rpc._special_secret_sig or any(map(holds_secret, value.values()))
    return isinstance(value, list) and any(map(holds_secret, value))


def made(resource: Resource) -> dict[str, Any]:
    """Return the outputs that AWS and the provider would fill in.

    Each is a reference in the language of Terraform, such as `${aws_s3_bucket.NAME.bucket}`, so a recording that is
    printed in that language keeps its references. Only those lists and objects are filled in that the program reads.
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
    """Return the names in snake_case by camelCase of the properties of one of the SDK's classes."""
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
"""Outputs that AWS adds to an object among the inputs."""
