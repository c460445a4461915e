"""The consumer as a process of its own."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_mediator.cli.calls import live
from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.cli.options import AsJson, LogFormatOption, LogLevelOption, Target

if TYPE_CHECKING:
    from pipeline_mediator.cli.life import Life
    from pipeline_mediator.cli.target import Application
    from pipeline_mediator.mediator import Mediator

__all__ = ["consume"]


def consume(
    target: Target,
    *,
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Messages to handle at a time (as the Consumer was made, or 16)."),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="S", min=0, help="Seconds for handlers to finish in, once it is told to end (likewise, or 30)."
        ),
    ] = None,
    log_level: LogLevelOption = None,
    log_format: LogFormatOption = None,
    as_json: AsJson = False,
) -> None:
    """Handle what brokers deliver, until stopped.

    It receives from the subscriptions of a Consumer.
    SIGTERM or Ctrl-C fetches nothing more and lets handlers finish for the grace period; a second one does not. What is
    not done then is given back. Any number of consumers may run at the same time. Ends with 2 if the application cannot
    be loaded, or a subscription cannot be; a broker that is away is waited for.
    """

    async def work(application: Application, life: Life) -> dict[str, Any]:
        consumer = application.consumer
        if consumer is None:
            raise CommandError(
                f"{application.target} gives no Consumer, and only that knows what to receive from: name a function "
                "that returns Consumer(mediator, broker.subscribe(...))"
            )
        if concurrency is not None:
            consumer.concurrency = concurrency
        if grace is not None:
            consumer.grace = grace
        async with AsyncExitStack() as stack:
            await _open(application.mediator, stack)
            life.begin(
                consumer.stop, f"nothing more is fetched; what is being handled has {consumer.grace:g} s to finish"
            )
            await consumer.run()
        return {}

    live(target, work, as_json=as_json, log_level=log_level, log_format=log_format)


async def _open(mediator: Mediator, stack: AsyncExitStack) -> None:
    """As a subscription is waited for, so is the broker that handlers publish to."""
    import anyio

    from pipeline_mediator.errors import BrokerUnavailableError
    from pipeline_mediator.trouble import Trouble, default_pauses

    trouble = Trouble("the mediator cannot reach its broker", "the mediator reaches its broker", default_pauses())
    while True:
        try:
            await stack.enter_async_context(mediator)
        except BrokerUnavailableError as error:
            await anyio.sleep(trouble.again(error))
        else:
            trouble.over()
            return
