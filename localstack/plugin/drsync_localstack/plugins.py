"""What LocalStack loads: two providers, and what to do when it starts.

This module is imported whenever LocalStack looks for plug-ins, so it imports the rest only where it is needed.
"""
# ruff: noqa: PLC0415 - as the docstring says

from localstack.runtime import hooks
from localstack.services.plugins import Service, aws_provider


@aws_provider(api="ebs")
def ebs() -> Service:
    """EBS direct, which LocalStack 4.12 doesn't have."""
    from drsync_localstack.ebs import EbsProvider
    from drsync_localstack.lab import the_lab

    return Service.for_provider(EbsProvider(the_lab()))


@aws_provider(api="ec2", name="drsync")
def ec2() -> Service:
    """LocalStack's EC2, with what it lacks."""
    from localstack.services.moto import MotoFallbackDispatcher

    from drsync_localstack.ec2 import DrsyncEc2Provider
    from drsync_localstack.lab import the_lab

    return Service.for_provider(DrsyncEc2Provider(the_lab()), dispatch_table_factory=MotoFallbackDispatcher)


@hooks.on_infra_start()
def on_infra_start() -> None:
    """Choose this EC2 (PROVIDER_OVERRIDE_EC2 still has its say), and serve the endpoints that AWS doesn't have."""
    from localstack.config import SERVICE_PROVIDER_CONFIG
    from localstack.services.edge import ROUTER

    from drsync_localstack.control import add_routes
    from drsync_localstack.lab import the_lab

    SERVICE_PROVIDER_CONFIG.set_provider_if_not_exists("ec2", "drsync")
    add_routes(ROUTER, the_lab())
