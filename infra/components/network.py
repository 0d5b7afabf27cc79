"""The private network of stacks with a database, cache or broker: no connections to or from the internet."""

from __future__ import annotations

from collections.abc import Sequence

import pulumi_aws as aws
from pulumi import Input, Output, Resource

from infra.components import Component, StackContext
from infra.grants import Grant, PortAccess, Statement

INTERFACES = (
    "ec2:CreateNetworkInterface",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeSubnets",
    "ec2:DeleteNetworkInterface",
    "ec2:AssignPrivateIpAddresses",
    "ec2:UnassignPrivateIpAddresses",
)
"""Actions that Lambda needs in the role of a function to run it in the network. They cannot be limited to resources."""


class Network(Component):
    """Two private subnets and a gateway endpoint for S3, which is free. There is no NAT and no internet gateway.

    region        the region of the stack
    zones         the availability zone of each subnet, see infra/zones.py
    holds_data    whether a database is in it; then VPC and subnets are protected like the database

    Outputs: `vpc_id`, `subnet_ids`, and `s3_prefixes`, which is the id of the list of S3's addresses.
    """

    def __init__(
        self, context: StackContext, *, region: Input[str], zones: Sequence[str | None], holds_data: bool = False
    ) -> None:
        super().__init__(context, "network")
        options = self.protected_options if holds_data else self.child_options
        vpc = aws.ec2.Vpc(
            self.resource_name("vpc"),
            cidr_block="10.0.0.0/24",
            enable_dns_support=True,
            enable_dns_hostnames=True,
            tags={"Name": context.name},
            opts=options(),
        )
        self._region = region
        self.vpc_id = vpc.id
        self.cidr_block = vpc.cidr_block
        # A resource without a security group is in this one, which allows no connection.
        aws.ec2.DefaultSecurityGroup(
            self.resource_name("default"), vpc_id=vpc.id, ingress=[], egress=[], opts=self.child_options()
        )
        table = aws.ec2.RouteTable(self.resource_name("private"), vpc_id=vpc.id, opts=self.child_options())
        self.subnet_ids: list[Output[str]] = []
        for index, zone in enumerate(zones):
            subnet = aws.ec2.Subnet(
                self.resource_name(f"private-{index}"),
                vpc_id=vpc.id,
                cidr_block=f"10.0.0.{128 * index}/25",
                availability_zone=zone,
                map_public_ip_on_launch=False,
                tags={"Name": self.resource_name(f"private-{index}")},
                # A subnet stays in its zone, also if the account gets more zones.
                opts=options(ignore_changes=["availability_zone"]),
            )
            aws.ec2.RouteTableAssociation(
                self.resource_name(f"private-{index}"),
                subnet_id=subnet.id,
                route_table_id=table.id,
                opts=self.child_options(),
            )
            self.subnet_ids.append(subnet.id)
        s3 = aws.ec2.VpcEndpoint(
            self.resource_name("s3"),
            vpc_id=vpc.id,
            service_name=Output.format("com.amazonaws.{0}.s3", region),
            vpc_endpoint_type="Gateway",
            route_table_ids=[table.id],
            opts=self.child_options(),
        )
        self.s3_prefixes = s3.prefix_list_id
        self.register_outputs({"vpc_id": self.vpc_id, "subnet_ids": self.subnet_ids, "s3_prefixes": self.s3_prefixes})

    def grant(self) -> Grant:
        """Return a grant for a function to run in the network."""
        return Grant(statements=(Statement("BeInTheNetwork", INTERFACES, ("*",)),))

    def security_group(
        self,
        component: Component,
        name: str,
        description: str,
        *,
        depends_on: Sequence[Resource] = (),
        holds_data: bool = False,
    ) -> aws.ec2.SecurityGroup:
        """Create a security group without rules, as a resource of `component`.

        holds_data    whether it is the group of a database, which is protected
        """
        options = component.protected_options if holds_data else component.child_options
        return aws.ec2.SecurityGroup(
            component.resource_name(name),
            vpc_id=self.vpc_id,
            description=description,
            tags={"Name": component.resource_name(name)},
            opts=options(depends_on=list(depends_on)),
        )

    def allow_port(self, component: Component, who: str, security_group: Input[str], access: PortAccess) -> None:
        """Allow the members of a security group to connect to a port. The rules are resources of `component`.

        who    the name of the members in the names of the rules, such as "api"
        """
        aws.vpc.SecurityGroupEgressRule(
            component.resource_name(f"{who}-to-{access.name}"),
            security_group_id=security_group,
            referenced_security_group_id=access.security_group,
            ip_protocol="tcp",
            from_port=access.port,
            to_port=access.port,
            description=f"to {access.name}",
            opts=component.child_options(),
        )
        aws.vpc.SecurityGroupIngressRule(
            component.resource_name(f"{access.name}-from-{who}"),
            security_group_id=access.security_group,
            referenced_security_group_id=security_group,
            ip_protocol="tcp",
            from_port=access.port,
            to_port=access.port,
            description=f"from {who}",
            opts=component.child_options(),
        )

    def allow_s3(self, component: Component, who: str, security_group: Input[str]) -> None:
        """Allow the members of a security group to connect to S3, which has a list of addresses and no security group.

        who    the name of the members in the name of the rule, such as "api"
        """
        aws.vpc.SecurityGroupEgressRule(
            component.resource_name(f"{who}-to-s3"),
            security_group_id=security_group,
            prefix_list_id=self.s3_prefixes,
            ip_protocol="tcp",
            from_port=443,
            to_port=443,
            description="to s3",
            opts=component.child_options(),
        )

    def interface_endpoint(self, component: Component, service: str) -> PortAccess:
        """Create an endpoint of an AWS service in the network, and return the access to it.

        It costs about 0.011 USD an hour in each subnet.

        service    the name of the service, such as "secretsmanager"
        """
        security_group = self.security_group(component, service, f"who may reach {service}")
        aws.ec2.VpcEndpoint(
            component.resource_name(service),
            vpc_id=self.vpc_id,
            service_name=Output.format("com.amazonaws.{0}.{1}", self._region, service),
            vpc_endpoint_type="Interface",
            private_dns_enabled=True,
            subnet_ids=self.subnet_ids,
            security_group_ids=[security_group.id],
            opts=component.child_options(),
        )
        return PortAccess(service, security_group.id, 443)
