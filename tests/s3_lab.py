"""A LocalStack to test against, and buckets in it."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).parents[1]
REGION = "us-east-1"

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}
"""LocalStack takes any; boto3 finds them in the environment."""

NO_OTHER_CREDENTIALS = {
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Keeps boto3 from what the machine's user has, and from asking the network for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A bucket of one test; credentials for it are in the environment."""

    name: str
    endpoint_url: str
    client: "S3Client"
    """boto3's own client, to look at the bucket past drsync."""
    region: str = REGION

    def remove(self) -> None:
        """Remove it with all that is in it."""
        for page in self.client.get_paginator("list_object_versions").paginate(Bucket=self.name):
            found = [*page.get("Versions", ()), *page.get("DeleteMarkers", ())]
            keys = [{"Key": entry["Key"], "VersionId": entry["VersionId"]} for entry in found]
            if keys:
                self.client.delete_objects(Bucket=self.name, Delete={"Objects": keys})  # type: ignore[typeddict-item]
        self.client.delete_bucket(Bucket=self.name)


def make_client(endpoint_url: str) -> "S3Client":
    """A client of boto3's own; it takes a tenth of a second to make."""
    session = boto3.session.Session(
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
    )
    return session.client("s3", endpoint_url=endpoint_url)


@contextmanager
def running_localstack(given: str) -> Iterator[str]:
    """The endpoint of a LocalStack: the `given` one, or if it is "" one on a free port, ended afterwards."""
    if given:
        yield given
        return
    environment = {**os.environ, "LOCALSTACK_PORT": str(_free_port())}
    try:
        yield _run("start.sh", environment).splitlines()[-1]
    finally:
        _run("stop.sh", environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _run(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", ROOT / "localstack" / script],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"localstack/{script} failed: {done.stderr}"
    return done.stdout
