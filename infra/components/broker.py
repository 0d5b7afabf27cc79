"""The broker: RabbitMQ on Amazon MQ, reached over TLS from inside the network only. The app reads its password from Secrets Manager."""

from __future__ import annotations

import json
import secrets

import pulumi
import pulumi_aws as aws
from pulumi import Output

from infra import choices
from infra.components import Component, Stack
from infra.components.network import Network
from infra.link import Door, Link, Statement, first

PORT = 5671
USER = "crudstack"


class Broker(Component):
    """One instance, or a cluster of three, that carries the invalidations of caches.

    RabbitMQ on Amazon MQ has its first user from birth, and AWS neither tells nor changes its password later. So each run draws one, and only
    the run that makes the broker uses it: for the broker, and right after it for the secret. Both are encrypted in the state, and later runs
    ignore what they draw; a broker that is replaced gets the password that it had. Only a run that is cut off between the two leaves a secret that does
    not fit: `pulumi destroy --target` both and `pulumi up` make them anew; a broker holds nothing that lasts.

    Outputs: `endpoint`, `secret_arn`, `name`.
    """

    def __init__(self, stack: Stack, *, settings: choices.Broker, network: Network) -> None:
        super().__init__(stack, "broker")
        self._group = network.group(self, "broker", "who may reach the broker")
        password = pulumi.Output.secret(secrets.token_urlsafe(32))
        secret = aws.secretsmanager.Secret(
            self.named("broker"),
            description="User and password of the broker",
            recovery_window_in_days=30 if stack.keeps else 0,
            opts=self.child(),
        )
        single = settings.mode == "single"
        broker = aws.mq.Broker(
            self.named("broker"),
            engine_type="RabbitMQ",
            engine_version=settings.version,
            host_instance_type=settings.instance,
            deployment_mode="SINGLE_INSTANCE" if single else "CLUSTER_MULTI_AZ",
            publicly_accessible=False,
            subnet_ids=network.subnet_ids[:1] if single else network.subnet_ids,
            security_groups=[self._group.id],
            users=[{"username": USER, "password": password}],
            logs={"general": True},
            auto_minor_version_upgrade=True,
            apply_immediately=not stack.keeps,
            # First what may be forbidden and is quick, then what takes twenty minutes.
            opts=self.child(depends_on=[secret], ignore_changes=["users"]),
        )
        version = aws.secretsmanager.SecretVersion(
            self.named("broker"),
            secret_id=secret.id,
            secret_string_wo=password.apply(lambda drawn: json.dumps({"username": USER, "password": drawn})),
            secret_string_wo_version=1,
            opts=self.child(depends_on=[broker], ignore_changes=["secret_string_wo"]),
        )
        endpoints = first(broker.instances, lambda instance: instance.endpoints)
        self.endpoint: Output[str] = first(endpoints, lambda endpoint: endpoint)
        self.name = broker.broker_name
        self.secret_arn = version.secret_arn
        # Two, one in each subnet, about 16 USD a month: the only way from inside the network to Secrets Manager.
        self._secrets = network.endpoint(self, "secretsmanager")
        self.register_outputs({"endpoint": self.endpoint, "secret_arn": self.secret_arn, "name": self.name})

    def link(self) -> Link:
        """What reads the password and connects."""
        return Link(
            statements=(Statement("ReadBrokerSecret", ("secretsmanager:GetSecretValue",), (self.secret_arn,)),),
            outputs={"broker": {"endpoint": self.endpoint, "secret_arn": self.secret_arn}},
            doors=(Door("broker", self._group.id, PORT), self._secrets),
        )
