"""Checks as pure functions, and AWS's list."""

import pytest
from memory_files import MemoryFiles

from drsync.preflight.checks.limits import check_devices, check_limits
from drsync.preflight.checks.reading import check_reading
from drsync.preflight.checks.system import check_architecture, check_os_list
from drsync.preflight.facts import (
    JOURNAL_WAITS,
    BootCode,
    Disk,
    Facts,
    Kernel,
    Linux,
    Table,
    Volume,
    Windows,
    decode_facts,
)
from drsync.preflight.findings import Verdict
from drsync.preflight.inside.files import Tree
from drsync.preflight.inside.linux import read_crypttab, read_fstab, read_linux
from drsync.preflight.inside.windows import is_windows, read_windows
from drsync.preflight.machine import Firmware, Machine, read_machine
from drsync.preflight.naming import mapper_name, names_volume
from drsync.preflight.report import judge
from drsync.preflight.vm_import import Listed, linux_listed, os_list, windows_listed
from drsync.units import GiB, TiB


@pytest.mark.parametrize(
    ("distribution", "version", "kernel", "listed"),
    [
        ("debian", "12.7", "6.1.0-25-amd64", Listed.YES),
        ("debian", "12.7", "6.10.1", Listed.OTHER_KERNEL),
        ("debian", "12.5", "6.1.0-25-amd64", Listed.OTHER_RELEASE),
        ("debian", "13.0", "6.12.0", Listed.OTHER_RELEASE),
        ("ubuntu", "24.04", "6.8.0-45-generic", Listed.YES),
        ("ubuntu", "24.04", "6.8.12", Listed.OTHER_KERNEL),
        ("rhel", "9.4", "5.14.0-427.el9.x86_64", Listed.YES),
        ("rhel", "9.8", "5.14.0-600.el9.x86_64", Listed.OTHER_RELEASE),
        ("rhel", "9.10", "5.14.0", Listed.OTHER_RELEASE),
        ("centos", "7.9.2009", "3.10.0-1160.el7.x86_64", Listed.END_OF_LIFE),
        ("sles", "15.5", "5.14.21-150500.55-default", Listed.YES),
        ("amzn", "2023", "6.1.112-122.189.amzn2023.x86_64", Listed.YES),
        ("gentoo", "2.14", "6.6.0", Listed.NO),
        ("debian", "", "6.1.0", Listed.OTHER_RELEASE),
    ],
)
def test_awss_list_is_exact_to_the_kernel(distribution: str, version: str, kernel: str, listed: Listed) -> None:
    assert linux_listed(distribution, version, kernel) is listed


def test_awss_list_has_its_date_and_its_source() -> None:
    assert os_list().as_of == "2026-10-04"
    assert os_list().source.endswith("prerequisites.html")
    assert windows_listed(20348) == ("Windows Server 2022", Listed.YES)
    assert windows_listed(1)[1] is Listed.NO


def test_a_system_off_the_list_is_a_warning_only() -> None:
    linux = Linux(root="vda1", id="arch", name="Arch Linux", kernels=(Kernel(version="6.11", image="x"),))
    (finding,) = check_os_list(Machine(disks={}), Facts(linux=(linux,)))
    assert finding.verdict is Verdict.WARNING
    assert "--via ebs" in finding.action


@pytest.mark.parametrize(
    ("disks", "verdict"),
    [
        ({"vda": 2 * TiB}, Verdict.OK),
        ({"vda": 8 * TiB}, Verdict.WARNING),
        ({"vda": 64 * TiB}, Verdict.WARNING),
        ({"vda": 64 * TiB + 512}, Verdict.FAILS),
        ({f"d{n}": GiB for n in range(21)}, Verdict.OK),
        ({f"d{n}": GiB for n in range(22)}, Verdict.WARNING),
        ({f"d{n}": GiB for n in range(28)}, Verdict.WARNING),
    ],
)
def test_limits(disks: dict[str, int], verdict: Verdict) -> None:
    (finding,) = check_limits(Machine(disks=disks), Facts())
    assert finding.verdict is verdict


@pytest.mark.parametrize(
    ("told", "seen", "verdict"),
    [
        ("", "x86_64", Verdict.OK),
        ("x86_64", "", Verdict.OK),
        ("aarch64", "aarch64", Verdict.WARNING),
        ("x86_64", "i386", Verdict.WARNING),
        ("s390x", "", Verdict.FAILS),
        ("", "", Verdict.UNKNOWN),
    ],
)
def test_architecture(told: str, seen: str, verdict: Verdict) -> None:
    facts = Facts(linux=(Linux(root="vda1", machine=seen),) if seen else ())
    (finding,) = check_architecture(Machine(disks={}, architecture=told), facts)
    assert finding.verdict is verdict


