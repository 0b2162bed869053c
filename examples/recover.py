#!/usr/bin/env python3
"""Restore a disk from a drsync repository without drsync: nothing but the rules of docs/format.md (F1, F2 …).

    python3 recover.py REPOSITORY VM DISK OUTPUT --key FILE [--point N]

REPOSITORY is the directory of a file:// repository, or a copy of a bucket (aws s3 sync s3://BUCKET/PREFIX DIRECTORY).
FILE is a key file, or holds the recovery key, a passphrase, or what KMS decrypts (--key kms says how to get that);
"-" is stdin. OUTPUT becomes a sparse raw image.
Needs: python3 -m pip install cryptography zstandard. Memory: 16 MiB for each TiB of the disk, and an index.
What is missing, changed or cannot be told for sure is refused (exit status 1), and no OUTPUT is left.
"""

import argparse
import array
import base64
import contextlib
import hashlib
import json
import os
import re
import shlex
import struct
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

BLOCK, MIB = 65536, 1024 * 1024
MAGIC, FOOTER = b"DRSYNC1\n", struct.Struct("<IIQ32s8s")
NOT_AS_WRITTEN = (InvalidTag, zstandard.ZstdError, struct.error, ValueError, TypeError, LookupError, RecursionError)
Point = dict[str, Any]
Rows = tuple[list[tuple[int, int, int]], list[tuple[int, int]]]  # (block, offset, length) of frames; zero runs


class Refused(Exception):
    """The disk can't be restored exactly as it was."""


def need(fact: bool, problem: str) -> None:
    if not fact:
        raise Refused(problem)


@contextlib.contextmanager
def reading(name: object) -> Iterator[None]:
    try:
        yield
    except NOT_AS_WRITTEN as err:
        raise Refused(f"{name} is not as it was written: {type(err).__name__} {err}") from err
    except Refused as err:
        raise Refused(f"{name}: {err}") from err


def small_json(path: Path, limit: int = 64 * 1024) -> Any:
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    need(len(raw) <= limit, "it is too large")
    return json.loads(raw)


def unzip(packed: bytes, limit: int) -> bytes:  # F10
    size = zstandard.frame_content_size(packed)
    need(0 < size <= limit, f"it would take {size} bytes")  # 0 is what a frame to skip claims, of any size
    return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:  # "Keys"
    return HKDF(SHA256(), 32, salt, info).derive(key)


def vm_keys(text: str, path: Path, identifier: bytes, vm: str, key_check: str) -> list[bytes]:
    """A VM's keys, one a generation, from what somebody has ("Key file", "Recovery key", "Key ring")."""
    lines = [line.strip().split(":") for line in text.splitlines()]
    if lines and lines[0][0] == "drsync-host-key":
        need(lines[0][1] == identifier.hex(), "it is not this repository's")
        mine = [line for line in lines if line[:2] == ["drsync-vm-key", vm]]
        need(bool(mine), f"it has no key of VM {vm}")
        return [bytes.fromhex(line[3]) for line in mine]
    if lines and lines[0][0] == "drsync-root-key":
        roots = [bytes.fromhex(line[1 if n == 0 else 2]) for n, line in enumerate(lines)]
    else:
        roots = root_keys(text, path, identifier)
    check = derive(roots[0], identifier, b"drsync key check")[:16].hex()
    need(check == key_check, "it is not this repository's")  # F5
    return [derive(root, identifier, b"drsync vm\0" + vm.encode()) for root in roots]


def root_keys(text: str, path: Path, identifier: bytes) -> list[bytes]:
    """The root keys, by the recovery key or a passphrase."""
    recovery = recovery_secret(text)
    rings = sorted((path / "keys").glob(f"ring-{identifier.hex()}-*.json"))
    if rings:
        with reading(rings[-1]):
            return open_ring(rings[-1], identifier, text, recovery)
    need(recovery is not None, "it is neither a key file nor a recovery key")
    slot = base64.b64decode(small_json(path / f"keys/recovery-{identifier.hex()}.json")["wrapped"])
    wrapping_key = AESGCM(derive(recovery or b"", identifier, b"drsync recovery slot"))
    return [wrapping_key.decrypt(slot[:12], slot[12:], b"drsync root key")]


