"""The entry points of requests: an HTTP API, or the URL of the function itself. Both call the function's alias."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pulumi_aws as aws
from pulumi import Output

from app.settings import EXPOSED_HEADERS, JwtAuth
from infra.choices import Domain
from infra.components import Component, StackContext
from infra.components.function import ApiFunction
from infra.config import API_WAITS_S
from infra.grants import first

LOGGED = {
    "request_id": "$context.requestId",
    "time": "$context.requestTime",
    "method": "$context.httpMethod",
    "status": "$context.status",
    "bytes": "$context.responseLength",
    "duration_ms": "$context.responseLatency",
    "integration_ms": "$context.integrationLatency",
    "error": "$context.error.message",
    "integration_error": "$context.integrationErrorMessage",
}
"""The fields of the access log. Path, query and addresses are left out, as in the app's own log."""
REQUEST_HEADERS = [
    *("authorization", "content-type", "idempotency-key", "if-match", "if-none-match"),
    *("content-disposition", "content-digest", "repr-digest", "range", "if-range"),  # of files
]
"""Headers that pages may send. They are listed even if all origins may call: "*" does not include Authorization."""


def cors(origins: Sequence[str]) -> Any:
    """Return the CORS configuration for pages of these origins; None if there are no origins."""
    if not origins:
        return None
    return {
        "allow_origins": list(origins),
        "allow_methods": ["*"],
        "allow_headers": REQUEST_HEADERS,
        "expose_headers": list(EXPOSED_HEADERS),
        "max_age": 3600,
    }


