"""The type of an instance: the cheapest of the allowed families that has what the VM had."""

import pytest

from drsync.target.ec2.sizing import FAMILIES, InstanceType, Need, choose


def kind(name: str, vcpus: int, gib: int, **more: object) -> InstanceType:
    known = {
        "architectures": ("x86_64",),
        "boot_modes": ("legacy-bios", "uefi"),
        "tpm": True,
        "bare_metal": False,
        "volumes": 26,
    }
    return InstanceType(name=name, vcpus=vcpus, memory_mib=gib * 1024, **{**known, **more})  # type: ignore[arg-type]


TYPES = [
    kind("t2.medium", 2, 4, boot_modes=("legacy-bios",), tpm=False),
    kind("t3.small", 2, 2),
    kind("c5.large", 2, 4),
    kind("c7i.large", 2, 4),
    kind("m5.large", 2, 8),
    kind("m7i.large", 2, 8),
    kind("m7i.metal", 2, 8, bare_metal=True),
    kind("m5.xlarge", 4, 16),
    kind("r5.large", 2, 16),
    kind("m6g.large", 2, 8, architectures=("arm64",), boot_modes=("uefi",)),
]


@pytest.mark.parametrize(
    ("vcpus", "mib", "wanted"),
    [
        (1, 512, "c7i.large"),
        (2, 4096, "c7i.large"),
        (2, 4097, "m7i.large"),
        (2, 16384, "r5.large"),
        (3, 1024, "m5.xlarge"),
    ],
)
def test_the_cheapest_type_that_is_not_smaller(vcpus: int, mib: int, wanted: str) -> None:
    chosen = choose(TYPES, Need(vcpus=vcpus, memory_mib=mib))
    assert chosen is not None
    assert chosen.name == wanted


def test_only_allowed_families_count_and_their_order_decides_between_equals() -> None:
    need = Need(vcpus=2, memory_mib=2048)
    assert choose(TYPES, need, ["t3"]) == kind("t3.small", 2, 2)
    assert choose(TYPES, need, ["c5", "c7i"]) == kind("c5.large", 2, 4)
    assert choose(TYPES, need, ["x9"]) is None
    assert "t3" not in FAMILIES


def test_what_can_not_boot_the_guest_is_left_out() -> None:
    assert choose(TYPES, Need(vcpus=1, memory_mib=512, boot_mode="uefi"), ["t2"]) is None
    assert choose(TYPES, Need(vcpus=1, memory_mib=512), ["t2"]) is not None
    assert choose(TYPES, Need(vcpus=1, memory_mib=512, tpm=True), ["t2"]) is None
    assert choose(TYPES, Need(vcpus=1, memory_mib=512, volumes=27)) is None
    assert choose(TYPES, Need(vcpus=99, memory_mib=512)) is None
    arm = choose(TYPES, Need(vcpus=1, memory_mib=512, architecture="arm64", boot_mode="uefi"), ["m6g", "m5"])
    assert arm is not None
    assert arm.name == "m6g.large"


@pytest.mark.parametrize(
    ("need", "why"),
    [
        (Need(vcpus=1, memory_mib=1, architecture="arm64"), "is not arm64"),
        (Need(vcpus=1, memory_mib=1, boot_mode="uefi"), "can't boot by uefi"),
        (Need(vcpus=1, memory_mib=1, tpm=True), "has no NitroTPM"),
        (Need(vcpus=1, memory_mib=1, volumes=40), "takes 26 volumes, not 40"),
        (Need(vcpus=8, memory_mib=1), "has 2 vCPUs and 4096 MiB"),
        (Need(vcpus=1, memory_mib=1), ""),
    ],
)
def test_it_is_said_why_a_type_does_not_do(need: Need, why: str) -> None:
    assert TYPES[0].lacks(need) == why
    assert TYPES[0].lacks(Need(vcpus=99, memory_mib=1), size_too=False) == ""
