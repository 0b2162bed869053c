"""The tools that back up a running libvirt domain: drsync, and virtnbdbackup with lz4."""

import subprocess
import sys
from pathlib import Path
from typing import Protocol

from bench.libvirt_vm import DATA
from bench.measuring import Usage, measure
from bench.tools import need
from libvirt_site import LibvirtSite

_DRSYNC = [sys.executable, "-m", "drsync"]


class LibvirtTool(Protocol):
    """A tool and its repository in one run."""

    name: str
    stored: Path
    """Where it stores."""
    restored: Path
    """The data disk, after a restore."""

    def full(self) -> Usage:
        """The first backup."""
        ...

    def increment(self) -> Usage:
        """The next backup."""
        ...

    def restore(self) -> Usage:
        """Restore the newest backup to new files."""
        ...


class DrsyncLibvirt:
    """drsync, source = "libvirt"."""

    name = "drsync"

    def __init__(self, site: LibvirtSite, directory: Path, domain: str) -> None:
        directory.mkdir()
        self._domain = domain
        self._directory = directory
        self.config = directory / "drsync.toml"
        self.stored = directory / "repository"
        self.restored = directory / "restored" / f"{DATA}.qcow2"
        self.config.write_text(
            f'[repository]\nurl = "file://{self.stored}"\nkey_file = "{directory}/key"\n'
            f'[spool]\npath = "{directory}/spool"\nreserve = "1MiB"\n'
            f'[[vm]]\nname = "{domain}"\nsource = "libvirt"\nuri = "{site.uri}"\nrpo = "10s"\n'
        )
        self.stored.mkdir()
        subprocess.run(self._command("init"), check=True, stdout=subprocess.DEVNULL)

    def full(self) -> Usage:
        return self.increment()

    def increment(self) -> Usage:
        return measure(self._command("capture", self._domain), self._directory / "commands.log")

    def restore(self) -> Usage:
        output = str(self.restored.parent)
        command = self._command("restore", self._domain, "--to", "image", "--output", output)
        return measure(command, self._directory / "commands.log")

    def daemon(self) -> subprocess.Popen[bytes]:
        """The daemon, started."""
        with (self._directory / "daemon.log").open("wb") as log:
            return subprocess.Popen(self._command("daemon"), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _command(self, *arguments: str) -> list[str]:
        return [*_DRSYNC, "--config", str(self.config), *arguments]


class VirtnbdLibvirt:
    """virtnbdbackup and virtnbdrestore."""

    name = "virtnbdbackup"

    def __init__(self, site: LibvirtSite, directory: Path, domain: str) -> None:
        """Raise NotMeasured if it is not installed."""
        need(("virtnbdbackup", "virtnbdrestore"), root=True)
        directory.mkdir()
        (directory / "scratch").mkdir()
        self._site = site
        self._domain = domain
        self._directory = directory
        self.stored = directory / "backup"
        self.restored = directory / "restored" / f"{domain}-data.qcow2"

    def full(self) -> Usage:
        return self._backup("full")

    def increment(self) -> Usage:
        return self._backup("inc")

    def restore(self) -> Usage:
        options: list[str | Path] = ["-i", self.stored, "-o", self.restored.parent, "-n"]
        options += ["-L", self._directory / "restore.log", *self._socket()]
        return measure(["virtnbdrestore", "-U", self._site.uri, *options], self._directory / "commands.log")

    def _backup(self, level: str) -> Usage:
        options: list[str | Path] = ["-d", self._domain, "-l", level, "-z", "-n", "-o", self.stored]
        options += ["-S", self._directory / "scratch", *self._socket()]
        return measure(["virtnbdbackup", "-U", self._site.uri, *options], self._directory / "commands.log")

    def _socket(self) -> list[str]:
        return ["-f", f"{self._site.path}/nbd"]
