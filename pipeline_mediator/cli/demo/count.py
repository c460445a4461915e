"""Holds what the clients were told against what was committed, published and received."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from pipeline_mediator.cli.demo.table import Row, Table
from pipeline_mediator.examples.orders.messages import OrderCancelled, OrderPlaced
from pipeline_mediator.messages import message_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipeline_mediator.cli.demo.database import Contents
    from pipeline_mediator.cli.demo.ledger import Ledger
    from pipeline_mediator.cli.demo.listener import Received
    from pipeline_mediator.cli.demo.payments import UnreliablePayments
    from pipeline_mediator.cli.demo.tally import Tally

__all__ = ["answers_as_text", "orders_table", "transactions_table"]

MEANING = {
    HTTPStatus.CREATED: "order placed",
    HTTPStatus.NO_CONTENT: "order cancelled",
    HTTPStatus.BAD_REQUEST: "no JSON; no transaction began",
    HTTPStatus.UNPROCESSABLE_ENTITY: "refused by validation; no transaction began",
    HTTPStatus.NOT_FOUND: "refused by the handler, rolled back",
    HTTPStatus.CONFLICT: "refused by the handler, rolled back",
    HTTPStatus.SERVICE_UNAVAILABLE: "failed in every attempt, each rolled back",
    HTTPStatus.INTERNAL_SERVER_ERROR: "the handler crashed after it had written, rolled back",
}


def answers_as_text(ledger: Ledger) -> str:
    """The answers to commands, by status and error."""
    lines = [
        f"{number:>6}  {status}  {error:<22}  {MEANING.get(HTTPStatus(status), '')}".rstrip()
        for (status, error), number in sorted(ledger.commands.items())
    ]
    return "\n".join([*lines, f"{ledger.queries.total():>6}  queries"])


def orders_table(ledger: Ledger, before: Contents, after: Contents, tally: Tally, received: Received) -> Table:
    """What became of the orders, as four parties know it that did not ask each other."""
    placed, cancelled = received.cents(OrderPlaced), received.cents(OrderCancelled)
    cancelled_for = {order_id: ledger.placed[order_id] for order_id in ledger.cancelled}
    units = {event.order_id: sum(line.quantity for line in event.lines) for event in received.of(OrderPlaced).values()}
    owed = _sum(ledger.placed) - _sum(cancelled_for), after.owed - before.owed, None, _sum(placed) - _sum(cancelled)
    taken = _sum(ledger.units, without=ledger.cancelled), before.available - after.available, None
    return Table(
        "What became of the orders",
        ("answered", "committed", "published", "received", "again"),
        (
            _told_of("orders placed", OrderPlaced, ledger.placed, after.placed, tally=tally, received=received),
            _told_of(
                "orders cancelled", OrderCancelled, cancelled_for, after.cancelled, tally=tally, received=received
            ),
            Row("cents in orders", (_sum(ledger.placed), after.in_lines, None, _sum(placed)), beside=(None,)),
            Row("cents owed", owed, beside=(None,)),
            Row("products taken", (*taken, _sum(units, without=cancelled)), beside=(None,)),
            Row("rows of the export", (ledger.exported, len(after.placed), None, None), beside=(None,)),
        ),
    )


def _told_of(
    name: str,
    kind: type[OrderPlaced | OrderCancelled],
    answered: Mapping[int, int],
    committed: Mapping[int, int],
    *,
    tally: Tally,
    received: Received,
) -> Row:
    """Answered, committed, published and received are the same orders; that a copy came again is no mistake."""
    messages = received.of(kind)
    published = tally.published[message_name(kind).name]
    return Row(
        name,
        (len(answered), len(committed), len(published), len(messages)),
        same=answered == committed == received.cents(kind) and published == messages.keys(),
        beside=(received.again[kind],),
    )


def transactions_table(ledger: Ledger, after: Contents, tally: Tally, payments: UnreliablePayments) -> Table:
    """What the pipeline did, against what the answers and the payment gateway make one expect."""
    answers = ledger.commands
    accepted = sum(number for (status, _), number in answers.items() if status in {201, 204})
    # The gateway's failures and crashes are counted where they were raised; of these answers each was one attempt.
    refused = sum(
        number for (status, error), number in answers.items() if status in {404, 409} or error == "TimeoutError"
    )
    return Table(
        "What became of the transactions",
        ("expected", "counted"),
        (
            Row("committed", (accepted, tally.committed)),
            Row("rolled back", (refused + payments.raised.total(), tally.rolled_back)),
            Row("reorders, written with the order", (tally.handled["StockRanLow"], after.reorders)),
        ),
    )


def _sum(amounts: Mapping[int, int], without: Iterable[int] = ()) -> int:
    left_out = set(without)
    return sum(amount for order_id, amount in amounts.items() if order_id not in left_out)
