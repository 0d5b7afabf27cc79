"""A provider of type `aws` for Pulumi's engine. It is as strict as the real one, but its AWS account is a file.

For the engine it behaves as pulumi-aws and its bridge do:

- Check refuses unknown, missing and mistyped arguments (by the classes of the installed pulumi_aws), combinations and
  values that the real validators refuse, and generates names.
- Diff compares the *state* with the new inputs, as Terraform's plan does, and knows what replaces a resource.
- Read answers from the account. From the request it takes only what AWS never returns, such as the path of the zip.
  Inputs get the values of the state, so a write-only argument is gone after a refresh (the bridge's extractInputs).
- Create, Update and Delete fail as on AWS: for deleted references, dependents and protection.

In the tests' own process it is served by `serve`, and the engine attaches to it (PULUMI_DEBUG_PROVIDERS). As a plugin,
`pulumi-resource-aws`, it is `python -m tests.engine.provider` with the account's directory in CRUDSTACK_TEST_ACCOUNT.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2
from pulumi.runtime.proto import plugin_pb2, provider_pb2, provider_pb2_grpc

from tests.engine.account import Account, AwsError, told
from tests.engine.aws_types import REGION, SETS, TYPES, Properties, random_hex
from tests.engine.aws_validators import refused
from tests.engine.wire import UNKNOWN, comparable, from_struct, has_unknown, opened, secret, to_struct
from tests.infra.sdk_types import argument_errors

VERSION = "7.51.1"
ZONES = ("a", "b", "c")
OPTIONS = [("grpc.max_receive_message_length", 400 << 20), ("grpc.max_send_message_length", 400 << 20)]


class Faults:
    """Planned failures, in a file that a test may change while the provider runs.

    create, delete   a part of the URN of resources whose Create or Delete fails
    cut              a part of the URN of resources after whose creation the provider exits, before it answers
    latency_s        seconds that each change takes
    zones            the availability zones that are open to the account, by id; by default all of ZONES
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / "faults.json"

    def set(self, **faults: Any) -> None:
        self._file.write_text(json.dumps(faults))

    def clear(self) -> None:
        self._file.unlink(missing_ok=True)

    def get(self, name: str) -> Any:
        try:
            return json.loads(self._file.read_text()).get(name)
        except FileNotFoundError:
            return None

    def hits(self, name: str, urn: str) -> bool:
        part = self.get(name)
        return isinstance(part, str) and part in urn


