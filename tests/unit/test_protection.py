"""Which VMs are protected: those that are named, and those that patterns find."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drsync.config import Config, LibvirtSource, captured_together, parse_config
from drsync.errors import LibvirtUnreachable, UnknownVm
from drsync.model import is_name
from drsync.protection import Protection, repository_name


@dataclass(frozen=True, kw_only=True)
class Found:
    name: str
    uuid: str = "0"


class Hosts:
    """libvirt hosts with domains that a test changes."""

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        self.names = dict(names)
        self.asked: list[str] = []

    def find(self, uri: str) -> Sequence[Found]:
        self.asked.append(uri)
        if uri not in self.names:
            raise LibvirtUnreachable(vm="*", uri=uri, problem="no such file")
        return [Found(name=name, uuid=f"uuid-of-{name}") for name in self.names[uri]]


SYSTEM = "qemu:///system"


def config(text: str) -> Config:
    return parse_config(b'[repository]\nurl = "file:///srv"\n' + text.encode(), Path("/etc/drsync.toml"))


def names(protection: Protection) -> list[str]:
    return [vm.name for vm in protection.look()]


def test_without_patterns_libvirt_is_not_asked() -> None:
    hosts = Hosts({})
    protection = Protection(config("[[vm]]\nname='web'\nsource='libvirt'\n"), hosts.find)
    assert names(protection) == ["web"]
    assert hosts.asked == []


def test_a_pattern_finds_what_matches_and_is_not_excluded() -> None:
    hosts = Hosts({SYSTEM: ["prod-db", "prod-test-1", "prod-web", "test"]})
    text = "[[protect]]\nmatch='prod-*'\nexclude_vms=['prod-test*']\nexclude=['vdb']\nrpo='1m'\n"
    protection = Protection(config(text), hosts.find)
    assert names(protection) == ["prod-db", "prod-web"]
    vm = protection.vm("prod-web")
    assert vm.source == LibvirtSource(domain="prod-web", uri=SYSTEM, exclude=("vdb",))
    assert (vm.rpo_s, vm.capture_timeout_s) == (60, 600)


def test_what_a_pattern_finds_is_in_its_group() -> None:
    hosts = Hosts({SYSTEM: ["shop-db", "shop-web", "other"]})
    text = (
        "[[vm]]\nname='cache'\nsource='libvirt'\ngroup='shop'\ngroup_pause=false\n"
        "[[protect]]\nmatch='shop-*'\ngroup='shop'\ngroup_pause=false\n[[protect]]\nmatch='*'\n"
    )
    protection = Protection(config(text), hosts.find)
    together = [[vm.name for vm in vms] for vms in captured_together(protection.look())]
    assert together == [["cache", "shop-db", "shop-web"], ["other"]]
    assert {vm.group_pause for vm in protection.vms if vm.group} == {False}


def test_what_is_named_or_was_matched_before_is_not_taken_again() -> None:
    hosts = Hosts({SYSTEM: ["a", "b", "c", "d"]})
    text = (
        "[[vm]]\nname='a'\nsource='libvirt'\n[[vm]]\nname='x'\nsource='libvirt'\ndomain='b'\n"
        "[[vm]]\nname='y'\nsource='libvirt'\ndomain='uuid-of-c'\n"
        "[[protect]]\nmatch='[a-d]'\nrpo='1m'\n[[protect]]\nmatch='*'\nrpo='2m'\n"
    )
    protection = Protection(config(text), hosts.find)
    assert names(protection) == ["a", "x", "y", "d"]
    assert protection.vm("d").rpo_s == 60
    assert hosts.asked == [SYSTEM]


def test_what_appears_is_found_and_what_is_gone_is_forgotten() -> None:
    hosts = Hosts({SYSTEM: ["a"]})
    protection = Protection(config("[[protect]]\nmatch='*'\n"), hosts.find)
    assert [vm.name for vm in protection.vms] == []
    assert names(protection) == ["a"]
    hosts.names[SYSTEM] = ["b"]
    assert [vm.name for vm in protection.vms] == ["a"]
    assert protection.vm("b").name == "b", "a VM that is not known yet is looked for"
    assert names(protection) == ["b"]
    with pytest.raises(UnknownVm, match="no VM named a; there are: b"):
        protection.vm("a")


def test_while_libvirt_does_not_answer_nothing_is_gone() -> None:
    hosts = Hosts({SYSTEM: ["a"]})
    protection = Protection(config("[[protect]]\nmatch='*'\n"), hosts.find)
    protection.look()
    hosts.names.clear()
    with pytest.raises(LibvirtUnreachable):
        protection.look()
    assert [vm.name for vm in protection.vms] == ["a"]


def test_names_that_can_be_kept_are_kept() -> None:
    assert repository_name("web-1.example.org") == "web-1.example.org"


@pytest.mark.parametrize(
    ("domain", "start"), [("Shop 1", "shop-1-"), ("--", "vm-"), ("ÄÖ", "vm-"), ("a" * 80, "a" * 54 + "-")]
)
def test_other_names_become_valid_ones(domain: str, start: str) -> None:
    name = repository_name(domain)
    assert name.startswith(start)
    assert is_name(name)


@given(st.lists(st.text(min_size=1), unique=True))
def test_no_two_names_become_one(domains: list[str]) -> None:
    named = [repository_name(domain) for domain in domains]
    assert all(map(is_name, named))
    assert len(set(named)) == len(named)
