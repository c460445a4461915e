"""Logging of a command that runs on: lines for people or for machines, on stderr."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

__all__ = ["LogFormat", "LogLevel", "set_up_logging"]

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["text", "json"]

_LINE: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
_OWN: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""What every record has; the rest was passed as `extra`."""


def set_up_logging(level: LogLevel | None, form: LogFormat | None) -> None:
    """Log to stderr. An application that has set up logging itself is overruled only by what was asked for."""
    root = logging.getLogger()
    if form is None and root.handlers:
        if level is not None:
            root.setLevel(level.upper())
        return
    logging.basicConfig(handlers=[_handler(form or "text")], level=(level or "info").upper(), force=True)


def _handler(form: LogFormat) -> logging.Handler:
    if form == "text" and sys.stderr.isatty():
        from rich.console import Console
        from rich.highlighter import NullHighlighter
        from rich.logging import RichHandler

        rich = RichHandler(console=Console(stderr=True), show_path=False, highlighter=NullHighlighter())
        rich.setFormatter(logging.Formatter("%(name)s %(message)s"))
        return rich
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else logging.Formatter(_LINE))
    return handler


class _JsonFormatter(logging.Formatter):
    """One JSON object per record, with what was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            facts["stack"] = self.formatStack(record.stack_info)
        extra = {name: value for name, value in vars(record).items() if name not in _OWN and value is not None}
        return json.dumps(extra | facts, default=str)
