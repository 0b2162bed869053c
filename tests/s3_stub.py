"""An S3 that answers what a test says: for replies that LocalStack never gives. Real HTTP on the loopback interface."""

import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One reply; `body` is XML unless the headers say otherwise."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def error_reply(status: int, code: str, message: str = "text", more: str = "") -> Reply:
    """An error as AWS documents it: "Error responses" of the S3 API reference."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message>{more}<RequestId>4442587FB7D0A2F9</RequestId></Error>"
    )
    return Reply(status=status, body=body.encode())


class StubS3:
    """Gives the scripted replies in order and keeps the requests.

    Leaving the `with` block checks that every reply was asked for.
    """

    def __init__(self, *replies: Reply) -> None:
        self._replies = deque(replies)
        self.requests: list[Request] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                stub.requests.append(Request(method=self.command, path=self.path, headers=headers, body=body))
                reply = stub._replies.popleft() if stub._replies else error_reply(500, "NothingScripted")
                self.send_response(reply.status)
                head = {"Content-Type": "application/xml", "Content-Length": str(len(reply.body))} | reply.headers
                for name, value in head.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply.body)

            do_GET = do_PUT = do_HEAD = do_POST = _answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if error is None:
            assert not self._replies, f"{len(self._replies)} scripted replies were never asked for"
