"""The runs on libvirt. In each, every step goes through all tools before the next step starts.

    idle ─▶ full of each ─▶ change ─▶ increment of each ─▶ restore of each

Each tool has a VM of its own, with the same data; while one is measured the others stand still.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from bench.disk_data import holds, real_files
from bench.guest_latency import Latency
from bench.libvirt_goals import libvirt_goals
from bench.libvirt_tools import DrsyncLibvirt, LibvirtTool, VirtnbdLibvirt
from bench.libvirt_vm import LibvirtVm
from bench.measuring import Figure, Journal, Usage, settle, used_bytes
from bench.tools import NotMeasured
from libvirt_site import LibvirtSite

_ROOT = Path(__file__).parents[2]
_IDLE_S = 10.0


def measure_libvirt(work: Path, *, size_gib: int, runs: int, output: Path | None) -> None:
    """Run, print, and write the figures to `output`."""
    work.mkdir(parents=True, exist_ok=True)
    data = real_files(work, size_gib)
    journal = Journal()
    latencies: list[tuple[str, str, Latency]] = []
    for number in range(1, runs + 1):
        print(f"run {number} of {runs}")
        with ExitStack() as stack:
            LibvirtRound(stack, work, data, journal, latencies, number).measure()
    print(f"\nmedians of {runs} runs, highest peak")
    for figure in journal.medians():
        print(figure)
    print()
    for goal in libvirt_goals(journal, latencies):
        print(goal)
    if output is not None:
        machine = {"cpus": os.cpu_count(), "system": platform.platform(), "size_gib": size_gib}
        latency = [{"tool": tool, "step": step, **asdict(found)} for tool, step, found in latencies]
        kept = {"machine": machine, "figures": [asdict(f) for f in journal.figures], "write_latency": latency}
        output.write_text(json.dumps(kept, indent=2) + "\n")


def guest_image() -> Path:
    """The small guest's disk, built once."""
    command = ["bash", str(_ROOT / "examples/guest/build.sh")]
    built = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    return Path(built.stdout.splitlines()[-1])


class LibvirtRound:
    """One run: a new site, new VMs, new repositories."""

    def __init__(
        self,
        stack: ExitStack,
        work: Path,
        data: Path,
        journal: Journal,
        latencies: list[tuple[str, str, Latency]],
        number: int,
    ) -> None:
        directory = work / "libvirt"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        directory.chmod(0o711)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        site = stack.enter_context(LibvirtSite())
        self._journal = journal
        self._latencies = latencies
        self._number = number
        self._tools: list[tuple[LibvirtTool, LibvirtVm]] = []
        for make in (DrsyncLibvirt, VirtnbdLibvirt):
            self._add(stack, site, directory, data, make)

    def _add(
        self,
        stack: ExitStack,
        site: LibvirtSite,
        directory: Path,
        data: Path,
        make: Callable[[LibvirtSite, Path, str], LibvirtTool],
    ) -> None:
        domain = f"vm-{make.__name__.lower()}"
        try:
            tool = make(site, directory / domain, domain)
        except NotMeasured as err:
            print(f"{make.__name__}: not measured: {err}")
            return
        vm = stack.enter_context(closing(LibvirtVm(site, domain, guest_image(), data)))
        vm.stand_still()
        self._tools.append((tool, vm))

    def measure(self) -> None:
        """All steps."""
        self._idle()
        for tool, vm in self._tools:
            with self._alive(vm):
                self._backup(tool, vm, "full", tool.full)
        for tool, vm in self._tools:
            with self._alive(vm):
                vm.change(self._number)
                self._backup(tool, vm, "increment", tool.increment)
        for tool, vm in self._tools:
            vm.go_on()
            tool.increment()  # nobody writes any more: what it restores is what the disk is
            vm.power_off()
        for tool, vm in self._tools:
            self._restore(tool, vm)

    @contextmanager
    def _alive(self, vm: LibvirtVm) -> Iterator[None]:
        """The VM works inside, and writes small pieces while it is backed up."""
        vm.go_on()
        yield
        vm.stop_writing()
        vm.stand_still()

    def _idle(self) -> None:
        """The latency that a VM has when nobody backs it up."""
        vm = self._tools[0][1]
        with self._alive(vm):
            vm.begin_writing()
            self._heard("nobody", "idle", vm.idle_latency(_IDLE_S))

    def _backup(self, tool: LibvirtTool, vm: LibvirtVm, step: str, take: Callable[[], Usage]) -> None:
        settle(vm.data)
        before = used_bytes(tool.stored)
        vm.begin_writing()
        count = vm.latency()
        usage = take()
        self._heard(tool.name, step, count.read())
        self._note(tool.name, step, usage, used_bytes(tool.stored) - before)

    def _restore(self, tool: LibvirtTool, vm: LibvirtVm) -> None:
        settle(tool.stored)
        self._note(tool.name, "restore", tool.restore())
        if self._number == 1 and not holds(tool.restored, "qcow2", vm.data, "qcow2"):
            raise SystemExit(f"{tool.name} restored something else than the disk: its figures say nothing")
        shutil.rmtree(tool.restored.parent)

    def _heard(self, tool: str, step: str, latency: Latency) -> None:
        self._latencies.append((tool, step, latency))
        print(f"{tool + ' ' + step:44} guest: {latency}", flush=True)

    def _note(self, tool: str, step: str, usage: Usage, stored_bytes: int | None = None) -> None:
        self._journal.note(Figure(tool=tool, step=step, run=self._number, stored_bytes=stored_bytes, **asdict(usage)))
