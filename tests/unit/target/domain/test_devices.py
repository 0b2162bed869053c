"""What else a domain has of its host; and who it is."""

from dataclasses import replace

import pytest
from domain_bench import MARK, SHOP_UUID, around, offer, request, run, small_request, xml_of

from drsync.target.domain import tree
from drsync.target.domain.rewrite import read_mark
from drsync.target.domain.values import Effect

NO_SPICE = replace(offer(), graphics=frozenset({"vnc"}), videos=frozenset({"vga", "virtio"}))


def tags(xml: str) -> list[str]:
    return [device.tag for _, device in tree.devices(tree.parse(xml, "domain"))]


def test_a_display_that_is_not_offered_becomes_vnc_and_all_of_spice_goes() -> None:
    outcome = run(xml_of("shop"), request(), offered=NO_SPICE)
    assert [g.get("type") for _, g in tree.devices(outcome.domain, "graphics")] == ["vnc", "vnc"]
    assert "redirdev" not in tags(outcome.rewritten.xml)
    assert [c.get("type") for _, c in tree.devices(outcome.domain, "channel")] == ["unix"]
    assert outcome.attributes("devices/audio") == {"id": "1", "type": "none"}
    assert outcome.attributes("devices/video/model") == {"type": "virtio"}
    assert outcome.notes("video") == ["qxl is not offered here and becomes virtio"]
    passwords = [g.get("passwd") for _, g in tree.devices(outcome.domain, "graphics")]
    assert passwords == [None, "geheim"]


def test_a_display_that_is_offered_stays_but_not_on_the_old_hosts_address() -> None:
    outcome = run(xml_of("shop"), request())
    spice = outcome.domain.find("devices/graphics")
    assert spice is not None
    assert spice.get("type") == "spice"
    assert [dict(part.attrib) for part in spice.findall("listen")] == [{"type": "address", "address": "127.0.0.1"}]
    assert "redirdev" in tags(outcome.rewritten.xml)
    assert outcome.notes("graphics") == ["spice listened on 10.1.2.3, an address of the old host; now on 127.0.0.1"]


def test_devices_of_the_old_host_are_left_out() -> None:
    outcome = run(xml_of("shop"), request())
    assert "hostdev" not in tags(outcome.rewritten.xml)
    assert outcome.notes("hostdev", Effect.LOST) == [
        f"{device} was a device of the old host, passed through; it is left out"
        for device in ("pci domain=0x0000 bus=0x65 slot=0x00 function=0x0", "usb 0x1050:0x0407")
    ]
    assert outcome.notes("input", Effect.LOST) == ["/dev/input/event7 was a device of the old host; it is left out"]
    assert outcome.notes("filesystem", Effect.LOST) == ["/srv/share of the old host is not here; it is left out"]


def test_in_place_the_hosts_own_devices_stay_if_they_are_there() -> None:
    there = around(devices=frozenset({"pci_0000_65_00_0"}))
    assert tags(run(xml_of("shop"), request(in_place=True), surroundings=there).rewritten.xml).count("hostdev") == 2
    gone = around(devices=frozenset({"pci_0000_00_00_0"}))
    assert tags(run(xml_of("shop"), request(in_place=True), surroundings=gone).rewritten.xml).count("hostdev") == 1


def test_a_console_in_a_file_whose_directory_is_not_here_becomes_a_terminal() -> None:
    outcome = run(xml_of("shop"), request())
    assert outcome.attributes("devices/serial") == {"type": "pty"}
    assert outcome.notes("serial") == [
        "there is no directory for /var/log/consoles/shop.log here: it is a pseudo-terminal (virsh console)"
    ]
    outcome = run(xml_of("shop"), request(), surroundings=around(has_path=lambda p: p == "/var/log/consoles"))
    assert outcome.attributes("devices/serial") == {"type": "file"}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("<serial type='dev'><source path='/dev/ttyS1'/><target port='1'/></serial>", {"type": "pty"}),
        ("<serial type='pty'><source path='/dev/pts/9'/><target port='1'/></serial>", {"type": "pty"}),
        ("<serial type='tcp'><source mode='bind' host='127.0.0.1' service='4555'/></serial>", {"type": "tcp"}),
    ],
)
def test_character_devices_of_the_old_host_become_terminals(device: str, expected: dict[str, str]) -> None:
    outcome = run(xml_of("small").replace("<devices>", f"<devices>{device}"), small_request())
    assert outcome.attributes("devices/serial") == expected
    assert outcome.has("devices/serial/source") is (expected["type"] == "tcp")


