"""The configuration file: what is read, and what each mistake is answered with."""

import re
from dataclasses import FrozenInstanceError
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.config import Config, LibvirtSource, QmpSource, captured_together, load_config, parse_config
from drsync.config.key import shown
from drsync.config.settings import TABLES
from drsync.config.table import keys_of
from drsync.config.vms import SOURCES
from drsync.errors import ConfigInvalid, ConfigMissing
from drsync.model import is_name
from drsync.retention import KEEP_ALL, Rules
from drsync.store.lock import LockMode, LockPolicy
from drsync.units import GiB

ROOT = Path(__file__).parents[2]
PATH = Path("/etc/drsync/drsync.toml")
REPOSITORY = '[repository]\nurl = "file:///srv/repository"\n'
VM = '[[vm]]\nname = "web"\nsocket = "/run/web.qmp"\n'


def parse(text: str, *, host_name: str = "alpha") -> Config:
    return parse_config(text.encode(), PATH, host_name=host_name)


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigInvalid) as caught:
        parse(text)
    problems = caught.value.fields["problems"]
    assert isinstance(problems, tuple)
    assert str(caught.value).startswith(f"{PATH}: {problems[0]}")
    return problems


def problem_of(text: str) -> str:
    (problem,) = problems_of(text)
    return problem


def test_a_url_and_a_vm_are_all_that_must_be_written() -> None:
    config = parse(REPOSITORY + VM)
    assert config.path == PATH
    assert config.repository.url == "file:///srv/repository"
    assert config.repository.key_file == Path("/etc/drsync/repository.key")
    assert (config.repository.endpoint_url, config.repository.region) == (None, None)
    assert config.spool.path == Path("/var/lib/drsync/spool")
    assert config.spool.reserve_bytes == 2 * GiB
    (vm,) = config.vms
    assert isinstance(vm.source, QmpSource)
    assert (vm.name, vm.source.socket, vm.source.disks) == ("web", Path("/run/web.qmp"), None)
    assert (vm.rpo_s, vm.capture_timeout_s) == (300, 600)
    assert (vm.consistency, vm.source.agent, vm.freeze_timeout_s, vm.on_freeze_failure) == ("crash", None, 10, "crash")
    assert (vm.group, vm.group_pause) == (None, True)
    assert (config.daemon.parallel, config.daemon.host, config.daemon.stop_timeout_s) == (2, "alpha", 60)


def test_every_key_of_the_example_is_read() -> None:
    config = load_config(ROOT / "examples/drsync.toml", host_name="alpha")
    assert {vm.name for vm in config.vms} >= {"web"}


def test_the_example_shows_every_key_and_each_default_as_it_is() -> None:
    example = (ROOT / "examples/drsync.toml").read_text()
    for table in [*TABLES.values(), *SOURCES.values()]:
        for key in keys_of(table).values():
            found = re.findall(rf"^(?:# )?{key.name} = (.+?)(?:\s+#.*)?$", example, re.MULTILINE)
            assert found, key.name
            if key.default is not None:
                assert (key.default if key.default == "[]" else shown(key.default)) in found, key.name


def test_the_documentation_has_every_key_with_default_meaning_and_reason() -> None:
    page = (ROOT / "docs/config.md").read_text()
    for name, table in [*TABLES.items(), *SOURCES.items()]:
        section = re.search(rf"^## .*\b{name}\b.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        for key in keys_of(table).values():
            written = shown(key.default).strip('"')
            default = "required" if key.required else f"`{written}`" if key.default is not None else "none"
            assert f"| `{key.name}` | {default} | {key.meaning} | {key.why} |" in section[0], key.name


def test_the_documentation_has_no_key_that_does_not_exist() -> None:
    known = {key.name for table in [*TABLES.values(), *SOURCES.values()] for key in keys_of(table).values()}
    assert set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/config.md").read_text(), re.MULTILINE)) == known


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigMissing, match=re.escape(f"no configuration file at {tmp_path}/none.toml")):
        load_config(tmp_path / "none.toml")


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="can't be read: Is a directory"):
        load_config(tmp_path)


def test_a_syntax_error_has_its_line() -> None:
    assert re.search(r"is not TOML: .*at line 2", problem_of("[repository]\nurl = file\n"))


