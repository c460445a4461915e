"""Holds what clients know of a service that was killed against what was committed and received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_mediator.cli.demo.table import Row, Table
from pipeline_mediator.examples.orders.messages import OrderCancelled, OrderPlaced

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline_mediator.cli.demo.database import Contents
    from pipeline_mediator.cli.demo.ledger import Ledger
    from pipeline_mediator.cli.demo.listener import Received

__all__ = ["outage_table"]


def outage_table(ledger: Ledger, after: Contents, received: Received) -> Table:
    """What became of the orders. An answer may be lost; then the service knows the order when it is sent again."""
    answered = ledger.known.keys() | ledger.repeated
    as_answered = (
        answered == after.known.keys()
        and ledger.known.items() <= after.known.items()
        and ledger.placed.items() <= after.placed.items()
    )
    placed = _Told.of(OrderPlaced, after.placed, received)
    cancelled = _Told.of(OrderCancelled, after.cancelled, received)
    return Table(
        "What became of them",
        ("answered", "committed", "received", "again", "lost", "unexpected"),
        (
            placed.row("orders placed", len(answered), len(after.placed), same=as_answered),
            cancelled.row(
                "orders cancelled",
                len(ledger.cancelled),
                len(after.cancelled),
                same=ledger.cancelled == after.cancelled.keys(),
            ),
            Row("told in order", (None, len(after.cancelled), _in_order(received)), beside=(None,) * 3),
            Row("cents", (None, after.in_lines, sum(received.cents(OrderPlaced).values())), beside=(None,) * 3),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Told:
    """What was received of one type, beside what should have been."""

    received: int
    again: int
    lost: int
    unexpected: int

    @classmethod
    def of(cls, kind: type[OrderPlaced | OrderCancelled], committed: Mapping[int, int], received: Received) -> _Told:
        messages = received.of(kind)
        right = received.cents(kind).items() & committed.items()
        return cls(len(messages), received.again[kind], len(committed) - len(right), len(messages) - len(right))

    def row(self, name: str, answered: int, committed: int, *, same: bool) -> Row:
        return Row(
            name,
            (answered, committed, self.received),
            same=same and self.lost == self.unexpected == 0,
            beside=(self.again, self.lost, self.unexpected),
        )


def _in_order(received: Received) -> int:
    """Orders whose cancellation came after the order itself, going by the first copies."""
    placed: set[int] = set()
    in_order = 0
    for message in received.messages.values():
        if isinstance(message, OrderPlaced):
            placed.add(message.order_id)
        else:
            in_order += message.order_id in placed
    return in_order
