"""Interfaces: mapped as asked, kept where they can be, else a problem that says what there is."""

from typing import Any

import pytest
from domain_bench import Outcome, around, request, run, small_request, xml_of

from drsync.target.domain import tree
from drsync.target.domain.networks import old_names
from drsync.target.domain.values import Effect, Network

ALL = {"prod": "default", "br-dmz": "bridge:eth0", "eno2": "default", "0000:3b:02.1": "default"}


def interfaces(outcome: Outcome) -> list[Any]:
    return [interface for _, interface in tree.devices(outcome.domain, "interface")]


def test_the_names_to_map_are_those_of_networks_bridges_devices_and_addresses() -> None:
    assert old_names(tree.parse(xml_of("shop"), "domain")) == list(ALL)


def test_every_interface_goes_where_it_is_sent() -> None:
    outcome = run(xml_of("shop"), request(networks=ALL))
    sources = [(i.get("type"), dict(i.find("source").attrib)) for i in interfaces(outcome)]
    assert sources == [
        ("network", {"network": "default"}),
        ("bridge", {"bridge": "eth0"}),
        ("network", {"network": "default"}),
        ("network", {"network": "default"}),
    ]
    macs = [tree.attribute(i, "mac", "address") for i in interfaces(outcome)]
    assert macs == [f"52:54:00:aa:bb:0{n}" for n in (1, 2, 3, 4)]
    assert interfaces(outcome)[1].find("vlan") is None
    assert interfaces(outcome)[1].find("virtualport") is None
    assert outcome.notes("network prod") == [
        "packet filter clean-traffic is not here and is left out: nothing is filtered",
        "becomes default",
    ]
    assert "its vlan is left out: bridge:eth0 has its own" in outcome.notes("network br-dmz")
    assert not [problem for problem in outcome.problems if problem.startswith("network")]


def test_what_is_not_mapped_and_not_here_is_a_problem_each() -> None:
    problems = [problem for problem in run(xml_of("shop"), request()).problems if problem.startswith("network")]
    assert problems == [
        "network prod: there is no network prod here; map it: --network prod=NEW; networks here: default",
        "network br-dmz: bridge br-dmz is not here; map it: --network br-dmz=NEW; networks here: default",
        "network eno2: host device eno2 is not here; map it: --network eno2=NEW; networks here: default",
        "network 0000:3b:02.1: was a NIC of the old host passed through; map it: --network 0000:3b:02.1=NEW; "
        "networks here: default",
    ]


def test_a_star_stands_for_all_that_are_not_named() -> None:
    outcome = run(xml_of("shop"), request(networks={"*": "default", "br-dmz": "bridge:eth0"}))
    assert [i.get("type") for i in interfaces(outcome)] == ["network", "bridge", "network", "network"]


def test_what_is_here_stays_with_its_details() -> None:
    there = around(
        networks={"prod": Network(active=True, portgroups=frozenset({"web"}))},
        interfaces=frozenset({"br-dmz", "eno2"}),
        filters=frozenset({"clean-traffic"}),
    )
    outcome = run(xml_of("shop"), request(networks={"0000:3b:02.1": "prod"}), surroundings=there)
    first, second, third, _ = interfaces(outcome)
    assert dict(first.find("source").attrib) == {"network": "prod", "portgroup": "web"}
    assert first.find("filterref") is not None
    assert first.find("target").get("dev") == "shop0"
    assert second.find("vlan") is not None
    assert third.get("type") == "direct"
    assert not [problem for problem in outcome.problems if problem.startswith("network")]


def test_a_port_group_that_is_not_here_is_left_out() -> None:
    there = around(networks={"prod": Network(active=True), "default": Network(active=True)})
    outcome = run(xml_of("shop"), request(networks={**ALL, "prod": "prod"}), surroundings=there)
    assert dict(interfaces(outcome)[0].find("source").attrib) == {"network": "prod"}
    outcome = run(xml_of("shop"), request(networks={k: v for k, v in ALL.items() if k != "prod"}), surroundings=there)
    assert dict(interfaces(outcome)[0].find("source").attrib) == {"network": "prod"}
    assert "port group web is not here: the network's default is used" in outcome.notes("network prod")


def test_a_network_that_is_off_and_a_bridge_that_is_missing_are_problems_also_as_new_ones() -> None:
    there = around(networks={"default": Network(active=False)})
    outcome = run(xml_of("small"), small_request(), surroundings=there)
    assert outcome.problems == ["network default: network default is not active (virsh net-start default)"]
    outcome = run(xml_of("small"), small_request(networks={"default": "bridge:br9"}))
    assert outcome.problems == ["network default: is to be bridge br9, which is not here; networks here: default"]
    outcome = run(xml_of("small"), small_request(networks={"default": "lan"}))
    assert outcome.problems[0].startswith("network default: there is no network lan here")


def test_macs_are_new_when_asked_for() -> None:
    outcome = run(xml_of("small"), small_request(keep_mac=False))
    assert interfaces(outcome)[0].find("mac") is None
    assert outcome.notes("network default") == ["MAC address 52:54:00:aa:bb:09 becomes a new one"]


@pytest.mark.parametrize(("holder", "said"), [("other", True), ("small", False)])
def test_a_mac_that_another_domain_has_is_said(holder: str, said: bool) -> None:
    outcome = run(xml_of("small"), small_request(), surroundings=around(macs={"52:54:00:aa:bb:09": holder}))
    assert bool(outcome.notes("network default", Effect.CHANGED)) is said


def test_names_that_libvirt_gave_are_left_to_it() -> None:
    xml = xml_of("small").replace(
        "<model type='virtio'/>", "<target dev='vnet3'/><alias name='net0'/><model type='virtio'/>", 1
    )
    (interface,) = interfaces(run(xml, small_request()))
    assert interface.find("target") is None
    assert interface.find("alias") is None


def test_a_users_network_and_a_tap_device_of_qemus_need_nothing() -> None:
    for source in ("<interface type='user'>", "<interface type='ethernet'><target dev='tap5'/>"):
        xml = xml_of("small").replace("<interface type='network'>", source).replace("<source network='default'/>", "")
        assert not run(xml, small_request()).problems
    managed = "<interface type='ethernet'><target dev='tap5' managed='no'/>"
    xml = xml_of("small").replace("<interface type='network'>", managed).replace("<source network='default'/>", "")
    assert run(xml, small_request()).problems[0].startswith("network tap5: tap device tap5 is not here")
