"""The database: PostgreSQL on RDS, reached over TLS from inside the network only, by a user that has no password.

Its master password is made, kept and renewed by RDS in Secrets Manager; nothing here ever sees it. The app's user signs in with tokens that its
role signs, and must be made inside the database first. Nothing outside of the network reaches the database, and nothing inside reaches Secrets
Manager, so two functions do that together, when the database is made and whenever the event below or BOOTSTRAP_VERSION changes:

    `app.bootstrap.outside`   not in the network. Gets the event

        {"host": ..., "port": 5432, "database": ..., "user": the app's user, "secret_arn": of the master user's secret,
         "inside": name of the other function}

      reads the secret, {"username": ..., "password": ...}, and invokes the other one with

        {"host": ..., "port": ..., "database": ..., "user": ..., "username": the master user, "password": its password}

    `app.bootstrap.inside`    in the network. Connects with that (TLS), makes the user unless it is there, and gives it what it needs: LOGIN,
      rds_iam, all rights in the database and its schema `public`, and the settings of its sessions. Doing it again changes nothing.

Both answer {"user": ...}, and fail with an error that holds no password: the answer of `outside` is kept in the state of the stack.
"""

from __future__ import annotations

from typing import NamedTuple

import pulumi_aws as aws
from pulumi import Input, Output, Resource

from infra import choices
from infra.components import Component, Stack
from infra.components.function import Function
from infra.components.network import Network
from infra.deployed_code import Package
from infra.link import Door, Link, Statement, first, policy, trust

VERSION = "17"
BOOTSTRAP_VERSION = "2"
"""Raise it if `app.bootstrap.inside` does more than before: then the next update runs it again in databases that exist."""
PORT = 5432
DATABASE = "crudstack"
MASTER = "crudstack_master"
APP = "crudstack_app"
BACKUP_DAYS = {True: 14, False: 1}
"""By whether data is kept; RDS without any backups could not be restored to a moment."""


class _Database(NamedTuple):
    """What an instance and a cluster have in common."""

    resource: Resource
    host: Output[str]
    arn: Output[str]
    resource_id: Output[str]
    secret_arn: Output[str]
    identifier: Output[str]


