"""The command line in the test's own process, on a configuration of the test's own."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from drsync.cli import main


@contextmanager
def logging_as_before() -> Iterator[None]:
    """A command sets up the log of its process, which here is that of all tests."""
    root, own = logging.getLogger(), logging.getLogger("drsync")
    handlers, root_level, own_level = root.handlers[:], root.level, own.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(root_level)
        own.setLevel(own_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.stdout)


class Cli:
    """`drsync` with a configuration file in `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.config = place / "drsync.toml"
        self.key_file = place / "key"
        self.repository = place / "repository"
        self.spool = place / "spool"
        self.configure()

    def configure(
        self, vms: Mapping[str, Path] | None = None, *, extra: str = "", spool: str = "", vm: str = ""
    ) -> None:
        """Write the configuration file: VM name → socket; `spool` is more of [spool], `vm` of every [[vm]]."""
        text = f'[repository]\nurl = "file://{self.repository}"\nkey_file = "key"\n'
        text += f'[spool]\npath = "spool"\nreserve = "1MiB"\n{spool}\n'
        for name, socket in (vms or {}).items():
            text += f'[[vm]]\nname = "{name}"\nsocket = "{socket}"\nrpo = "1s"\n{vm}'
        self.config.write_text(text + extra)

    def run(self, *words: str, stdin: str = "", config: bool = True) -> Done:
        """Run a command."""
        before = ["--config", str(self.config)] if config else []
        with logging_as_before():
            result = CliRunner().invoke(main, [*before, *words], input=stdin)
        given = f"--config {self.config} "  # remedies have it, as they are to be typed (test_contract.py)
        return Done(
            code=result.exit_code, stdout=result.stdout.replace(given, ""), stderr=result.stderr.replace(given, "")
        )

    def ok(self, *words: str, stdin: str = "") -> Done:
        """Run a command that must succeed."""
        done = self.run(*words, stdin=stdin)
        assert done.code == 0, done
        return done

    def refused(self, code: int, *words: str, stdin: str = "") -> Sequence[str]:
        """Run a command that must fail with `code`; what it says: the error, then the remedy."""
        done = self.run(*words, stdin=stdin)
        assert done.code == code, done
        assert done.stdout == ""
        error, remedy = done.stderr.splitlines()[-2:]
        assert error.startswith("error: ")
        assert remedy.startswith("remedy: ")
        return error.removeprefix("error: "), remedy.removeprefix("remedy: ")
