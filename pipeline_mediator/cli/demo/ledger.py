"""What the clients were told, answer by answer."""

from __future__ import annotations

import json
from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

    from pipeline_mediator.cli.demo.visits import Visit

__all__ = ["Ledger"]

NO_ORDER = 2_000_000_000


class Ledger:
    """Sends requests and writes down the answers."""

    def __init__(self) -> None:
        self.placed: dict[int, int] = {}
        """Cents by order."""
        self.known: dict[str, int] = {}
        """Orders by their payment key."""
        self.repeated: set[str] = set()
        """Payment keys of orders that the service said to have already."""
        self.units: dict[int, int] = {}
        """Products taken from the stock, by order."""
        self.cancelled: set[int] = set()
        self.exported = 0
        """Rows of the export, without its heading."""
        self.commands: Counter[tuple[int, str]] = Counter()
        """Answers to orders and cancellations, by status and error."""
        self.queries: Counter[tuple[int, str]] = Counter()

    @property
    def requests(self) -> int:
        """How many were sent."""
        return self.commands.total() + self.queries.total()

    async def record(self, client: httpx.AsyncClient, visit: Visit) -> None:
        """Send an order, and what follows if it is accepted."""
        order_id = await self._place(client, visit)
        if order_id is None:
            return
        for what in visit.then:
            match what:
                case "show":
                    await self._send(client, self.queries, "GET", f"/orders/{order_id}")
                case "cancel":
                    await self._cancel(client, order_id)
                case "cancel another":
                    await self._cancel(client, NO_ORDER)
                case "repeat":
                    await self._place(client, visit)

    async def export(self, client: httpx.AsyncClient) -> None:
        """Fetch every order."""
        answer = await self._send(client, self.queries, "GET", "/orders.csv")
        self.exported = max(0, len(answer.text.splitlines()) - 1)

    async def _place(self, client: httpx.AsyncClient, visit: Visit) -> int | None:
        answer = await self._send(client, self.commands, "POST", "/orders", visit.body)
        if _error_of(answer) == "RepeatedReferenceError":
            self.repeated.add(visit.payment_key)
        if answer.status_code != HTTPStatus.CREATED:
            return None
        receipt: dict[str, int] = answer.json()
        order_id = receipt["order_id"]
        self.known[visit.payment_key] = order_id
        self.placed[order_id] = receipt["total_cents"]
        self.units[order_id] = visit.units
        return order_id

    async def _cancel(self, client: httpx.AsyncClient, order_id: int) -> None:
        answer = await self._send(client, self.commands, "POST", f"/orders/{order_id}/cancel")
        if answer.status_code == HTTPStatus.NO_CONTENT or _error_of(answer) == "AlreadyCancelledError":
            self.cancelled.add(order_id)

    async def _send(
        self,
        client: httpx.AsyncClient,
        answers: Counter[tuple[int, str]],
        method: str,
        path: str,
        body: bytes | None = None,
    ) -> httpx.Response:
        answer = await client.request(method, path, content=body)
        answers[answer.status_code, _error_of(answer)] += 1
        return answer


def _error_of(answer: httpx.Response) -> str:
    if answer.is_success:
        return ""
    try:
        explained: dict[str, Any] = answer.json()
    except json.JSONDecodeError:
        return ""
    return str(explained.get("error", ""))