class Postgres(Component):
    """An instance, or a cluster of Aurora Serverless v2, encrypted and backed up; in front of it a proxy if asked for.

    settings    class, size and the like
    zip         of the two functions that make the app's user

    Outputs: `host`, `identifier`.
    """

    def __init__(
        self, stack: Stack, *, settings: choices.Postgres, network: Network, zip: Package, log_days: int
    ) -> None:
        super().__init__(stack, "postgres")
        self.settings = settings
        self._group = network.group(self, "database", "who may reach the database", holds_data=True)
        subnets = aws.rds.SubnetGroup(self.named("database"), subnet_ids=network.subnet_ids, opts=self.kept())
        self._made = self._cluster(subnets) if settings.mode == "aurora" else self._instance(subnets)
        self.identifier, self.host, self._resource_id = self._made.identifier, self._made.host, self._made.resource_id
        self._door = Door("postgres", self._group.id, PORT)
        self._bootstrap(network, zip, log_days)
        if settings.proxy:
            self._proxy(network)
        self.register_outputs({"host": self.host, "identifier": self.identifier})

    def link(self) -> Link:
        """Return the policy and the outputs with which the function signs in as the app's user."""
        # The same region and account, written as IAM wants it: arn:aws:rds-db:REGION:ACCOUNT:dbuser:ID/USER
        here = self._made.arn.apply(lambda arn: (arn or "").rsplit(":", 2)[0].replace(":rds:", ":rds-db:"))
        user = Output.format("{0}:dbuser:{1}/{2}", here, self._resource_id, APP)
        return Link(
            statements=(Statement("SignInToDatabase", ("rds-db:connect",), (user,)),),
            outputs={"db": {"host": self.host, "port": PORT, "name": DATABASE, "user": self._user, "auth": "iam"}},
            doors=(self._door,),
        )

    def _instance(self, subnets: aws.rds.SubnetGroup) -> _Database:
        keeps, settings = self.stack.keeps, self.settings
        parameters = aws.rds.ParameterGroup(
            self.named("database"),
            family=f"postgres{VERSION}",
            parameters=[
                {"name": "rds.force_ssl", "value": "1"},
                {"name": "log_min_duration_statement", "value": "1000"},
                {"name": "log_parameter_max_length", "value": "0"},  # the data of slow statements stay out of the log
            ],
            opts=self.kept(),
        )
        instance = aws.rds.Instance(
            self.named("database"),
            engine="postgres",
            engine_version=VERSION,
            instance_class=settings.class_,
            allocated_storage=settings.storage_gb,
            storage_type="gp3",
            storage_encrypted=True,
            db_name=DATABASE,
            username=MASTER,
            manage_master_user_password=True,
            iam_database_authentication_enabled=True,
            multi_az=settings.multi_az,
            db_subnet_group_name=subnets.name,
            vpc_security_group_ids=[self._group.id],
            publicly_accessible=False,
            parameter_group_name=parameters.name,
            backup_retention_period=BACKUP_DAYS[keeps],
            delete_automated_backups=not keeps,
            copy_tags_to_snapshot=True,
            deletion_protection=keeps,
            skip_final_snapshot=not keeps,
            final_snapshot_identifier=self.named("final") if keeps else None,
            auto_minor_version_upgrade=True,
            apply_immediately=not keeps,
            enabled_cloudwatch_logs_exports=["postgresql", "upgrade"],
            opts=self.data(),
        )
        secret = first(instance.master_user_secrets, lambda secret: secret.secret_arn)
        return _Database(instance, instance.address, instance.arn, instance.resource_id, secret, instance.identifier)

    def _cluster(self, subnets: aws.rds.SubnetGroup) -> _Database:
        keeps = self.stack.keeps
        parameters = aws.rds.ClusterParameterGroup(
            self.named("database"),
            family=f"aurora-postgresql{VERSION}",
            parameters=[
                {"name": "rds.force_ssl", "value": "1"},
                {"name": "log_min_duration_statement", "value": "1000"},
                {"name": "log_parameter_max_length", "value": "0"},  # the data of slow statements stay out of the log
            ],
            opts=self.kept(),
        )
        cluster = aws.rds.Cluster(
            self.named("database"),
            engine="aurora-postgresql",
            engine_version=VERSION,
            serverlessv2_scaling_configuration={"min_capacity": 0.5, "max_capacity": self.settings.max_acu},
            storage_encrypted=True,
            database_name=DATABASE,
            master_username=MASTER,
            manage_master_user_password=True,
            iam_database_authentication_enabled=True,
            db_subnet_group_name=subnets.name,
            vpc_security_group_ids=[self._group.id],
            db_cluster_parameter_group_name=parameters.name,
            backup_retention_period=BACKUP_DAYS[keeps],
            delete_automated_backups=not keeps,
            copy_tags_to_snapshot=True,
            deletion_protection=keeps,
            skip_final_snapshot=not keeps,
            final_snapshot_identifier=self.named("final") if keeps else None,
            apply_immediately=not keeps,
            enabled_cloudwatch_logs_exports=["postgresql"],
            opts=self.data(),
        )
        instances = [
            aws.rds.ClusterInstance(
                self.named(f"database-{index}"),
                cluster_identifier=cluster.id,
                engine=aws.rds.EngineType.AURORA_POSTGRESQL,
                instance_class="db.serverless",
                db_subnet_group_name=subnets.name,
                publicly_accessible=False,
                auto_minor_version_upgrade=True,
                copy_tags_to_snapshot=True,
                apply_immediately=not keeps,
                opts=self.data(),
            )
            for index in range(2 if self.settings.multi_az else 1)
        ]
        secret = first(cluster.master_user_secrets, lambda secret: secret.secret_arn)
        return _Database(
            instances[0],
            cluster.endpoint,
            cluster.arn,
            cluster.cluster_resource_id,
            secret,
            cluster.cluster_identifier,
        )

    def _bootstrap(self, network: Network, zip: Package, log_days: int) -> None:
        """Make the app's user. See above."""
        inside = Function(
            self.stack,
            "bootstrap-inside",
            zip=zip,
            handler="app.bootstrap.inside",
            links=[Link(doors=(self._door,))],
            network=network,
            timeout_s=60,
            log_days=log_days,
            opts=self.child(),
        )
        secret = Statement("ReadMasterSecret", ("secretsmanager:GetSecretValue",), (self._made.secret_arn,))
        outside = Function(
            self.stack,
            "bootstrap-outside",
            zip=zip,
            handler="app.bootstrap.outside",
            links=[Link(statements=(secret,)), inside.invoke_link()],
            timeout_s=90,
            log_days=log_days,
            opts=self.child(),
        )
        event: dict[str, Input[object]] = {
            "host": self._made.host,
            "port": PORT,
            "database": DATABASE,
            "user": APP,
            "secret_arn": self._made.secret_arn,
            "inside": inside.name,
        }
        done = aws.lambda_.Invocation(
            self.named("bootstrap"),
            function_name=outside.name,
            input=Output.json_dumps(event),
            triggers={"version": BOOTSTRAP_VERSION},
            opts=self.child(depends_on=[self._made.resource, inside]),
        )
        # Whoever wants to know the user's name waits until there is one.
        self._user = done.id.apply(lambda _: APP)

    def _proxy(self, network: Network) -> None:
        """A proxy that signs in to the database as the app does to it: by IAM on both sides, without a secret."""
        group = network.group(self, "proxy", "who may reach the proxy")
        network.open(self, "proxy", group.id, self._door)
        role = aws.iam.Role(self.named("proxy"), assume_role_policy=trust("rds.amazonaws.com"), opts=self.child())
        allowed = aws.iam.RolePolicy(
            self.named("proxy"), role=role.name, policy=policy(self.link().statements), opts=self.child()
        )
        proxy = aws.rds.Proxy(
            self.named("proxy"),
            engine_family="POSTGRESQL",
            default_auth_scheme="IAM_AUTH",
            require_tls=True,
            role_arn=role.arn,
            vpc_subnet_ids=network.subnet_ids,
            vpc_security_group_ids=[group.id],
            opts=self.child(depends_on=[allowed]),
        )
        targets = aws.rds.ProxyDefaultTargetGroup(
            self.named("proxy"),
            db_proxy_name=proxy.name,
            connection_pool_config={"max_connections_percent": 80},
            opts=self.child(),
        )
        aurora = self.settings.mode == "aurora"
        aws.rds.ProxyTarget(
            self.named("proxy"),
            db_proxy_name=proxy.name,
            target_group_name=targets.name,
            db_cluster_identifier=self.identifier if aurora else None,
            db_instance_identifier=None if aurora else self.identifier,
            opts=self.child(depends_on=[self._made.resource]),
        )
        self.host, self._door = proxy.endpoint, Door("postgres", group.id, PORT)
        # arn:...:db-proxy:prx-0123 ends with what IAM knows it by.
        self._resource_id = proxy.arn.apply(lambda arn: (arn or "").rpartition(":")[2])
