"""The database: PostgreSQL on RDS, which accepts TLS connections from inside the network only.

RDS creates, stores and renews the password of the master user in Secrets Manager; the program never reads it. The app's
user has no password. It signs in with tokens of IAM, and must be created in the database first. Only functions in the
network reach the database, and only functions outside of it reach Secrets Manager. So two functions create the user
together, when the database is created and whenever the event below or BOOTSTRAP_VERSION changes:

    `app.bootstrap.outside`   not in the network. Gets the event

        {"host": ..., "port": 5432, "database": ..., "user": the app's user, "secret_arn": of the master user's secret,
         "inside": name of the other function}

      reads the secret, {"username": ..., "password": ...}, and invokes the other one with

        {"host": ..., "port": ..., "database": ..., "user": ..., "username": the master user, "password": its password}

    `app.bootstrap.inside`    in the network. Connects over TLS as the master user, creates the user if there is none,
      and grants it LOGIN, rds_iam, and all rights in the database and its schema `public`. It also sets the defaults of
      the user's sessions. It is idempotent.

Both answer {"user": ...}. Their errors hold no password, because the answer of `outside` is stored in the state.
"""

from __future__ import annotations

from typing import NamedTuple

import pulumi_aws as aws
from pulumi import Input, Output, Resource

from infra import choices
from infra.components import Component, StackContext
from infra.components.function import Function
from infra.components.network import Network
from infra.deployed_code import Package
from infra.grants import Grant, PortAccess, Statement, first, policy, trust

VERSION = "17"
BOOTSTRAP_VERSION = "2"
"""Raise it if `app.bootstrap.inside` does more than before: the next update then runs it in databases that exist."""
PORT = 5432
DATABASE = "crudstack"
MASTER = "crudstack_master"
APP = "crudstack_app"
BACKUP_DAYS = {True: 14, False: 1}
"""Days that backups are kept, by whether the stack is protected. Without backups RDS has no point-in-time restore."""


class _Database(NamedTuple):
    """The attributes of an instance or a cluster that the other resources need."""

    resource: Resource
    host: Output[str]
    arn: Output[str]
    resource_id: Output[str]
    secret_arn: Output[str]
    identifier: Output[str]


