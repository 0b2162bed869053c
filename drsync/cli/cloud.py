"""`drsync cloud`: what lies in AWS between disasters."""

import click

from drsync.cli import cloud_points, cloud_setup


@click.group("cloud")
def command() -> None:
    """Prepare AWS for recovery."""


for _command in (cloud_setup.setup, cloud_points.sync, cloud_points.status, cloud_points.cleanup):
    command.add_command(_command)