def test_sockets_that_libvirt_named_are_left_to_it_and_others_need_their_directory() -> None:
    agent = (
        "<devices><channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-3-x/a'/>"
        "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
    )
    outcome = run(xml_of("small").replace("<devices>", agent), small_request())
    assert not outcome.has("devices/channel/source")
    own = agent.replace("/var/lib/libvirt/qemu/channel/target/domain-3-x/a", "/run/mine/agent")
    outcome = run(xml_of("small").replace("<devices>", own), small_request())
    assert outcome.attributes("devices/channel/source") == {"mode": "bind"}
    assert outcome.notes("channel")


def test_a_console_log_without_its_directory_is_left_out() -> None:
    serial = "<devices><serial type='pty'><log file='/var/log/old/x.log' append='off'/><target port='0'/></serial>"
    outcome = run(xml_of("small").replace("<devices>", serial), small_request())
    assert not outcome.has("devices/serial/log")
    assert outcome.notes("serial")


def test_options_for_files_that_cannot_be_here_are_left_out_and_others_stay() -> None:
    outcome = run(xml_of("shop"), request())
    line = outcome.domain.find(f"{{{tree.QEMU_NAMESPACE}}}commandline")
    assert line is not None
    assert [a.get("value") for a in line] == ["-global", "ICH9-LPC.disable_s3=1"]
    assert outcome.notes("QEMU options") == [
        "-qmp unix:/run/site-a/shop.qmp,server=on,wait=off is left out: there is no directory for "
        "/run/site-a/shop.qmp here"
    ]
    outcome = run(xml_of("shop"), request(), surroundings=around(has_path=lambda _p: True))
    line = outcome.domain.find(f"{{{tree.QEMU_NAMESPACE}}}commandline")
    assert line is not None
    assert len(line) == 4


def test_on_a_machine_that_cannot_be_looked_into_paths_are_not_trusted() -> None:
    outcome = run(xml_of("shop"), request(), surroundings=around(has_path=lambda _path: None))
    assert outcome.attributes("devices/serial") == {"type": "pty"}
    assert outcome.notes("serial")[0].startswith("it can't be told from here whether there is a directory for ")
    assert "can't be told from here" in outcome.notes("QEMU options")[0]


def test_labels_of_the_old_host_are_left_out() -> None:
    outcome = run(xml_of("shop"), request())
    assert not outcome.has("seclabel")
    assert outcome.notes("seclabel") == ["the fixed dac label is left out: libvirt makes its own"]


def test_the_domain_keeps_its_name_and_uuid() -> None:
    outcome = run(xml_of("shop"), request())
    assert (outcome.value("name"), outcome.value("uuid")) == ("shop", SHOP_UUID)
    assert not outcome.notes("uuid")
    assert outcome.value("title") == "The shop"
    assert outcome.has("metadata/{http://libosinfo.org/xmlns/libvirt/domain/1.0}libosinfo")


def test_a_copy_has_another_uuid_everywhere_and_is_told_that_time_went_back() -> None:
    uuid, genid = "11111111-2222-4333-8444-555555555555", "99999999-2222-4333-8444-555555555555"
    outcome = run(xml_of("shop"), request(name="shop-2", uuid=uuid, genid=genid))
    assert (outcome.value("name"), outcome.value("uuid"), outcome.value("genid")) == ("shop-2", uuid, genid)
    assert outcome.value("sysinfo/system/entry[@name='uuid']") == uuid
    assert outcome.notes("name") == ["shop becomes shop-2"]
    assert outcome.notes("uuid") == [f"{SHOP_UUID} becomes {uuid}"]
    assert outcome.notes("genid")


def test_the_domain_remembers_where_it_came_from() -> None:
    first = run(xml_of("shop"), request())
    assert read_mark(first.rewritten.xml) == MARK
    again = run(first.rewritten.xml, request(mark=replace(MARK, point=9)))
    assert read_mark(again.rewritten.xml) == replace(MARK, point=9)
    assert read_mark(xml_of("shop")) is None


def test_a_rewritten_domain_is_left_as_it_is_by_another_rewrite() -> None:
    wanted = request(networks={"*": "default"})
    once = run(xml_of("shop"), wanted, offered=NO_SPICE)
    twice = run(once.rewritten.xml, wanted, offered=NO_SPICE)
    assert twice.rewritten.xml == once.rewritten.xml