class Provider(provider_pb2_grpc.ResourceProviderServicer):
    """Serves the provider protocol. `requests` counts the requests to Read by method and type."""

    def __init__(self, directory: Path) -> None:
        self.account, self.faults = Account(directory), Faults(directory)
        self.requests: Counter[tuple[str, str]] = Counter()

    def Handshake(self, request: Any, context: Any) -> Any:
        return provider_pb2.ProviderHandshakeResponse(accept_secrets=True, supports_autonaming_configuration=True)

    def GetPluginInfo(self, request: Any, context: Any) -> Any:
        return plugin_pb2.PluginInfo(version=VERSION)

    def GetSchema(self, request: Any, context: Any) -> Any:
        return provider_pb2.GetSchemaResponse(schema=json.dumps({"name": "aws", "version": VERSION}))

    def CheckConfig(self, request: Any, context: Any) -> Any:
        return provider_pb2.CheckResponse(inputs=request.news)

    def DiffConfig(self, request: Any, context: Any) -> Any:
        same = from_struct(request.news) == from_struct(request.old_inputs)
        kinds = provider_pb2.DiffResponse
        return provider_pb2.DiffResponse(changes=kinds.DIFF_NONE if same else kinds.DIFF_SOME)

    def Configure(self, request: Any, context: Any) -> Any:
        return provider_pb2.ConfigureResponse(acceptSecrets=True, supportsPreview=True)

    def Cancel(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    def Attach(self, request: Any, context: Any) -> Any:
        return empty_pb2.Empty()

    def GetMapping(self, request: Any, context: Any) -> Any:
        return provider_pb2.GetMappingResponse()

    def GetMappings(self, request: Any, context: Any) -> Any:
        return provider_pb2.GetMappingsResponse()

    def Invoke(self, request: Any, context: Any) -> Any:
        if request.tok != "aws:index/getAvailabilityZones:getAvailabilityZones":
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the tests' provider answers no {request.tok}")
        response = provider_pb2.InvokeResponse()
        asked = from_struct(request.args)
        there = self.faults.get("zones")
        zones = {f"euc1-az{zone}": f"{REGION}{letter}" for zone, letter in zip((2, 3, 1), ZONES, strict=True)}
        open_zones = [id for id in (zones if there is None else there) if id not in asked.get("excludeZoneIds", ())]
        known = {**zones, **(there or {})}
        told = list(known) if asked.get("allAvailabilityZones") else open_zones
        answer = {"names": [known[id] for id in told], "zoneIds": told, "groupNames": [REGION]}
        getattr(response, "return").update({**asked, **answer, "id": REGION, "region": REGION})
        return response

    def Check(self, request: Any, context: Any) -> Any:
        news, olds = from_struct(request.news), from_struct(request.olds)
        if request.type not in TYPES:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"the tests' provider knows no {request.type}")
        if len(request.urn) and request.autonaming.mode == provider_pb2.CheckRequest.AutonamingOptions.DISABLE:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "the tests' provider makes names up itself")
        type_, failures = TYPES[request.type], []
        if type_.named and type_.named not in news and f"{type_.named}Prefix" not in news:
            news[type_.named] = olds.get(type_.named) or _autonamed(request, lower=request.type.endswith(":Bucket"))
        given = opened(news)
        failures += [("", reason) for reason in argument_errors(request.type, given)]
        failures += list(refused(request.type, given))
        name = given.get(type_.named, UNKNOWN) if type_.named else UNKNOWN
        if name != UNKNOWN and (len(name) > type_.longest or not re.fullmatch(type_.letters, name)):
            failures.append((type_.named, f"{name!r}: expected at most {type_.longest} of {type_.letters}"))
        return provider_pb2.CheckResponse(
            inputs=to_struct(news),
            failures=[provider_pb2.CheckFailure(property=name, reason=reason) for name, reason in failures],
        )

    def Diff(self, request: Any, context: Any) -> Any:
        type_ = TYPES[request.type]
        state, given = opened(from_struct(request.olds)), opened(from_struct(request.news))
        before = opened(from_struct(request.old_inputs))
        changed = sorted(
            name
            for name in {*given, *before} - {*type_.write_only, *type_.forgotten, "__defaults"}
            if not _same(name, state.get(name), given.get(name))
        )
        if "engineVersion" in changed and request.type.endswith(":ReplicationGroup"):
            # elasticache/engine_version.go: only a downgrade forces a new cache.
            downgrade = str(given.get("engineVersion")) < str(state.get("engineVersion"))
            replaces = [name for name in changed if name in type_.replaces and (name != "engineVersion" or downgrade)]
        else:
            replaces = [name for name in changed if name in type_.replaces or name == type_.named]
        kind, kinds = provider_pb2.PropertyDiff, provider_pb2.DiffResponse
        detailed = {
            name: kind(kind=kind.UPDATE_REPLACE if name in replaces else kind.UPDATE, inputDiff=True)
            for name in changed
        }
        return provider_pb2.DiffResponse(
            changes=kinds.DIFF_SOME if changed else kinds.DIFF_NONE,
            diffs=changed,
            replaces=replaces,
            # The bridge deletes the old resource first if the new one has the same name, which was not generated.
            deleteBeforeReplace=bool(replaces) and not type_.named,
            detailedDiff=detailed,
            hasDetailedDiff=True,
        )

    def Create(self, request: Any, context: Any) -> Any:
        given, type_ = opened(from_struct(request.properties)), TYPES[request.type]
        if request.preview:
            # Outputs that AWS computes are unknown in a preview.
            known = {**given}
            if request.type.endswith(":DomainName"):
                computed = {"targetDomainName": UNKNOWN, "hostedZoneId": UNKNOWN}
                known["domainNameConfiguration"] = {**given["domainNameConfiguration"], **computed}
            _, filled_in = _made(request.type, given, "0" * 26)
            unknown = {name: UNKNOWN for name in filled_in if name not in given}
            return provider_pb2.CreateResponse(properties=to_struct(self._outputs(request.type, {**unknown, **known})))
        self._slow(request)
        if has_unknown(given):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Create of {request.urn} was given an unknown value")
        if self.faults.hits("create", request.urn):
            context.abort(grpc.StatusCode.UNKNOWN, f"creating {request.type}: the test lets it fail")
        for prefixed in [name for name in given if name == f"{type_.named}Prefix"]:
            given[type_.named] = given[prefixed] + random_hex(request.urn, time.monotonic_ns())[:26]
        id, filled_in = type_.made(given, random_hex(request.urn, time.monotonic_ns()))
        outputs = {**given, **filled_in}
        self._ask(context, self.account.create, request.type, id, self._without_write_only(request.type, outputs))
        if self.faults.hits("cut", request.urn):
            os._exit(1)
        return provider_pb2.CreateResponse(id=id, properties=to_struct(self._outputs(request.type, outputs)))

    def Read(self, request: Any, context: Any) -> Any:
        self.requests["Read", request.type] += 1
        there = self.account.get(request.type, request.id)
        if there is None:
            return provider_pb2.ReadResponse(id="")
        state = told(request.type, there, opened(from_struct(request.properties)))
        outputs = self._outputs(request.type, state)
        inputs = {
            name: value
            for name, old in from_struct(request.inputs).items()
            if (value := _extracted(opened(old), outputs.get(name))) is not None
        }
        return provider_pb2.ReadResponse(id=request.id, properties=to_struct(outputs), inputs=to_struct(inputs))

    def Update(self, request: Any, context: Any) -> Any:
        given, old, type_ = opened(from_struct(request.news)), opened(from_struct(request.olds)), TYPES[request.type]
        left_out = {*opened(from_struct(request.old_inputs))} - {*given}
        outputs = {**{name: value for name, value in old.items() if name not in left_out}, **given}
        # lambda/function.go publishes a version if code or configuration change, not for tags or concurrency.
        published = given.get("publish") and any(
            not _same(name, old.get(name), given.get(name))
            for name in {*given} - {"tags", "reservedConcurrentExecutions"}
        )
        if request.type.endswith(":Function") and published:
            number = int(old["version"]) + 1
            outputs |= {"version": str(number), "qualifiedArn": f"{old['arn']}:{number}"}
        if request.type.endswith(":DomainName"):
            outputs["domainNameConfiguration"] = {**old["domainNameConfiguration"], **given["domainNameConfiguration"]}
        if request.preview:
            outputs |= dict.fromkeys(type_.computed_on_update if published else (), UNKNOWN)
        else:
            self._slow(request)
            if has_unknown(given):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Update of {request.urn} was given an unknown value")
            if self.faults.hits("update", request.urn):
                context.abort(grpc.StatusCode.UNKNOWN, f"updating {request.type}: the test lets it fail")
            kept = self._without_write_only(request.type, outputs)
            self._ask(context, self.account.update, request.type, request.id, kept)
        return provider_pb2.UpdateResponse(properties=to_struct(self._outputs(request.type, outputs)))

    def Delete(self, request: Any, context: Any) -> Any:
        self._slow(request)
        if self.faults.hits("delete", request.urn):
            context.abort(grpc.StatusCode.UNKNOWN, f"deleting {request.urn}: the test lets it fail")
        self._ask(context, self.account.delete, request.type, request.id)
        return empty_pb2.Empty()

    def _slow(self, request: Any) -> None:
        time.sleep(self.faults.get("latency_s") or 0)

    @staticmethod
    def _ask(context: Any, ask: Any, *arguments: Any) -> None:
        try:
            ask(*arguments)
        except AwsError as error:
            context.abort(grpc.StatusCode.UNKNOWN, str(error))

    @staticmethod
    def _without_write_only(type_: str, properties: Properties) -> Properties:
        return {name: value for name, value in properties.items() if name not in TYPES[type_].write_only}

    def _outputs(self, type_: str, properties: Properties) -> Properties:
        """Return properties as the bridge sends them: sets are sorted, secrets are in envelopes."""
        outputs = {
            name: sorted(value) if name in SETS and isinstance(value, list) and value != UNKNOWN else value
            for name, value in self._without_write_only(type_, properties).items()
        }
        outputs.setdefault("region", REGION)
        if "tags" in outputs:
            outputs["tagsAll"] = outputs["tags"]
        sensitive = TYPES[type_].sensitive
        return {name: secret(value) if name in sensitive else value for name, value in outputs.items()}


