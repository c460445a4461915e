"""What `python -m pipeline_mediator consume` serves in the named scenarios: a handler that waits until it is let go."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.faults.life import end_with_parent
from tests.faults.scene import scene_on

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from pipeline_mediator import Consumer, Context
    from tests.faults.application import Moved, Noted


@asynccontextmanager
async def consumer() -> AsyncGenerator[Consumer]:
    """Each handler marks its beginning, and goes on when "go" is marked."""
    end_with_parent()
    async with scene_on(os.environ["FAULTS_DATABASE"], os.environ["FAULTS_REDIS"]) as scene:

        async def wait_for_go(event: Moved | Noted, _context: Context) -> None:
            await scene.mark(event.token)
            while not await scene.is_marked("go"):  # noqa: ASYNC110 - it is another process that says so
                await asyncio.sleep(0.02)

        yield scene.consumer(before=wait_for_go, min_idle=10.0)