class HttpApi(Component):
    """An HTTP API with one route for all requests.

    origins       origins whose pages may call it
    jwt           the issuer and audiences of the tokens that are verified before the function is called; if it is None,
                  the app checks the requests itself
    domain        a custom domain name; the API then accepts requests to this name only
    per_second    requests per second that are accepted; others are answered with 429
    burst         requests that are accepted at once
    log_days      days that the access log is kept

    Outputs: `url`.
    """

    def __init__(
        self,
        context: StackContext,
        *,
        function: ApiFunction,
        origins: Sequence[str] = (),
        jwt: JwtAuth | None = None,
        domain: Domain | None = None,
        per_second: int = 500,
        burst: int = 1000,
        log_days: int = 30,
    ) -> None:
        super().__init__(context, "http-api")
        api = aws.apigatewayv2.Api(
            self.resource_name("api"),
            protocol_type="HTTP",
            cors_configuration=cors(origins),
            disable_execute_api_endpoint=domain is not None,
            opts=self.protected_options(),
        )
        self.api_id = api.id
        integration = aws.apigatewayv2.Integration(
            self.resource_name("function"),
            api_id=api.id,
            integration_type="AWS_PROXY",
            integration_uri=function.alias.invoke_arn,
            payload_format_version="2.0",
            timeout_milliseconds=1000 * API_WAITS_S,
            opts=self.protected_options(),
        )
        target = Output.format("integrations/{0}", integration.id)
        verified: dict[str, Any] = {"authorization_type": "NONE"}
        if jwt is not None:
            authorizer = aws.apigatewayv2.Authorizer(
                self.resource_name("jwt"),
                api_id=api.id,
                authorizer_type="JWT",
                identity_sources=["$request.header.Authorization"],
                jwt_configuration={"issuer": jwt.issuer, "audiences": jwt.audiences},
                opts=self.child_options(),
            )
            verified = {"authorization_type": "JWT", "authorizer_id": authorizer.id}
            # Health checks send no token, so this route has no authorizer. It matches this one path only, and API
            # Gateway prefers it to $default. The app refuses every other request without verified claims.
            aws.apigatewayv2.Route(
                self.resource_name("healthz"),
                api_id=api.id,
                route_key="ANY /healthz",
                target=target,
                authorization_type="NONE",
                opts=self.child_options(),
            )
            if origins:
                # Browsers send a preflight request without a token. With a route that needs no token, the API answers
                # preflight requests itself.
                aws.apigatewayv2.Route(
                    self.resource_name("preflight"),
                    api_id=api.id,
                    route_key="OPTIONS /{proxy+}",
                    target=target,
                    authorization_type="NONE",
                    opts=self.child_options(),
                )
        aws.apigatewayv2.Route(
            self.resource_name("all"),
            api_id=api.id,
            route_key="$default",
            target=target,
            opts=self.protected_options(),
            **verified,
        )
        # API Gateway adds each log group to one policy of the region, which is full after about 40 groups, and never
        # removes one. For all groups with this prefix it adds a single line.
        logs = aws.cloudwatch.LogGroup(
            self.resource_name("access"),
            name_prefix=f"/aws/vendedlogs/{context.name}-access-",
            retention_in_days=log_days,
            opts=self.child_options(),
        )
        stage = aws.apigatewayv2.Stage(
            self.resource_name("all"),
            api_id=api.id,
            name="$default",
            auto_deploy=True,
            access_log_settings={"destination_arn": logs.arn, "format": json.dumps(LOGGED)},
            default_route_settings={"throttling_rate_limit": per_second, "throttling_burst_limit": burst},
            opts=self.protected_options(),
        )
        aws.lambda_.Permission(
            self.resource_name("api"),
            action="lambda:InvokeFunction",
            function=function.name,
            qualifier=function.alias.name,
            principal="apigateway.amazonaws.com",
            source_arn=Output.format("{0}/*/*", api.execution_arn),
            opts=self.child_options(),
        )
        self.url = self._custom_domain(api, stage, domain) if domain else api.api_endpoint
        self.register_outputs({"url": self.url})

    def _custom_domain(self, api: aws.apigatewayv2.Api, stage: aws.apigatewayv2.Stage, domain: Domain) -> Output[str]:
        certificate = aws.acm.Certificate(
            self.resource_name("domain"), domain_name=domain.name, validation_method="DNS", opts=self.child_options()
        )
        asked = certificate.domain_validation_options
        record = aws.route53.Record(
            self.resource_name("validation"),
            zone_id=domain.zone,
            name=first(asked, lambda option: option.resource_record_name),
            type=first(asked, lambda option: option.resource_record_type),
            records=[first(asked, lambda option: option.resource_record_value)],
            ttl=300,
            allow_overwrite=True,
            opts=self.child_options(),
        )
        valid = aws.acm.CertificateValidation(
            self.resource_name("domain"),
            certificate_arn=certificate.arn,
            validation_record_fqdns=[record.fqdn],
            opts=self.child_options(),
        )
        name = aws.apigatewayv2.DomainName(
            self.resource_name("domain"),
            domain_name=domain.name,
            domain_name_configuration={
                "certificate_arn": valid.certificate_arn,
                "endpoint_type": "REGIONAL",
                "security_policy": "TLS_1_2",
            },
            opts=self.child_options(),
        )
        aws.apigatewayv2.ApiMapping(
            self.resource_name("domain"),
            api_id=api.id,
            domain_name=name.id,
            stage=stage.id,
            api_mapping_key=domain.base_path.removeprefix("/") or None,
            opts=self.child_options(),
        )
        configuration = name.domain_name_configuration
        aws.route53.Record(
            self.resource_name("domain"),
            zone_id=domain.zone,
            name=domain.name,
            type="A",
            aliases=[
                {
                    "name": configuration.target_domain_name,
                    "zone_id": configuration.hosted_zone_id,
                    "evaluate_target_health": False,
                }
            ],
            opts=self.child_options(),
        )
        return Output.from_input(f"https://{domain.name}{domain.base_path}")


class FunctionUrl(Component):
    """The function's own URL. AWS accepts all requests, and the app checks the token.

    origins    origins whose pages may call it

    Outputs: `url`.
    """

    def __init__(self, context: StackContext, *, function: ApiFunction, origins: Sequence[str] = ()) -> None:
        super().__init__(context, "function-url")
        url = aws.lambda_.FunctionUrl(
            self.resource_name("url"),
            function_name=function.name,
            qualifier=function.alias.name,
            authorization_type="NONE",
            cors=cors(origins),
            opts=self.protected_options(),
        )
        # Both permissions are needed. The second allows calls through the URL only.
        aws.lambda_.Permission(
            self.resource_name("url"),
            action="lambda:InvokeFunctionUrl",
            function=function.name,
            qualifier=function.alias.name,
            principal="*",
            function_url_auth_type="NONE",
            opts=self.child_options(),
        )
        aws.lambda_.Permission(
            self.resource_name("by-url"),
            action="lambda:InvokeFunction",
            function=function.name,
            qualifier=function.alias.name,
            principal="*",
            invoked_via_function_url=True,
            opts=self.child_options(),
        )
        self.url = url.function_url.apply(lambda found: (found or "").rstrip("/"))
        self.register_outputs({"url": self.url})
