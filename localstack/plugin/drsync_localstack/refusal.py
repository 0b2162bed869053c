"""What AWS answers when it refuses a request."""


class Refused(Exception):
    """A request is refused: AWS's error code, the HTTP status, and EBS direct's `Reason` where the API has one."""

    def __init__(self, code: str, message: str, *, status: int = 400, reason: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status
        self.reason = reason


def invalid(message: str, reason: str = "INVALID_PARAMETER_VALUE") -> Refused:
    """EBS direct's ValidationException; known are the reasons that exist (botocore), guesses which one is when."""
    return Refused("ValidationException", message, reason=reason)