def test_a_file_that_is_not_text_has_the_line() -> None:
    with pytest.raises(ConfigInvalid, match=r"is not UTF-8 text \(at line 2\)"):
        parse_config(b'[repository]\nurl = "\xff"\n', PATH)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (VM, "[repository]: url is missing"),
        (REPOSITORY + "kye_file = 'x'", '[repository]: unknown key "kye_file"; did you mean key_file?'),
        (REPOSITORY + "rpo = '1m'", '[repository]: unknown key "rpo"; it belongs to [[vm]]'),
        (REPOSITORY + "socket = 'x'", '[repository]: unknown key "socket"; it belongs to [[vm]] with source = "qmp"'),
        (REPOSITORY + "match = 'a'", '[repository]: unknown key "match"; it belongs to [[protect]]'),
        (REPOSITORY + "parallel = 2", '[repository]: unknown key "parallel"; it belongs to [daemon]'),
        (REPOSITORY + "[deamon]", 'unknown table or key "deamon"; did you mean daemon?'),
        (
            REPOSITORY + "[zzzz]",
            'unknown table or key "zzzz"; known: cloud, daemon, limits, protect, prune, repository, '
            "retention, spool, verify, vm",
        ),
        (REPOSITORY + "[vm]\nname='a'", "vm is not a list of tables; write [[vm]], with two brackets"),
        ("spool = 3\n" + REPOSITORY, "[spool] = 3 is not a table"),
        (REPOSITORY + VM + "consistency = 'full'", '[[vm]] "web": consistency: "full" is not known; use "crash" or'),
        (REPOSITORY + VM + "consistency = 'filesystem'", '[[vm]] "web": consistency = "filesystem" needs agent, the'),
        (REPOSITORY + VM + "on_freeze_failure = true", '[[vm]] "web": on_freeze_failure: true is not known; use'),
        (REPOSITORY + VM + "freeze_timeout = '100ms'", '[[vm]] "web": freeze_timeout: '),
        (REPOSITORY + VM + "group_pause = 'yes'", '[[vm]] "web": group_pause: "yes" is neither true nor false'),
        (REPOSITORY + VM + "group = 'my shop'", '[[vm]] "web": group: "my shop" is not a name'),
        (REPOSITORY + VM + f"agent = '/{'x' * 107}'", '[[vm]] "web": agent: /xxxxx'),
        (
            REPOSITORY + VM + "group = 'g'\n[[vm]]\nname = 'db'\nsocket = 's'\ngroup = 'g'\nrpo = '1m'",
            '[[vm]] "db": rpo is not that of "web", which is in the group "g", too',
        ),
        (
            REPOSITORY + VM + "group = 'g'\n[[vm]]\nname = 'db'\nsocket = 's'\ngroup = 'g'\ngroup_pause = false",
            '[[vm]] "db": group_pause is not that of "web", which is in the group "g", too',
        ),
        (
            REPOSITORY + VM + "group = 'g'\n[[protect]]\nmatch = 'x*'\ngroup = 'g'\nrpo = '1m'",
            '[[protect]] number 1: rpo is not that of "web", which is in the group "g", too',
        ),
        (
            REPOSITORY + "[[protect]]\nmatch='a*'\ngroup='g'\n[[protect]]\nmatch='b*'\ngroup='g'\ngroup_pause=false",
            '[[protect]] number 2: group_pause is not that of [[protect]] number 1, which is in the group "g", too',
        ),
        (
            REPOSITORY + VM + "agent = 'a'\n[[vm]]\nname = 'db'\nsocket = 's'\nagent = 'a'",
            '[[vm]]: agent = "/etc/drsync/a" stands 2 times; it must be unique',
        ),
        (REPOSITORY + VM + "sokcet = 'a'", '[[vm]] "web": unknown key "sokcet"; did you mean socket?'),
        (REPOSITORY + "[[vm]]\nname = 'web'", '[[vm]] "web": socket is missing'),
        (REPOSITORY + "[[vm]]\nsocket = 'a'", "[[vm]] number 1: name is missing"),
        (REPOSITORY + VM + "source = 'kvm'", '[[vm]] "web": source: "kvm" is not a source; use "qmp" or "libvirt"'),
        (REPOSITORY + "[protect]\nmatch='a'", "protect is not a list of tables; write [[protect]], with two brackets"),
        (REPOSITORY + "[[protect]]\nrpo='1m'", "[[protect]] number 1: match is missing"),
        (
            REPOSITORY + "[[protect]]\nmatch='a'\nsource='qmp'",
            '[[protect]] number 1: source: "qmp" is not a source that VMs can be looked for in; use "libvirt"',
        ),
        (
            REPOSITORY + "[[vm]]\nname='a'\nsource='libvirt'\nuri='xen:///'",
            '[[vm]] "a": uri: "xen:///" is not a URI of libvirt\'s QEMU driver on this host; write "qemu:///system"',
        ),
        (
            REPOSITORY + "[[protect]]\nmatch='a'\nuri='qemu+ssh://b/system'",
            '[[protect]] number 1: uri: "qemu+ssh://b/system" is not a URI of libvirt\'s QEMU driver on this host; '
            'write "qemu:///system"',
        ),
        (
            REPOSITORY + "[[vm]]\nname='a'\nsource='libvirt'\nexclude='vdb'",
            '[[vm]] "a": exclude: "vdb" is not a list of texts; write for example ["vdb"]',
        ),
        (
            REPOSITORY + "[[vm]]\nname='a'\nsource='libvirt'\nsocket='x'",
            '[[vm]] "a": unknown key "socket"; it belongs to [[vm]] with source = "qmp"',
        ),
        (REPOSITORY + VM + "source = ['qmp']", """[[vm]] "web": source: ['qmp'] is not a source; use "qmp\""""),
        (REPOSITORY + VM + "disks = {}", '[[vm]] "web": disks: {} is not a table of disks; write for example'),
        (REPOSITORY + VM + "disks = { a = 3 }", '[[vm]] "web": disks: a = 3 is not the name of a block node'),
        (REPOSITORY + VM + "disks = { A = 'd' }", '[[vm]] "web": disks: "A" is not a name; use 1 to 63 of'),
        (REPOSITORY + VM + "disks = { a='d', b='d' }", '[[vm]] "web": disks: names one block node twice'),
        (REPOSITORY + VM + VM.replace("web.", "b."), '[[vm]]: name = "web" stands 2 times; it must be unique'),
        (REPOSITORY + VM + VM.replace('"web"', '"b"'), '[[vm]]: socket = "/run/web.qmp" stands 2 times; it must be'),
        (REPOSITORY + VM.replace("web.", "w" * 100), '[[vm]] "web": socket: /run/www'),
        (REPOSITORY + "region = 'x'", "[repository]: region is only for s3:// repositories; url is file:///srv/repo"),
        (REPOSITORY + "region = ''", '[repository]: region: "" is not a text; write it in quotes'),
        ("[repository]\nurl = 3", "[repository]: url: 3 is not a text; write it in quotes"),
        ("[repository]\nurl = 's3:/b'", '[repository]: url: "s3:/b" is not a repository; write "file:///DIRECTORY"'),
        ("[repository]\nurl = 'file://a'", '[repository]: url: "file://a" is not a repository; write "file:///DIR'),
        ("[repository]\nurl = 's3://bu/p'\nendpoint_url = 'a'", "[repository]: url: "),
    ],
)
def test_a_mistake_is_answered_with_key_place_value_and_what_is_right(text: str, problem: str) -> None:
    assert problems_of(text)[0].startswith(problem)


