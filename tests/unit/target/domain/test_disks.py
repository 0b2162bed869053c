"""Disks: restored ones are pointed to their place, others have no bytes here."""

from dataclasses import replace

from domain_bench import around, disks, offer, request, run, small_request, xml_of

from drsync.target.domain import tree
from drsync.target.domain.values import Effect, NewDisk


def test_a_restored_disk_keeps_all_but_its_source() -> None:
    disk = run(xml_of("shop"), request()).disk("vda")
    assert disk is not None
    assert dict(disk.find("source").attrib) == {"file": "/pool/shop-vda.qcow2"}  # type: ignore[union-attr]
    assert tree.attribute(disk, "driver", "type") == "qcow2"
    assert tree.attribute(disk, "driver", "io") == "native"
    assert tree.attribute(disk, "driver", "iothread") == "1"
    assert tree.value(disk, "serial") == "ROOT-1"
    assert tree.attribute(disk, "address", "bus") == "0x08"
    assert tree.attribute(disk, "boot", "order") == "1"


def test_a_device_and_a_network_disk_become_files() -> None:
    outcome = run(xml_of("shop"), request())
    for target in ("vdb", "sda"):
        disk = outcome.disk(target)
        assert disk is not None
        assert disk.get("type") == "file"
        assert tree.attribute(disk, "source", "file") == f"/pool/shop-{target}.qcow2"
        assert disk.find("auth") is None
        assert outcome.notes(f"disk {target}") == ["format raw becomes qcow2"]


def test_a_disk_on_a_device_of_the_target_is_a_block_disk() -> None:
    on_volume = {"vda": NewDisk(path="/dev/vg/shop-vda", format="raw", is_block_device=True)}
    disk = run(xml_of("shop"), request(disks=on_volume)).disk("vda")
    assert disk is not None
    assert disk.get("type") == "block"
    assert tree.attribute(disk, "source", "dev") == "/dev/vg/shop-vda"
    assert tree.attribute(disk, "driver", "type") == "raw"


def test_a_disk_that_was_not_captured_is_left_out_and_said() -> None:
    outcome = run(xml_of("shop"), request())
    assert outcome.disk("vdc") is None
    assert outcome.notes("disk vdc", Effect.LOST) == ["was not captured and is left out (/srv/old/scratch.qcow2)"]


def test_in_place_a_disk_that_was_not_captured_stays() -> None:
    outcome = run(xml_of("shop"), request(in_place=True))
    assert outcome.disk("vdc") is not None
    assert outcome.notes("disk vdc", Effect.CHANGED) == ["was not captured and stays as it is now: it does not go back"]


def test_a_disk_that_the_domain_does_not_have_is_a_problem() -> None:
    outcome = run(xml_of("shop"), request(disks=disks("vda", "vdb", "sda", "vdz")))
    assert "disk vdz: is in the point, but the domain has no such disk" in outcome.problems


def test_a_medium_that_is_not_here_is_ejected_and_one_that_is_here_stays() -> None:
    outcome = run(xml_of("shop"), request())
    drive = outcome.disk("sdb")
    assert drive is not None
    assert drive.find("source") is None
    assert outcome.notes("disk sdb") == ["the medium /srv/iso/debian.iso is not here: the drive is empty"]
    outcome = run(xml_of("shop"), request(), surroundings=around(has_path=lambda p: p == "/srv/iso/debian.iso"))
    drive = outcome.disk("sdb")
    assert drive is not None
    assert drive.find("source") is not None


def test_encryption_of_the_old_image_is_gone_and_said() -> None:
    xml = xml_of("small").replace(
        "<source file='/srv/old/small.img'/>",
        "<source file='/srv/old/small.img'><encryption format='luks'><secret type='passphrase' uuid='x'/></encryption>"
        "</source>",
    )
    outcome = run(xml, small_request())
    disk = outcome.disk("vda")
    assert disk is not None
    assert disk.find("source/encryption") is None
    assert outcome.notes("disk vda") == ["was encrypted at rest on the old host; here it is as the guest sees it"]


def test_a_passed_through_scsi_device_becomes_a_disk() -> None:
    xml = xml_of("small").replace(
        "<disk type='file' device='disk'>", "<disk type='block' device='lun' sgio='unfiltered'>"
    )
    outcome = run(xml, small_request())
    disk = outcome.disk("vda")
    assert disk is not None
    assert (disk.get("device"), disk.get("sgio")) == ("disk", None)
    assert outcome.notes("disk vda", Effect.CHANGED)


def test_a_bus_that_is_not_offered_is_a_problem() -> None:
    outcome = run(xml_of("small"), small_request(), offered=replace(offer(), disk_buses=frozenset({"scsi"})))
    assert outcome.problems == ["disk vda: bus virtio is not offered; there are: scsi"]


def test_limits_on_devices_of_the_old_host_are_left_out() -> None:
    xml = xml_of("small").replace(
        "<os>", "<blkiotune><device><path>/dev/old</path><weight>500</weight></device></blkiotune><os>"
    )
    outcome = run(xml, small_request())
    assert not outcome.has("blkiotune/device")
    assert outcome.notes("blkiotune")
