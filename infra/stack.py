"""All resources of a stack on one page.

requests -> HttpApi or FunctionUrl -> ApiFunction -> DataBucket
                                                  -> Postgres, Cache, Broker in a Network, if a storage needs them
crudstack export, import -> "backup" -> the same, if there is a Network
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pulumi
from pulumi import Output

from app.settings import JwtAuth
from infra import artifact
from infra.artifact import Artifact
from infra.components import StackContext, Transform
from infra.components.broker import Broker
from infra.components.bucket import DataBucket
from infra.components.cache import Cache
from infra.components.function import ApiFunction, Function
from infra.components.http_api import FunctionUrl, HttpApi
from infra.components.network import Network
from infra.components.observability import Observability
from infra.components.postgres import Postgres
from infra.components.token import ApiToken
from infra.config import StackConfig
from infra.deployed_code import Package, package_of
from infra.environment import VARIABLE
from infra.zones import subnet_zones

BACKUP_S = 900
"""Seconds that an invocation of the function for backups may take, which is the maximum of Lambda."""
BACKUP_MB, BACKUP_DISK_MB = 1769, 10240
"""MB of memory of the function for backups, which give it one whole CPU, and of its disk. They cost while it runs."""


def build(
    config: StackConfig,
    *,
    zip: Path | Package | None = None,
    state: Any = None,
    transforms: Mapping[str, Transform] | None = None,
) -> dict[str, Any]:
    """Register the resources that the config asks for. Return the fields of app.settings.StackOutputs.

    Fields that AWS assigns are Outputs of Pulumi. Raises ConfigError, before anything is registered, if the zip cannot
    be built or if the region has too few zones.

    zip           the zip of the app. If None, the zip is built with the drivers that the storages need
    state         the exported state of the stack. A function that runs the contents of the built zip keeps its code,
                  and a subnet keeps its zone
    transforms    changes to the resources of components, by the class name of the component; see Transform
    """
    context = StackContext(
        name=f"crudstack-{config.stage}",
        is_protected=config.is_protected,
        tags={"crudstack:stage": config.stage, **config.tags},
        transforms=transforms or {},
    )
    zones = subnet_zones(context.name, state) if config.needs_network else []
    code = Package(str(zip)) if isinstance(zip, Path) else zip or package_of(package(config), state)
    bucket = DataBucket(context, keep_days=30 if config.is_protected else 1, origins=config.cors)
    grants = [bucket.grant("write")]
    of_backups = list(grants)

    network = postgres = cache = broker = None
    if config.needs_network:
        grants.append(bucket.exports_grant())
        holds_data = "postgres" in config.servers
        network = Network(context, region=bucket.region, zones=zones, holds_data=holds_data)
    if "postgres" in config.servers:
        assert network is not None
        postgres = Postgres(context, settings=config.postgres, network=network, zip=code, log_days=config.log_days)
        grants.append(postgres.grant())
        of_backups.append(postgres.grant(direct=True))
    if "cache" in config.servers:
        assert network is not None
        # The name of the user must be unique in the whole account, as the name of the bucket is.
        cache = Cache(context, settings=config.cache, network=network, user=bucket.bucket)
        grants.append(cache.grant())
        of_backups.append(cache.grant())
    if "broker" in config.servers:
        assert network is not None
        broker = Broker(context, settings=config.broker, network=network)
        grants.append(broker.grant())
        of_backups.append(broker.grant())

    token_sha256 = None
    if config.auth == "token":
        # Named after the bucket, so that the token can be found by the outputs.
        name = Output.format("{0}/api-token", bucket.bucket)
        token_sha256 = ApiToken(context, name=name, generation=config.token_generation).sha256

    outputs = config.outputs(token_sha256)
    for grant in grants:
        outputs |= grant.outputs
    function = ApiFunction(
        context,
        "api",
        zip=code,
        handler="app.handler.handler",
        grants=grants,
        network=network,
        environment={VARIABLE: Output.json_dumps(outputs)},
        memory_mb=config.memory_mb,
        ephemeral_mb=config.ephemeral_mb,
        timeout_s=config.timeout_s,
        concurrency=config.reserved_concurrency,
        snap_start=config.snap_start,
        log_days=config.log_days,
        has_url=config.edge == "function-url",
    )
    backup = None
    if network is not None:
        told = dict(outputs)
        for grant in of_backups:
            told |= grant.outputs
        # Runs for commands of the stack's user only, who cannot reach the servers in the network.
        backup = Function(
            context,
            "backup",
            zip=code,
            handler="app.backup.handler",
            grants=of_backups,
            network=network,
            environment={VARIABLE: Output.json_dumps(told)},
            memory_mb=BACKUP_MB,
            ephemeral_mb=BACKUP_DISK_MB,
            timeout_s=BACKUP_S,
            log_days=config.log_days,
        )
    http_api = None
    if config.edge == "http-api":
        http_api = edge = HttpApi(
            context,
            function=function,
            origins=config.cors,
            jwt=config.auth if isinstance(config.auth, JwtAuth) else None,
            domain=config.domain,
            log_days=config.log_days,
        )
        url = edge.url
    else:
        url = FunctionUrl(context, function=function, origins=config.cors).url
    Observability(
        context,
        function=function,
        timeout_s=config.timeout_s,
        http_api=http_api,
        postgres=postgres,
        connections=config.postgres.max_connections,
        cache=cache,
        broker=broker,
        email=config.alarm_email,
        budget_usd=config.budget_usd,
    )
    # The functions cannot have these in their environment, because they are made from the functions.
    made = {"api_url": url, "function_name": function.name}
    return {**outputs, **made, **({"backup_function_name": backup.name} if backup is not None else {})}


def package(config: StackConfig) -> Artifact:
    """Build the zip of the app with the drivers that the storages need. The log names the files that were left out."""
    requirements = [artifact.ROOT / "requirements/app.txt"]
    requirements += [artifact.ROOT / f"requirements/app-{extra}.txt" for extra in sorted(config.extras)]
    name = "-".join(["lambda", *sorted(config.extras)])
    built = artifact.build(artifact.ROOT / f"dist/{name}.zip", requirements=requirements)
    if built.left_out:
        pulumi.log.info(f"the zip of the app: {artifact.left_out(built)}")
    return built