@pytest.mark.parametrize("name", ["Web", "web server", "", "-web", ".web", "web/1", "w" * 64, "wéb"])
def test_a_vm_name_must_be_safe_everywhere(name: str) -> None:
    assert "is not a " in problem_of(REPOSITORY + VM.replace('"web"', f'"{name}"'))


@pytest.mark.parametrize("value", ["5", "'5'", "'5 minutes'", "'-5m'", "true", "[]", "''", "'1M'"])
def test_a_time_needs_a_number_and_a_unit(value: str) -> None:
    problem = problem_of(REPOSITORY + VM + f"rpo = {value}")
    assert problem.startswith('[[vm]] "web": rpo: ')
    assert "is not a time; write" in problem
    assert "5m" in problem


@pytest.mark.parametrize("key", ["rpo", "capture_timeout"])
def test_a_time_below_a_second_is_refused(key: str) -> None:
    assert problem_of(REPOSITORY + VM + f"{key} = '0.5s'").endswith('"0.5s" is too short; 1s is the least')


@pytest.mark.parametrize("value", ["2", "'2'", "'2GB'", "'2G'", "false", "'many'"])
def test_a_size_needs_a_number_and_a_binary_unit(value: str) -> None:
    problem = problem_of(REPOSITORY + f"[spool]\nreserve = {value}")
    assert problem.startswith("[spool]: reserve: ")
    assert "is not a size; write" in problem


