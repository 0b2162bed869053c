"""Block tokens and page tokens: opaque, bound to what they were given for, and good for a time only.

Known: a block token lives for 7 days, a page token for 60 minutes, both are at most 256 characters of base64
(botocore, API reference). How AWS makes them is not.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable

from drsync_localstack.refusal import Refused, invalid

BLOCK_TOKEN_S = 7 * 24 * 3600
PAGE_TOKEN_S = 3600


class Tokens:
    """Makes tokens and checks them."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._key = secrets.token_bytes(32)

    def block(self, snapshot_id: str, index: int) -> str:
        """A token to read one block with."""
        return self._make(f"{snapshot_id} {index}", BLOCK_TOKEN_S)

    def check_block(self, token: str, snapshot_id: str, index: int) -> None:
        """Refuse a token that is expired, or of another block."""
        if self._read(token, "INVALID_BLOCK_TOKEN") != f"{snapshot_id} {index}":
            raise invalid("The block token is not that of this block.", "INVALID_BLOCK_TOKEN")

    def page(self, listing: str, next_index: int) -> str:
        """A token with which a listing goes on at a block."""
        return self._make(f"{listing} {next_index}", PAGE_TOKEN_S)

    def check_page(self, token: str, listing: str) -> int:
        """The block with which the listing goes on; refuses a token that is expired, or of another listing."""
        name, _, index = self._read(token, "INVALID_PAGE_TOKEN").rpartition(" ")
        if name != listing:
            raise invalid("The page token is not that of this listing.", "INVALID_PAGE_TOKEN")
        return int(index)

    def expiry(self) -> float:
        """When block tokens of now expire."""
        return self._now() + BLOCK_TOKEN_S

    def _make(self, text: str, lifetime_s: float) -> str:
        body = f"{int(self._now() + lifetime_s)} {text}".encode()
        return base64.b64encode(self._seal(body) + body).decode()

    def _read(self, token: str, reason: str) -> str:
        refused: Refused = invalid("The token is invalid or has expired.", reason)
        try:
            raw = base64.b64decode(token, validate=True)
        except ValueError:
            raise refused from None
        seal, body = raw[:16], raw[16:]
        if not hmac.compare_digest(seal, self._seal(body)):
            raise refused
        expires, _, text = body.decode().partition(" ")
        if self._now() >= int(expires):
            raise refused
        return text

    def _seal(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, hashlib.sha256)[:16]
