"""Where an instance comes up: its subnet, its security groups, its address. Asked for before anything is made."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from drsync.errors import CloudNotFound
from drsync.target.ec2.aws import Aws


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """A subnet."""

    id: str
    vpc_id: str
    zone: str
    cidr: str
    free_addresses: int

    def problem_with(self, address: str) -> str:
        """Why an instance can't have this address; empty if nothing speaks against it."""
        try:
            wanted, network = ipaddress.ip_address(address), ipaddress.ip_network(self.cidr)
        except ValueError:
            return f"{address} is not an IP address"
        if wanted not in network:
            return f"address {address} is not in subnet {self.id} ({self.cidr})"
        # The first four and the last one are AWS's own (VPC user guide, "Subnet CIDR blocks").
        if int(wanted) - int(network.network_address) < 4 or wanted == network.broadcast_address:
            return f"address {address} is one of those that AWS keeps in subnet {self.id}"
        return ""


def subnet(aws: Aws, subnet_id: str) -> Subnet | None:
    """A subnet; None if there is none.

    Raises:
        CloudError: AWS can't be asked.
    """
    try:
        with aws.translated("DescribeSubnets"):
            (found,) = aws.ec2.describe_subnets(SubnetIds=[subnet_id])["Subnets"]
    except CloudNotFound:
        return None
    return Subnet(
        id=found["SubnetId"],
        vpc_id=found["VpcId"],
        zone=found["AvailabilityZone"],
        cidr=found["CidrBlock"],
        free_addresses=found["AvailableIpAddressCount"],
    )


def has_default_vpc(aws: Aws) -> bool:
    """Whether an instance can be launched without naming a subnet.

    Raises:
        CloudError: AWS can't be asked.
    """
    with aws.translated("DescribeVpcs"):
        return bool(aws.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"])


def unknown_groups(aws: Aws, groups: Sequence[str], vpc_id: str | None) -> list[str]:
    """What is wrong with security groups: those that don't exist, or belong to another VPC.

    Raises:
        CloudError: AWS can't be asked.
    """
    if not groups:
        return []
    with aws.translated("DescribeSecurityGroups"):
        pages = aws.ec2.get_paginator("describe_security_groups").paginate(
            Filters=[{"Name": "group-id", "Values": list(groups)}]
        )
        found = {one["GroupId"]: one.get("VpcId", "") for page in pages for one in page["SecurityGroups"]}
    problems = [f"there is no security group {group}" for group in groups if group not in found]
    elsewhere = [group for group in groups if vpc_id and found.get(group, vpc_id) != vpc_id]
    return problems + [f"security group {group} belongs to VPC {found[group]}, not {vpc_id}" for group in elsewhere]


def owner_of(aws: Aws, address: str, subnet_id: str) -> str:
    """Who has an address in a subnet; empty if nobody has.

    Raises:
        CloudError: AWS can't be asked.
    """
    with aws.translated("DescribeNetworkInterfaces"):
        found = aws.ec2.describe_network_interfaces(
            Filters=[
                {"Name": "addresses.private-ip-address", "Values": [address]},
                {"Name": "subnet-id", "Values": [subnet_id]},
            ]
        )["NetworkInterfaces"]
    if not found:
        return ""
    return found[0].get("Attachment", {}).get("InstanceId", "") or found[0]["NetworkInterfaceId"]