@pytest.mark.parametrize("value", ["0", "65", "2.0", "true", "'2'"])
def test_parallel_is_a_number_from_1_to_64(value: str) -> None:
    assert problem_of(REPOSITORY + f"[daemon]\nparallel = {value}").endswith("is not a whole number from 1 to 64")


def test_an_endpoint_must_be_a_web_address_without_a_secret() -> None:
    s3 = "[repository]\nurl = 's3://bucket/prefix'\n"
    assert parse(s3 + "endpoint_url = 'http://127.0.0.1:4566'").repository.endpoint_url == "http://127.0.0.1:4566"
    assert "is not an endpoint" in problem_of(s3 + "endpoint_url = '127.0.0.1:4566'")
    secret = problem_of(s3 + "endpoint_url = 'http://me:hunter2@127.0.0.1'")
    assert "holds a secret" in secret
    assert "hunter2" not in secret


def test_all_problems_are_found_in_one_reading() -> None:
    assert len(problems_of("[spool]\nreserve = 1\nx = 2\n" + VM + "rpo = 1\n")) == 4


def test_the_message_has_the_first_problem_and_how_many_more_there_are() -> None:
    with pytest.raises(ConfigInvalid, match=r"drsync.toml: \[repository\]: url is missing \(and 1 more; `drsync conf"):
        parse("[spool]\nreserve = 1\n")


def test_relative_paths_start_at_the_files_directory(tmp_path: Path) -> None:
    path = tmp_path / "drsync.toml"
    path.write_text(REPOSITORY + "key_file = 'key'\n[spool]\npath = '../spool'\n" + VM.replace("/run/", ""))
    config = load_config(path)
    assert config.repository.key_file == tmp_path / "key"
    assert config.spool.path == tmp_path / "../spool"
    (vm,) = config.vms
    assert isinstance(vm.source, QmpSource)
    assert vm.source.socket == tmp_path / "web.qmp"


def test_a_home_directory_is_written_in_full() -> None:
    assert problem_of(REPOSITORY + "[spool]\npath = '~/spool'").endswith("write it in full, as /home/NAME/...")


def test_a_libvirt_vm_needs_its_name_alone() -> None:
    (vm,) = parse(REPOSITORY + "[[vm]]\nname = 'web'\nsource = 'libvirt'\n").vms
    assert vm.source == LibvirtSource(domain=None, uri="qemu:///system", exclude=())


def test_every_key_of_libvirt_is_read() -> None:
    text = "[[vm]]\nname = 'web'\nsource = 'libvirt'\ndomain = 'Web 1'\nuri = 'qemu:///session'\nexclude = ['vdb']\n"
    (vm,) = parse(REPOSITORY + text).vms
    assert vm.source == LibvirtSource(domain="Web 1", uri="qemu:///session", exclude=("vdb",))


def test_a_pattern_protects_what_it_matches() -> None:
    (protect,) = parse(
        REPOSITORY + "[[protect]]\nmatch = 'prod-*'\nexclude_vms = ['prod-test*']\nrpo = '1m'\n"
    ).protects
    assert (protect.match, protect.exclude_vms, protect.exclude, protect.rpo_s) == ("prod-*", ("prod-test*",), (), 60)
    assert (protect.source, protect.uri, protect.capture_timeout_s) == ("libvirt", "qemu:///system", 600)


