"""Clients that send again until they know what became of an order."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

import httpx

from pipeline_mediator.cli.demo.ledger import Ledger
from pipeline_mediator.cli.errors import CommandError

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable

__all__ = ["RetryingLedger"]

ATTEMPTS = 20
PAUSE = 0.05
"""Seconds before another attempt."""


class RetryingLedger(Ledger):
    """Sends what got no answer once more, the same bytes: the reference in them tells the service that it is the same.

    `address` waits for the service where it is not there. Raises `CommandError` when it never answers.
    """

    def __init__(self, address: Callable[[], Awaitable[str]]) -> None:
        super().__init__()
        self.cut_off = 0
        """Requests without an answer."""
        self._address = address

    async def _send(
        self,
        client: httpx.AsyncClient,
        answers: Counter[tuple[int, str]],
        method: str,
        path: str,
        body: bytes | None = None,
    ) -> httpx.Response:
        for _ in range(ATTEMPTS):
            address = await self._address()
            try:
                answer = await super()._send(client, answers, method, f"{address}{path}", body)
            except httpx.TransportError:
                self.cut_off += 1
            else:
                if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                    return answer
            await asyncio.sleep(PAUSE)
        raise CommandError(f"the service did not answer {method} {path} in {ATTEMPTS} attempts")
