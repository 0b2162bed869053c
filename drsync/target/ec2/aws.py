"""One session with AWS: clients of a region, with timeouts and the one layer that tries again.

botocore is that layer: it repeats what is throttled, stalls or breaks. For EBS direct in its "adaptive"
mode, which also holds the rate of requests below what AWS throttles, for all threads together; the few
requests to the other services in "standard" mode, since a single throttled one would slow "adaptive" down
to one request in two seconds. Nobody above it repeats a request for these reasons. What is waited for above
it are states: a snapshot that is not visible yet, one that is not complete yet (snapshot.py).

An attempt ends after CONNECT_TIMEOUT_S without progress in sending, or READ_TIMEOUT_S without an
answer; ATTEMPTS of them and their pauses stay within about 120 s. Paths to EBS direct from
outside AWS are known to stall for ever without such limits (awslabs/coldsnap#437).
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import boto3.session
import botocore.loaders
import botocore.session
from botocore.config import Config

from drsync import __version__
from drsync.boto import FOREIGN
from drsync.errors import CloudMisconfigured
from drsync.target.ec2.aws_errors import translate

if TYPE_CHECKING:
    from mypy_boto3_ebs import EBSClient
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_iam import IAMClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sts import STSClient

CONNECT_TIMEOUT_S: Final = 8.0
"""To connect, and for every 16 KiB that are sent."""
READ_TIMEOUT_S: Final = 12.0
"""Until EBS direct answers: a block takes well below a second."""
SLOW_READ_TIMEOUT_S: Final = 60.0
"""Until the other services answer: RunInstances takes seconds, a part of 64 MiB longer."""
ATTEMPTS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudOptions:
    """Which region, and where it is. Credentials are found as boto3 finds them."""

    region: str | None = None
    """None: that of AWS_REGION, AWS_DEFAULT_REGION or the profile."""
    endpoint_url: str | None = None
    """Only for doubles of AWS; else boto3 also looks at AWS_ENDPOINT_URL."""
    connections: int = 32
    """Kept open to each service; more threads than this wait for each other."""
    read_timeout_s: float = READ_TIMEOUT_S
    """Of EBS direct."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request that is about to be sent, once however often it is tried."""

    service: str
    operation: str
    parameters: dict[str, Any]


@cache
def _models() -> botocore.loaders.Loader:
    """AWS's service models as botocore ships them: EC2's takes half a second to read, once a process."""
    return botocore.loaders.create_loader()


class Aws:
    """The clients of one region, made when they are first needed; may be used from several threads.

    `on_call` is told of every request: costs and least privilege are reckoned from that.
    """

    def __init__(self, options: CloudOptions | None = None, *, on_call: Callable[[Call], None] | None = None) -> None:
        self._options = options or CloudOptions()
        self._on_call = on_call
        self._lock = threading.RLock()
        self._session: boto3.session.Session | None = None
        self._clients: dict[str, Any] = {}

    @property
    def region(self) -> str:
        """The region that all clients speak to.

        Raises:
            CloudMisconfigured: none is chosen.
        """
        chosen = self._options.region or os.environ.get("AWS_REGION")
        if chosen is None:
            with self.translated("session"):
                chosen = self._boto().region_name
        if not chosen:
            raise CloudMisconfigured(problem="no region is chosen")
        return chosen

    @property
    def ec2(self) -> "EC2Client":
        """EC2: snapshots, images, instances."""
        client: EC2Client = self._client("ec2")
        return client

    @property
    def ebs(self) -> "EBSClient":
        """EBS direct: blocks of snapshots."""
        client: EBSClient = self._client("ebs")
        return client

    @property
    def s3(self) -> "S3Client":
        """S3, for what VM Import reads; the repository has a store of its own."""
        client: S3Client = self._client("s3")
        return client

    @property
    def iam(self) -> "IAMClient":
        """IAM: the role that VM Import takes on."""
        client: IAMClient = self._client("iam")
        return client

    @property
    def sts(self) -> "STSClient":
        """STS: whose account this is."""
        client: STSClient = self._client("sts")
        return client

    @contextmanager
    def translated(self, operation: str) -> Iterator[None]:
        """Turn what boto3 raises within into errors of drsync's tree; `operation` is named in them.

        Raises:
            CloudUnavailable: trying again may help; the request may have been carried out.
            CloudDenied: the credentials are not enough.
            CloudNotFound, CloudRefused: `fields["aws_code"]` says why.
            CloudLimit: a quota is used up.
            CloudMisconfigured: there is no such region or endpoint.
        """
        try:
            yield
        except FOREIGN as err:
            raise translate(err, region=self._named_region(), operation=operation) from err

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def __enter__(self) -> "Aws":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _named_region(self) -> str:
        """The region as an error names it: looking for it must not fail again."""
        session_region = self._session.region_name if self._session is not None else None
        return self._options.region or os.environ.get("AWS_REGION") or session_region or "REGION"

    def _boto(self) -> boto3.session.Session:
        with self._lock:
            if self._session is None:
                core = botocore.session.get_session()
                core.register_component("data_loader", _models())
                self._session = boto3.session.Session(botocore_session=core)
            return self._session

    def _client(self, service: str) -> Any:
        with self._lock:
            if service not in self._clients:
                self._clients[service] = self._made(service)
            return self._clients[service]

    def _made(self, service: Any) -> Any:
        region = self.region
        with self.translated(service):
            client: Any = self._boto().client(
                service, region_name=region, endpoint_url=self._options.endpoint_url, config=self._config(service)
            )
        if self._on_call is not None:
            client.meta.events.register("provide-client-params.*", self._tell)
        return client

    def _config(self, service: str) -> Config:
        is_ebs = service == "ebs"
        return Config(
            retries={"total_max_attempts": ATTEMPTS, "mode": "adaptive" if is_ebs else "standard"},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=self._options.read_timeout_s if is_ebs else SLOW_READ_TIMEOUT_S,
            max_pool_connections=self._options.connections,
            s3={"addressing_style": "path" if self._is_double() else "auto", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            tcp_keepalive=True,
            user_agent_extra=f"drsync/{__version__}",
        )

    def _is_double(self) -> bool:
        """Whether S3 is not AWS's: then buckets have no host names of their own."""
        variables = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
        return self._options.endpoint_url is not None or any(os.environ.get(name) for name in variables)

    def _tell(self, params: dict[str, Any], model: Any, **_: object) -> None:
        if self._on_call is not None:
            self._on_call(Call(model.service_model.service_name, model.name, params))
