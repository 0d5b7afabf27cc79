"""The broker: RabbitMQ on Amazon MQ, which accepts TLS connections from inside the network only.

The app reads the password from Secrets Manager.
"""

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
    """One instance or a cluster of three, which carries the invalidations of caches.

    Amazon MQ sets the user and password of RabbitMQ when it creates the broker. It cannot show or change the password
    later. So the program creates the secret first, and the broker gets the password of the secret's version:

    - Each run generates a password. Only the run that creates the version uses it.
    - A run that is interrupted leaves a version without a broker. The next run creates the broker from that version.
    - A broker that is replaced gets the same password.
    - If the secret was deleted, the next run creates a version with another password. The replacement trigger of the
      broker is a hash of the password, so the broker is replaced too. If that fails, the next run tries it again.
    - A refresh changes nothing. The provider does not read the users of RabbitMQ, so it may empty `users` in the state.
      It ignores every change of `users` on a broker that exists. `users` is not in `ignore_changes`: a replacement
      after a refresh would otherwise take the empty list from the state.

    A change of the RabbitMQ version replaces the broker, because Amazon MQ cannot upgrade one from 3.13 to 4.2. No data
    is lost, because a broker holds none for long.

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
        generated = json.dumps({"username": USER, "password": secrets.token_urlsafe(32)})
        version = aws.secretsmanager.SecretVersion(
            self.resource_name("broker"),
            secret_id=secret.id,
            secret_string=Output.secret(generated),
            opts=self.child_options(ignore_changes=["secret_string"]),
        )
        # An Output made from a secret is a secret too.
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
                # In camelCase, because the SDK does not translate the names in this option.
                replace_on_changes=["engineVersion"],
                replacement_trigger=password.apply(lambda known: hashlib.sha256(known.encode()).hexdigest()),
            ),
        )
        endpoints = first(broker.instances, lambda instance: instance.endpoints)
        self.endpoint: Output[str] = first(endpoints, lambda endpoint: endpoint)
        self.name = broker.broker_name
        self.secret_arn = version.secret_arn
        # The only way from inside the network to Secrets Manager: one endpoint in each subnet, 16 USD a month for both.
        self._secrets = network.interface_endpoint(self, "secretsmanager")
        self.register_outputs({"endpoint": self.endpoint, "secret_arn": self.secret_arn, "name": self.name})

    def grant(self) -> Grant:
        """Return a grant to read the password and connect to the broker."""
        return Grant(
            statements=(Statement("ReadBrokerSecret", ("secretsmanager:GetSecretValue",), (self.secret_arn,)),),
            outputs={"broker": {"endpoint": self.endpoint, "secret_arn": self.secret_arn}},
            ports=(PortAccess("broker", self._group.id, PORT), self._secrets),
        )


def _password(secret: str | None) -> str:
    if not secret:
        raise pulumi.RunError("the secret of the broker holds no text in the state: expected user and password as JSON")
    password: str = json.loads(secret)["password"]
    return password
