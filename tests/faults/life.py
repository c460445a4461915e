"""How a process of a run begins and ends: by SIGTERM, or with the process that started it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.faults.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["end_with_parent", "run_until_told"]


def run_until_told(main: Callable[[Settings, str], Awaitable[None]]) -> None:
    """Run it, cancel it on SIGTERM, and leave with 0 then."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    end_with_parent()
    asyncio.run(_until_told(main))


async def _until_told(main: Callable[[Settings, str], Awaitable[None]]) -> None:
    running = asyncio.ensure_future(main(*Settings.of_this_process()))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    with suppress(asyncio.CancelledError):
        await running


def end_with_parent() -> None:
    """Nobody else would end this process if the tool itself is killed: its end closes the pipe that is our input."""

    def wait() -> None:
        # Not by sys.stdin, whose lock the interpreter wants when it ends.
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
