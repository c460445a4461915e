"""What a command that runs on logs, and how."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from io import StringIO

import pytest

from pipeline_mediator.cli.logs import set_up_logging


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def logging_to(stream: StringIO, *handlers: logging.Handler) -> Generator[logging.Logger]:
    """A root logger with these handlers instead of pytest's, which come and go with each phase of a test."""
    root = logging.getLogger()
    before = root.handlers, root.level, sys.stderr
    root.handlers, sys.stderr = [*handlers], stream
    try:
        yield root
    finally:
        root.handlers, level, sys.stderr = before
        root.setLevel(level)


def test_lines_for_people() -> None:
    stderr = StringIO()
    with logging_to(stderr):
        set_up_logging(None, None)
        logging.getLogger("shop").info("sold %s", 3)
        logging.getLogger("shop").debug("not this")
    assert stderr.getvalue().endswith("INFO shop sold 3\n")


def test_objects_for_machines() -> None:
    stderr = StringIO()
    with logging_to(stderr):
        set_up_logging("debug", "json")
        facts = {"order": 7, "by": {"ada"}, "to": None}
        logging.getLogger("shop").debug("not %s", "sold", exc_info=ValueError("none left"), extra=facts)
    (line,) = stderr.getvalue().splitlines()
    told = json.loads(line)
    assert told["time"].endswith("+00:00")
    assert told["exception"].endswith("ValueError: none left")
    del told["time"], told["exception"]
    assert told == {"level": "debug", "logger": "shop", "message": "not sold", "order": 7, "by": "{'ada'}"}


def test_on_a_terminal_it_is_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    with logging_to(terminal):
        set_up_logging(None, None)
        logging.getLogger("shop").info("[red]sold[/red]")
    assert "\x1b[" in terminal.getvalue()
    assert " shop [red]sold[/red]" in terminal.getvalue()


def test_an_application_that_has_set_it_up_keeps_it() -> None:
    handler = logging.NullHandler()
    with logging_to(StringIO(), handler) as root:
        set_up_logging(None, None)
        assert root.handlers == [handler]

        set_up_logging("error", None)
        assert (root.handlers, root.level) == ([handler], logging.ERROR)


def test_a_format_that_was_asked_for_overrules_it() -> None:
    stderr = StringIO()
    with logging_to(stderr, logging.NullHandler()):
        set_up_logging(None, "json")
        logging.getLogger("shop").warning("low")
    assert json.loads(stderr.getvalue())["message"] == "low"
