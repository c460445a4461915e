"""Real Redis Streams with an accident before or after an acceptance."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline_mediator.errors import BrokerUnavailableError
from pipeline_mediator.message_brokers import RedisStreamBroker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Outgoing

__all__ = ["HookedBroker", "RefusingBroker", "die", "stop"]


def die() -> None:
    """Nothing of this process runs after this."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Nothing of this process runs until somebody continues it."""
    os.kill(os.getpid(), signal.SIGSTOP)


class HookedBroker(RedisStreamBroker):
    """Calls `before` each batch is handed over, and `after` all of it was answered; hands over `limit` at most."""

    def __init__(
        self,
        url: str,
        *,
        before: Callable[[], Awaitable[None] | None] = lambda: None,
        after: Callable[[], Awaitable[None] | None] = lambda: None,
        limit: int | None = None,
    ) -> None:
        super().__init__(url)
        self._before = before
        self._after = after
        self._limit = limit

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        await _called(self._before)
        answers = await super().publish(batch[: self._limit])
        await _called(self._after)
        return answers


class RefusingBroker(RedisStreamBroker):
    """Refuses what `refuses` says, with `error`; what it takes is really published.

    With `ordered` it takes nothing that follows a refused message of its key either, as its features promise.
    """

    def __init__(
        self,
        url: str,
        *,
        ordered: bool = True,
        error: Callable[[], Exception] = lambda: BrokerUnavailableError("not now, says the test"),
    ) -> None:
        super().__init__(url)
        self.refuses: Callable[[Outgoing], bool] = lambda _outgoing: False
        self.asked: list[str] = []
        """Tokens of the messages that it was asked to take."""
        self._ordered = ordered
        self._error = error

    @property
    def features(self) -> BrokerFeatures:
        return replace(super().features, ordered_by_key=self._ordered)

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        self.asked += [json.loads(outgoing.body)["token"] for outgoing in batch]
        keys: set[str] = set()
        refusals: list[Exception | None] = []
        for outgoing in batch:
            behind = BrokerUnavailableError("behind another") if self._ordered and outgoing.key in keys else None
            refusals.append(self._error() if self.refuses(outgoing) else behind)
            if refusals[-1] is not None and outgoing.key is not None:
                keys.add(outgoing.key)
        taken = [outgoing for outgoing, refusal in zip(batch, refusals, strict=True) if refusal is None]
        answers = iter(await super().publish(taken))
        return [next(answers) if refusal is None else refusal for refusal in refusals]


async def _called(hook: Callable[[], Any]) -> None:
    waits = hook()
    if waits is not None:
        await waits
