"""Refusals as LocalStack's errors, with the faults before and after a call."""

import functools
from collections.abc import Callable
from typing import Any

from localstack.aws.api import CommonServiceException

from drsync_localstack.faults import Faults
from drsync_localstack.refusal import Refused


class AwsError(CommonServiceException):
    """An error that is not in LocalStack's own list."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.code, refused.message, status_code=refused.status, sender_fault=refused.status < 500)
        if refused.reason:
            self.Reason = refused.reason  # the serializer looks members up by the model's name


def operation(name: str, faults: Faults, call: Callable[[], Any]) -> Any:
    """Make one call of an operation, hit by what faults are on; what it refuses becomes LocalStack's error."""
    try:
        faults.hit(name)
        answer = call()
        faults.hit(name, after=True)
    except Refused as err:
        raise AwsError(err) from err
    return answer


def served(method: Callable[..., Any]) -> Callable[..., Any]:
    """A provider's method, with `operation` around it; the provider has `faults`."""

    @functools.wraps(method)
    def wrapped(self: Any, context: Any, request: Any) -> Any:
        return operation(context.operation.name, self.faults, lambda: method(self, context, request))

    return wrapped
