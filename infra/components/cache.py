"""The cache: Valkey on ElastiCache, encrypted on the way and at rest, reached from inside the network only, by a user that has no password."""

from __future__ import annotations

import pulumi_aws as aws
from pulumi import Input, Output

from infra import choices
from infra.components import Component, Stack
from infra.components.network import Network
from infra.link import Door, Link, Statement, first

PORT = 6379
VERSION = "8"


def node_count(*, keeps: bool) -> int:
    """Return how many nodes a replication group has."""
    return 2 if keeps else 1


class Cache(Component):
    """A serverless cache, or a replication group of nodes: one, in prod two in different zones.

    user    what the app's user is called: unique in the account and its region, at most 40 characters, small letters, digits and hyphens

    Outputs: `host`, `name`.
    """

    def __init__(self, stack: Stack, *, settings: choices.Cache, network: Network, user: Input[str]) -> None:
        super().__init__(stack, "cache")
        self.serverless = settings.mode == "serverless"
        self.nodes = 0 if self.serverless else node_count(keeps=stack.keeps)
        self._group = network.group(self, "cache", "who may reach the cache")
        # It signs in with tokens of IAM, for which id and name must be equal.
        self._user = aws.elasticache.User(
            self.named("app"),
            engine="valkey",
            user_id=user,
            user_name=user,
            access_string="on ~* +@all -@dangerous +info",
            authentication_mode={"type": "iam"},
            opts=self.child(),
        )
        # Valkey, unlike Redis, needs no user called default in it.
        users = aws.elasticache.UserGroup(
            self.named("users"),
            engine="valkey",
            user_group_id=user,
            user_ids=[self._user.user_id],
            opts=self.child(),
        )
        if self.serverless:
            self._serverless(settings, network, users)
        else:
            self._nodes(settings, network, users)
        self.register_outputs({"host": self.host, "name": self.name})

    def link(self) -> Link:
        """What signs in as the app's user."""
        return Link(
            statements=(Statement("SignInToCache", ("elasticache:Connect",), (self.arn, self._user.arn)),),
            outputs={
                "cache": {
                    "host": self.host,
                    "port": PORT,
                    "user": self._user.user_name,
                    "tls": True,
                    "name": self.name,
                    "serverless": self.serverless,
                }
            },
            doors=(Door("cache", self._group.id, PORT),),
        )

    def _serverless(self, settings: choices.Cache, network: Network, users: aws.elasticache.UserGroup) -> None:
        cache = aws.elasticache.ServerlessCache(
            self.named("cache"),
            engine="valkey",
            major_engine_version=VERSION,
            cache_usage_limits={
                "data_storage": {"maximum": settings.max_gb, "unit": "GB"},
                "ecpu_per_seconds": [{"maximum": 5000}],
            },
            subnet_ids=network.subnet_ids,
            security_group_ids=[self._group.id],
            user_group_id=users.user_group_id,
            opts=self.child(),
        )
        self.host: Output[str] = first(cache.endpoints, lambda endpoint: endpoint.address)
        self.name, self.arn = cache.name, cache.arn

    def _nodes(self, settings: choices.Cache, network: Network, users: aws.elasticache.UserGroup) -> None:
        keeps = self.stack.keeps
        subnets = aws.elasticache.SubnetGroup(self.named("cache"), subnet_ids=network.subnet_ids, opts=self.child())
        group = aws.elasticache.ReplicationGroup(
            self.named("cache"),
            description="Fast copies of the database's metadata",
            engine="valkey",
            engine_version=f"{VERSION}.0",
            node_type=settings.node_type,
            num_cache_clusters=self.nodes,
            automatic_failover_enabled=keeps,
            multi_az_enabled=keeps,
            port=PORT,
            transit_encryption_enabled=True,
            transit_encryption_mode="required",
            at_rest_encryption_enabled=True,
            subnet_group_name=subnets.name,
            security_group_ids=[self._group.id],
            user_group_ids=[users.user_group_id],
            auto_minor_version_upgrade=True,
            apply_immediately=not keeps,
            # AWS upgrades within the major version by itself. A refresh then finds 8.1, and the 8.0 above would be a
            # downgrade, which replaces the group.
            opts=self.child(ignore_changes=["engine_version"]),
        )
        self.host = group.primary_endpoint_address
        self.name, self.arn = group.replication_group_id, group.arn
