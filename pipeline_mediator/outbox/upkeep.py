"""What a relay does beside publishing: listen for commits of other processes, clean up, look how much waits."""

from __future__ import annotations

import logging
import random
from inspect import isawaitable
from typing import TYPE_CHECKING, Final

import anyio

from pipeline_mediator.outbox import gauges
from pipeline_mediator.trouble import Trouble, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from pipeline_mediator.outbox.bell import Bell
    from pipeline_mediator.outbox.protocol import OutboxStore
    from pipeline_mediator.outbox.settings import Settings

__all__ = ["Upkeep"]

logger = logging.getLogger(__name__)

_CLEANED: Final = 500
"""Rows deleted at once."""
_REST: Final = 3
"""After a deletion, rest this many times as long as it took."""
_SHORTEST_REST: Final = 0.01
_LOOK_EVERY: Final = 15.0
"""Seconds between two looks at how much waits."""


class Upkeep:
    """The duties of one run of a relay, each for a task of its own; none of them ends or fails.

    While relaying itself is in trouble, the store is left alone.
    """

    def __init__(self, store: OutboxStore, settings: Settings, bell: Bell, trouble: Trouble) -> None:
        self._store = store
        self._settings = settings
        self._bell = bell
        self._trouble = trouble

    def duties(self) -> Iterator[Callable[[], Coroutine[object, object, None]]]:
        """What to run."""
        yield self._listen
        yield self._look
        if self._settings.clean_every is not None:
            yield self._clean

    async def _listen(self) -> None:
        name = self._settings.name
        trouble = Trouble(
            f"{name}: commits of other processes are not heard", f"{name}: they are heard again", self._settings.pauses
        )
        while True:
            try:
                async with self._store.listen():
                    trouble.over()
                    self._bell.ring()  # for what was committed before
                    await anyio.sleep_forever()
            except Exception as error:  # noqa: BLE001 - logged; polling does meanwhile
                await anyio.sleep(trouble.again(error))

    async def _clean(self) -> None:
        every = self._settings.clean_every or 0.0
        # At other times than the other relays, which began together with this one.
        await anyio.sleep(every * random.random())  # noqa: S311 - no secret
        while True:
            if not self._trouble.failures:
                await self._guard("sent messages cannot be cleaned away", self._clean_up)
            await anyio.sleep(every)

    async def _clean_up(self) -> None:
        deleted = _CLEANED
        while deleted == _CLEANED:
            began = anyio.current_time()
            deleted = await self._store.clean(_CLEANED)
            await anyio.sleep(max(_SHORTEST_REST, _REST * (anyio.current_time() - began)))

    async def _look(self) -> None:
        while True:
            if not self._trouble.failures and (self._settings.on_health is not None or gauges.wanted()):
                await self._guard("how much waits is not known", self._tell_health)
            await anyio.sleep(_LOOK_EVERY)

    async def _tell_health(self) -> None:
        health = await self._store.health()
        gauges.show(self._settings.name, health)
        if self._settings.on_health is not None:
            told = self._settings.on_health(health)
            if isawaitable(told):
                await told

    async def _guard(self, problem: str, duty: Callable[[], Coroutine[object, object, None]]) -> None:
        try:
            await duty()
        except Exception as error:  # noqa: BLE001 - logged; the next time may be better
            logger.warning("%s: %s (%s)", self._settings.name, problem, in_words(error))
