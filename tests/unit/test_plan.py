"""The plan file: every key, every mistake with its place, and what stands in docs/plan.md and examples/plan.toml."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from drsync.config.key import Key
from drsync.config.plan import PLAN_TABLES, Plan, load_plan
from drsync.config.plan_sites import LibvirtSite
from drsync.config.plan_values import OnFailure, Wait, WaitFor
from drsync.config.table import keys_of
from drsync.errors import PlanInvalid

ROOT = Path(__file__).parents[2]
SITE = '[site.b]\ntarget = "libvirt"\n'
WAVE = '[[wave]]\nvms = ["db", "web"]\n'


def plan_of(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return load_plan(path)


def problems_of(tmp_path: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(PlanInvalid) as caught:
        plan_of(tmp_path, text)
    problems = caught.value.fields["problems"]
    assert isinstance(problems, tuple)
    return problems


def all_keys() -> list[Key]:
    return [key for kinds in PLAN_TABLES.values() for kind in kinds for key in keys_of(kind).values()]


def test_a_short_plan_has_the_defaults(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SITE + WAVE)
    name, site = plan.site(None)
    assert isinstance(site, LibvirtSite)
    assert (name, site.uri, site.pool, site.networks, site.keep_mac) == ("b", "qemu:///system", None, {}, True)
    (wave,) = plan.waves
    assert (wave.vms, wave.delay_s, wave.wait, wave.timeout_s) == (("db", "web"), 0, Wait(what=WaitFor.RUNNING), 600)
    assert (plan.top.on_failure, plan.top.parallel) == (OnFailure.CONTINUE, 2)


def test_the_example_shows_every_key_and_each_default_as_it_is() -> None:
    path = ROOT / "examples/plan.toml"
    plan = load_plan(path)
    assert plan.site("standby")[1].target == "libvirt"
    assert plan.overrides["shop"].wait == Wait(what=WaitFor.TCP, port=443)
    text = path.read_text()
    for key in all_keys():
        shown = re.findall(rf"^(?:# )?{key.name} = (.+?)(?:\s+#.*)?$", text, re.MULTILINE)
        assert shown, key.name
        if key.default not in (None, {}, []):
            default = f'"{key.default}"' if isinstance(key.default, str) else str(key.default).lower()
            assert default in shown, key.name


def test_the_documentation_has_every_key_with_default_meaning_and_reason() -> None:
    page = (ROOT / "docs/plan.md").read_text()
    for key in all_keys():
        default = str(key.default).lower() if isinstance(key.default, bool) else key.default
        shown = "required" if key.required else "none" if default is None else f"`{default}`"
        assert f"| `{key.name}` | {shown} | {key.meaning} | {key.why} |" in page, key.name
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {key.name for key in all_keys()}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no [site.NAME]: say where the VMs come back"),
        (SITE, "there is no [[wave]]: say which VMs come back"),
        (SITE + "[wave]\nvms = ['a']", "wave is not a list of tables; write [[wave]], with two brackets"),
        ("[site.b]\n" + WAVE, "[site.b]: target is missing"),
        ('[site.b]\ntarget = "vmware"\n' + WAVE, '[site.b]: target: "vmware" is not a target; use "libvirt" or "ec2"'),
        (SITE + "urri = 'x'\n" + WAVE, '[site.b]: unknown key "urri"; did you mean uri?'),
        (SITE + "delay = '5s'\n" + WAVE, '[site.b]: unknown key "delay"; it belongs to [[wave]]'),
        ("on_failure = 'retry'\n" + SITE + WAVE, 'the plan: on_failure: "retry" is neither "continue" nor "stop"'),
        ("waves = 1\n" + SITE + WAVE, 'the plan: unknown key "waves"; did you mean wave?'),
        (SITE + "[[wave]]\n", "[[wave]] number 1: vms is missing"),
        (SITE + "[[wave]]\nvms = []\n", "[[wave]] number 1: vms: [] is not a list of VMs; write"),
        (SITE + "[[wave]]\nvms = ['Db']\n", '[[wave]] number 1: vms: "Db" is not a name'),
        (SITE + "[[wave]]\nvms = ['a', 'a']\n", "[[wave]] number 1: vms: names a twice"),
        (SITE + WAVE + WAVE, "[[wave]]: db is in 2 waves; each VM comes back once"),
        (SITE + WAVE + "wait = 'ping'\n", '[[wave]] number 1: wait: "ping" is nothing to wait for; write "running"'),
        (SITE + WAVE + "wait = 'tcp:0'\n", '[[wave]] number 1: wait: "tcp:0" is nothing to wait for'),
        (SITE + WAVE + "wait = 'tcp:99999'\n", '[[wave]] number 1: wait: "tcp:99999" is nothing to wait for'),
        (SITE + WAVE + "delay = 5\n", "[[wave]] number 1: delay: 5 is not a time; write it in quotes"),
        (SITE + WAVE + "[vm.wbe]\n", "[vm.wbe]: no wave has this VM; did you mean web?"),
        (SITE + WAVE + "[vm.web]\npoint = 0\n", "[vm.web]: point: 0 is not a point's number"),
        (SITE + WAVE + "[vm.web]\nat = 2026-01-01\n", "[vm.web]: at: 2026-01-01 is not a time with its zone"),
        (
            SITE + WAVE + "[vm.web]\npoint = 1\nat = 2026-01-01T00:00:00Z\n",
            "[vm.web]: point and at both choose the point: give one of them",
        ),
        (
            SITE + 'pool = "a"\ndisk_dir = "/x"\n' + WAVE,
            "[site.b]: pool and disk_dir both choose the place: give one of them",
        ),
        (SITE + "networks = { a = 1 }\n" + WAVE, "[site.b]: networks: a = 1 is not the name of a network"),
        (SITE + "keep_mac = 'yes'\n" + WAVE, '[site.b]: keep_mac: "yes" is not true or false'),
        ("site = 3\n" + WAVE, "site is not a table; write [site.NAME]"),
        ("a = ", "is not TOML: "),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    assert any(found.startswith(problem) for found in problems_of(tmp_path, text)), problems_of(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, "[site.b]\ntarget = 'x'\n[[wave]]\nvms = 3\n[vm.x]\npoint = 'y'\n")
    assert len(problems) == 3


def test_a_plan_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(PlanInvalid, match="can't be read: No such file"):
        load_plan(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "wait"),
    [
        ("running", Wait(what=WaitFor.RUNNING)),
        ("agent", Wait(what=WaitFor.AGENT)),
        ("tcp:22", Wait(what=WaitFor.TCP, port=22)),
        ("tcp:db.example:5432", Wait(what=WaitFor.TCP, host="db.example", port=5432)),
        ("tcp:[fd00::1]:443", Wait(what=WaitFor.TCP, host="fd00::1", port=443)),
    ],
)
def test_what_is_waited_for_is_read_and_written_alike(tmp_path: Path, text: str, wait: Wait) -> None:
    plan = plan_of(tmp_path, SITE + WAVE + f'wait = "{text}"\n')
    assert plan.waves[0].wait == wait
    assert str(wait) == text


def test_an_instant_keeps_its_zone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SITE + WAVE + "[vm.web]\nat = 2026-11-23T11:00:00+01:00\n")
    assert plan.overrides["web"].at == datetime(2026, 11, 23, 10, tzinfo=UTC)


def test_the_site_is_chosen_by_name_unless_it_is_the_only_one(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SITE + "[site.a]\ntarget = 'ec2'\n" + WAVE)
    assert plan.site("a")[0] == "a"
    with pytest.raises(PlanInvalid, match="choose a site with --site; it has a, b"):
        plan.site(None)
    with pytest.raises(PlanInvalid, match="there is no site c; it has a, b"):
        plan.site("c")
