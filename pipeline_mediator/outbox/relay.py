"""The relay: publishes what an outbox keeps."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from pipeline_mediator.errors import ConfigurationError
from pipeline_mediator.outbox.loop import Loop
from pipeline_mediator.outbox.publishing import Publisher
from pipeline_mediator.outbox.settings import Settings
from pipeline_mediator.service import Service, apart
from pipeline_mediator.trouble import default_backoff, default_pauses

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tenacity.wait import WaitBaseT

    from pipeline_mediator.outbox.protocol import Health, OutboxStore

__all__ = ["OutboxRelay"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Relays(Publisher, Protocol):
    """A mediator, as a relay sees it."""

    @property
    def outbox(self) -> OutboxStore | None:
        """The store of its pipeline's outbox."""
        ...


class OutboxRelay(Service):
    """Publishes what an outbox keeps, at least once, and the messages of one key in order.

        async with mediator, OutboxRelay(mediator):     # beside the application, in its process
            ...
        await OutboxRelay(mediator).run()               # in a process of its own, until cancelled or stopped
        published = await OutboxRelay(mediator).drain() # what is due now: in tests, scripts, at the end

    Any number of relays may serve one outbox. Each takes up to `batch` messages at a time, publishes them through the
    mediator's chains for the outbox (those of different destinations side by side) and writes what became of them. It
    wakes on a commit of this process, and of others where the store can tell; anyway every `poll` seconds. What it
    publishes belongs to nobody's trace: each message's own is linked.

    A message that is refused backs off, by `backoff` (tenacity's wait strategies), and after `attempts` is a dead
    letter, kept with the reason; later messages of its key then wait for somebody to decide, or with
    `on_dead="park"` go on. No message is given up because a broker cannot be reached or refuses the credentials: such a
    destination is left alone, by `pauses`, and the others go on. So is the database.

    `lease` seconds after a relay was last heard of, another takes over what it had; publishing is cut off at half of
    that, so brokers need shorter timeouts. A stop lets the batch at hand finish for `stop_within` seconds, and gives
    back what is not published by then; a cancellation gives back what is under way. Either way what is known to be
    published is written. Every `clean_every` seconds (None: never) it deletes sent messages that the store kept long
    enough. `on_health` is called with `Health` every 15 seconds; the same is shown as OpenTelemetry gauges,
    `pipeline_mediator.outbox.pending`, `.waiting`, `.dead` and `.oldest`, where a meter provider is set. `name` is
    their attribute, and stands in the log. All times are in seconds and by monotonic clocks.

    Without `store` it serves the pipeline's. A relay never ends by itself: what fails is logged and tried again; only
    `drain` raises.

    Source of the idea: the polling publisher of the transactional outbox pattern.

    Raises `ConfigurationError` for a pipeline without outbox, or settings that cannot be.
    """

    def __init__(  # noqa: PLR0913 - settings, each by its name
        self,
        mediator: Relays,
        store: OutboxStore | None = None,
        *,
        name: str = "outbox",
        batch: int = 1000,
        poll: float = 1.0,
        attempts: int = 10,
        backoff: WaitBaseT | None = None,
        pauses: WaitBaseT | None = None,
        lease: float = 30.0,
        on_dead: Literal["block", "park"] = "block",
        clean_every: float | None = 60.0,
        stop_within: float = 10.0,
        on_health: Callable[[Health], object] | None = None,
    ) -> None:
        if store is None:
            store = mediator.outbox
        if store is None:
            raise ConfigurationError(
                "OutboxRelay: no OutboxMiddleware stands in the mediator's pipeline; add one, or pass store="
            )
        super().__init__(name, "relay", "nothing is published any more")
        self.mediator = mediator
        self.store = store
        self._settings = Settings(
            name=name,
            batch=batch,
            poll=poll,
            attempts=attempts,
            backoff=default_backoff() if backoff is None else backoff,
            pauses=default_pauses() if pauses is None else pauses,
            lease=lease,
            on_dead=on_dead,
            clean_every=clean_every,
            stop_within=stop_within,
            on_health=on_health,
        )
        self._loops: set[Loop] = set()

    async def drain(self) -> int:
        """Publish what is due; how many messages that were.

        Not awaited: what backs off, what other relays have taken, and destinations that take nothing. Raises what the
        store raises.
        """
        return await apart(self._drain)

    def stop(self) -> None:
        """Let `run` and `drain` end; in the event loop's thread. Called before one of them, that ends at once."""
        super().stop()
        for loop in self._loops:
            loop.stop()

    async def health(self) -> Health:
        """How much waits in the outbox."""
        return await self.store.health()

    async def _serve(self) -> None:
        with self._loop() as loop:
            await loop.run()

    async def _drain(self) -> int:
        with self._loop() as loop:
            return await loop.drain()

    @contextmanager
    def _loop(self) -> Generator[Loop]:
        """A loop that `stop` reaches."""
        loop = Loop(self.mediator, self.store, self._settings)
        self._loops.add(loop)
        if self._stopped:
            loop.stop()
        try:
            yield loop
        finally:
            self._loops.discard(loop)
            self._stopped = self._stopped and (self._running or bool(self._loops))
