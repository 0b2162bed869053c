"""Holds an RPO of 10 s on a guest that keeps writing 10 MB/s: the daemon's lag, second by second, and its plot."""

import shutil
import statistics
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

from bench.disk_data import real_files
from bench.libvirt_rounds import guest_image
from bench.libvirt_tools import DrsyncLibvirt
from bench.libvirt_vm import LibvirtVm
from libvirt_site import LibvirtSite

from drsync.config import load_config
from drsync.model import SystemClock
from drsync.overview import Overview
from drsync.session import Session

RPO_S: Final = 10.0
_RATE_MIB_PER_S: Final = 10
_FIRST_POINT_S: Final = 600.0


def hold_rpo(work: Path, *, minutes: float, plot: Path) -> None:
    """Run the daemon for so long after its first point; print how the lag was, and draw it."""
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        directory = work / "rpo"
        shutil.rmtree(directory, ignore_errors=True)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        site = stack.enter_context(LibvirtSite())
        tool = DrsyncLibvirt(site, directory, "busy")
        vm = stack.enter_context(closing(LibvirtVm(site, "busy", guest_image(), real_files(work, 1))))
        daemon = tool.daemon()
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        lags = _watch(tool.config, vm, minutes)
    inside = sum(lag <= RPO_S for _, lag in lags) / len(lags)
    longest = max(lag for _, lag in lags)
    middle = statistics.median(lag for _, lag in lags)
    print(f"RPO {RPO_S:g} s, {minutes:g} minutes at {_RATE_MIB_PER_S} MiB/s: lag median {middle:.1f} s, ", end="")
    print(f"longest {longest:.1f} s, within the RPO {inside:.1%} of the time")
    _draw(lags, plot)
    print(f"drawn: {plot}")


def _watch(config: Path, vm: LibvirtVm, minutes: float) -> list[tuple[float, float]]:
    """The lag of the VM's newest point, each second: (seconds since the start, seconds)."""
    session = Session(load_config(config), SystemClock())
    deadline = time.monotonic() + _FIRST_POINT_S
    while _lag_s(session) is None:
        if time.monotonic() > deadline:
            raise SystemExit(f"there was no first point in {_FIRST_POINT_S:g} s")
        time.sleep(0.5)
    vm.write_at(_RATE_MIB_PER_S)
    started, lags = time.monotonic(), []
    while (now := time.monotonic() - started) < minutes * 60:
        lag = _lag_s(session)
        if lag is not None:
            lags.append((now, lag))
        time.sleep(1)
    return lags


def _lag_s(session: Session) -> float | None:
    (status,) = Overview(session).status()
    return status.lag_s


def _draw(lags: list[tuple[float, float]], plot: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots()
    axes.plot([at for at, _ in lags], [lag for _, lag in lags], linewidth=0.8)
    axes.axhline(RPO_S, color="red", linewidth=0.8, label=f"RPO {RPO_S:g} s")
    axes.set_xlabel("seconds")
    axes.set_ylabel("lag of the newest point, s")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(plot, dpi=120)