def test_values_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        parse(REPOSITORY).spool.reserve_bytes = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("host_name", "host"),
    [
        ("Alpha.example.org", "alpha.example.org"),
        ("-x_y z", "x_y-z"),
        ("", "host"),
        ("???", "host"),
        ("é" * 80, "host"),
    ],
)
def test_the_hosts_name_is_made_safe(host_name: str, host: str) -> None:
    assert parse(REPOSITORY, host_name=host_name).daemon.host == host


@given(st.text(max_size=100))
def test_any_host_name_becomes_a_name(host_name: str) -> None:
    assert is_name(parse(REPOSITORY, host_name=host_name).daemon.host)


VALUES = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.floats(), st.dates(), st.text(), st.sampled_from(["qmp", "5m", "web"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
NAMES = st.sampled_from(
    ["name", "source", "socket", "disks", "rpo", "url", "path", "reserve", "parallel", "host", "zzz"]
)
DOCUMENTS = st.dictionaries(
    st.sampled_from([*TABLES, "other"]),
    st.one_of(VALUES, st.dictionaries(NAMES, VALUES), st.lists(st.dictionaries(NAMES, VALUES), max_size=3)),
)


@given(DOCUMENTS)
def test_any_document_is_either_read_or_refused_in_words(document: dict[str, object]) -> None:
    from drsync.config.reading import read_document

    config, problems = read_document(document, PATH, host_name="alpha")
    assert (config is None) == bool(problems)
    assert all(problem and problem.isprintable() for problem in problems)


def test_without_retention_everything_stays() -> None:
    config = parse(REPOSITORY + VM)
    assert config.retention.of("web") == KEEP_ALL
    assert config.repository.lock is None


def test_a_vm_has_the_rules_of_its_name_else_of_its_pattern_else_of_all() -> None:
    config = parse(
        REPOSITORY
        + """
        [retention]
        last = 5
        daily = 7
        [retention.vm."db-*"]
        daily = 90
        [retention.vm."*-test"]
        daily = 0
        minimum_age = "0s"
        [retention.vm.db-one]
        yearly = 3
        """
    )
    days = timedelta(days=3)
    assert config.retention.of("web") == Rules(last=5, daily=7, minimum_age=days)
    assert config.retention.of("db-two") == Rules(last=5, daily=90, minimum_age=days)
    assert config.retention.of("db-test") == Rules(last=5, daily=90, minimum_age=days), "the first pattern counts"
    assert config.retention.of("web-test") == Rules(last=5)
    assert config.retention.of("db-one") == Rules(last=5, daily=7, yearly=3, minimum_age=days), "a name goes before"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[retention]", "[retention]: no rule keeps anything for long; set last, hourly, daily"),
        ("[retention]\nminimum_age = '9d'", "[retention]: no rule keeps anything for long"),
        ("[retention]\ndaily = -1", "[retention]: daily: -1 is not a whole number from 0 to 1000000"),
        ("[retention]\ndaily = true", "[retention]: daily: true is not a whole number"),
        ("[retention]\ndayly = 1", '[retention]: unknown key "dayly"; did you mean daily?'),
        ("retention = 5", "[retention] = 5 is not a table"),
        ("[retention]\nlast = 1\nvm = 5", "[retention]: vm is not a table"),
        ("[retention]\nlast = 1\n[retention.vm]\nweb = 5", '[retention.vm."web"] = 5 is not a table'),
        (
            "[retention]\nlast = 1\n[retention.vm.web]\nlast = 0",
            '[retention.vm."web"]: no rule keeps anything for long',
        ),
        (
            "[retention]\nlast = 1\n[retention.vm.web]\nkeep = 0",
            '[retention.vm."web"]: unknown key "keep"; it belongs to [[cloud]]',
        ),
    ],
)
def test_a_mistake_in_the_rules_is_told(text: str, problem: str) -> None:
    assert problems_of(f"{text}\n{REPOSITORY}" if text.startswith("retention") else REPOSITORY + text)[0].startswith(
        problem
    )


def test_locks_are_for_s3_alone_and_neither_too_short_nor_too_long() -> None:
    bucket = '[repository]\nurl = "s3://bucket/site"\n'
    assert parse(bucket + "lock = '30d'").repository.lock == LockPolicy(
        mode=LockMode.COMPLIANCE, period=timedelta(days=30)
    )
    governed = parse(bucket + "lock = '1d'\nlock_mode = 'governance'").repository.lock
    assert governed == LockPolicy(mode=LockMode.GOVERNANCE, period=timedelta(days=1))
    assert "lock is only for s3://" in problem_of(REPOSITORY + "lock = '30d'")
    for wrong in ("'1h'", "'4000d'"):
        assert "is not from 1d to 3650d" in problem_of(bucket + f"lock = {wrong}")


