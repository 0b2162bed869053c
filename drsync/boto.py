"""What botocore raises, sorted, and what servers say, made fit for an error: the same for every service of AWS."""

import socket
import ssl
from typing import Final

import urllib3.exceptions
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError

FOREIGN: Final = (aws.BotoCoreError, aws.ClientError, ResponseParserError, urllib3.exceptions.HTTPError, OSError)
"""All that a call can raise; reading a body can also raise what is below botocore."""

UNAVAILABLE: Final = (
    aws.ConnectionError,
    aws.HTTPClientError,
    aws.IncompleteReadError,
    aws.MetadataRetrievalError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
    OSError,
)
"""Nobody answered, or not as a server of AWS's kind does; unless it `is_lasting`, a retry may help."""

DENIED: Final = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
    aws.SSOError,
    getattr(aws, "LoginError", aws.SSOError),  # newer than the oldest botocore that drsync runs with
    aws.RefreshWithMFAUnsupportedError,
    aws.UnknownCredentialError,
)
"""There are no credentials, or none that can be used."""


def is_lasting(err: BaseException) -> bool:
    """Whether a failed connection will fail again: nobody has that name, or the certificate is not trusted."""
    for cause in _causes(err):
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return True
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
    return False


def one_line(text: str, limit: int) -> str:
    """One line of at most `limit` characters that can be printed, whatever the other side sent."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:limit]


def _causes(err: BaseException) -> list[BaseException]:
    """An exception and what it came from; botocore and urllib3 wrap it several times."""
    found = [err]
    while len(found) < 10 and (cause := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(cause)
    return found
