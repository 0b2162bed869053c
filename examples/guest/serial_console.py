"""A guest's shell on its serial console, driven by a program."""

import base64
import binascii
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MAX_OUTPUT_BYTES = 256 * 1024
"""What `run` gives back of a command's output: its end, up to this."""

_LINE_BYTES = 512
"""Length of a line typed at the guest's shell, which takes 1024."""


class Ran(NamedTuple):
    """What a command in the guest came to."""

    status: int
    output: str


class ConsoleTimeout(Exception):
    """What was waited for did not come in time."""


class ConsoleBroken(Exception):
    """The console is closed, or says what it should not."""


class SerialConsole:
    """The guest's shell on the other end of a serial line, driven so that nothing depends on its echo or prompt.

    A command goes over as base64 into a file of the guest, line by line, each
    acknowledged before the next (a serial line has no flow control). Its output
    comes back as base64 between two marks that hold a random word.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._received = b""
        self._in_step = False
        try:
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise

    def run(self, command: str, deadline: float) -> Ran:
        """Run a shell command; see Guest.run."""
        if not self._in_step:
            self._get_in_step(deadline)
        self._in_step = False  # until the end is seen
        word = secrets.token_hex(6)
        script, output = f"/tmp/{word}.sh", f"/tmp/{word}.out"  # noqa: S108 - the guest's own, nobody else is there
        self._send_file(command.encode(), script, word, deadline)
        self.type(
            f"sh {script} </dev/null >{output} 2>&1; s=$?; echo {word}-begin; "
            f"tail -c {MAX_OUTPUT_BYTES} {output} | base64; echo {word}-end $s; rm -f {script} {output}"
        )
        answer = self._wait_for(rf"{word}-begin\r?\n(.*){word}-end (\d+)\r?\n", deadline)
        self._in_step = True
        try:
            data = base64.b64decode(b"".join(answer.group(1).split()), validate=True)
        except binascii.Error as err:
            raise ConsoleBroken("its output is mixed up with messages of the kernel") from err
        return Ran(int(answer.group(2)), data.decode(errors="replace"))

    def type(self, line: str) -> None:
        """Type a line at the shell."""
        self._send(line.encode() + b"\n")

    def interrupt(self) -> None:
        """Press Ctrl-C; the next `run` gets in step with the shell again."""
        self._in_step = False
        with suppress(ConsoleBroken):  # who is gone needs no interrupt
            self._send(b"\x03")

    def drain(self, wait_s: float) -> None:
        """Take in what the guest printed, waiting at most `wait_s`: it would stall when nobody listened."""
        self._socket.settimeout(wait_s)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return
        except OSError as err:
            raise ConsoleBroken(f"the console is gone: {err}") from err
        if not data:
            raise ConsoleBroken("the console is closed: QEMU ended")
        self._received += data

    def wait_for_hang_up(self, deadline: float) -> None:
        """Listen until QEMU ends: what was typed is lost when this side hangs up first."""
        with suppress(ConsoleBroken):
            while (left_s := deadline - time.monotonic()) > 0:
                self.drain(left_s)
            raise ConsoleTimeout

    def close(self) -> None:
        """Hang up; the guest runs on."""
        self._socket.close()

    def _get_in_step(self, deadline: float) -> None:
        """Silence echo and prompt, and wait until the shell answers."""
        while True:
            word = secrets.token_hex(6)
            # The quotes keep an echo of this line from looking like its answer.
            self.type(f"stty -echo; PS1= PS2=; echo in''step-{word}")
            try:
                self._wait_for(rf"instep-{word}\r?\n", min(deadline, time.monotonic() + 5))
            except ConsoleTimeout:
                if time.monotonic() >= deadline:
                    raise
            else:
                self._in_step = True
                return

    def _send_file(self, content: bytes, path: str, word: str, deadline: float) -> None:
        text = base64.b64encode(content).decode()
        for number, start in enumerate(range(0, max(len(text), 1), _LINE_BYTES)):
            self.type(f"echo {text[start : start + _LINE_BYTES]} >>{path}.b64; echo {word}-{number}")
            self._wait_for(rf"{word}-{number}\r?\n", deadline)
        self.type(f"base64 -d {path}.b64 >{path}; rm {path}.b64; echo {word}-ready")
        self._wait_for(rf"{word}-ready\r?\n", deadline)

    def _wait_for(self, pattern: str, deadline: float) -> re.Match[bytes]:
        """The first match in what the guest prints; all up to its end is used up."""
        compiled = re.compile(pattern.encode(), re.DOTALL)
        while not (found := compiled.search(self._received)):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ConsoleTimeout
            self.drain(left_s)
        self._received = self._received[found.end() :]
        return found

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(10)
        try:
            self._socket.sendall(data)
        except OSError as err:
            raise ConsoleBroken(f"the console is gone: {err}") from err
