"""A key in KMS as a slot, with the real commands: it opens, and when it doesn't, the recovery key does."""

import base64
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from command_line import Cli
from s3_lab import CREDENTIALS, REGION, Bucket
from shipped_vm import objects_of, write_directory

from drsync.store.open import open_store

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

pytestmark = pytest.mark.localstack

RECOVER = Path(__file__).parents[2] / "examples" / "recover.py"


@pytest.fixture
def client(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator["KMSClient"]:
    """KMS itself; commands find it in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", bucket.endpoint_url)
    session = boto3.session.Session(
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=REGION,
    )
    made = session.client("kms", endpoint_url=bucket.endpoint_url)
    yield made
    made.close()


@pytest.fixture
def cli(bucket: Bucket, client: "KMSClient", tmp_path: Path) -> Cli:
    """A configuration whose repository is a bucket."""
    cli = Cli(tmp_path)
    cli.config.write_text(
        f'[repository]\nurl = "s3://{bucket.name}/dr"\nendpoint_url = "{bucket.endpoint_url}"\nkey_file = "key"\n'
        '[spool]\npath = "spool"\nreserve = "1MiB"\n'
    )
    return cli


def test_a_key_in_kms_opens_the_repository_and_the_recovery_key_when_it_is_gone(
    cli: Cli, client: "KMSClient", monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = str(cli.ok("init", "--json").json["recovery_key"])
    arn = client.create_key()["KeyMetadata"]["Arn"]
    monkeypatch.delenv("AWS_DEFAULT_REGION")  # the ARN has it
    cli.config.write_text(cli.config.read_text().replace("key_file", f'region = "{REGION}"\nkey_file'))
    cli.ok("key", "add", "kms", "--kms-key", arn, stdin=recovery)
    listed = cli.ok("key", "list", "--json").json["slots"]
    assert (listed[1]["name"], listed[1]["kms_key"], listed[1]["kms_region"]) == ("kms", arn, REGION)

    before = cli.key_file.read_bytes()
    cli.key_file.unlink()
    cli.ok("key", "recover")
    assert cli.key_file.read_bytes() == before
    cli.ok("key", "rotate")
    client.rotate_key_on_demand(KeyId=arn)
    rotated = cli.key_file.read_bytes()
    assert rotated != before
    cli.key_file.unlink()
    cli.ok("key", "recover", "--unlock", "kms")
    assert cli.key_file.read_bytes() == rotated

    client.schedule_key_deletion(KeyId=arn, PendingWindowInDays=7)
    cli.key_file.unlink()
    error, remedy = cli.refused(29, "key", "recover", "--unlock", "kms")
    assert re.match(rf"slot kms: KMS can't decrypt with key {re.escape(arn)}: the key is deleted", error)
    assert remedy.startswith("drsync key recover --unlock recovery")
    done = cli.ok("key", "recover", stdin=recovery)
    assert "a recovery key or passphrase opens the repository, too" in done.stderr
    assert cli.key_file.read_bytes() == rotated
    error, _ = cli.refused(29, "key", "rotate", "--unlock", "recovery", stdin=recovery)
    assert "KMS can't encrypt" in error
    cli.ok("key", "remove", "kms", "--unlock", "recovery", stdin=recovery)
    assert cli.ok("key", "rotate", "--json", stdin=recovery).json["generation"] == 3
    cli.ok("status")


def test_two_that_change_the_keys_in_a_bucket_at_once(cli: Cli) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from drsync.config import load_config
    from drsync.format.keys import RecoveryKey
    from drsync.model import SystemClock
    from drsync.session import Session

    recovery = RecoveryKey.from_text(str(cli.ok("init", "--json").json["recovery_key"]))

    def add(number: int) -> None:
        ring = Session(load_config(cli.config), SystemClock()).host_keys.keyring()
        ring.add_recovery(lambda: ring.open_with_recovery(recovery), f"s{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    document = cli.ok("key", "list", "--json").json
    assert sorted(slot["name"] for slot in document["slots"]) == ["recovery", "s0", "s1", "s2", "s3"]
    assert document["ring"] == 4


def test_what_kms_decrypts_opens_a_copy_of_the_bucket_without_drsync(
    cli: Cli, bucket: Bucket, client: "KMSClient", tmp_path: Path
) -> None:
    """By the command that recover.py prints, whose call is made here as the AWS CLI makes it."""
    recovery = str(cli.ok("init", "--json").json["recovery_key"])
    cli.ok("key", "add", "kms", "--kms-key", client.create_key()["KeyMetadata"]["Arn"], stdin=recovery)
    store = open_store(f"s3://{bucket.name}/dr", endpoint_url=bucket.endpoint_url, region=REGION)
    copy = write_directory(objects_of(store), tmp_path / "copy")

    def told(key: str) -> str:
        """It opens the key ring, or not, before it looks for the VM, of which there is no point."""
        command = [sys.executable, str(RECOVER), str(copy), "web", "root", str(tmp_path / "disk"), "--key", key]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    refused, command = told("kms").splitlines()
    assert refused.endswith("none of its slots takes this key or passphrase; KMS gives FILE, as long as it is there:")
    words = shlex.split(command.removesuffix(" > FILE"))
    assert words[:3] == ["aws", "kms", "decrypt"]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    reply = client.decrypt(
        KeyId=given["--key-id"],
        EncryptionContext=json.loads(given["--encryption-context"]),
        CiphertextBlob=base64.b64decode(given["--ciphertext-blob"]),
    )
    plain = reply[given["--query"]]  # type: ignore[literal-required]  # a JMESPath of one word
    (tmp_path / "key-text").write_text(base64.b64encode(plain).decode() + "\n")
    assert told(str(tmp_path / "key-text")) == "recover: refused: VM web has no point\n"
    (tmp_path / "key-text").write_text(base64.b64encode(bytes(32)).decode())
    assert told(str(tmp_path / "key-text")).startswith(refused)
