"""The runs. In each, every step goes through all tools before the next step starts, so that a noisy minute hits all.

    convert ─▶ ship alone ─▶ full of each ─▶ change ─▶ increment of each ─▶ sparse disk ─▶ restore of each

A run starts from nothing: new disks, new repositories.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from bench.disk_data import copy_raw, holds, make_changes, real_files, write_raw
from bench.drsync_tool import DrsyncTool
from bench.file_tools import BorgTool, ResticTool
from bench.goals import OURS, goals
from bench.measuring import Figure, Journal, Usage, measure, settle, used_bytes
from bench.tools import NotMeasured, Place, Tool
from bench.virtnbd_tool import VirtnbdTool


def measure_all(work: Path, *, size_gib: int, runs: int, output: Path | None) -> None:
    """Run, print, and write the figures to `output`."""
    work.mkdir(parents=True, exist_ok=True)
    data = real_files(work, size_gib)
    journal = Journal()
    directory = work / "run"
    for number in range(1, runs + 1):
        print(f"run {number} of {runs}")
        shutil.rmtree(directory, ignore_errors=True)
        try:
            with ExitStack() as stack:
                Round(directory, data, journal, number).measure(stack)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    _summarise(journal, runs)
    if output is not None:
        _keep(output, journal, size_gib)


def _summarise(journal: Journal, runs: int) -> None:
    print(f"\nmedians of {runs} runs, highest peak")
    for figure in journal.medians():
        print(figure)
    print()
    for goal in goals(journal):
        print(goal)


def _keep(output: Path, journal: Journal, size_gib: int) -> None:
    machine = {"cpus": os.cpu_count(), "system": platform.platform(), "size_gib": size_gib}
    kept = {
        "machine": machine,
        "figures": [asdict(f) for f in journal.figures],
        "medians": [asdict(f) for f in journal.medians()],
        "goals": [asdict(g) for g in goals(journal)],
    }
    output.write_text(json.dumps(kept, indent=2) + "\n")


class Round:
    """One run, in a directory that is removed afterwards."""

    def __init__(self, directory: Path, data: Path, journal: Journal, number: int) -> None:
        directory.mkdir()
        directory.chmod(0o711)
        self._directory = directory
        self._data = data
        self._journal = journal
        self._number = number
        self._raw = directory / "disk.raw"

    def measure(self, stack: ExitStack) -> None:
        """All steps; what is started is left to `stack` to end."""
        copy_raw(self._data, self._raw)
        pieces = make_changes(self._directory / "pieces")
        drsync = DrsyncTool(self._place("drsync"))
        peers: list[Tool] = [
            VirtnbdTool(self._place("virtnbdbackup")),
            ResticTool(self._place("restic")),
            BorgTool(self._place("borg")),
        ]
        tools = [tool for tool in (drsync, *peers) if self._prepared(tool, stack)]
        self._convert_and_ship()
        for tool in tools:
            self._backup(tool, "full")
        write_raw(self._raw, pieces)
        for tool in tools:
            tool.change(pieces)
        for tool in tools:
            self._backup(tool, "increment")
        self._small_captures(drsync)
        for tool in tools:
            self._restore(tool)

    def _place(self, name: str) -> Place:
        directory = self._directory / name
        directory.mkdir()
        return Place(directory=directory, raw=self._raw)

    def _prepared(self, tool: Tool, stack: ExitStack) -> bool:
        stack.callback(tool.close)
        try:
            tool.prepare()
        except NotMeasured as err:
            print(f"{tool.name}: not measured: {err}")
            return False
        return True

    def _convert_and_ship(self) -> None:
        """A plain copy; then drsync ships that copy, which is a layer as a full capture makes it."""
        layer, repository = self._directory / "layer.qcow2", self._directory / "shipped"
        settle(self._raw)
        command: list[str | Path] = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", self._raw, layer]
        self._note("qemu-img", "convert", measure(command, self._directory / "convert.log"))
        settle(layer)
        command = [sys.executable, Path(__file__).with_name("ship_alone.py"), layer, repository]
        took = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        stored = used_bytes(repository)
        self._journal.note(Figure(tool=OURS, step="ship alone", run=self._number, stored_bytes=stored, **took))
        layer.unlink()
        shutil.rmtree(repository)

    def _backup(self, tool: Tool, step: str) -> None:
        settle(tool.reads)
        before = used_bytes(tool.stored)
        usage = tool.full() if step == "full" else tool.increment()
        self._note(tool.name, step, usage, used_bytes(tool.stored) - before)

    def _small_captures(self, drsync: DrsyncTool) -> None:
        settle()
        self._note(OURS, "nothing changed", drsync.capture("files"))
        drsync.write_sparse("0")
        self._note(OURS, "full of sparse 2 TiB", drsync.capture("sparse"))
        drsync.write_sparse("1T")
        self._note(OURS, "1 MiB on sparse 2 TiB", drsync.capture("sparse"))

    def _restore(self, tool: Tool) -> None:
        settle(tool.stored)
        self._note(tool.name, "restore", tool.restore())
        if self._number == 1 and not holds(tool.restored, tool.restored_format, self._raw):
            raise SystemExit(f"{tool.name} restored something else than the disk: its figures say nothing")
        tool.restored.unlink()

    def _note(self, tool: str, step: str, usage: Usage, stored_bytes: int | None = None) -> None:
        self._journal.note(Figure(tool=tool, step=step, run=self._number, stored_bytes=stored_bytes, **asdict(usage)))
