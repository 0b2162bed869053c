"""The root of the tree."""

from string import Formatter
from typing import ClassVar


class DrsyncError(Exception):
    """The root: carries its fields, so that a program need not parse the message."""

    code: ClassVar[int] = 9
    retryable: ClassVar[bool] = False
    template: ClassVar[str] = ""
    remedy_template: ClassVar[str] = ""

    def __init__(self, **fields: object) -> None:
        wanted = {name for _, name, _, _ in Formatter().parse(self.template + self.remedy_template) if name}
        missing = wanted - fields.keys()
        if missing:
            raise TypeError(f"{type(self).__name__} lacks {', '.join(sorted(missing))}")
        self.fields = fields
        super().__init__(self.template.format_map(fields))

    @property
    def remedy(self) -> str:
        """The exact command that a person should run next."""
        return self.remedy_template.format_map(self.fields)
