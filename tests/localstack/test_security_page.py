"""The commands of docs/security.md, as written, by the AWS command line that comes with LocalStack."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from command_line import Cli
from s3_lab import ROOT, Bucket

pytestmark = pytest.mark.localstack

PAGE = (ROOT / "docs/security.md").read_text()


def commands(beginning: str) -> str:
    """The indented block of the page that begins so."""
    found = re.search(rf"^( {{4,}}){re.escape(beginning)}.*\n(?:\1.*\n)*", PAGE, re.MULTILINE)
    assert found is not None, beginning
    return dedent(found[0])


@pytest.fixture
def site(bucket: Bucket) -> Bucket:
    """A bucket that is still to be made."""
    return replace(bucket, name=f"{bucket.name}-site")


def run(script: str, site: Bucket, place: Path) -> str:
    path = f"{ROOT / '.venv-localstack/bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("my-bucket", site.name)],
        cwd=place,
        env={**os.environ, "PATH": path, "AWS_ENDPOINT_URL": site.endpoint_url, "AWS_PAGER": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def keys_of(site: Bucket) -> set[str]:
    return {entry["Key"] for entry in site.client.list_objects_v2(Bucket=site.name).get("Contents", ())}


def rule_of_the_page() -> str:
    found = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_rule_of_the_page_is_one_that_s3_takes(bucket: Bucket) -> None:
    rule = json.loads(rule_of_the_page())
    bucket.client.put_bucket_lifecycle_configuration(Bucket=bucket.name, LifecycleConfiguration=rule)
    (kept,) = bucket.client.get_bucket_lifecycle_configuration(Bucket=bucket.name)["Rules"]
    assert kept["NoncurrentVersionExpiration"] == {"NoncurrentDays": 14}


def test_a_bucket_is_made_as_the_page_says_and_what_was_deleted_comes_back(site: Bucket, tmp_path: Path) -> None:
    run(commands("aws s3api create-bucket"), site, tmp_path)
    (tmp_path / "rule.json").write_text(rule_of_the_page())
    run(commands("aws s3api put-bucket-lifecycle-configuration"), site, tmp_path)
    run(commands("drsync cloud setup --print"), site, tmp_path)
    assert site.client.get_bucket_versioning(Bucket=site.name)["Status"] == "Enabled"
    assert site.name in site.client.get_bucket_policy(Bucket=site.name)["Policy"]
    assert site.client.get_public_access_block(Bucket=site.name)["PublicAccessBlockConfiguration"]["BlockPublicAcls"]

    cli = Cli(tmp_path)
    cli.config.write_text(
        f'[repository]\nurl = "s3://{site.name}/site-1"\nendpoint_url = "{site.endpoint_url}"\nkey_file = "key"\n'
        '[spool]\npath = "spool"\nreserve = "1MiB"\n'
    )
    cli.ok("init")
    whole = keys_of(site)
    site.client.delete_bucket_policy(Bucket=site.name)
    for key in whole:
        site.client.delete_object(Bucket=site.name, Key=key)
    assert (len(whole) >= 2, keys_of(site)) == (True, set())
    run(commands("aws s3api list-object-versions"), site, tmp_path)
    assert keys_of(site) == whole
    assert cli.ok("points", "--json").json == []
    site.remove()
