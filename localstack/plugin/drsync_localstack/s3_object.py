"""An object of LocalStack's S3, read by ranges."""

from typing import Any

from botocore.exceptions import ClientError
from localstack.aws.connect import connect_to

from drsync_localstack.catalog import Place
from drsync_localstack.import_tasks import ImportFailed

WINDOW_BYTES = 4 * 1024 * 1024


class S3Object:
    """Reads go through a window, so that the many small ones of a format are few requests."""

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self._client = client
        self._name = {"Bucket": bucket, "Key": key}
        self._start = 0
        self._window = b""
        head = self._try(client.head_object)
        self.size_bytes: int = head["ContentLength"]
        self._tag: str = head["ETag"]

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes, fewer at the end."""
        length = max(0, min(length, self.size_bytes - offset))
        if not length:
            return b""
        if not (self._start <= offset and offset + length <= self._start + len(self._window)):
            end = min(offset + max(length, WINDOW_BYTES), self.size_bytes)
            answer = self._try(self._client.get_object, Range=f"bytes={offset}-{end - 1}", IfMatch=self._tag)
            self._start, self._window = offset, answer["Body"].read()
        return self._window[offset - self._start :][:length]

    def _try(self, call: Any, **parameters: Any) -> Any:
        try:
            return call(**self._name, **parameters)
        except ClientError as err:
            status = err.response["ResponseMetadata"]["HTTPStatusCode"]
            # Seen on AWS with 403, when the role may not read; 404 and the rest are a guess by the same pattern.
            raise ImportFailed(
                f"Disk validation failed [We do not have access to the given resource. {status}]"
            ) from err


def open_object(place: Place, bucket: str, key: str) -> S3Object:
    """An object, as the service sees it.

    Raises:
        ImportFailed: it can't be read.
    """
    return S3Object(connect_to(aws_access_key_id=place.account, region_name=place.region).s3, bucket, key)


def has_role(place: Place, name: str) -> bool:
    """Whether IAM has the role, and VM Import may assume it. Policies are not evaluated: LocalStack doesn't."""
    client = connect_to(aws_access_key_id=place.account, region_name=place.region).iam
    try:
        trust = client.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]
    except ClientError:
        return False
    return "vmie.amazonaws.com" in str(trust)