def test_devices_that_an_instance_has_not() -> None:
    machine = Machine(disks={}, nics=2, passed_through=1, tpm=True)
    assert [f.verdict for f in check_devices(machine, Facts())] == [Verdict.WARNING] * 3
    assert check_devices(Machine(disks={}, nics=1), Facts()) == []


DOMAIN = """<domain type='kvm'><os{os}><type arch='x86_64' machine='q35'>hvm</type>{more}</os><devices>
<disk type='file' device='disk'><target dev='vda'/><boot order='2'/></disk>
<disk type='file' device='disk'><target dev='vdb'/><boot order='1'/></disk>
<interface type='network'/><interface type='network'/><hostdev/><tpm/></devices></domain>"""


def machine_of(os: str = "", more: str = "") -> Machine:
    domain = {"name": "web", "uuid": "u", "xml": DOMAIN.format(os=os, more=more)}
    definition = {"source": "libvirt", "domain": domain, "disks": {n: {"target": n} for n in ("vda", "vdb")}}
    return read_machine(definition, {"vda": 1, "vdb": 2})


def test_a_machine_is_read_from_the_points_definition() -> None:
    machine = machine_of()
    assert (machine.firmware, machine.architecture, machine.boot_disk) == (Firmware.BIOS, "x86_64", "vdb")
    assert (machine.nics, machine.passed_through, machine.tpm, machine.direct_kernel) == (2, 1, True, False)
    assert machine_of(" firmware='efi'").firmware is Firmware.UEFI
    secure = machine_of(more="<loader type='pflash' secure='yes'>/x</loader><kernel>/vmlinuz</kernel>")
    assert (secure.firmware, secure.secure_boot, secure.direct_kernel) == (Firmware.UEFI, True, True)
    assert read_machine({"target": {"arch": "x86_64"}}, {"d0": 1}).architecture == "x86_64"
    assert read_machine({"source": "libvirt", "domain": 1}, {"d0": 1}).firmware is None


def test_a_guest_whose_kernel_comes_from_the_host_fails() -> None:
    machine = machine_of(more="<kernel>/vmlinuz</kernel>")
    fails = [f for f in judge(machine, Facts(complete=True, reader="x")) if f.verdict is Verdict.FAILS]
    assert [f.check for f in fails] == ["boot-mode"]


def test_fstab_and_crypttab_are_read() -> None:
    first, second = read_fstab("# x\nUUID=1\t/\text4 defaults,nofail 0 1\n\n/dev/x /mnt/a\\040b xfs\nbad line\n")
    assert (first.source, first.target, first.kind, first.options) == ("UUID=1", "/", "ext4", ("defaults", "nofail"))
    assert (second.target, second.options) == ("/mnt/a b", ())
    (row,) = read_crypttab("data UUID=1 /etc/key luks,discard\n")
    assert (row.name, row.source, row.key, row.options) == ("data", "UUID=1", "/etc/key", ("luks", "discard"))


def test_names_of_volumes() -> None:
    volume = Volume(name="vda1", disk="vda", size_bytes=1, kind="ext4", uuid="ab-CD", label="x", partuuid="p-1")
    for source in ("UUID=AB-cd", 'LABEL="x"', "PARTUUID=p-1", "/dev/vda1", "/dev/disk/by-uuid/ab-CD"):
        assert names_volume(source, volume), source
    for source in ("UUID=", "LABEL=y", "/dev/vda", "/dev/sda1", "PARTLABEL="):
        assert not names_volume(source, volume), source
    logical = Volume(name="my-vg/root", disk="", size_bytes=1, kind="ext4")
    assert mapper_name("my-vg/root") == "my--vg-root"
    assert names_volume("/dev/mapper/my--vg-root", logical)
    assert names_volume("/dev/my-vg/root", logical)


