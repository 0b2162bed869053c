"""drsync cloud setup: says what is missing, makes it, leaves alone what is somebody else's."""

import json
from pathlib import Path

import pytest
from command_line import Cli
from ec2_lab import Cloud
from s3_lab import REGION

from drsync.errors import ImportNotSetUp
from drsync.target.ec2.aws import Aws
from drsync.target.ec2.role import POLICY_NAME, RULE_ID

pytestmark = pytest.mark.localstack

REPOSITORY = "s3://the-repository/site-1"
OTHER_POLICY = json.dumps(
    {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]}
)


@pytest.fixture
def cli(tmp_path: Path, aws: Aws) -> Cli:
    """The command line, with the test's account in the environment (fixture `aws`)."""
    return Cli(tmp_path)


def setup(cli: Cli, bucket: str, *words: str) -> tuple[int, str, str]:
    done = cli.run("cloud", "setup", "--bucket", bucket, "--repository", REPOSITORY, *words)
    return done.code, done.stdout, done.stderr


def states(text: str) -> dict[str, str]:
    return {one["what"]: one["state"] for one in json.loads(text)["findings"]}


def test_an_empty_account_is_checked_prepared_and_checked_again(cli: Cli, cloud: Cloud) -> None:
    bucket = f"images-{cloud.account}"
    code, out, err = setup(cli, bucket)
    assert code == ImportNotSetUp.code
    assert f"bucket {bucket}" in out
    assert "there is no such role" in err
    assert f"remedy: drsync cloud setup --bucket {bucket} --check" in err
    assert [one["Name"] for one in cloud.s3.list_buckets()["Buckets"]] == []

    code, out, err = setup(cli, bucket, "--apply", "--json")
    assert (code, err) == (0, "what IAM was told takes effect within about a minute\n")
    assert len(json.loads(out)["made"]) == 2
    assert set(states(out).values()) == {"good"}
    trust = cloud.iam.get_role(RoleName="vmimport")["Role"]["AssumeRolePolicyDocument"]
    assert cloud.account in str(trust)
    (rule,) = cloud.s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert (rule["ID"], rule["Filter"]) == (RULE_ID, {"Prefix": "drsync-import/"})
    assert all(cloud.s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values())

    code, out, _ = setup(cli, bucket, "--apply", "--json")
    assert (code, json.loads(out)["made"]) == (0, [])


def test_what_is_there_already_is_completed_and_kept(cli: Cli, cloud: Cloud) -> None:
    bucket = f"images-{cloud.account}"
    cloud.s3.create_bucket(Bucket=bucket)
    own = {"ID": "own", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 1}}
    cloud.s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [own]})  # type: ignore[list-item]
    cloud.make_role()
    code, out, err = setup(cli, bucket, "--apply", "--json")
    assert (code, err.count("within about a minute")) == (0, 1)
    assert len(json.loads(out)["made"]) == 2
    rules = cloud.s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert {rule["ID"] for rule in rules} == {"own", RULE_ID}
    assert states(out)[f"role vmimport, policy {POLICY_NAME}"] == "good"


def test_a_policy_of_ours_that_was_changed_is_put_right(cli: Cli, cloud: Cloud) -> None:
    bucket = f"images-{cloud.account}"
    setup(cli, bucket, "--apply")
    cloud.iam.put_role_policy(RoleName="vmimport", PolicyName=POLICY_NAME, PolicyDocument=OTHER_POLICY)
    code, _, err = setup(cli, bucket, "--check")
    assert code == ImportNotSetUp.code
    assert "not what drsync needs" in err
    assert setup(cli, bucket, "--apply")[0] == 0


def test_a_role_with_policies_of_somebody_else_may_do(cli: Cli, cloud: Cloud) -> None:
    bucket = f"images-{cloud.account}"
    setup(cli, bucket, "--apply")
    cloud.iam.delete_role_policy(RoleName="vmimport", PolicyName=POLICY_NAME)
    cloud.iam.put_role_policy(RoleName="vmimport", PolicyName="theirs", PolicyDocument=OTHER_POLICY)
    code, out, _ = setup(cli, bucket, "--check", "--json")
    assert code == 0
    assert states(out)[f"role vmimport, policy {POLICY_NAME}"] == "unsure"


def test_a_bucket_in_another_region_and_a_role_of_another_service_are_wrong_and_left(cli: Cli, cloud: Cloud) -> None:
    bucket = f"images-{cloud.account}"
    cloud.s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    cloud.make_role(service="ec2.amazonaws.com")
    before = cloud.iam.get_role(RoleName="vmimport")["Role"]["AssumeRolePolicyDocument"]
    code, _, err = setup(cli, bucket, "--apply")
    assert code == ImportNotSetUp.code
    assert f"it is in eu-west-1, but VM Import takes images only from {REGION}" in err
    assert "does not trust vmie.amazonaws.com" in err
    assert cloud.iam.get_role(RoleName="vmimport")["Role"]["AssumeRolePolicyDocument"] == before


def test_print_asks_nobody_and_writes_files(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    words = ("cloud", "setup", "--print", "--bucket", "images", "--repository", REPOSITORY)
    printed = cli.ok(*words, "--account", "111122223333").json
    roles = {"owner", "host", "cloud-sync", "restore", "recovery", "failback", "verify", "prune", "setup"}
    assert set(printed) == {*roles, "bucket", "vmimport-trust", "vmimport-policy"}
    assert "111122223333" in json.dumps(printed["vmimport-trust"])
    done = cli.ok(*words, "--output", str(tmp_path / "iam"))
    assert done.stdout == ""
    assert "wrote 12 documents" in done.stderr
    assert json.loads((tmp_path / "iam/host.json").read_text()) == cli.ok(*words).json["host"]
    own = cli.ok(*words, "--host", "alpha", "--vm", "web", "--vm", "db", "--lock-days", "0").json
    for name in ("/host/alpha.json", "/vm/web/log/*", "/vm/db/pack/*"):
        assert name in json.dumps(own["host"]["Statement"])
    assert "/vm/*/log/*" not in json.dumps(own["host"]["Statement"])
    assert not [s for s in own["prune"]["Statement"] if s["Effect"] == "Allow" and "Retention" in str(s["Action"])]


def test_a_repository_that_is_not_in_s3_is_a_mistake_of_the_command(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    error, remedy = cli.refused(2, "cloud", "setup", "--print", "--bucket", "images")
    assert "is no repository in S3: say --repository s3://BUCKET/PREFIX" in error
    assert remedy == "drsync cloud setup --help"
    cli.refused(2, "cloud", "setup", "--print", "--bucket", "images", "--repository", "s3://images")
