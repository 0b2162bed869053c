"""Whole disks, made with real tools, looked into through the fence; and what the checks make of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from guest_disks import (
    KERNEL,
    ROOT_UUID,
    DebianGuest,
    Files,
    FileSource,
    grub_core,
    initramfs,
    lvm_physical_volume,
    make_btrfs,
    make_disk,
    make_ext4,
    make_fat,
    make_xfs,
    pe,
    run,
)

from drsync.preflight.facts import BootCode, Driver, Facts, Table
from drsync.preflight.fence import look_inside
from drsync.preflight.findings import Finding, Verdict
from drsync.preflight.machine import Firmware, Machine
from drsync.preflight.report import judge
from drsync.units import MiB

GPT_ROOT = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
LVM = "E6D6D379-F507-44C2-A23C-238F2A3DF928"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return initramfs(tmp_path_factory.mktemp("initramfs"), ["nvme/host/nvme", "virtio_blk"])


def found(*disks: Path, firmware: Firmware | None = None) -> tuple[Facts, dict[str, list[Finding]]]:
    sources = [FileSource(path, f"vd{letter}") for path, letter in zip(disks, "abcdef", strict=False)]
    facts = look_inside(sources)
    machine = Machine(disks={s.name: s.size_bytes for s in sources}, firmware=firmware, architecture="x86_64")
    findings: dict[str, list[Finding]] = {}
    for finding in judge(machine, facts):
        findings.setdefault(finding.check, []).append(finding)
    assert sum(s.read_bytes for s in sources) < 32 * MiB, "a check reads megabytes"
    return facts, findings


def worst(findings: Sequence[Finding]) -> Verdict:
    order = [Verdict.OK, Verdict.WARNING, Verdict.UNKNOWN, Verdict.FAILS]
    return max((f.verdict for f in findings), key=order.index)


def efi(directory: Path, files: Files) -> Path:
    return make_fat(directory / "esp.img", 34 * MiB, files)


GOOD_ESP: Files = {
    "/EFI/BOOT/BOOTX64.EFI": pe(more=b"UEFI SHIM\n$Version: 15 shim"),
    "/EFI/BOOT/fbx64.efi": pe(),
    "/EFI/debian/grubx64.efi": pe(),
}


def uefi_disk(directory: Path, esp: Files, root: Path) -> Path:
    table = f"label: gpt\nstart=2048, size=34MiB, type={ESP}\nsize=80MiB, type={GPT_ROOT}, name=system\n"
    return make_disk(directory / "disk.raw", 128 * MiB, table, {MiB: efi(directory, esp), 35 * MiB: root})


def bios_gpt_disk(directory: Path, root: Path, *, core: bool = True) -> Path:
    code, image = grub_core(bytearray(440), sector=2048)
    (directory / "core").write_bytes(image if core else bytes(512))
    table = f"label: gpt\nstart=2048, size=1MiB, type={BIOS_BOOT}\nsize=80MiB, type={GPT_ROOT}\n"
    return make_disk(directory / "disk.raw", 96 * MiB, table, {MiB: directory / "core", 2 * MiB: root}, boot_code=code)


def test_a_uefi_guest_with_the_fallback_loader_is_fine(tmp_path: Path, archive: bytes) -> None:
    fstab = f"UUID={ROOT_UUID} / ext4 defaults 0 1\nUUID=1234-5678 /boot/efi vfat umask=0077 0 1\n"
    root = make_ext4(tmp_path / "root.img", 24 * MiB, DebianGuest(initramfs=archive, fstab=fstab).files())
    facts, findings = found(uefi_disk(tmp_path, GOOD_ESP, root))
    assert {worst(f) for f in findings.values()} == {Verdict.OK}, findings
    (disk,) = facts.disks
    assert (disk.table, disk.boot_code, disk.problem) == (Table.GPT, BootCode.NONE, "")
    assert [v.kind for v in facts.volumes] == ["vfat", "ext4"]
    assert facts.volumes[1].partlabel == "system"
    assert facts.volumes[0].fallback_is_shim
    assert (facts.linux[0].id, facts.linux[0].version, facts.linux[0].machine) == ("debian", "12.7", "x86_64")
    assert "UEFI" in findings["boot-mode"][0].reason


@pytest.mark.parametrize(
    ("esp", "reason"),
    [
        ({"/EFI/debian/grubx64.efi": pe()}, "BOOTX64.EFI is missing"),
        ({"/EFI/BOOT/BOOTX64.EFI": pe(0xAA64)}, "is for aarch64"),
        ({"/EFI/BOOT/BOOTX64.EFI": "no program"}, "no executable"),
        ({"/EFI/BOOT/BOOTX64.EFI": pe(more=b"UEFI SHIM shim")}, "neither GRUB nor shim's fallback"),
    ],
)
def test_a_uefi_guest_that_only_its_own_nvram_boots_fails(
    esp: Files, reason: str, tmp_path: Path, archive: bytes
) -> None:
    root = make_ext4(tmp_path / "root.img", 24 * MiB, DebianGuest(initramfs=archive).files())
    _, findings = found(uefi_disk(tmp_path, esp, root), firmware=Firmware.UEFI)
    assert worst(findings["loader"]) is Verdict.FAILS
    assert reason in findings["loader"][0].reason
    assert findings["loader"][0].action


def test_grub_on_gpt_finds_its_core_in_the_bios_boot_partition(tmp_path: Path, archive: bytes) -> None:
    root = make_ext4(tmp_path / "root.img", 24 * MiB, DebianGuest(initramfs=archive).files())
    _, findings = found(bios_gpt_disk(tmp_path, root), firmware=Firmware.BIOS)
    assert findings["loader"][0].reason == "vda: grub, the BIOS boot partition (1)"
    assert {worst(f) for f in findings.values()} == {Verdict.OK}, findings


def test_grub_without_its_core_fails(tmp_path: Path, archive: bytes) -> None:
    root = make_ext4(tmp_path / "root.img", 24 * MiB, DebianGuest(initramfs=archive).files())
    _, findings = found(bios_gpt_disk(tmp_path, root, core=False), firmware=Firmware.BIOS)
    assert worst(findings["loader"]) is Verdict.FAILS
    assert "sector 2048 is empty" in findings["loader"][0].reason


def test_the_copy_of_a_damaged_gpt_is_read(tmp_path: Path, archive: bytes) -> None:
    root = make_ext4(tmp_path / "root.img", 24 * MiB, DebianGuest(initramfs=archive).files())
    disk = bios_gpt_disk(tmp_path, root)
    with disk.open("r+b") as file:
        file.seek(520)
        file.write(b"\xff")
    facts, findings = found(disk, firmware=Firmware.BIOS)
    assert facts.linux, "the file system is found all the same"
    assert worst(findings["partition-table"]) is Verdict.WARNING
    with disk.open("r+b") as file:
        file.seek(96 * MiB - 500)
        file.write(b"\xff")
    assert worst(found(disk, firmware=Firmware.BIOS)[1]["partition-table"]) is Verdict.FAILS


def test_a_guest_on_lvm_is_found_and_its_boot_partition_is_mounted(tmp_path: Path, archive: bytes) -> None:
    guest = DebianGuest(initramfs=archive)
    guest.fstab = "/dev/mapper/my--vg-root / ext4 defaults 0 1\nLABEL=boot /boot ext4 defaults 0 2\n"
    guest.fstab += "/dev/my-vg/gone /srv ext4 nofail\n"
    guest.command_line = "root=/dev/mapper/my--vg-root console=ttyS0"
    files = guest.files()
    boot = {name.removeprefix("/boot"): files.pop(name) for name in list(files) if name.startswith("/boot/")}
    root = make_ext4(tmp_path / "root.img", 24 * MiB, files)
    boot_image = make_ext4(tmp_path / "boot.img", 16 * MiB, boot, label="boot", uuid=ROOT_UUID.replace("1", "9"))
    volume = lvm_physical_volume(tmp_path / "pv.img", 96 * MiB, "my-vg", {"root": root})
    table = f"label: gpt\nstart=2048, size=16MiB, type={GPT_ROOT}\nsize=100MiB, type={LVM}\n"
    disk = make_disk(tmp_path / "disk.raw", 128 * MiB, table, {MiB: boot_image, 17 * MiB: volume})
    facts, findings = found(disk, firmware=Firmware.UEFI)
    assert [v.name for v in facts.volumes] == ["vda1", "vda2", "my-vg/root"]
    assert facts.linux[0].root == "my-vg/root"
    assert facts.linux[0].kernels[0].version == KERNEL
    for check in ("nvme", "ena", "root", "fstab", "network", "console"):
        assert worst(findings[check]) is Verdict.OK, findings[check]
    assert worst(findings["loader"]) is Verdict.FAILS, "there is no EFI system partition"


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_other_file_systems_are_read(kind: str, tmp_path: Path, archive: bytes) -> None:
    files: Files = DebianGuest(initramfs=archive).files()
    if kind == "xfs":
        root = make_xfs(tmp_path / "root.img", 320 * MiB, files)
    else:
        root = make_btrfs(tmp_path / "root.img", 128 * MiB, files)
    table = "label: dos\nstart=2048, type=83, bootable\n"
    disk = make_disk(tmp_path / "disk.raw", 400 * MiB, table, {MiB: root})
    facts, findings = found(disk)
    assert facts.linux[0].kernels[0].nvme is Driver.INITRAMFS
    assert worst(findings["file-systems"]) is (Verdict.WARNING if kind == "btrfs" else Verdict.OK)


def test_a_btrfs_root_may_be_in_a_directory_of_its_own(tmp_path: Path, archive: bytes) -> None:
    files = DebianGuest(initramfs=archive).files()
    root = make_btrfs(tmp_path / "root.img", 128 * MiB, {f"/@{name}": content for name, content in files.items()})
    facts, _ = found(root)
    assert facts.disks[0].table is Table.NONE
    assert facts.linux[0].id == "debian"


def test_logical_partitions_are_found(tmp_path: Path, archive: bytes) -> None:
    root = make_ext4(tmp_path / "root.img", 24 * MiB, DebianGuest(initramfs=archive).files())
    table = "label: dos\nstart=2048, size=8MiB, type=82\nstart=20480, size=80MiB, type=5\n"
    table += "start=22528, size=70MiB, type=83\n"
    disk = make_disk(tmp_path / "disk.raw", 96 * MiB, table, {22528 * 512: root})
    facts, _ = found(disk)
    assert [p.number for p in facts.disks[0].partitions] == [1, 5]
    assert facts.linux[0].root == "vda5"


def test_an_empty_disk_and_one_that_is_no_system_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.raw").touch()
    with (tmp_path / "empty.raw").open("r+b") as file:
        file.truncate(8 * MiB)
    facts, findings = found(tmp_path / "empty.raw", firmware=Firmware.BIOS)
    assert facts.disks[0].table is Table.EMPTY
    assert worst(findings["partition-table"]) is worst(findings["loader"]) is Verdict.FAILS
    data = make_ext4(tmp_path / "data.img", 8 * MiB, {"/photos/1": "x"})
    _, findings = found(data, firmware=Firmware.BIOS)
    assert worst(findings["kernel"]) is Verdict.UNKNOWN


def test_a_luks_volume_is_told_as_what_is_not_known(tmp_path: Path) -> None:
    image = tmp_path / "luks.img"
    image.write_bytes(b"LUKS\xba\xbe\x00\x02" + bytes(160) + b"aaaaaaaa-1111-2222-3333-444444444444" + bytes(MiB))
    _, findings = found(image, firmware=Firmware.UEFI)
    assert worst(findings["encryption"]) is Verdict.UNKNOWN
    assert "serial console" in findings["encryption"][0].action


def test_the_examples_guest_is_understood(guest_image: Path, tmp_path: Path) -> None:
    raw = tmp_path / "guest.raw"
    run("qemu-img", "convert", "-O", "raw", guest_image, raw)
    facts, findings = found(raw)
    assert facts.disks[0].boot_code is BootCode.SYSLINUX
    assert facts.loose[0].kernels[0].nvme in {Driver.BUILT_IN, Driver.INITRAMFS}
    for check in ("loader", "partition-table", "nvme", "console"):
        assert worst(findings[check]) is Verdict.OK, findings[check]
    assert worst(findings["kernel"]) is Verdict.WARNING, "it lives in its initramfs"


@pytest.mark.parametrize(
    ("change", "check", "verdict", "reason"),
    [
        ({"fstab": "/dev/vda2 / ext4 defaults 0 1"}, "fstab", Verdict.FAILS, "/dev/vda2"),
        ({"fstab": f"UUID={ROOT_UUID} / ext4\n/dev/sdb1 /data ext4 nofail"}, "fstab", Verdict.WARNING, "/dev/sdb1"),
        ({"fstab": f"UUID={ROOT_UUID} / ext4\nUUID=77 /data xfs defaults"}, "fstab", Verdict.FAILS, "on no disk"),
        ({"fstab": f"UUID={ROOT_UUID} / ext4\nshare /mnt virtiofs defaults"}, "fstab", Verdict.FAILS, "of the host's"),
        ({"fstab": f"UUID={ROOT_UUID} / ext4\nnas:/x /mnt nfs defaults"}, "fstab", Verdict.WARNING, "another machine"),
        ({"command_line": "root=/dev/vda1 console=ttyS0"}, "root", Verdict.FAILS, "/dev/vda1"),
        ({"command_line": f"root=UUID={ROOT_UUID}"}, "console", Verdict.WARNING, "serial console"),
        ({"interfaces": "auto enp1s0\niface enp1s0 inet dhcp"}, "network", Verdict.FAILS, "enp1s0"),
        (
            {"interfaces": "auto ens5\niface ens5 inet static\n address 10.0.0.5/24"},
            "network",
            Verdict.WARNING,
            "10.0.0.5",
        ),
        ({"modules": "kernel/drivers/nvme/host/nvme.ko:"}, "ena", Verdict.FAILS, "no ena driver"),
        ({"initramfs": b""}, "nvme", Verdict.FAILS, "not in the initramfs"),
        ({"initramfs": b"\x89LZO unknown"}, "nvme", Verdict.UNKNOWN, "could not be looked into"),
        ({"built_in": "kernel/drivers/nvme/host/nvme.ko", "initramfs": b""}, "nvme", Verdict.OK, "built into"),
    ],
)
def test_each_finding(
    change: dict[str, str | bytes], check: str, verdict: Verdict, reason: str, tmp_path: Path, archive: bytes
) -> None:
    guest = DebianGuest(initramfs=archive)
    for name, value in change.items():
        setattr(guest, name, value)
    root = make_ext4(tmp_path / "root.img", 24 * MiB, guest.files())
    _, findings = found(root)
    assert worst(findings[check]) is verdict, findings[check]
    assert any(reason in f.reason for f in findings[check])
    assert all(f.action for f in findings[check] if f.verdict is not Verdict.OK)
