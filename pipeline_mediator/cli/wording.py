"""Text that may be shown: without credentials, and on a terminal without characters that it would obey."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["escaped", "first_line", "printable", "seconds", "told", "without_credentials"]

_CREDENTIALS: Final = re.compile(r"(?<=://)\S*@")
"""What stands before the host in a URL. Rather too much than too little: a password may hold a stray / or @."""
_NAMED_SECRETS: Final = re.compile(r"(?i)\b(password|pwd|passwd|SharedAccessKey|AccountKey|access_token)=[^\s;&,'\")]+")


def told(error: BaseException) -> str:
    """What an error says, with its notes."""
    return printable("\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())]), lines=True)


def first_line(error: BaseException) -> str:
    """Its type, and the beginning of what it says: drivers append the statement, and a hint where to read about it."""
    reason = str(error).partition("\n")[0]
    return printable(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)


def printable(text: str, *, lines: bool = False) -> str:
    """Without credentials, and escaped."""
    return escaped(without_credentials(text), lines=lines)


def without_credentials(text: str) -> str:
    """Of URLs, and of connection strings."""
    return _NAMED_SECRETS.sub(r"\1=***", _CREDENTIALS.sub("***@", text))


def escaped(text: str, *, lines: bool = False) -> str:
    """Without control characters; line breaks and tabs stay with `lines`."""
    return "".join(
        one if one.isprintable() or (lines and one in "\n\t") else one.encode("unicode_escape").decode() for one in text
    )


def seconds(number: float) -> str:
    """A duration, as coarse as it is long."""
    if number < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