def test_a_red_hat_with_boot_loader_entries_and_dracut() -> None:
    files = {
        "/etc/os-release": 'ID="rhel"\nVERSION_ID="9.4"\n',
        "/etc/redhat-release": "Red Hat Enterprise Linux release 9.4 (Plow)\n",
        "/boot/vmlinuz-5.14.0-427.el9.x86_64": "x",
        "/boot/vmlinuz-5.14.0-70.el9.x86_64": "x",
        "/boot/vmlinuz-0-rescue-1234": "x",
        "/boot/loader/entries/a.conf": "title x\noptions root=UUID=1 $kernelopts\n",
        "/boot/grub2/grubenv": "# GRUB Environment Block\nkernelopts=ro console=ttyS0 net.ifnames=0\n",
        "/etc/NetworkManager/NetworkManager.conf": "[main]\n",
        "/etc/systemd/system/multi-user.target.wants/NetworkManager.service": "-> /x",
        "/etc/cloud/cloud.cfg": "datasource_list: [ NoCloud, Ec2 ]\n",
        "/usr/bin/cloud-init": "x",
        "/etc/cloud/cloud.cfg.d/99.cfg": "network: {config: disabled}\n",
    }
    problems: list[str] = []
    linux = read_linux(Tree(MemoryFiles(files)), "vda1", problems)
    assert (linux.id, linux.version, problems) == ("rhel", "9.4", [])
    assert [k.version for k in linux.kernels] == ["5.14.0-427.el9.x86_64", "5.14.0-70.el9.x86_64"]
    assert linux.command_lines == ("root=UUID=1 ro console=ttyS0 net.ifnames=0",)
    assert linux.network_by == ("NetworkManager",)
    assert linux.interfaces[0].dhcp
    assert (linux.cloud_init, linux.cloud_init_network, linux.datasources) == (True, False, ("NoCloud", "Ec2"))


def windows_files(*drivers: str) -> dict[str, str | bytes]:
    import struct

    from guest_disks import pe

    version = struct.pack("<IIII", 0xFEEF04BD, 0x00010000, 0x000A0000, 20348 << 16)
    kernel = pe(more=bytes(100) + version)
    return {"/Windows/System32/ntoskrnl.exe": kernel, **{f"/Windows/System32/drivers/{d}": "x" for d in drivers}}


def windows_findings(*drivers: str, bcd: tuple[str, ...], hiberfil: bytes = b"") -> dict[str, Verdict]:
    tree = Tree(MemoryFiles({**windows_files(*drivers), "/hiberfil.sys": hiberfil}))
    assert is_windows(tree)
    system = read_windows(tree, "vda2", bcd, [])
    assert (system.build, system.machine) == (20348, "x86_64")
    disk = Disk(name="vda", size_bytes=1, table=Table.MBR, boot_code=BootCode.WINDOWS, core=True)
    facts = Facts(reader="x", complete=True, disks=(disk,), windows=(system,))
    return {f.check: f.verdict for f in judge(Machine(disks={"vda": 1}, firmware=Firmware.BIOS), facts)}


def test_windows_with_awss_drivers() -> None:
    found = windows_findings("ena.sys", "stornvme.sys", bcd=("vda1:/Boot/BCD",))
    assert (found["windows-bcd"], found["windows-nvme"], found["windows-ena"]) == ("ok", "warning", "ok")
    assert Verdict.FAILS not in found.values()
    assert found["os-list"] is Verdict.OK


def test_windows_as_kvm_runs_it_needs_a_conversion() -> None:
    found = windows_findings("viostor.sys", "netkvm.sys", bcd=("vda1:/EFI/Microsoft/Boot/BCD",), hiberfil=b"HIBR")
    assert found["windows-bcd"] is found["windows-nvme"] is found["windows-ena"] is Verdict.FAILS
    assert found["windows-hibernation"] is Verdict.WARNING


def test_a_windows_of_an_unknown_build_is_told() -> None:
    facts = Facts(windows=(Windows(root="vda2"),))
    assert check_os_list(Machine(disks={}), facts)[0].verdict is Verdict.UNKNOWN


def test_a_file_system_that_was_in_use_is_told() -> None:
    volume = Volume(name="vda1", disk="vda", size_bytes=1, kind="ext4", read=True, problem=JOURNAL_WAITS)
    for reader, said in (("dissect", True), ("libguestfs", False)):
        (finding,) = check_reading(Machine(disks={}), Facts(reader=reader, complete=True, volumes=(volume,)))
        assert finding.verdict is Verdict.OK
        assert ("vda1 was in use" in finding.reason) is said


def test_facts_from_inside_are_checked() -> None:
    for raw in (b"", b"[]", b'{"more": 1}', b'{"disks": [{"name": 1}]}', b'{"reader": "' + b"x" * 600 + b'"}'):
        with pytest.raises(ValueError, match=r".+"):
            decode_facts(raw)
    with pytest.raises(ValueError, match="bytes of facts"):
        decode_facts(bytes(5 * 1024 * 1024))