class Postgres(Component):
    """An encrypted RDS instance or Aurora Serverless v2 cluster with backups, and a proxy if `settings` has one.

    settings    the class and size of the database, and whether it has a proxy
    zip         the zip of the two functions that create the app's user
    log_days    days that the logs of these functions are kept

    Outputs: `host`, `identifier`.
    """

    def __init__(
        self, context: StackContext, *, settings: choices.Postgres, network: Network, zip: Package, log_days: int
    ) -> None:
        super().__init__(context, "postgres")
        self.settings = settings
        self._group = network.security_group(self, "database", "who may reach the database", holds_data=True)
        subnets = aws.rds.SubnetGroup(
            self.resource_name("database"), subnet_ids=network.subnet_ids, opts=self.protected_options()
        )
        self._database = self._cluster(subnets) if settings.mode == "aurora" else self._instance(subnets)
        self.identifier, self.host, self._resource_id = (
            self._database.identifier,
            self._database.host,
            self._database.resource_id,
        )
        self._port_access = PortAccess("postgres", self._group.id, PORT)
        self._direct = (self.host, self._resource_id, self._port_access)
        self._create_app_user(network, zip, log_days)
        if settings.proxy:
            self._proxy(network)
        self.register_outputs({"host": self.host, "identifier": self.identifier})

    def grant(self, *, direct: bool = False) -> Grant:
        """Return a grant to sign in as the app's user.

        direct    whether to connect to the database itself and not to the proxy, so that sessions may change settings
        """
        host, resource_id, port_access = self._direct if direct else (self.host, self._resource_id, self._port_access)
        # IAM knows a database user by arn:aws:rds-db:REGION:ACCOUNT:dbuser:ID/USER.
        here = self._database.arn.apply(lambda arn: (arn or "").rsplit(":", 2)[0].replace(":rds:", ":rds-db:"))
        user = Output.format("{0}:dbuser:{1}/{2}", here, resource_id, APP)
        return Grant(
            statements=(Statement("SignInToDatabase", ("rds-db:connect",), (user,)),),
            outputs={"db": {"host": host, "port": PORT, "name": DATABASE, "user": self._user, "auth": "iam"}},
            ports=(port_access,),
        )

    def _instance(self, subnets: aws.rds.SubnetGroup) -> _Database:
        is_protected, settings = self.context.is_protected, self.settings
        parameters = aws.rds.ParameterGroup(
            self.resource_name("database"),
            family=f"postgres{VERSION}",
            parameters=[
                {"name": "rds.force_ssl", "value": "1"},
                {"name": "log_min_duration_statement", "value": "1000"},
                {"name": "log_parameter_max_length", "value": "0"},  # the data of slow statements stay out of the log
            ],
            opts=self.protected_options(),
        )
        instance = aws.rds.Instance(
            self.resource_name("database"),
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
            backup_retention_period=BACKUP_DAYS[is_protected],
            delete_automated_backups=not is_protected,
            copy_tags_to_snapshot=True,
            deletion_protection=is_protected,
            skip_final_snapshot=not is_protected,
            final_snapshot_identifier=self.resource_name("final") if is_protected else None,
            auto_minor_version_upgrade=True,
            apply_immediately=not is_protected,
            enabled_cloudwatch_logs_exports=["postgresql", "upgrade"],
            opts=self.data_options(),
        )
        secret = first(instance.master_user_secrets, lambda secret: secret.secret_arn)
        return _Database(instance, instance.address, instance.arn, instance.resource_id, secret, instance.identifier)

    def _cluster(self, subnets: aws.rds.SubnetGroup) -> _Database:
        is_protected = self.context.is_protected
        parameters = aws.rds.ClusterParameterGroup(
            self.resource_name("database"),
            family=f"aurora-postgresql{VERSION}",
            parameters=[
                {"name": "rds.force_ssl", "value": "1"},
                {"name": "log_min_duration_statement", "value": "1000"},
                {"name": "log_parameter_max_length", "value": "0"},  # the data of slow statements stay out of the log
            ],
            opts=self.protected_options(),
        )
        cluster = aws.rds.Cluster(
            self.resource_name("database"),
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
            backup_retention_period=BACKUP_DAYS[is_protected],
            delete_automated_backups=not is_protected,
            copy_tags_to_snapshot=True,
            deletion_protection=is_protected,
            skip_final_snapshot=not is_protected,
            final_snapshot_identifier=self.resource_name("final") if is_protected else None,
            apply_immediately=not is_protected,
            enabled_cloudwatch_logs_exports=["postgresql"],
            opts=self.data_options(),
        )
        instances = [
            aws.rds.ClusterInstance(
                self.resource_name(f"database-{index}"),
                cluster_identifier=cluster.id,
                engine=aws.rds.EngineType.AURORA_POSTGRESQL,
                instance_class="db.serverless",
                db_subnet_group_name=subnets.name,
                publicly_accessible=False,
                auto_minor_version_upgrade=True,
                copy_tags_to_snapshot=True,
                apply_immediately=not is_protected,
                opts=self.data_options(),
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

    def _create_app_user(self, network: Network, zip: Package, log_days: int) -> None:
        """Create the app's user in the database, by the two functions that the module's docstring describes."""
        inside = Function(
            self.context,
            "bootstrap-inside",
            zip=zip,
            handler="app.bootstrap.inside",
            grants=[Grant(ports=(self._port_access,))],
            network=network,
            timeout_s=60,
            log_days=log_days,
            opts=self.child_options(),
        )
        secret = Statement("ReadMasterSecret", ("secretsmanager:GetSecretValue",), (self._database.secret_arn,))
        outside = Function(
            self.context,
            "bootstrap-outside",
            zip=zip,
            handler="app.bootstrap.outside",
            grants=[Grant(statements=(secret,)), inside.invoke_grant()],
            timeout_s=90,
            log_days=log_days,
            opts=self.child_options(),
        )
        event: dict[str, Input[object]] = {
            "host": self._database.host,
            "port": PORT,
            "database": DATABASE,
            "user": APP,
            "secret_arn": self._database.secret_arn,
            "inside": inside.name,
        }
        done = aws.lambda_.Invocation(
            self.resource_name("bootstrap"),
            function_name=outside.name,
            input=Output.json_dumps(event),
            triggers={"version": BOOTSTRAP_VERSION},
            opts=self.child_options(depends_on=[self._database.resource, inside]),
        )
        # The name depends on the invocation, so the app gets it only after the user was created.
        self._user = done.id.apply(lambda _: APP)

    def _proxy(self, network: Network) -> None:
        """Create a proxy. The app signs in to the proxy, and the proxy to the database, with tokens of IAM."""
        group = network.security_group(self, "proxy", "who may reach the proxy")
        network.allow_port(self, "proxy", group.id, self._port_access)
        role = aws.iam.Role(
            self.resource_name("proxy"), assume_role_policy=trust("rds.amazonaws.com"), opts=self.child_options()
        )
        allowed = aws.iam.RolePolicy(
            self.resource_name("proxy"),
            role=role.name,
            policy=policy(self.grant().statements),
            opts=self.child_options(),
        )
        proxy = aws.rds.Proxy(
            self.resource_name("proxy"),
            engine_family="POSTGRESQL",
            default_auth_scheme="IAM_AUTH",
            require_tls=True,
            role_arn=role.arn,
            vpc_subnet_ids=network.subnet_ids,
            vpc_security_group_ids=[group.id],
            opts=self.child_options(depends_on=[allowed]),
        )
        targets = aws.rds.ProxyDefaultTargetGroup(
            self.resource_name("proxy"),
            db_proxy_name=proxy.name,
            connection_pool_config={"max_connections_percent": 80},
            opts=self.child_options(),
        )
        aurora = self.settings.mode == "aurora"
        aws.rds.ProxyTarget(
            self.resource_name("proxy"),
            db_proxy_name=proxy.name,
            target_group_name=targets.name,
            db_cluster_identifier=self.identifier if aurora else None,
            db_instance_identifier=None if aurora else self.identifier,
            opts=self.child_options(depends_on=[self._database.resource]),
        )
        self.host, self._port_access = proxy.endpoint, PortAccess("postgres", group.id, PORT)
        # IAM knows the proxy by the last part of its ARN, as in arn:...:db-proxy:prx-0123.
        self._resource_id = proxy.arn.apply(lambda arn: (arn or "").rpartition(":")[2])
