"""Alarms for errors and overload, and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pulumi_aws as aws
from pulumi import Input, Output

from infra.components import Component, StackContext
from infra.components.broker import Broker
from infra.components.cache import Cache
from infra.components.function import ApiFunction
from infra.components.http_api import HttpApi
from infra.components.postgres import Postgres


class Observability(Component):
    """Alarms that go to a topic, and a budget.

    email          the address that gets messages; if it is None, CloudWatch alone shows the alarms
    budget_usd     the budget of the whole account in USD a month; None: no budget
    timeout_s      the time limit of the function: an alarm goes off if one request of a hundred takes 80 % of it
    connections    the largest number of connections of the database

    Outputs: `topic_arn`.
    """

    def __init__(
        self,
        context: StackContext,
        *,
        function: ApiFunction,
        timeout_s: int,
        http_api: HttpApi | None = None,
        postgres: Postgres | None = None,
        connections: int = 0,
        cache: Cache | None = None,
        broker: Broker | None = None,
        email: str | None = None,
        budget_usd: float | None = None,
    ) -> None:
        super().__init__(context, "observability")
        topic = aws.sns.Topic(self.resource_name("alarms"), opts=self.child_options())
        self.topic_arn = topic.arn
        if email is not None:
            aws.sns.TopicSubscription(
                self.resource_name("alarms"),
                topic=topic.arn,
                protocol="email",
                endpoint=email,
                opts=self.child_options(),
            )
        called = {"FunctionName": function.name}
        self._alarm("errors", "AWS/Lambda", "Errors", called, "Sum", 0, "the function failed")
        self._alarm("throttles", "AWS/Lambda", "Throttles", called, "Sum", 0, "there were too few instances")
        slow = f"one request of a hundred took more than 80 % of {timeout_s} s"
        self._alarm("duration", "AWS/Lambda", "Duration", called, "p99", 800 * timeout_s, slow)
        if http_api is not None:
            self._alarm(
                "5xx", "AWS/ApiGateway", "5xx", {"ApiId": http_api.api_id}, "Sum", 5, "requests were answered 5xx"
            )
        else:
            self._alarm("5xx", "AWS/Lambda", "Url5xxCount", called, "Sum", 5, "requests were answered 5xx")
        if postgres is not None:
            self._database(postgres, connections)
        if cache is not None:
            self._cache(cache)
        if broker is not None:
            of = {"Broker": broker.name}
            self._alarm("broker-cpu", "AWS/AmazonMQ", "SystemCpuUtilization", of, "Average", 80, "the broker is busy")
            self._alarm(
                "broker-messages", "AWS/AmazonMQ", "MessageCount", of, "Maximum", 10000, "messages wait for instances"
            )
        if budget_usd is not None and email is not None:
            self._budget(budget_usd, [email])
        self.register_outputs({"topic_arn": self.topic_arn})

    def _database(self, postgres: Postgres, connections: int) -> None:
        aurora = postgres.settings.mode == "aurora"
        of = {"DBClusterIdentifier" if aurora else "DBInstanceIdentifier": postgres.identifier}
        self._alarm("database-cpu", "AWS/RDS", "CPUUtilization", of, "Average", 80, "the database is busy")
        many = 0.8 * connections
        self._alarm(
            "database-connections", "AWS/RDS", "DatabaseConnections", of, "Maximum", many, "connections run out"
        )
        if not aurora:
            low = 0.1 * postgres.settings.storage_gb * 1024**3
            self._alarm(
                "database-storage",
                "AWS/RDS",
                "FreeStorageSpace",
                of,
                "Minimum",
                low,
                "the disk is full soon",
                below=True,
            )

    def _cache(self, cache: Cache) -> None:
        if cache.serverless:
            of: dict[str, Input[str]] = {"clusterId": cache.name}
            self._alarm(
                "cache-throttled", "AWS/ElastiCache", "ThrottledCmds", of, "Sum", 0, "the cache is at its limit"
            )
        else:
            # The metric exists for each node and not for the group. Any node may become the primary one.
            for number in range(1, cache.nodes + 1):
                of = {"CacheClusterId": Output.format("{0}-00{1}", cache.name, number)}
                self._alarm(
                    "cache-memory" if number == 1 else f"cache-memory-{number}",
                    "AWS/ElastiCache",
                    "DatabaseMemoryUsagePercentage",
                    of,
                    "Maximum",
                    80,
                    f"node {number} of the cache is full soon",
                )

    def _alarm(
        self,
        name: str,
        namespace: str,
        metric: str,
        dimensions: Mapping[str, Input[str]],
        statistic: str,
        threshold: float,
        meaning: str,
        *,
        below: bool = False,
    ) -> None:
        """Create an alarm that goes off after five minutes above `threshold`, or below it.

        statistic    a name of CloudWatch, such as "Sum", or a percentile, such as "p99"
        """
        percentile = statistic.startswith("p")
        aws.cloudwatch.MetricAlarm(
            self.resource_name(name),
            alarm_description=f"{self.context.name}: {meaning}",
            namespace=namespace,
            metric_name=metric,
            dimensions=dimensions,
            statistic=None if percentile else statistic,
            extended_statistic=statistic if percentile else None,
            comparison_operator="LessThanThreshold" if below else "GreaterThanThreshold",
            threshold=threshold,
            period=300,
            evaluation_periods=1,
            treat_missing_data="notBreaching",
            alarm_actions=[self.topic_arn],
            ok_actions=[self.topic_arn],
            opts=self.child_options(),
        )

    def _budget(self, usd: float, emails: Sequence[str]) -> None:
        aws.budgets.Budget(
            self.resource_name("budget"),
            budget_type="COST",
            time_unit="MONTHLY",
            limit_amount=f"{usd:.2f}",
            limit_unit="USD",
            notifications=[
                {
                    "notification_type": kind,
                    "comparison_operator": "GREATER_THAN",
                    "threshold": percent,
                    "threshold_type": "PERCENTAGE",
                    "subscriber_email_addresses": emails,
                }
                for kind, percent in (("ACTUAL", 80), ("FORECASTED", 100))
            ],
            opts=self.child_options(),
        )
