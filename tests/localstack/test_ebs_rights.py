"""Every request of a recovery by EBS, of the way home and of the pilot light is allowed by its role's policy."""

import copy
from pathlib import Path

import pytest
from cloud_lab import MIB, Made, protected
from command_line import Cli
from ec2_lab import Cloud
from iam_evaluator import operations_of, refused
from shipped_vm import DiskStep, ShippedVm, Step

from drsync.config import load_config
from drsync.errors import CloudError
from drsync.model import NoProgress, SystemClock
from drsync.recovery.cloud.pilot import PilotLight
from drsync.recovery.cloud.recover import CloudRecovery
from drsync.recovery.cloud.request import CloudRequest
from drsync.recovery.failback.request import FailbackRequest
from drsync.recovery.failback.run import Failback
from drsync.session import Session
from drsync.target.ec2.aws import Aws, Call
from drsync.target.ec2.policy import OURS, Document, Role, Scope, policy
from drsync.target.ec2.snapshot import Snapshots

pytestmark = [pytest.mark.localstack, pytest.mark.timeout(300)]

HOME_MODULES = ("changed_blocks.py", "volumes.py")
MODULES = ("snapshot.py", "images.py", "instances.py", "network.py", "sizing.py")
SCOPE = Scope(repository_bucket="repository", repository_prefix="site", import_bucket="images")
TAGS = {OURS: "x"}


@pytest.fixture
def session(tmp_path: Path) -> Session:
    place = tmp_path / "cli"
    place.mkdir()
    cli = Cli(place)
    vm = protected(cli, tmp_path)
    capture(vm, 2)
    capture(vm, 4)
    return Session(load_config(cli.config), SystemClock())


def capture(vm: ShippedVm, content: int) -> None:
    vm.capture(Step(disks={"root": DiskStep(size_bytes=8 * MIB, writes={content: content})}))


def without(document: Document, action: str) -> Document:
    made = copy.deepcopy(document)
    for statement in made["Statement"]:
        if statement["Effect"] == "Allow":
            statement["Action"] = [one for one in statement["Action"] if one != action]
    return made


def recover_in_every_way(cloud: Cloud, aws: Aws, session: Session) -> None:
    """A recovery that comes up, is stopped and started, and one that fails and is removed."""
    recovery = CloudRecovery(session, aws, Snapshots(aws, session.clock, tag_every_s=0.0))
    subnet = cloud.ec2.describe_subnets()["Subnets"][0]
    address = subnet["CidrBlock"].rpartition(".")[0] + ".70"
    group = cloud.ec2.create_security_group(GroupName="web", Description="web", VpcId=subnet["VpcId"])["GroupId"]
    placed = CloudRequest(
        vm="web",
        skip_preflight=True,
        number=1,
        subnet=subnet["SubnetId"],
        security_groups=[group],
        private_ip=address,
        wait=True,
    )
    plain = CloudRequest(vm="web", skip_preflight=True, number=1, name="off", start=False, instance_type="m5.large")
    for request in (placed, plain, CloudRequest(vm="web", skip_preflight=True, number=1, name="off")):
        recovery.run(recovery.plan(request), NoProgress())
    broken = {"code": "ValidationException", "status": 400}
    cloud.faults(rules=[{"operation": "RunInstances", "times": 1, "error": broken}])
    plan = recovery.plan(CloudRequest(vm="web", skip_preflight=True, number=2))
    with pytest.raises(CloudError):
        recovery.run(plan, NoProgress())


def test_a_recovery_may_send_all_that_it_sends(cloud: Cloud, aws: Aws, session: Session, calls: list[Call]) -> None:
    recover_in_every_way(cloud, aws, session)
    sent = {(call.service, call.operation) for call in calls}
    assert operations_of(*MODULES) - sent == {("ec2", "TerminateInstances")}
    document = policy(Role.RECOVERY, SCOPE)
    assert refused(document, calls, TAGS) == []
    for service, operation in sent:
        action = f"{service}:{operation}"
        assert refused(without(document, action), calls, TAGS), f"{action} is for nothing"
    assert refused(policy(Role.HOST, SCOPE), calls, TAGS)


def test_the_pilot_light_may_send_all_that_it_sends(aws: Aws, session: Session, calls: list[Call]) -> None:
    light = PilotLight(session, aws, Snapshots(aws, session.clock, tag_every_s=0.0), keep=1)
    light.sync("web", NoProgress())
    light.status("web")
    light.cleanup("web")
    document = policy(Role.CLOUD_SYNC, SCOPE)
    assert refused(document, calls, TAGS) == []


def fail_back_in_every_way(cloud: Cloud, aws: Aws, session: Session, instance: str) -> None:
    """A failback compared with a snapshot, one that is read whole and stops the instance, and one that fails."""
    failback = Failback(session, aws, Snapshots(aws, session.clock))
    made = Made(cloud)
    for number, request in enumerate((FailbackRequest(vm="web"), FailbackRequest(vm="web", whole=True, stop=True))):
        made.write(instance, "root", {number + 3: bytes([number + 1]) * (512 * 1024)})
        failback.run(failback.plan(request), NoProgress())
    broken = {"code": "ValidationException", "status": 400}
    cloud.faults(rules=[{"operation": "ListChangedBlocks", "times": 1, "error": broken}])
    plan = failback.plan(FailbackRequest(vm="web"))
    with pytest.raises(CloudError):
        failback.run(plan, NoProgress())


def test_the_way_home_may_send_all_that_it_sends(cloud: Cloud, aws: Aws, session: Session, calls: list[Call]) -> None:
    recovery = CloudRecovery(session, aws, Snapshots(aws, session.clock))
    outcome = recovery.run(recovery.plan(CloudRequest(vm="web", skip_preflight=True)), NoProgress())
    calls.clear()
    fail_back_in_every_way(cloud, aws, session, outcome.instance.id)
    sent = {(call.service, call.operation) for call in calls}
    assert operations_of(*HOME_MODULES) <= sent
    document = policy(Role.FAILBACK, SCOPE)
    assert refused(document, calls, TAGS) == []
    for service, operation in sent:
        action = f"{service}:{operation}"
        assert refused(without(document, action), calls, TAGS), f"{action} is for nothing"
    assert refused(policy(Role.RECOVERY, SCOPE), calls, TAGS)