def recovery_secret(text: str) -> bytes | None:
    digits = "".join(text.split()).replace("-", "").upper().replace("0", "O").replace("1", "I")
    if not re.fullmatch("[A-Z2-7]{56}", digits):
        return None
    raw = base64.b32decode(digits)
    check = hashlib.sha256(b"drsync recovery key" + raw[:32]).digest()[:3]
    need(raw[32:] == check, "the recovery key has a typing error")
    return raw[:32]


def open_ring(path: Path, identifier: bytes, text: str, recovery: bytes | None) -> list[bytes]:
    """The root keys in a key ring, by the first slot that takes what was given (F45, F46)."""
    raw = path.read_bytes()[: 128 * 1024]
    clear, _, sealed = raw.partition(b"\n")
    ring = json.loads(clear)
    said = (ring["format"], ring["repository"], f"{ring['number']:016x}")
    need(said == (1, identifier.hex(), path.stem[-16:]), "it is not what its name says")
    if re.fullmatch("[A-Za-z0-9+/]{43}=", text.strip()):
        with contextlib.suppress(InvalidTag):  # it's a passphrase that looks like one
            return unseal(base64.b64decode(text), identifier, clear, sealed)[1]
    for slot in ring["slots"]:
        secret = slot_secret(slot, text, recovery)
        if secret is None:
            continue
        private = X25519PrivateKey.from_private_bytes(derive(secret, identifier, b"drsync slot key"))
        if private.public_key().public_bytes_raw().hex() != slot["public"]:
            continue
        info = b"drsync slot\0" + identifier + struct.pack("<Q", ring["number"]) + slot["name"].encode()
        suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
        ring_key = suite.decrypt(base64.b64decode(slot["wrapped"]), private, info=info)
        authority, roots = unseal(ring_key, identifier, clear, sealed)
        proof = derive(secret, identifier, b"drsync slot proof" + authority)
        need(proof.hex() == slot["proof"], "it was made by somebody who had none of its slots")
        return roots
    commands = [f"\n{kms_command(slot, identifier)}" for slot in ring["slots"] if slot["kind"] == "kms"]
    by_kms = f"; KMS gives FILE, as long as it is there:{''.join(commands)}" if commands else ""
    raise Refused(f"none of its slots takes this key or passphrase{by_kms}")


def unseal(ring_key: bytes, identifier: bytes, clear: bytes, sealed: bytes) -> tuple[bytes, list[bytes]]:
    """The authority and the root keys."""
    cipher = AESGCM(derive(ring_key, identifier, b"drsync key ring"))
    kept = json.loads(cipher.decrypt(bytes(12), base64.b64decode(sealed), clear))
    return bytes.fromhex(kept["authority"]), [bytes.fromhex(root) for root in kept["roots"]]


def kms_command(slot: dict[str, Any], identifier: bytes) -> str:
    """The AWS CLI's command that has a slot's KMS key decrypt the ring key."""
    told = [slot["key"], slot["wrapped"], slot.get("region", "")]
    need(all(re.fullmatch("[A-Za-z0-9:/+=._-]*", word) for word in told), "a KMS slot of it names no key")
    context = json.dumps({"drsync:repository": identifier.hex()})
    words = ["aws", "kms", "decrypt", "--key-id", slot["key"], "--encryption-context", context]
    words += ["--ciphertext-blob", slot["wrapped"], "--query", "Plaintext", "--output", "text"]
    words += ["--region", slot["region"]] if slot.get("region") else []
    return shlex.join(words) + " > FILE"


