"""The way in: finds the program, or says what it lacks, and gives the exit code."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from io import TextIOWrapper
from typing import TYPE_CHECKING

from pipeline_mediator.cli.errors import STOPPED
from pipeline_mediator.cli.output import complain
from pipeline_mediator.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

_LIBRARIES = {"rich": "Rich", "typer": "Typer"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0: done. 1: done, and the answer is no. 2: it could not be done. 130: stopped by Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shall not end the command.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(given)
    except MissingExtraError as error:
        complain(error)
        return STOPPED
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        # An application's own last words.
        complain(str(ended.code))
        return STOPPED


def _run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "demo":
        from pipeline_mediator.cli.demonstrate import demonstrate

        return demonstrate(arguments[1:])
    app = _program()
    app(arguments, prog_name="pipeline-mediator")
    return 0


def _program() -> Callable[..., object]:
    for name, library in _LIBRARIES.items():
        if find_spec(name) is None:
            raise MissingExtraError("this command", library, "cli")
    from pipeline_mediator.cli.program import app

    return app
