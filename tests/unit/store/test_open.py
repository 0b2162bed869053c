from pathlib import Path

import pytest

from drsync.errors import StoreMisconfigured
from drsync.store import ObjectStore
from drsync.store.directory import DirectoryStore
from drsync.store.open import open_store
from drsync.store.s3 import S3Options, S3Store


def opened(url: str, endpoint_url: str | None = None) -> ObjectStore:
    return open_store(url, endpoint_url=endpoint_url, region=None)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("file:///var/lib/drsync/repository", "file:///var/lib/drsync/repository"),
        ("file://localhost/srv/dr", "file:///srv/dr"),
        ("file:///srv/my%20disk%3F", "file:///srv/my%20disk%3F"),
        ("file:///srv/dr/", "file:///srv/dr"),
    ],
)
def test_a_file_url_is_a_directory_store(url: str, shown: str) -> None:
    store = opened(url)
    assert isinstance(store, DirectoryStore)
    assert store.url == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://my-bucket", "s3://my-bucket"),
        ("s3://my-bucket/", "s3://my-bucket"),
        ("s3://my.bucket/site/1/", "s3://my.bucket/site/1"),
    ],
)
def test_an_s3_url_is_an_s3_store(url: str, shown: str) -> None:
    store = opened(url, endpoint_url="http://127.0.0.1:9000")
    assert isinstance(store, S3Store)
    assert store.url == shown


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/lib/drsync",
        "file:relative",
        "file://relative/path",
        "file:///",
        "file:///a%00b",
        "file:///a?b",
        "https://bucket.s3.amazonaws.com/",
        "sftp://host/path",
        "s3:///prefix",
        "s3://Bucket_With_Capitals/x",
        "s3://ab/x",
        "s3://bucket/../x",
        "s3://bucket/a//b",
        "s3://bucket:99/x",
        "s3://bucket/x#y",
        "s3://[/x",
    ],
)
def test_a_url_that_can_not_be_used_is_refused(url: str) -> None:
    with pytest.raises(StoreMisconfigured):
        opened(url)


def test_a_relative_directory_is_refused() -> None:
    with pytest.raises(StoreMisconfigured):
        DirectoryStore(Path("repository"))


@pytest.mark.parametrize(
    "endpoint_url",
    ["127.0.0.1:4566", "ftp://host", "http://", "http://host/path", "http://host?x=1", "http://host:99999", "nonsense"],
)
def test_an_endpoint_that_can_not_be_used_is_refused(endpoint_url: str) -> None:
    with pytest.raises(StoreMisconfigured):
        S3Options(bucket="bucket", endpoint_url=endpoint_url)


def test_no_password_in_a_url_gets_into_a_message() -> None:
    with pytest.raises(StoreMisconfigured) as in_url:
        opened("s3://AKIA:hunter2@bucket/prefix")
    with pytest.raises(StoreMisconfigured) as in_endpoint:
        opened("s3://bucket", endpoint_url="http://admin:hunter2@minio:9000")
    for raised in (in_url, in_endpoint):
        assert "hunter2" not in str(raised.value)
        assert "hunter2" not in raised.value.remedy
