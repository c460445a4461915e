"""One call of a command: the target is loaded, the work done in an event loop, the answer printed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from pipeline_mediator.cli.life import Life
from pipeline_mediator.cli.logs import set_up_logging
from pipeline_mediator.cli.output import nothing_else_on_stdout, print_document
from pipeline_mediator.cli.target import application, load

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pipeline_mediator.cli.logs import LogFormat, LogLevel
    from pipeline_mediator.cli.target import Application

__all__ = ["Answer", "answer", "live"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found out."""

    document: Any
    """For machines."""
    show: Callable[[], object]
    """Prints it for people."""
    code: int = 0


def answer(target: str, work: Callable[[Application], Awaitable[Answer]], *, as_json: bool) -> NoReturn:
    """Load the target, do the work, print what it found, end with its code."""
    import anyio

    async def run() -> Answer:
        async with application(found, target) as loaded:
            return await work(loaded)

    with nothing_else_on_stdout(enforced=as_json):
        found = load(target)
        result = anyio.run(run, backend="asyncio")
    _end(result, as_json=as_json)


def live(
    target: str,
    work: Callable[[Application, Life], Awaitable[dict[str, Any]]],
    *,
    as_json: bool,
    log_level: LogLevel | None,
    log_format: LogFormat | None,
) -> NoReturn:
    """The same for what runs until it is told to end.

    What `work` returns goes into the document, beside the signal that ended it; an `exit_code` in it is that.
    """
    import anyio

    life = Life()
    facts: dict[str, Any] = {}

    async def run() -> None:
        async with application(found, target) as loaded:
            facts.update(await work(loaded, life))

    with nothing_else_on_stdout(enforced=as_json):
        found = load(target)
        # After the import: an application that sets up logging has the last word.
        set_up_logging(log_level, log_format)
        anyio.run(life.run, run, backend="asyncio")
    code = life.code or facts.pop("exit_code", 0)
    _end(Answer(facts | {"signal": life.signal, "forced": life.forced}, lambda: None, code), as_json=as_json)


def _end(result: Answer, *, as_json: bool) -> NoReturn:
    if as_json:
        print_document(result.document)
    else:
        result.show()
    sys.stdout.flush()
    raise typer.Exit(result.code)
