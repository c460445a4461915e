"""The relay as a process of its own; what it needs is imported when it runs."""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from pipeline_mediator.cli.errors import CommandError
from pipeline_mediator.cli.target import load, made_from
from pipeline_mediator.errors import MediatorError

if TYPE_CHECKING:
    import argparse

    from anyio import CancelScope
    from anyio.abc import TaskStatus

    from pipeline_mediator.outbox import OutboxRelay

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "publish what an application's outbox keeps"
DESCRIPTION = (
    "Publishes what the outbox of an application's mediator keeps, until it is stopped. SIGTERM or Ctrl-C lets the "
    "batch at hand finish; a second one does not. Any number of relays may run at the same time. Exit code 2 if the "
    "application cannot be loaded; what fails later is logged and tried again. With --drain, 1 if something is left."
)

logger = logging.getLogger(__name__)

_SETTINGS = ("name", "batch", "poll", "attempts", "lease", "on_dead", "stop_within")
_LEFT = 1
_SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a program."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the relay may be told; what is left out is as in `OutboxRelay`."""
    parser.add_argument(
        "target",
        metavar="module:attribute",
        help="a Mediator, or a function that returns one, async or not; looked for in the current directory too",
    )
    parser.add_argument("--drain", action="store_true", help="publish what is due now, and end")
    parser.add_argument("--name", help="of the outbox, in the log and as the gauges' attribute")
    parser.add_argument("--batch", metavar="N", type=int, help="messages to take at a time (default: 1000)")
    parser.add_argument("--poll", metavar="S", type=float, help="look at least every S seconds (default: 1)")
    parser.add_argument("--attempts", metavar="N", type=int, help="then a message is a dead letter (default: 10)")
    parser.add_argument("--lease", metavar="S", type=float, help="seconds until others take over (default: 30)")
    parser.add_argument("--stop-within", metavar="S", type=float, help="seconds to finish a batch in (default: 10)")
    parser.add_argument(
        "--on-dead",
        choices=["block", "park"],
        help="behind a dead letter, let later messages of its key wait, or go on (default: block)",
    )


def run(options: argparse.Namespace) -> int:
    """Relay; 0 if it was stopped or has drained all, 1 if something is left, and as a shell says it if it was forced.

    Raises `CommandError` for a target that is not there, and other `MediatorError`s for one that cannot be used.
    """
    import anyio

    found = load(options.target)
    # After the import: an application that sets up logging has the last word.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    return anyio.run(partial(_Process(options).run, found), backend="asyncio")


class _Process:
    """One run of the command: relays, or drains, until a signal says otherwise."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._relay: OutboxRelay | None = None
        self._code = 0

    async def run(self, found: object) -> int:
        """Give the exit code."""
        import anyio

        errors: list[Exception] = []
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._heed_signals, tasks.cancel_scope)
            try:
                await self._serve(found)
            except Exception as error:  # noqa: BLE001 - raised below, not in a group
                errors.append(error)
            tasks.cancel_scope.cancel()
        if errors:
            raise errors[0]
        return self._code

    async def _serve(self, found: object) -> None:
        from pipeline_mediator.mediator import Mediator
        from pipeline_mediator.outbox import OutboxRelay

        mediator = await made_from(found, Mediator, self._options.target)
        given = {name: getattr(self._options, name) for name in _SETTINGS}
        relay = OutboxRelay(mediator, **{name: value for name, value in given.items() if value is not None})
        async with mediator:
            self._relay = relay
            await (self._drain(relay) if self._options.drain else relay.run())

    async def _drain(self, relay: OutboxRelay) -> None:
        try:
            published = await relay.drain()
            left = await relay.health()
        except MediatorError:
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise CommandError(f"the outbox cannot be read: {type(error).__name__}: {reason}") from error
        logger.info(
            "%d messages published; left: %d pending, %d waiting, %d dead",
            published,
            left.pending,
            left.waiting,
            left.dead,
        )
        if left.pending or left.waiting:
            self._code = self._code or _LEFT

    async def _heed_signals(self, scope: CancelScope, *, task_status: TaskStatus[None]) -> None:
        import anyio

        told = False
        with ExitStack() as stack:
            try:
                signals = stack.enter_context(anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
            except NotImplementedError:
                return  # on Windows: there, Ctrl-C raises KeyboardInterrupt
            finally:
                task_status.started()
            async for number in signals:
                if self._relay is None or told:
                    self._code = _SIGNALLED + number
                    scope.cancel()
                    return
                told = True
                logger.info("%s: the batch at hand is finished, then it ends", signal.Signals(number).name)
                self._relay.stop()
