"""The relay as a process of its own."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline_mediator.cli.calls import live
from pipeline_mediator.cli.errors import FOUND, CommandError
from pipeline_mediator.cli.letters import reading
from pipeline_mediator.cli.options import AsJson, LogFormatOption, LogLevelOption, Target

if TYPE_CHECKING:
    from pipeline_mediator.cli.life import Life
    from pipeline_mediator.cli.target import Application
    from pipeline_mediator.outbox import OutboxRelay

__all__ = ["relay"]

logger = logging.getLogger(__name__)


def relay(  # noqa: PLR0913 - options, each by its name
    target: Target,
    *,
    drain: Annotated[bool, typer.Option("--drain", help="Publish what is due now, and end.")] = False,
    name: Annotated[
        str | None, typer.Option(help="Of the outbox, in the log and as the gauges' attribute (outbox).")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Messages to take at a time (1000).")] = None,
    poll: Annotated[float | None, typer.Option(metavar="S", help="Look at least every S seconds (1).")] = None,
    attempts: Annotated[int | None, typer.Option(metavar="N", help="Then a message is a dead letter (10).")] = None,
    lease: Annotated[float | None, typer.Option(metavar="S", help="Seconds until others take over (30).")] = None,
    stop_within: Annotated[float | None, typer.Option(metavar="S", help="Seconds to finish a batch in (10).")] = None,
    on_dead: Annotated[
        Literal["block", "park"] | None,
        typer.Option(help="Behind a dead letter, let later messages of its key wait, or go on (block)."),
    ] = None,
    log_level: LogLevelOption = None,
    log_format: LogFormatOption = None,
    as_json: AsJson = False,
) -> None:
    """Publish what an outbox keeps, until stopped.

    SIGTERM or Ctrl-C lets the batch at hand finish; a second one does not. Any number of relays may run at the same
    time. Ends with 2 if the application cannot be loaded; what fails later is logged and tried again. With --drain, 1
    if something is left.
    """
    given = {
        "name": name,
        "batch": batch,
        "poll": poll,
        "attempts": attempts,
        "lease": lease,
        "on_dead": on_dead,
        "stop_within": stop_within,
    }
    settings = {name: value for name, value in given.items() if value is not None}

    async def work(application: Application, life: Life) -> dict[str, Any]:
        served = _relay_of(application, settings)
        async with application.mediator:
            life.begin(served.stop, "the batch at hand is finished, then it ends")
            if drain:
                return await _drain(served)
            await served.run()
            return {}

    live(target, work, as_json=as_json, log_level=log_level, log_format=log_format)


def _relay_of(application: Application, settings: dict[str, Any]) -> OutboxRelay:
    from pipeline_mediator.outbox import OutboxRelay

    if application.relay is None:
        return OutboxRelay(application.mediator, **settings)
    if settings:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in settings)
        raise CommandError(f"{application.target} is a relay with settings of its own: leave out {options}")
    return application.relay


async def _drain(relay: OutboxRelay) -> dict[str, Any]:
    with reading("the outbox"):
        published = await relay.drain()
        left = await relay.health()
    logger.info(
        "%d messages published; left: %d pending, %d waiting, %d dead",
        published,
        left.pending,
        left.waiting,
        left.dead,
    )
    return {
        "published": published,
        "left": asdict(left),
        "exit_code": FOUND if left.pending or left.waiting else 0,
    }
