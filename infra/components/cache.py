"""The cache: Valkey on ElastiCache, encrypted in transit and at rest. It can be reached from inside the network only.

The app's user has no password. It signs in with tokens of IAM.
"""

from __future__ import annotations

import pulumi_aws as aws
from pulumi import Input, Output

from infra import choices
from infra.components import Component, StackContext
from infra.components.network import Network
from infra.grants import Grant, PortAccess, Statement, first

PORT = 6379
VERSION = "8"


def node_count(*, is_protected: bool) -> int:
    """Return the number of nodes of a replication group."""
    return 2 if is_protected else 1


class Cache(Component):
    """A serverless cache, or a replication group: one node, or in a protected stack two nodes in different zones.

    user    the name of the app's user, unique in the account and its region: at most 40 lower-case letters, digits and
            hyphens

    Outputs: `host`, `name`.
    """

    def __init__(self, context: StackContext, *, settings: choices.Cache, network: Network, user: Input[str]) -> None:
        super().__init__(context, "cache")
        self.serverless = settings.mode == "serverless"
        self.nodes = 0 if self.serverless else node_count(is_protected=context.is_protected)
        self._group = network.security_group(self, "cache", "who may reach the cache")
        # The id and the name of a user that signs in with tokens of IAM must be equal.
        self._user = aws.elasticache.User(
            self.resource_name("app"),
            engine="valkey",
            user_id=user,
            user_name=user,
            access_string="on ~* +@all -@dangerous +info",
            authentication_mode={"type": "iam"},
            opts=self.child_options(),
        )
        # Unlike Redis, Valkey needs no user with the name default in the group.
        users = aws.elasticache.UserGroup(
            self.resource_name("users"),
            engine="valkey",
            user_group_id=user,
            user_ids=[self._user.user_id],
            opts=self.child_options(),
        )
        if self.serverless:
            self._serverless(settings, network, users)
        else:
            self._nodes(settings, network, users)
        self.register_outputs({"host": self.host, "name": self.name})

    def grant(self) -> Grant:
        """Return a grant to sign in as the app's user."""
        return Grant(
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
            ports=(PortAccess("cache", self._group.id, PORT),),
        )

    def _serverless(self, settings: choices.Cache, network: Network, users: aws.elasticache.UserGroup) -> None:
        cache = aws.elasticache.ServerlessCache(
            self.resource_name("cache"),
            engine="valkey",
            major_engine_version=VERSION,
            cache_usage_limits={
                "data_storage": {"maximum": settings.max_gb, "unit": "GB"},
                "ecpu_per_seconds": [{"maximum": 5000}],
            },
            subnet_ids=network.subnet_ids,
            security_group_ids=[self._group.id],
            user_group_id=users.user_group_id,
            opts=self.child_options(),
        )
        self.host: Output[str] = first(cache.endpoints, lambda endpoint: endpoint.address)
        self.name, self.arn = cache.name, cache.arn

    def _nodes(self, settings: choices.Cache, network: Network, users: aws.elasticache.UserGroup) -> None:
        is_protected = self.context.is_protected
        subnets = aws.elasticache.SubnetGroup(
            self.resource_name("cache"), subnet_ids=network.subnet_ids, opts=self.child_options()
        )
        group = aws.elasticache.ReplicationGroup(
            self.resource_name("cache"),
            description="Fast copies of the database's metadata",
            engine="valkey",
            engine_version=f"{VERSION}.0",
            node_type=settings.node_type,
            num_cache_clusters=self.nodes,
            automatic_failover_enabled=is_protected,
            multi_az_enabled=is_protected,
            port=PORT,
            transit_encryption_enabled=True,
            transit_encryption_mode="required",
            at_rest_encryption_enabled=True,
            subnet_group_name=subnets.name,
            security_group_ids=[self._group.id],
            user_group_ids=[users.user_group_id],
            auto_minor_version_upgrade=True,
            apply_immediately=not is_protected,
            # AWS upgrades within the major version automatically. A refresh then reads 8.1, and the 8.0 above would be
            # a downgrade, which replaces the group.
            opts=self.child_options(ignore_changes=["engine_version"]),
        )
        self.host = group.primary_endpoint_address
        self.name, self.arn = group.replication_group_id, group.arn
