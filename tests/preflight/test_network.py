"""Each tool's network configuration, read from its text, and what the check makes of it."""

import pytest

from drsync.preflight.checks.network import check_network
from drsync.preflight.facts import Facts, Interface, Linux
from drsync.preflight.findings import Verdict
from drsync.preflight.inside import network
from drsync.preflight.machine import Machine

MACHINE = Machine(disks={"vda": 1})


def test_netplan() -> None:
    text = """
network:
  version: 2
  ethernets:
    enp1s0: {dhcp4: true}
    lan:
      match: {macaddress: "52:54:00:00:00:01"}
      set-name: lan0
      addresses: [10.0.0.5/24, {10.0.0.6/24: {label: x}}]
    any: {match: {name: "e*"}, dhcp4: yes}
"""
    first, second, third = network.netplan("/etc/netplan/50-cloud-init.yaml", text)
    assert (first.name, first.dhcp, first.mac, first.by_cloud_init) == ("enp1s0", True, "", True)
    assert (second.name, second.dhcp, second.mac) == ("", False, "52:54:00:00:00:01")
    assert second.addresses == ("10.0.0.5/24", "10.0.0.6/24")
    assert (third.name, third.dhcp) == ("e*", True)


@pytest.mark.parametrize("text", ["", "[]", "network: 1", "network: {ethernets: [1]}", "network: {ethernets: {x: 1}}"])
def test_netplan_of_another_shape_is_nothing(text: str) -> None:
    assert network.netplan("x", text) == []


def test_netplan_that_is_no_yaml_is_told() -> None:
    with pytest.raises(ValueError, match="no YAML"):
        network.netplan("x", "a: [")


def test_yaml_that_grows_when_it_is_written_out_is_not_written_out() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    text = bomb + "network: {ethernets: {eth0: {addresses: *i, match: {name: *i, macaddress: *i}}}}\n"
    assert network.netplan("x", text) == [Interface(file="x", dhcp=False)]


def test_networkd() -> None:
    text = "[Match]\nName=en*\n[Network]\nDHCP=ipv4\n"
    assert network.networkd("x", text) == [Interface(file="x", name="en*", dhcp=True)]
    text = "[Match]\nMACAddress=52:54:00:00:00:01\n[Network]\n[Address]\nAddress=10.0.0.5/24\n"
    assert network.networkd("x", text) == [
        Interface(file="x", mac="52:54:00:00:00:01", dhcp=False, addresses=("10.0.0.5/24",))
    ]
    assert network.networkd("x", "[Match]\nType=wlan\n[Network]\nDHCP=yes\n") == []


def test_network_manager() -> None:
    text = "[connection]\nid=x\ntype=ethernet\ninterface-name=enp1s0\n"
    text += "[ipv4]\nmethod=manual\naddress1=10.0.0.5/24,10.0.0.1\n"
    (found,) = network.network_manager("x", text)
    assert (found.name, found.dhcp, found.addresses) == ("enp1s0", False, ("10.0.0.5/24,10.0.0.1",))
    text = "[connection]\ntype=ethernet\n[ethernet]\nmac-address=52:54:00:00:00:01\n[ipv4]\nmethod=auto\n"
    (found,) = network.network_manager("x", text)
    assert (found.name, found.mac, found.dhcp) == ("", "52:54:00:00:00:01", True)
    assert network.network_manager("x", "[connection]\ntype=wifi\n") == network.network_manager("x", "no ini") == []


def test_ifupdown() -> None:
    text = """
auto lo
iface lo inet loopback
# auto eth9
allow-hotplug eth0
iface eth0 inet dhcp
auto eth1
iface eth1 inet static
    address 10.0.0.5
    hwaddress ether 52:54:00:00:00:01
iface eth2 inet dhcp
"""
    first, second = network.ifupdown("x", text)
    assert (first.name, first.dhcp) == ("eth0", True)
    assert (second.name, second.dhcp, second.addresses) == ("eth1", False, ("10.0.0.5",))


def test_sysconfig() -> None:
    (found,) = network.sysconfig(
        "/etc/x/ifcfg-eth0", 'DEVICE="eth0"\nBOOTPROTO=dhcp\nONBOOT=yes\nHWADDR=52:54:00:00:00:01\n'
    )
    assert (found.name, found.dhcp, found.mac) == ("eth0", True, "52:54:00:00:00:01")
    (found,) = network.sysconfig("/etc/x/ifcfg-eth1", "BOOTPROTO='static'\nIPADDR=10.0.0.5/24\nSTARTMODE=auto\n")
    assert (found.name, found.dhcp, found.addresses) == ("eth1", False, ("10.0.0.5/24",))
    assert network.sysconfig("/etc/x/ifcfg-lo", "") == network.sysconfig("/etc/x/ifcfg-eth2", "ONBOOT=no") == []


def test_names_that_are_tied_to_an_address() -> None:
    rules = 'SUBSYSTEM=="net", ATTR{address}=="52:54:00:00:00:01", NAME="eth0"\n# address NAME="eth1"\n'
    assert network.fixed_names(rules) == ["eth0"]
    assert network.link_name("[Match]\nMACAddress=52:54:00:00:00:01\n[Link]\nName=lan0\n") == "lan0"
    assert network.link_name("[Match]\nOriginalName=*\n[Link]\nName=lan0\n") == ""


def linux(*interfaces: Interface, **more: object) -> Linux:
    words = {"network_by": ("ifupdown",), "systemd": True, **more}
    return Linux(root="vda1", interfaces=interfaces, **words)  # type: ignore[arg-type]


DHCP = Interface(file="x", dhcp=True)
NAMED = Interface(file="x", name="enp1s0", dhcp=True)
CLASSIC = Interface(file="x", name="eth0", dhcp=True)


@pytest.mark.parametrize(
    ("system", "verdict"),
    [
        (linux(DHCP), Verdict.OK),
        (linux(Interface(file="x", name="e*", dhcp=True)), Verdict.OK),
        (linux(Interface(file="x", name="ens5", dhcp=True)), Verdict.OK),
        (linux(NAMED), Verdict.FAILS),
        (linux(CLASSIC), Verdict.FAILS),
        (linux(CLASSIC, command_lines=("root=x net.ifnames=0",)), Verdict.OK),
        (linux(CLASSIC, systemd=False), Verdict.OK),
        (linux(CLASSIC, systemd=False, fixed_names=("eth0",)), Verdict.FAILS),
        (linux(Interface(file="x", mac="52:54:00:00:00:01", dhcp=True)), Verdict.FAILS),
        (linux(Interface(file="x", addresses=("10.0.0.5/24",), dhcp=False)), Verdict.WARNING),
        (linux(NAMED, DHCP), Verdict.OK),
        (linux(NAMED, cloud_init=True), Verdict.OK),
        (linux(NAMED, cloud_init=True, cloud_init_network=False), Verdict.FAILS),
        (linux(NAMED, cloud_init=True, datasources=("NoCloud",)), Verdict.FAILS),
        (linux(NAMED, cloud_init=True, datasources=("NoCloud", "Ec2")), Verdict.OK),
        (linux(), Verdict.FAILS),
        (linux(network_by=()), Verdict.UNKNOWN),
    ],
)
def test_whether_the_instance_gets_an_address(system: Linux, verdict: Verdict) -> None:
    (finding,) = check_network(MACHINE, Facts(linux=(system,)))
    assert finding.verdict is verdict, finding
    assert bool(finding.action) is (verdict is not Verdict.OK)
