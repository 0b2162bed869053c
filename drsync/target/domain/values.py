"""What is asked of a rewrite, what a host has, and what there is to say about it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from drsync.target.domain.capabilities import DomainCapabilities, HostCapabilities

ANY_NETWORK = "*"
"""In a mapping of networks: every one that is not named itself."""


class Effect(StrEnum):
    """What a note means for the guest."""

    CHANGED = "changed"
    """Something is another than it was; the guest has all that it had."""
    LOST = "lost"
    """The guest lacks something that it had."""
    PROBLEM = "problem"
    """The domain could not be defined or started: nothing is written until this is solved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One thing that is not as it was."""

    effect: Effect
    subject: str
    """Which part of the domain: "cpu", "machine", "disk vda", "network prod", ..."""
    text: str


class Notes:
    """Collects what there is to say, in order."""

    def __init__(self) -> None:
        self.all: list[Note] = []

    def changed(self, subject: str, text: str) -> None:
        self._add(Effect.CHANGED, subject, text)

    def lost(self, subject: str, text: str) -> None:
        self._add(Effect.LOST, subject, text)

    def problem(self, subject: str, text: str) -> None:
        self._add(Effect.PROBLEM, subject, text)

    def _add(self, effect: Effect, subject: str, text: str) -> None:
        note = Note(effect=effect, subject=subject, text=text)
        if note not in self.all:
            self.all.append(note)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDisk:
    """Where the bytes of a restored disk lie on the target."""

    path: str
    format: str
    is_block_device: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What the domain remembers of where it came from (in its <metadata>): a plan that runs again finds it by this."""

    repository: str
    vm: str
    point: int
    capture: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the domain shall be on the target."""

    name: str
    uuid: str
    disks: Mapping[str, NewDisk]
    """By the disk's target (vda); a writable disk that is not in here was not captured."""
    mark: Mark
    networks: Mapping[str, str] = field(default_factory=dict)
    """Old network, bridge or device → network of the target, or "bridge:NAME"."""
    keep_mac: bool = True
    nvram_path: str | None = None
    """Where the restored NVRAM lies; None: the point has none."""
    has_tpm_state: bool = False
    in_place: bool = False
    """It comes back on the very host that it was captured on, in place of itself: its own devices are there."""
    genid: str | None = None
    """A new generation id, if the domain has one: it tells the guest that time went back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The host that the VM was captured on, as far as the point tells."""

    cpu_xml: str = ""
    """Its <cpu> in the capabilities."""
    machine: str = ""
    """The canonical machine type behind an alias such as "q35"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network of the target."""

    active: bool
    portgroups: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the target has beside its hypervisor. A set that is None could not be found out."""

    networks: Mapping[str, Network] = field(default_factory=dict)
    interfaces: frozenset[str] | None = None
    """Network devices of the host: bridges, NICs, taps."""
    filters: frozenset[str] = frozenset()
    secrets: frozenset[str] = frozenset()
    devices: frozenset[str] | None = None
    """Names of node devices: pci_0000_01_00_0, ..."""
    macs: Mapping[str, str] = field(default_factory=dict)
    """MAC address → domain of the target that has it."""
    has_path: Callable[[str], bool | None] = lambda _path: None
    """Whether a file or directory is there; None: it can't be told from here."""


class CpuJudge(Protocol):
    """Asks the target's libvirt about processors."""

    def misfit(self, cpu_xml: str) -> str:
        """Why a guest with this <cpu> can't run; empty if it can."""
        ...

    def baseline(self, cpus: Sequence[str]) -> str | None:
        """The richest <cpu> that all of `cpus` have, or None if there is none (another vendor)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What runs the domain on the target."""

    arch: str
    virt_type: str
    machine: str
    emulator: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A host, as a rewrite sees it."""

    host: HostCapabilities
    offer: DomainCapabilities
    platform: Platform
    around: Surroundings
    judge: CpuJudge


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """A domain for the target, and what is not as it was."""

    xml: str
    notes: Sequence[Note]

    @property
    def problems(self) -> Sequence[Note]:
        return [note for note in self.notes if note.effect is Effect.PROBLEM]