def _made(type_: str, given: Properties, random: str) -> tuple[str, Properties]:
    """Return the outputs that AWS would compute, for a preview in which some inputs are unknown."""
    named = TYPES[type_].named
    complete = {**given, named: given.get(named, UNKNOWN)} if named else given
    if type_.endswith(":Invocation"):
        complete = {**complete, "input": "{}"}
    return TYPES[type_].made(complete, random)


def _autonamed(request: Any, *, lower: bool) -> str:
    name = f"{request.name}-{random_hex(request.randomSeed or os.urandom(8))[:7]}"
    return name.lower() if lower else name


def _same(name: str, state: Any, given: Any) -> bool:
    """Tell whether a value is unchanged. Keys of objects that are not given are ignored: AWS may have added them."""
    if isinstance(given, dict) and isinstance(state, dict) and comparable(given) is not None:
        if not isinstance(comparable(given), dict):
            return bool(comparable(given) == comparable(state))
        if name in ("tags", "variables"):
            return given == state
        return all(_same(key, state.get(key), value) for key, value in given.items())
    if isinstance(given, list) and isinstance(state, list):
        if name in SETS:
            return sorted(given) == sorted(state)
        pairs = zip(given, state, strict=False)
        return len(given) == len(state) and all(_same(name, theirs, ours) for ours, theirs in pairs)
    if given in (None, "", [], {}) and state in (None, "", [], {}, False, 0):
        return True
    return bool(comparable(given) == comparable(state))


def _extracted(old: Any, state: Any) -> Any:
    """Return the input after a refresh: the values that the state has for the properties of the old input."""
    if isinstance(old, dict) and isinstance(state, dict) and isinstance(comparable(old), dict) and "value" not in state:
        return {name: value for name in old if (value := _extracted(old[name], state.get(name))) is not None}
    if isinstance(old, list) and isinstance(state, list) and len(old) == len(state):
        return [_extracted(mine, theirs) for mine, theirs in zip(old, state, strict=True)]
    return state


@contextmanager
def serve(directory: Path) -> Iterator[tuple[Provider, int]]:
    """Serve a provider over the account in `directory` on a free loopback port, and yield both."""
    provider = Provider(directory)
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=16), options=OPTIONS)
    provider_pb2_grpc.add_ResourceProviderServicer_to_server(provider, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield provider, port
    finally:
        server.stop(None).wait()


def main() -> None:
    """Serve as a plugin: the engine reads the port from stdout, and ends this process."""
    warnings.simplefilter("ignore")  # the SDK warns of deprecated names in its own code
    with serve(Path(os.environ["CRUDSTACK_TEST_ACCOUNT"])) as (_, port):
        print(port, flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(0))
        signal.pause()


if __name__ == "__main__":
    main()
