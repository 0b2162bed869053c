"""Reading a running domain live, in pull mode: one job after the other, and a guest that is never hurt by it."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from command_line import Cli
from idle_domain import IdleDomain
from libvirt_site import LibvirtSite
from live_content import content_of

from drsync.errors import LiveUnavailable
from drsync.model import BLOCK_SIZE, Kind, NoPace, new_capture_id
from drsync.source import Base, BaseDisk, DiskSurvey, Source
from drsync.source.libvirt_pull import PullOptions
from drsync.source.libvirt_scratch import ScratchLimits
from drsync.source.libvirt_source import open_source
from drsync.source.libvirt_survey import LibvirtOptions

MIB: Final = 1024 * 1024
SIZES: Final = {"vda": 20 * MIB + 1536, "vdb": 4 * MIB}
TAG: Final = "00c0ffee"

pytestmark = pytest.mark.qemu


@pytest.fixture
def domain(site: LibvirtSite) -> Iterator[IdleDomain]:
    with IdleDomain(site, "pulled", SIZES) as domain:
        yield domain


def options(domain: IdleDomain, place: Path, **changes: object) -> LibvirtOptions:
    pull = PullOptions(directory=place / ".live", scratch=ScratchLimits(keep_free_bytes=0))
    values = {"vm": "web", "domain": domain.name, "uri": domain.site.uri, "repository_tag": TAG, "layers": place}
    return LibvirtOptions(**{**values, "pull": replace(pull, **changes)})  # type: ignore[arg-type]  # several types


def record(source: Source, base: Base | None = None) -> tuple[list[DiskSurvey], Base]:
    surveys = list(source.survey(base))
    capture = new_capture_id()
    definition = source.begin_recording(capture, surveys)
    disks = [BaseDisk(name=d.name, size_bytes=d.size_bytes) for d in surveys]
    return surveys, Base(capture=capture, disks=disks, definition=definition)


def test_all_of_a_disk_is_read_and_what_reads_as_zeros_is_not(domain: IdleDomain, tmp_path: Path) -> None:
    domain.io("vda", "write -P 5 0 3M", "write -P 6 10M 1024", f"write -P 9 {20 * MIB} 1536", "write -z 1M 1M")
    domain.io("vdb", "write -P 7 100k 1M")
    with open_source(options(domain, tmp_path)) as source:
        surveys, _ = record(source)
        source.check_live(surveys)
        view = source.open_live(None, surveys, pace=NoPace())
        for disk, size_bytes in SIZES.items():
            content, held, zeros = content_of(view, disk, size_bytes)
            assert content == domain.read(disk)
            assert held | zeros == set(range(-(-size_bytes // BLOCK_SIZE)))
            assert not held & zeros
        assert set(range(16, 32)) <= content_of(view, "vda", SIZES["vda"])[2]
        assert domain.job() == "Unbounded"
        view.close()
        assert domain.job() == "None"
    assert not (tmp_path / ".live").exists()


def test_a_view_of_an_increment_tells_of_what_was_written_and_zeroed_since(domain: IdleDomain, tmp_path: Path) -> None:
    domain.io("vda", "write -P 5 0 3M")
    with open_source(options(domain, tmp_path)) as source:
        _, base = record(source)
        domain.io("vda", "write -P 8 64k 64k", "write -z 1M 64k", "discard 2M 64k", f"write -P 9 {20 * MIB} 1536")
        surveys, _ = record(source, base)
        assert {d.kind for d in surveys} == {Kind.INCREMENTAL}
        view = source.open_live(base, surveys, pace=NoPace())
        domain.io("vda", "write -P 4 512k 64k")  # is in the bitmaps that record now, not in the view
        content, held, zeros = content_of(view, "vda", SIZES["vda"])
        assert held | zeros >= {1, 16, 32, 320}
        assert 8 not in held
        assert {16, 32} <= zeros
        assert content[BLOCK_SIZE : 2 * BLOCK_SIZE] == b"\x08" * BLOCK_SIZE
        assert content_of(view, "vdb", SIZES["vdb"])[1:] == (set(), set())
        view.close()


def test_a_domain_with_iothreads_is_not_read_in_pull_mode(site: LibvirtSite, tmp_path: Path) -> None:
    with IdleDomain(site, "threads", SIZES, iothread=True) as domain, open_source(options(domain, tmp_path)) as source:
        surveys = source.survey(None)
        for attempt in (
            lambda: source.check_live(surveys),
            lambda: source.begin_recording(new_capture_id(), surveys),
            lambda: source.open_live(None, surveys, pace=NoPace()),
        ):
            with pytest.raises(
                LiveUnavailable, match=r"iothreads, and a QEMU 7\.2\.\d+ may end when an NBD client leaves"
            ):
                attempt()
        assert domain.site.virsh("checkpoint-list", "threads", "--name").split() == []
        assert domain.state == "running"


def test_c6_somebody_elses_nbd_server_is_never_touched(domain: IdleDomain, tmp_path: Path) -> None:
    theirs = domain.site.path / "theirs"
    domain.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(theirs)}})
    with open_source(options(domain, tmp_path)) as source:
        surveys, base = record(source)
        with pytest.raises(LiveUnavailable, match="already running"):
            source.open_live(None, surveys, pace=NoPace())
        assert domain.job() == "None"
        assert not (tmp_path / ".live").exists()
        assert {d.kind for d in source.survey(base)} == {Kind.INCREMENTAL}
        domain.execute("nbd-server-stop")  # it is there still
        view = source.open_live(None, surveys, pace=NoPace())
        assert content_of(view, "vdb", SIZES["vdb"])[0] == domain.read("vdb")
        view.close()


@pytest.mark.alone  # what is free must stay so to 2 MiB
def test_config_check_tells_how_a_full_would_be_read(site: LibvirtSite, tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    with ExitStack() as stack:
        for name, changes in (("plain", {}), ("threads", {"iothread": True}), ("raw", {"formats": {"vda": "raw"}})):
            stack.enter_context(IdleDomain(site, name, {"vda": 8 * MIB}, **changes)).io("vda", "write -P 5 0 4M")
        vms = "".join(
            f'[[vm]]\nname = "{name}"\nsource = "libvirt"\nuri = "{site.uri}"\n' for name in ("plain", "threads", "raw")
        )
        cli.configure(spool='stream_above = "1MiB"', extra=vms)
        cli.ok("init")
        text = cli.ok("config", "check").stdout
        assert "vm plain: vda: would read live up to" in text
        for name, reason in (
            ("threads", "it has iothreads, and a QEMU 7.2."),
            ("raw", "libvirt keeps bitmaps of qcow2"),
        ):
            assert f"vm {name}: vda: would capture up to" in text
            assert f"vm {name}: can't be read live: {reason}" in text
        assert text.count("; so a full needs room in the spool") == 2
        reserve = f'reserve = "{reserve_leaving(cli.spool, 3 * MIB)}B"'
        cli.config.write_text(cli.config.read_text().replace('reserve = "1MiB"', reserve))
        error, remedy = cli.refused(64, "capture", "threads")
        assert "and its disks can't be read live: it has iothreads, and a QEMU 7.2." in error
        assert remedy.startswith(f"df -h {cli.spool}")
        assert cli.ok("capture", "plain", "--json").json["result"] == "committed"


def reserve_leaving(spool: Path, room_bytes: int) -> int:
    """A reserve beside which just this room is free."""
    return shutil.disk_usage(spool).free - room_bytes