def slot_secret(slot: dict[str, Any], text: str, recovery: bytes | None) -> bytes | None:
    if slot["kind"] == "recovery":
        return recovery
    if slot["kind"] != "passphrase" or recovery is not None:
        return None
    cost = {"r": 8, "p": 1, "log2_n": 17, **slot["scrypt"]}
    need(10 <= cost["log2_n"] <= 20 and 1 <= cost["r"] <= 16 and 1 <= cost["p"] <= 4, "its scrypt is out of bounds")
    need(128 * cost["r"] << cost["log2_n"] <= 1 << 30, "its scrypt is out of bounds")  # F47
    scrypt = Scrypt(salt=bytes.fromhex(cost["salt"]), length=32, n=1 << cost["log2_n"], r=cost["r"], p=cost["p"])
    return scrypt.derive(unicodedata.normalize("NFC", text.rstrip("\r\n")).encode())


class Repository:
    """A repository, and the keys of one VM in it."""

    def __init__(self, path: Path, vm: str, key_text: str) -> None:
        need(re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", vm) is not None, f"no VM has the name {vm!r}")  # F2
        self.path, self.vm = path, vm
        with reading(path / "repo.json"):
            record = small_json(path / "repo.json")
            known = (record["format"], record["features"], record["block_size"]) == (1, [], BLOCK)
            need(known, "it needs a newer program")  # F4
            self.id = bytes.fromhex(record["id"])
        with reading("the key"):
            self.vm_keys = vm_keys(key_text, path, self.id, vm, record["key_check"])

    def vm_key(self, generation: int) -> bytes:
        has = len(self.vm_keys)
        need(1 <= generation <= has, f"it is under the key of generation {generation}; what was given has {has}")
        return self.vm_keys[generation - 1]

    def numbers(self, folder: str) -> list[int]:
        """The numbers of the segments or horizons that are there, in order."""
        names = [path.name for path in (self.path / f"vm/{self.vm}/{folder}").glob("*")]
        return sorted(int(name, 16) for name in names if re.fullmatch("[0-9a-f]{16}", name))

    def newest(self) -> int:
        """The number of the newest segment, which must not be older than what the hosts know of (F16)."""
        newest = max(self.numbers("log"), default=0)
        for path in (self.path / "host").glob("*.json"):
            try:
                with reading(path):
                    known = self.heartbeat(path)
            except Refused:
                continue  # F21
            need(known <= newest, f"segment {known} is missing; --point {newest} takes the newest that is there")
        need(newest > 0, f"VM {self.vm} has no point")
        return newest

    def heartbeat(self, path: Path) -> int:
        generation, _, sealed = small_json(path, 16 * MIB)["vms"][self.vm].rpartition(":")
        raw = base64.b64decode(sealed)
        bound = b"drsync heartbeat\0" + self.id + self.vm.encode()
        key = AESGCM(derive(self.vm_key(int(generation or 1)), b"", b"drsync heartbeat"))
        return int(json.loads(key.decrypt(raw[:12], raw[12:], bound))["seq"])


class Sealed:
    """A segment, pack or horizon whose index has been authenticated ("Objects"), and is taken apart by columns."""

    def __init__(self, repository: Repository, name: str, kind: str, seq: int) -> None:  # F7, F8, F9
        self.path = repository.path / name
        with self.path.open("rb") as file:
            self.length = os.fstat(file.fileno()).st_size
            need(len(MAGIC) + FOOTER.size <= self.length <= 256 * MIB, "its size is none that an object has")
            magic, footer = file.read(8), os.pread(file.fileno(), FOOTER.size, self.length - FOOTER.size)
            header_length, index_length, length, _, end_magic = FOOTER.unpack(footer)
            need(magic == end_magic == MAGIC and length == self.length, "it is cut, extended or something else")
            self.frames_end = self.length - FOOTER.size - index_length - header_length
            need(header_length <= 4096 and index_length <= 64 * MIB and self.frames_end >= 8, "it is malformed")
            head = os.pread(file.fileno(), header_length, self.frames_end)
            sealed = os.pread(file.fileno(), index_length, self.frames_end + header_length)
        header = json.loads(head)
        object_id = bytes.fromhex(header["object"])
        said = (header["kind"], header["repository"], header["vm"], header["seq"], header["format"], len(object_id))
        need(said == (kind, repository.id.hex(), repository.vm, seq, 1, 16), "it is not what its name says")
        need(kind in ("segment", "horizon") or name.endswith(object_id.hex()), "it is another than its name says")
        self.generation = header.get("generation", 1)
        vm_key = repository.vm_key(self.generation)
        index_key = AESGCM(derive(vm_key, object_id, b"drsync index"))
        self.rest = memoryview(unzip(index_key.decrypt(bytes(12), sealed, head), 64 * MIB))
        self.index_sha256 = hashlib.sha256(sealed).digest()
        self.frame_key = AESGCM(derive(vm_key, object_id, b"drsync frame"))
        self.meta = json.loads(bytes(self.take(int.from_bytes(self.take(4), "little"))))

    def take(self, size: int) -> memoryview:
        need(0 <= size <= len(self.rest), "its index is shorter than it says")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def numbers(self, code: str, count: int) -> list[int]:
        column = array.array(code)
        column.frombytes(self.take(count * column.itemsize))
        if sys.byteorder == "big":
            column.byteswap()
        return column.tolist()

    def column(self, width: int, count: int) -> list[bytes]:
        taken = self.take(width * count)
        return [bytes(taken[width * n : width * (n + 1)]) for n in range(count)]

    def pack_table(self) -> list[tuple[str, int, bytes, int, int]]:
        """Object id, length and hash of the index of each pack that a segment lists, and what it can hold."""
        count = self.meta["packs"]
        ids, lengths, hashes = self.column(16, count), self.numbers("Q", count), self.column(32, count)
        first, last = self.numbers("Q", count), self.numbers("Q", count)
        return [(ids[n].hex(), lengths[n], hashes[n], first[n], last[n]) for n in range(count)]

    def rows(self, point: Point) -> dict[str, Rows]:
        """What it holds of each disk, which must fit the point (F7, F13)."""
        found: dict[str, Rows] = {}
        offset = len(MAGIC)
        for held in self.meta["contents"]:
            size = {disk["name"]: disk["size_bytes"] for disk in point["disks"]}[held["disk"]]
            blocks, lengths = self.numbers("I", held["rows"]), self.numbers("I", held["rows"])
            self.take(16 * held["rows"])  # hashes: for comparing, not for restoring
            zeros = [*zip(*(self.numbers("I", held["zero_runs"]) for _ in range(2)), strict=True)]
            need(blocks == sorted(blocks) and zeros == sorted(zeros), "its rows are not in order")
            end, frames = 0, []
            for first, count in sorted([*((block, 1) for block in blocks), *zeros]):
                need(first >= end and count > 0, "its rows overlap")
                end = first + count
            need(end * BLOCK < size + BLOCK and held["disk"] not in found, "its rows lie outside of the disk")
            for block, length in zip(blocks, lengths, strict=True):
                frames.append((block, offset, length))
                offset += length
            found[held["disk"]] = (frames, zeros)
        need(not self.rest and offset == self.frames_end, "its frames are not those of its index")
        return found


class Horizon:
    """What was pruned ("Horizon"): which points survive, and the merged segments that stand in the holes of the log."""

    def __init__(self, repository: Repository) -> None:
        numbers = repository.numbers("horizon")
        need(numbers == [*range(1, len(numbers) + 1)], "a horizon is missing")  # F30
        self.through, self.segment = 0, ""
        self.survivors: dict[int, bytes] = {}
        self.holes: dict[int, tuple[int, str, bytes, bytes]] = {}  # by the last segment: first, name and two hashes
        if not numbers:
            return
        with reading(name := f"vm/{repository.vm}/horizon/{numbers[-1]:016x}"):
            found = Sealed(repository, name, "horizon", numbers[-1])
            need(found.meta["number"] == numbers[-1], "it is of another number")
            self.through, self.segment = found.meta["through"], found.meta["segment"]
            points, holes = found.meta["points"], found.meta["merged"]
            self.survivors = dict(zip(found.numbers("Q", points), found.column(32, points), strict=True))
            firsts, lasts, ids = found.numbers("Q", holes), found.numbers("Q", holes), found.column(16, holes)
            hashes, ends = found.column(32, holes), found.column(32, holes)
            for n, last in enumerate(lasts):
                need((lasts[n - 1] if n else 0) < firsts[n] <= last < self.through, "its holes are not in order")
                merged = f"vm/{repository.vm}/merged/{last:016x}-{ids[n].hex()}"
                self.holes[last] = firsts[n], merged, hashes[n], ends[n]

    def check(self, seq: int, index_sha256: bytes) -> None:
        """A segment must be the one that the horizon knows (F32)."""
        known = self.survivors.get(seq, index_sha256)
        need(known == index_sha256, "it is another segment than the horizon knows")
        need(seq != self.through or index_sha256.hex() == self.segment, "it is not the newest that the horizon knows")


class Recovery:
    """One disk of one point on its way into a file ("Reading a point"): from the newest segment back."""

    def __init__(self, repository: Repository, disk: str, output: int) -> None:
        self.repository, self.disk, self.output = repository, disk, output
        self.complete = False  # its full has been read: what is older says nothing

    def run(self, last: int, *, exactly: bool, begin: int = 1) -> int:
        """Write the disk as segment `last` left it, from segment `begin` on; the number of the point that this is."""
        horizon = Horizon(self.repository)
        need(last > horizon.through or last in horizon.survivors, f"point {last} was pruned, or is none")  # F31
        need(
            exactly or last >= horizon.through, f"segment {horizon.through} is missing, which the horizon knows"
        )  # F16
        follows, above, found, seq, generation = "", Point(disks=[]), 0, last, sys.maxsize
        while seq >= begin:
            first, name, merged, ends = horizon.holes.get(seq, (seq, "", b"", b""))
            with reading(name := name or f"vm/{self.repository.vm}/log/{seq:016x}"):
                segment = Sealed(self.repository, name, "merged" if merged else "segment", seq)
                point = segment.meta["point"] or Point(disks=[])
                need(segment.meta["seq"] == seq, "it is of another number")
                need(not merged or segment.index_sha256 == merged, "it is not the one that the horizon names")  # F33
                index_sha256 = ends or segment.index_sha256
                horizon.check(seq, index_sha256)
                need(follows == index_sha256.hex() or seq == last, "the next one does not follow it")  # F12
                need(segment.generation <= generation, "the next one is under an older key")  # F48
                follows, seq, generation = segment.meta["previous"], first - 1, segment.generation
                if not found and (segment.meta["point"] is not None or exactly):
                    self.begin(point)
                    found = segment.meta["seq"]
                self.read(segment, point)
                if segment.meta["point"] is not None:
                    check_follows(above, point)
                    above = point
        with reading("the first segment"):
            need((follows == "" or begin > 1) and found > 0, "it follows another one, or there is no point")
            check_follows(above, Point(disks=[]))
        return found

    def begin(self, point: Point) -> None:
        sizes = {disk["name"]: disk["size_bytes"] for disk in point["disks"]}
        need(self.disk in sizes, f"it has no disk {self.disk!r}, but {sorted(sizes) or 'no point at all'}")
        self.size: int = sizes[self.disk]
        os.truncate(self.output, self.size)
        self.limit = -(-self.size // BLOCK)  # of what is older, only blocks below count
        self.settled = bytearray(self.limit)  # blocks of which something newer has told

    def read(self, segment: Sealed, point: Point) -> None:
        packs, own = segment.pack_table(), segment.rows(point)
        need(not (packs and not point["disks"]), "it is no point, but has packs")  # F13
        disks = {disk["name"]: disk for disk in point["disks"]}
        need(len(disks) == len(point["disks"]), "it has a disk twice")  # F15
        if self.complete or self.disk not in disks:
            return
        disk = disks[self.disk]
        self.limit = min(self.limit, -(-disk["size_bytes"] // BLOCK))
        self.lay(segment, own)
        low = [*disks].index(self.disk) << 32
        for object_id, length, index_sha256, begin, end in reversed(packs):
            if all(self.settled[max(0, begin - low) : max(0, min(end - low + 1, self.limit))]):
                continue  # what it can hold is settled: it may as well be lost (F52)
            with reading(name := f"vm/{self.repository.vm}/pack/{object_id}"):
                pack = Sealed(self.repository, name, "pack", 0)
                need((pack.length, pack.index_sha256) == (length, index_sha256), "it is not the one listed")  # F14
                self.lay(pack, pack.rows(point))
        self.complete = disk["kind"] == "full"

    def lay(self, held_by: Sealed, rows: dict[str, Rows]) -> None:
        frames, zeros = rows.get(self.disk, ([], []))
        bound = self.repository.id + self.disk.encode() + b"\0"
        with held_by.path.open("rb") as file:
            for block, offset, length in frames:
                if block < self.limit and not self.settled[block]:
                    frame = os.pread(file.fileno(), min(length, 2 * BLOCK), offset)
                    nonce, place = struct.pack("<IQ", 0, offset), bound + struct.pack("<Q", block)
                    self.write(block, unzip(held_by.frame_key.decrypt(nonce, frame, place), BLOCK))  # F11
        for first, count in zeros:
            end = max(first, min(first + count, self.limit))
            self.settled[first:end] = b"\1" * (end - first)

    def write(self, block: int, plain: bytes) -> None:
        need(len(plain) == min(BLOCK, self.size - block * BLOCK), f"block {block} has a wrong length")
        need(os.pwrite(self.output, plain, block * BLOCK) == len(plain), "no room is left for OUTPUT")
        self.settled[block] = 1


def check_follows(after: Point, before: Point) -> None:
    """Each disk of a point must be full, or lie on the point before (F15)."""
    known = {disk["name"]: disk["size_bytes"] for disk in before["disks"]}
    for disk in after["disks"]:
        need(disk["kind"] == "full" or disk["name"] in known, f"disk {disk['name']} has no full below it")
        if disk["kind"] == "incremental":
            same = after["base"] == before["capture"] and disk["size_bytes"] == known[disk["name"]]
            need(same, f"disk {disk['name']} is no increment of the point before")


def key_text(source: str) -> str:
    if source == "kms":
        return ""  # opens no slot, so that all that KMS could open are told
    return sys.stdin.read(4 * MIB) if source == "-" else Path(source).read_text()


def recover(options: argparse.Namespace) -> int:
    """Restore what the options say; the number of the point."""
    need(not os.path.lexists(options.output), f"{options.output} exists already")
    repository = Repository(options.repository, options.vm, key_text(options.key))
    last: int = repository.newest() if options.point is None else options.point
    need(last >= options.begin > 0, "points are numbered from 1")
    partial = options.output.with_name(options.output.name + ".partial")
    output = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        recovery = Recovery(repository, options.disk, output)
        point = recovery.run(last, exactly=options.point is not None, begin=options.begin)
        os.fsync(output)
        partial.rename(options.output)  # F17
    except BaseException:
        partial.unlink()
        raise
    finally:
        os.close(output)
    return point


def main() -> None:
    parser = argparse.ArgumentParser(description="Restore a disk from a drsync repository without drsync.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("vm")
    parser.add_argument("disk")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--key",
        required=True,
        help="file with keys, recovery key, passphrase or what KMS gave; - for stdin; kms: how KMS is asked",
    )
    parser.add_argument("--point", type=int, help="number of the point; the newest if left out")
    begin = "number of a point with all disks in full: what lies before it is not looked at, since it is damaged (F54)"
    parser.add_argument("--from", type=int, default=1, dest="begin", help=begin)
    options = parser.parse_args()
    try:
        point = recover(options)
    except (Refused, OSError, UnicodeDecodeError) as err:
        sys.exit(f"recover: refused: {err}")
    print(f"restored disk {options.disk} of VM {options.vm} at point {point} to {options.output}")


if __name__ == "__main__":
    main()
