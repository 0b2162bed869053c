"""AWS KMS as what opens a slot of the key ring (kms:Encrypt and kms:Decrypt, nothing else).

The encryption context names the repository: a key policy can be bound to it, and what was wrapped
for one repository does not open another one's. Credentials are found as boto3 finds them; the key stays in KMS.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import boto3.session
from botocore import exceptions as aws
from botocore.config import Config

from drsync import __version__
from drsync.boto import FOREIGN, one_line
from drsync.errors import KmsUnusable
from drsync.format.keys import KEY_BYTES
from drsync.format.ring import Slot

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

_WORDS: Final = {
    "AccessDeniedException": "these credentials may not",
    "NotFoundException": "there is no such key",
    "KMSInvalidStateException": "the key is deleted, or waits to be",
    "DisabledException": "the key is disabled",
    "IncorrectKeyException": "it was wrapped by another key",
    "InvalidCiphertextException": "it was wrapped for another repository, or was changed",
}
"""What AWS's codes mean here; what else it says follows."""


class AwsKms:
    """A KeyService (keyring.py) of AWS, or of what speaks its protocol at AWS_ENDPOINT_URL_KMS."""

    def wrap(self, slot: Slot, plain: bytes, context: dict[str, str]) -> bytes:
        with _translated(slot, "encrypt"):
            reply = _client(slot).encrypt(KeyId=slot.key, Plaintext=plain, EncryptionContext=context)
            return reply["CiphertextBlob"]

    def unwrap(self, slot: Slot, wrapped: bytes, context: dict[str, str]) -> bytes:
        with _translated(slot, "decrypt"):
            # The key is named: a ciphertext of somebody else's key must not be taken for one of ours.
            reply = _client(slot).decrypt(KeyId=slot.key, CiphertextBlob=wrapped, EncryptionContext=context)
            plain = reply["Plaintext"]
        if len(plain) != KEY_BYTES:
            raise KmsUnusable(slot=slot.name, key=slot.key, operation="decrypt", problem="it holds something else")
        return plain


def _client(slot: Slot) -> "KMSClient":
    config = Config(
        retries={"total_max_attempts": 3, "mode": "standard"},
        connect_timeout=10,
        read_timeout=30,
        user_agent_extra=f"drsync/{__version__}",
    )
    return boto3.session.Session().client("kms", region_name=slot.region or None, config=config)


@contextmanager
def _translated(slot: Slot, operation: str) -> Iterator[None]:
    try:
        yield
    except (*FOREIGN, KeyError) as err:
        raise KmsUnusable(slot=slot.name, key=slot.key, operation=operation, problem=_problem(err)) from err


def _problem(err: Exception) -> str:
    if not isinstance(err, aws.ClientError):
        return "the reply is not one of KMS" if isinstance(err, KeyError) else one_line(str(err), 300)
    error = err.response.get("Error", {})
    code = str(error.get("Code", ""))
    said = one_line(f"{code}: {error.get('Message', '')}", 300).rstrip(".")
    return f"{_WORDS[code]} ({said})" if code in _WORDS else said
