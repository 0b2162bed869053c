"""What all tests share: an environment of their own, and an S3 to test against."""

import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import figures
import lanes
import mutants
import pytest
import rules
from ec2_lab import Cloud, connect
from hypothesis import Phase, settings
from s3_lab import CREDENTIALS, NO_OTHER_CREDENTIALS, Bucket, make_client, running_localstack
from soak import SEED, SOAK, SOAK_TIMEOUT_S

from drsync.target.ec2.aws import Aws, Call, CloudOptions

if TYPE_CHECKING:
    from libvirt_bench import LibvirtGround
    from mypy_boto3_s3 import S3Client

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background

settings.register_profile("dev", max_examples=25, deadline=None)  # no deadline: machines are shared
settings.register_profile("ci", settings.get_profile("dev"), max_examples=100, derandomize=True)
settings.register_profile(
    "mutants", settings.get_profile("dev"), phases=[Phase.explicit, Phase.generate], database=None
)
settings.register_profile("soak", settings.get_profile("dev"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "soak" if SOAK else "dev"))

_SEED = pytest.StashKey[int]()
GIVEN_LOCALSTACK = os.environ.get("DRSYNC_TEST_LOCALSTACK", "")
"""The endpoint of one to use instead of starting one; read before clean_environ removes it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of these tests."""
    group = parser.getgroup("drsync")
    group.addoption("--seed", type=int, help="what random histories begin with: the same one plays the same again")
    group.addoption(
        "--lanes", choices=("together", "alone"), default="", help="only what may run beside others, or not"
    )
    group.addoption("--rule", type=int, action="append", help="only the tests of this rule (docs/reliability.md)")


def pytest_configure(config: pytest.Config) -> None:
    """One seed for the whole run, given or drawn."""
    given = config.getoption("--seed")
    drawn = getattr(config, "workerinput", {}).get("seed")
    config.stash[_SEED] = int(drawn or SEED or secrets.randbelow(2**31)) if given is None else given
    config.pluginmanager.register(lanes.Lanes({"seed": config.stash[_SEED]}))


def pytest_report_header(config: pytest.Config) -> str:
    """What plays this run's random histories again."""
    return f"seed: --seed {config.stash[_SEED]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests are marked with the rules that they prove; `--rule N` and `--lanes` keep some of them."""
    wanted = set(config.getoption("--rule") or [])
    kept: list[pytest.Item] = []
    for item in lanes.of_lanes(items, config.getoption("--lanes")):
        proved = rules.rules_of(item.nodeid)
        for number in proved:
            item.add_marker(pytest.mark.rule(number))
        if SOAK:
            item.add_marker(pytest.mark.timeout(SOAK_TIMEOUT_S), append=False)  # before those for fewer examples
        if not wanted or wanted & set(proved):
            kept.append(item)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = lanes.in_order(kept)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The figures of this run."""
    terminalreporter.section("figures")
    for title, number in figures.counted().items():
        terminalreporter.write_line(f"{number:>15,}  {title}")
    killed, made = mutants.recorded()
    terminalreporter.write_line(f"{killed:>15,}  mutants killed, of {made} (tests/mutants.sh, recorded)")
    terminalreporter.write_line(f"seed: --seed {config.stash[_SEED]}")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """What random histories begin with."""
    return request.config.stash[_SEED]


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine's user reaches a test."""
    for name in list(os.environ):
        if name.startswith(("DRSYNC_", "AWS_")):
            monkeypatch.delenv(name)
    for name, value in NO_OTHER_CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def guest_image() -> Path:
    """The examples' guest's disk, to be used as a backing file or copied: never boot it itself."""
    built = subprocess.run(
        ["bash", Path(__file__).parents[1] / "examples/guest/build.sh"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode != 0:
        pytest.fail(f"the guest can't be built: {built.stdout}{built.stderr}")
    return Path(built.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def ground(guest_image: Path) -> Iterator["LibvirtGround"]:
    """A libvirt host with a guest that was booted once; tests take turns."""
    from libvirt_bench import LibvirtGround

    with LibvirtGround(guest_image) as ground:
        yield ground


@pytest.fixture(scope="session")
def localstack() -> Iterator[str]:
    """The endpoint of a running LocalStack."""
    with running_localstack(GIVEN_LOCALSTACK) as endpoint_url:
        yield endpoint_url


@pytest.fixture(scope="session")
def s3_client(localstack: str) -> Iterator["S3Client"]:
    """A client of boto3's own, with which buckets are made."""
    client = make_client(localstack)
    yield client
    client.close()


@pytest.fixture
def bucket(
    localstack: str, s3_client: "S3Client", clean_environ: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    """A bucket of this test's own, and credentials for it in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    made = Bucket(name=f"drsync-test-{secrets.token_hex(6)}", endpoint_url=localstack, client=s3_client)
    s3_client.create_bucket(Bucket=made.name)
    yield made
    made.remove()


@pytest.fixture
def cloud(localstack: str) -> Iterator[Cloud]:
    """An AWS account of this test's own, without faults."""
    made = connect(localstack, f"{secrets.randbelow(10**12 - 10**11) + 10**11}")
    made.faults()
    yield made
    made.faults()
    made.close()


@pytest.fixture
def calls() -> list[Call]:
    """Every request that `aws` and what `connect_aws` makes have sent."""
    return []


@pytest.fixture
def connect_aws(cloud: Cloud, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Aws]]:
    """Makes drsync's own sessions with the test's AWS account, which commands find in the environment, too."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", cloud.account)
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.endpoint_url)
    made: list[Aws] = []

    def connect_aws(**options: Any) -> Aws:
        made.append(Aws(CloudOptions(**options), on_call=calls.append))
        return made[-1]

    yield connect_aws
    for aws in made:
        aws.close()


@pytest.fixture
def aws(connect_aws: Callable[..., Aws]) -> Aws:
    """drsync's own session with the test's AWS account."""
    return connect_aws()
