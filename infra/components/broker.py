"""The broker: RabbitMQ on Amazon MQ, reached over TLS from inside the network only. The app reads its password from Secrets Manager."""

from __future__ import annotations

import hashlib
import json
import secrets

import pulumi
import pulumi_aws as aws
from pulumi import Output

from infra import choices
from infra.components import Component, StackContext
from infra.components.network import Network
from infra.grants import Grant, PortAccess, Statement, first

PORT = 5671
USER = "crudstack"


class Broker(Component):
    """One instance, or a cluster of three, that carries the invalidations of caches.

    Amazon MQ takes the user of RabbitMQ when the broker is made, and neither tells nor changes its password later. So
    the secret comes first, and the broker gets the password that the secret's version holds:

    - Each run draws a password, and only the run that makes the version uses it; later runs ignore what they draw.
    - A run that is cut off leaves a version and no broker. The next run makes the broker from that version.
    - A broker that is replaced gets the same password.
    - If the version is made anew, because the secret was deleted, its password is another one. The broker's trigger is
      a hash of the password, so the broker is replaced too. If that fails, the next run tries it again.
    - A refresh changes nothing. The provider reads no users of RabbitMQ and may empty `users` in the state, but it
      ignores every change of them on a broker that exists. `users` is not among the ignored changes: a replacement
      after a refresh would otherwise take the empty list from the state.

    A change of the RabbitMQ version replaces the broker, because Amazon MQ cannot upgrade one from 3.13 to 4.2. A broker
    holds nothing that lasts.

    Outputs: `endpoint`, `secret_arn`, `name`.
    """

    def __init__(self, context: StackContext, *, settings: choices.Broker, network: Network) -> None:
        super().__init__(context, "broker")
        self._group = network.security_group(self, "broker", "who may reach the broker")
        secret = aws.secretsmanager.Secret(
            self.resource_name("broker"),
            description="User and password of the broker",
            recovery_window_in_days=30 if context.is_protected else 0,
            opts=self.child_options(),
        )
        drawn = json.dumps({"username": USER, "password": secrets.token_urlsafe(32)})
        version = aws.secretsmanager.SecretVersion(
            self.resource_name("broker"),
            secret_id=secret.id,
            secret_string=Output.secret(drawn),
            opts=self.child_options(ignore_changes=["secret_string"]),
        )
        # An Output of a secret is a secret, and so is all that comes from it.
        password = version.secret_string.apply(_password)
        single = settings.mode == "single"
        broker = aws.mq.Broker(
            self.resource_name("broker"),
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
            apply_immediately=not context.is_protected,
            opts=self.child_options(
                # In camelCase: of all options this one alone is not translated.
                replace_on_changes=["engineVersion"],
                replacement_trigger=password.apply(lambda known: hashlib.sha256(known.encode()).hexdigest()),
            ),
        )
        endpoints = first(broker.instances, lambda instance: instance.endpoints)
        self.endpoint: Output[str] = first(endpoints, lambda endpoint: endpoint)
        self.name = broker.broker_name
        self.secret_arn = version.secret_arn
        # Two, one in each subnet, about 16 USD a month: the only way from inside the network to Secrets Manager.
        self._secrets = network.interface_endpoint(self, "secretsmanager")
        self.register_outputs({"endpoint": self.endpoint, "secret_arn": self.secret_arn, "name": self.name})

    def grant(self) -> Grant:
        """What reads the password and connects."""
        return Grant(
            statements=(Statement("ReadBrokerSecret", ("secretsmanager:GetSecretValue",), (self.secret_arn,)),),
            outputs={"broker": {"endpoint": self.endpoint, "secret_arn": self.secret_arn}},
            ports=(PortAccess("broker", self._group.id, PORT), self._secrets),
        )


def _password(held: str | None) -> str:
    if not held:
        raise pulumi.RunError("the secret of the broker holds no text in the state: expected user and password as JSON")
    password: str = json.loads(held)["password"]
    return password