def test_the_vms_of_a_group_are_captured_together() -> None:
    more = "".join(f"[[vm]]\nname = '{n}'\nsocket = '{n}'\ngroup = 'shop'\n" for n in ("db", "cache"))
    config = parse(REPOSITORY + VM + more)
    assert [[vm.name for vm in vms] for vms in captured_together(config.vms)] == [["web"], ["db", "cache"]]


def test_a_limit_may_be_written_a_second_or_without() -> None:
    for text in ("20MiB", "20MiB/s"):
        assert parse(f"{REPOSITORY}[limits]\nupload = '{text}'\n").limits.upload.bytes_per_s == 20 * 1024 * 1024
    assert parse(REPOSITORY).limits.upload.bytes_per_s is None


WINDOWS = """
[limits]
upload = "50MiB/s"
time_zone = "Europe/Berlin"

[[limits.window]]
from = "08:00"
to = "18:00"
days = "mon-fri"
upload = "5MiB/s"
restore = "unlimited"

[[limits.window]]
days = "sat-mon,wed"
upload = "20MiB/s"
read = "1MiB/s"
"""


def test_windows_become_the_course_of_each_limit_that_they_set() -> None:
    limits = parse(REPOSITORY + WINDOWS).limits
    assert str(limits.time_zone) == str(limits.upload.zone) == "Europe/Berlin"
    office, weekend = limits.upload.windows
    assert (office.days, office.begin_min, office.end_min, office.bytes_per_s) == (
        frozenset(range(5)),
        8 * 60,
        18 * 60,
        5 * 2**20,
    )
    assert (weekend.days, weekend.begin_min, weekend.end_min) == (frozenset({5, 6, 0, 2}), 0, 24 * 60)
    assert [window.bytes_per_s for window in limits.restore.windows] == [None]
    assert [window.bytes_per_s for window in limits.read.windows] == [2**20]
    assert limits.seed_upload.windows == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("from = '8:00'\nupload = '1MiB'", 'from: "8:00" is not a time of day; write "08:00", from "00:00" to "24:00"'),
        ("to = '24:01'\nupload = '1MiB'", 'to: "24:01" is not a time of day; write "08:00", from "00:00" to "24:00"'),
        (
            "from = '08:60'\nupload = '1MiB'",
            'from: "08:60" is not a time of day; write "08:00", from "00:00" to "24:00"',
        ),
        (
            "days = 'mon-so'\nupload = '1MiB'",
            'days: "mon-so" are no days; write for example "mon-fri" or "sat,sun" (mon, tue, wed, thu, fri, sat, sun)',
        ),
        ("from = '08:00'\nto = '08:00'\nupload = '1MiB'", "from and to are the same; the whole day is"),
        ("from = '08:00'", "it limits nothing; set one of upload, seed_upload"),
        ("upload = '1KB'", "upload: '1KB' is not a size"),
        ("upload = '1B/s'", "upload: 1 bytes a second is too little; 1024 is the least"),
        ("uplaod = '1MiB'", 'unknown key "uplaod"; did you mean upload?'),
    ],
)
def test_what_is_wrong_with_a_window_is_told(text: str, problem: str) -> None:
    found = problems_of(f"{REPOSITORY}[[limits.window]]\n{text}\n")
    assert any(each.startswith(f"[[limits.window]] number 1: {problem}") for each in found), found


def test_what_is_wrong_with_the_limits_is_told() -> None:
    assert "is no time zone that this host knows" in problem_of(f"{REPOSITORY}[limits]\ntime_zone = 'Mars/Base'\n")
    assert "two brackets" in problem_of(f"{REPOSITORY}[limits.window]\nupload = '1MiB'\n")
    assert problem_of(f"{REPOSITORY}[limits]\nfrom = '08:00'\n") == (
        '[limits]: unknown key "from"; it belongs to [[limits.window]]'
    )
