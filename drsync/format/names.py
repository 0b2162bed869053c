"""The names of objects, below the repository's prefix. The only place that builds one.

repo.json                     what this repository is
keys/recovery-<id>.json       the root key of repository <id>, wrapped by its recovery key
keys/ring-<id>-<n:016x>.json  from the first change of its keys on: the root keys, and the slots that open them
keys/generation-<id>-<g:04x>  there is a root key of this generation: for hosts, who see names there and read nothing
vm/<vm>/log/<seq:016x>        a segment
vm/<vm>/pack/<id>             a pack
vm/<vm>/map/<seq:016x>-<id>   a block map
vm/<vm>/damage/<seq:016x>-<id>  a damage record
vm/<vm>/merged/<last:016x>-<id>  a merged segment: stands for several up to `last`
vm/<vm>/horizon/<n:016x>      which points survive, and what stands for what was taken out
vm/<vm>/pin/<n:016x>          a pin record
host/<host>.json              a heartbeat; the only object that is overwritten
"""

import re
from typing import Final

from drsync.format import Malformed

REPOSITORY: Final = "repo.json"
MAX_SEQ: Final = 2**63 - 1


def recovery_slot(repository_id: bytes) -> str:
    """The name of a repository's recovery slot.

    It holds the repository's id, so that two that are made in one place at the
    same moment don't overwrite each other's slot: only one becomes the repository.
    """
    return f"keys/recovery-{repository_id.hex()}.json"


def ring_prefix(repository_id: bytes) -> str:
    """What the names of a repository's key rings start with."""
    return f"keys/ring-{repository_id.hex()}-"


def ring(repository_id: bytes, number: int) -> str:
    """The name of a repository's key ring `number`; the highest one counts."""
    return f"{ring_prefix(repository_id)}{number:016x}.json"


def number_of_ring(name: str) -> int:
    """The number in a key ring's name.

    Raises:
        Malformed: the name is not a key ring's.
    """
    match = re.fullmatch(r"keys/ring-[0-9a-f]{32}-([0-9a-f]{16})\.json", name)
    if match is None:
        raise Malformed("its name is not a key ring's")
    return int(match[1], 16)


def generation_prefix(repository_id: bytes) -> str:
    """What the names start with that tell of a repository's later root keys."""
    return f"keys/generation-{repository_id.hex()}-"


def generation(repository_id: bytes, number: int) -> str:
    """The name that tells of the root key of generation `number`."""
    return f"{generation_prefix(repository_id)}{number:04x}"


def generation_told(name: str) -> int:
    """The generation that a name tells of.

    Raises:
        Malformed: it tells of none.
    """
    match = re.fullmatch(r"keys/generation-[0-9a-f]{32}-([0-9a-f]{4})", name)
    if match is None:
        raise Malformed("its name tells of no generation")
    return int(match[1], 16)


def log_prefix(vm: str) -> str:
    """What the names of a VM's segments start with."""
    return f"vm/{vm}/log/"


def segment(vm: str, seq: int) -> str:
    """The name of segment `seq`."""
    return f"{log_prefix(vm)}{seq:016x}"


def seq_of_segment(name: str) -> int:
    """The number in a segment's name.

    Raises:
        Malformed: the name is not a segment's.
    """
    match = re.fullmatch(r"vm/[^/]+/log/([0-9a-f]{16})", name)
    if match is None or not 1 <= int(match[1], 16) <= MAX_SEQ:
        raise Malformed("its name is not a segment's")
    return int(match[1], 16)


def pack_prefix(vm: str) -> str:
    """What the names of a VM's packs start with."""
    return f"vm/{vm}/pack/"


def pack(vm: str, object_id: bytes) -> str:
    """The name of a pack."""
    return f"{pack_prefix(vm)}{object_id.hex()}"


def map_prefix(vm: str) -> str:
    """What the names of a VM's block maps start with."""
    return f"vm/{vm}/map/"


def block_map(vm: str, seq: int, object_id: bytes) -> str:
    """The name of a block map of point `seq`."""
    return f"{map_prefix(vm)}{seq:016x}-{object_id.hex()}"


def seq_of_map(name: str) -> int:
    """The number of the point whose map this is.

    Raises:
        Malformed: the name is not a map's.
    """
    match = re.fullmatch(r"vm/[^/]+/map/([0-9a-f]{16})-[0-9a-f]{32}", name)
    if match is None:
        raise Malformed("its name is not a block map's")
    return int(match[1], 16)


def damage_prefix(vm: str) -> str:
    """What the names of a VM's damage records start with."""
    return f"vm/{vm}/damage/"


def damage(vm: str, seq: int, object_id: bytes) -> str:
    """The name of a record of damage to segment `seq`, or to a pack that it lists."""
    return f"{damage_prefix(vm)}{seq:016x}-{object_id.hex()}"


def seq_of_damage(name: str) -> int:
    """The number of the segment that a damage record tells of.

    Raises:
        Malformed: the name is not a damage record's.
    """
    match = re.fullmatch(r"vm/[^/]+/damage/([0-9a-f]{16})-[0-9a-f]{32}", name)
    if match is None:
        raise Malformed("its name is not a damage record's")
    return int(match[1], 16)


def pin_prefix(vm: str) -> str:
    """What the names of a VM's pin records start with."""
    return f"vm/{vm}/pin/"


def pin(vm: str, number: int) -> str:
    """The name of pin record `number`."""
    return f"{pin_prefix(vm)}{number:016x}"


def number_of_pin(name: str) -> int:
    """The number in a pin record's name.

    Raises:
        Malformed: the name is not a pin record's.
    """
    match = re.fullmatch(r"vm/[^/]+/pin/([0-9a-f]{16})", name)
    if match is None or not 1 <= int(match[1], 16) <= MAX_SEQ:
        raise Malformed("its name is not a pin record's")
    return int(match[1], 16)


def merged_prefix(vm: str) -> str:
    """What the names of a VM's merged segments start with."""
    return f"vm/{vm}/merged/"


def merged(vm: str, last: int, object_id: bytes) -> str:
    """The name of a merged segment that stands for segments up to `last`."""
    return f"{merged_prefix(vm)}{last:016x}-{object_id.hex()}"


def horizon_prefix(vm: str) -> str:
    """What the names of a VM's horizons start with."""
    return f"vm/{vm}/horizon/"


def horizon(vm: str, number: int) -> str:
    """The name of horizon `number`."""
    return f"{horizon_prefix(vm)}{number:016x}"


def number_of_horizon(name: str) -> int:
    """The number in a horizon's name.

    Raises:
        Malformed: the name is not a horizon's.
    """
    match = re.fullmatch(r"vm/[^/]+/horizon/([0-9a-f]{16})", name)
    if match is None or not 1 <= int(match[1], 16) <= MAX_SEQ:
        raise Malformed("its name is not a horizon's")
    return int(match[1], 16)


def object_id_of(name: str) -> bytes:
    """The object id at the end of the name of a pack, map or merged segment.

    Raises:
        Malformed: there is none.
    """
    tail = name[-32:]
    if not re.fullmatch(r"[0-9a-f]{32}", tail):
        raise Malformed("its name has no object id")
    return bytes.fromhex(tail)


def heartbeat(host: str) -> str:
    """The name of a host's heartbeat."""
    return f"host/{host}.json"


HEARTBEAT_PREFIX: Final = "host/"
VM_PREFIX: Final = "vm/"
