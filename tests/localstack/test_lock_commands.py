"""Object Lock by the command line: a repository in a bucket that has it, and in one that has not."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import Cli
from s3_lab import Bucket

from drsync.errors import LocksLapsing, LocksMissing

pytestmark = pytest.mark.localstack


def configure(cli: Cli, bucket: Bucket, name: str, lock: str) -> None:
    cli.config.write_text(
        f'[repository]\nurl = "s3://{name}/site-1"\nendpoint_url = "{bucket.endpoint_url}"\nkey_file = "key"\n{lock}\n'
        '[spool]\npath = "spool"\nreserve = "1MiB"\n'
    )


def test_locks_from_init_to_the_alarm(bucket: Bucket, tmp_path: Path) -> None:
    cli, name = Cli(tmp_path), f"{bucket.name}-lock"
    configure(cli, bucket, bucket.name, 'lock = "30d"')
    assert "no Object Lock" in cli.refused(LocksMissing.code, "init")[0]
    assert not cli.key_file.exists()
    assert bucket.client.list_objects_v2(Bucket=bucket.name).get("Contents") is None

    bucket.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    configure(cli, bucket, name, 'lock = "30d"')
    cli.ok("init")
    ((_, recovery), (_, record)) = [
        (entry["Key"], bucket.client.get_object_retention(Bucket=name, Key=entry["Key"])["Retention"])
        for entry in bucket.client.list_objects_v2(Bucket=name)["Contents"]
    ]
    for lock in (recovery, record):
        assert lock["Mode"] == "COMPLIANCE"
        assert abs(lock["RetainUntilDate"] - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=5)
    assert "objects are locked when they are made, compliance, 30 d" in cli.ok("config", "check").stdout
    status = cli.ok("lock", "status", "--json").json
    assert (status["state"], status["error"]) == ("locked", None)
    assert cli.ok("lock", "extend", "--json").json["extended"] == 0

    configure(cli, bucket, name, 'lock = "300d"')  # as if 270 of them were over
    done = cli.run("lock", "status", "--json")
    assert done.code == LocksLapsing.code
    assert done.json["state"] == "lapsing"
    assert "remedy: drsync lock extend" in done.stderr
    assert cli.run("status").code == LocksLapsing.code
    assert cli.run("config", "check").code == LocksLapsing.code
    dry = cli.ok("lock", "extend", "--dry-run", "--json").json
    assert (dry["done"], dry["seen"], dry["extended"]) == (True, 1, 1)
    assert cli.run("lock", "status").code == LocksLapsing.code
    assert "1 object seen, 1 lock extended" in cli.ok("lock", "extend").stdout
    assert cli.ok("lock", "status").stdout.startswith("locks: all objects are locked until ")
    cli.ok("config", "check")

    configure(cli, bucket, name, "")
    assert "`lock` is not set: nothing is locked" in cli.ok("config", "check").stdout
    assert cli.ok("lock", "status", "--json").json["state"] == "off"
