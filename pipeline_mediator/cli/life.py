"""The life of a command that works until it is told to end."""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio import CancelScope
    from anyio.abc import TaskStatus

__all__ = ["Life"]

logger = logging.getLogger(__name__)

_SIGNALLED = 128
"""What a shell adds to the number of the signal that ended a program."""


class Life:
    """Runs until its work is done, or SIGTERM or SIGINT ends it: once and it may finish, twice and it may not.

        life = Life()
        async def work() -> None:
            relay = OutboxRelay(await create_mediator())
            life.begin(relay.stop, "the batch at hand is finished, then it ends")
            await relay.run()
        await life.run(work)
        sys.exit(life.code)

    A signal that comes before `begin` ends it at once: there is nothing to finish yet.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """The name of the first one."""
        self.code = 0
        """As a shell says it, if it was not allowed to finish."""
        self._stop: Callable[[], object] | None = None
        self._finishing = ""

    @property
    def forced(self) -> bool:
        """Whether it was not allowed to finish."""
        return self.code != 0

    def begin(self, stop: Callable[[], object], finishing: str) -> None:
        """From here on the first signal calls `stop`, in the event loop's thread; `finishing` says what follows."""
        self._stop, self._finishing = stop, finishing

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Let it live. Raises what `work` raises."""
        import anyio

        errors: list[Exception] = []
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._heed_signals, tasks.cancel_scope)
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - raised below, not in a group
                errors.append(error)
            tasks.cancel_scope.cancel()
        if errors:
            raise errors[0]

    async def _heed_signals(self, scope: CancelScope, *, task_status: TaskStatus[None]) -> None:
        import anyio

        with ExitStack() as stack:
            try:
                signals = stack.enter_context(anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))
            except NotImplementedError:
                return  # on Windows: there, Ctrl-C raises KeyboardInterrupt
            finally:
                task_status.started()
            async for number in signals:
                if self._stop is None or self.signal is not None:
                    self.signal = self.signal or number.name
                    self.code = _SIGNALLED + number
                    logger.warning("%s: it ends at once; what is under way is given back", number.name)
                    scope.cancel()
                    return
                self.signal = number.name
                logger.info("%s: %s", number.name, self._finishing)
                self._stop()
