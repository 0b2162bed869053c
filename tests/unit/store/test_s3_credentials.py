"""Credentials that last for minutes, as STS and instance roles give them: a point takes longer than that."""

import hashlib
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from s3_stub import Reply, StubS3, error_reply

from drsync.errors import StoreDenied
from drsync.store.s3 import S3Options, S3Store

PROGRAM = """\
import json, pathlib, sys
count = pathlib.Path(sys.argv[1])
number = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(number))
made = {"AccessKeyId": f"AKIA{number}", "SecretAccessKey": "s", "SessionToken": f"token{number}"}
print(json.dumps({"Version": 1, "Expiration": sys.argv[2], **made}))
"""
"""What `credential_process` runs; like STS, it gives other credentials each time."""

STORED = Reply(headers={"ETag": '"0123456789abcdef"'})


def short_lived(place: Path, monkeypatch: pytest.MonkeyPatch, *, lives: timedelta) -> Path:
    """Credentials of a program; the file in which it counts how often it was asked."""
    program, count, config = place / "credentials.py", place / "asked", place / "config"
    program.write_text(PROGRAM)
    expires = (datetime.now(UTC) + lives).isoformat()
    config.write_text(f"[default]\ncredential_process = {sys.executable} {program} {count} {expires}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    return count


def stubbed(stub: StubS3) -> S3Store:
    return S3Store(S3Options(bucket="bucket", endpoint_url=stub.endpoint_url, region="us-east-1"))


def put(store: S3Store, key: str) -> None:
    store.create(key, b"x", sha256=hashlib.sha256(b"x").digest())


def test_credentials_that_run_out_are_fetched_anew_in_the_midst_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = short_lived(tmp_path, monkeypatch, lives=timedelta(minutes=5))  # botocore renews them 10 minutes before
    with StubS3(STORED, STORED) as stub:
        store = stubbed(stub)
        put(store, "vm/web/pack/00000000000000000000000000000001")
        put(store, "vm/web/log/0000000000000001")
    tokens = [request.headers["x-amz-security-token"] for request in stub.requests]
    keys = [re.search(r"Credential=(AKIA\d+)/", request.headers["authorization"]) for request in stub.requests]
    assert int(count.read_text()) >= 2
    assert len(set(tokens)) == 2, "both were signed with the same credentials"
    assert [key[1].removeprefix("AKIA") for key in keys if key] == [token.removeprefix("token") for token in tokens]


def test_credentials_that_last_are_not_fetched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = short_lived(tmp_path, monkeypatch, lives=timedelta(hours=1))
    with StubS3(STORED, STORED) as stub:
        store = stubbed(stub)
        put(store, "vm/web/pack/00000000000000000000000000000001")
        put(store, "vm/web/log/0000000000000001")
    assert count.read_text() == "1"


def test_without_new_ones_it_is_denied_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = short_lived(tmp_path, monkeypatch, lives=timedelta(minutes=5))
    with StubS3(STORED, error_reply(400, "ExpiredToken", "The provided token has expired.")) as stub:
        store = stubbed(stub)
        put(store, "vm/web/pack/00000000000000000000000000000001")
        assert count.exists()
        with pytest.raises(StoreDenied, match="has expired"):
            put(store, "vm/web/log/0000000000000001")
