"""The orders that the demo sends: varied, and the same for the same seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pipeline_mediator.cli.demo.payments import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FollowUp", "Visit", "plan_visits"]

FollowUp: TypeAlias = Literal["show", "cancel", "cancel another", "repeat"]


@dataclass(frozen=True, slots=True)
class Visit:
    """What one client sends: an order, and what follows once it is accepted."""

    body: bytes
    payment_key: str = ""
    """What the payment gateway will know the order by."""
    units: int = 0
    fault: Fault | None = None
    """What the gateway will do to it."""
    then: tuple[FollowUp, ...] = ()


def plan_visits(number: int, seed: int) -> list[Visit]:
    """So many visits, in no order; the first of them are one of each kind, so that small numbers are varied too."""
    random = Random(seed)  # noqa: S311 - nothing is kept secret by it
    kinds = [*_KINDS, *random.choices(list(_KINDS), list(_KINDS.values()), k=max(0, number - len(_KINDS)))][:number]
    random.shuffle(kinds)
    return [kind(random, f"demo-{at:05}") for at, kind in enumerate(kinds)]


def _plain(random: Random, reference: str) -> Visit:
    return _visit(random, reference, then=random.choice([(), (), (), ("show",)]))


def _cancelled(random: Random, reference: str) -> Visit:
    return _visit(random, reference, then=("show", "cancel"))


def _cancelled_twice(random: Random, reference: str) -> Visit:
    return _visit(random, reference, then=("cancel", "cancel", "show"))


def _mistyped(random: Random, reference: str) -> Visit:
    return _visit(random, reference, then=("cancel another", "show"))


def _sent_twice(random: Random, reference: str) -> Visit:
    return _visit(random, reference, then=("repeat",))


def _unreachable_gateway(random: Random, reference: str) -> Visit:
    return _visit(random, reference, fault=Fault(unreachable=random.choice([1, 1, 2])))


def _dead_gateway(random: Random, reference: str) -> Visit:
    return _visit(random, reference, fault=Fault(unreachable=1_000))


def _crash(random: Random, reference: str) -> Visit:
    return _visit(random, reference, fault=Fault(crashes=True))


def _unknown_customer(random: Random, reference: str) -> Visit:
    return _visit(random, reference, customer_id=random.randint(1_000, 9_999))


def _unknown_product(random: Random, reference: str) -> Visit:
    return _visit(random, reference, lines={"pen": 1, random.choice(["sofa", "piano"]): 1})


def _out_of_stock(random: Random, reference: str) -> Visit:
    return _visit(random, reference, lines={"pen": 1, "desk": random.randint(500, 1_000)})


def _too_expensive(random: Random, reference: str) -> Visit:
    return _visit(random, reference, customer_id=4, lines={"chair": 12})


def _invalid(random: Random, reference: str) -> Visit:
    order = _order(1, reference, {"book": 1})
    mistake: dict[str, Any] = random.choice(
        [
            {"lines": [{"sku": "book", "quantity": random.randint(-9, 0)}]},
            {"lines": [{"sku": "book", "quantity": "three"}]},
            {"lines": [*order["lines"], *order["lines"]]},
            {"lines": []},
            {"reference": "=1+1"},
            {"customer_id": None},
        ]
    )
    body = json.dumps(order | mistake).encode()
    return Visit(body if random.random() < 0.9 else body[:-5])  # noqa: PLR2004 - one in ten is cut short


_KINDS: dict[Callable[[Random, str], Visit], int] = {
    _plain: 48,
    _cancelled: 10,
    _cancelled_twice: 2,
    _mistyped: 2,
    _sent_twice: 3,
    _unreachable_gateway: 12,
    _dead_gateway: 2,
    _crash: 2,
    _unknown_customer: 2,
    _unknown_product: 2,
    _out_of_stock: 2,
    _too_expensive: 2,
    _invalid: 11,
}
"""How often each kind of visit comes, of a hundred."""


def _visit(
    random: Random,
    reference: str,
    *,
    customer_id: int | None = None,
    lines: dict[str, int] | None = None,
    fault: Fault | None = None,
    then: tuple[FollowUp, ...] = (),
) -> Visit:
    customer_id = customer_id or random.choices([1, 2, 3, 4], [40, 30, 20, 10])[0]
    lines = lines or _some_lines(random)
    body = json.dumps(_order(customer_id, reference, lines)).encode()
    return Visit(body, f"{customer_id}/{reference}", sum(lines.values()), fault, then)


def _some_lines(random: Random) -> dict[str, int]:
    cheap = random.sample(["book", "lamp", "paper", "pen"], k=random.randint(1, 3))
    dear = random.choices(["chair", "desk", None], [10, 5, 85])
    return {sku: random.randint(1, 5) for sku in [*cheap, *dear] if sku is not None}


def _order(customer_id: int, reference: str, lines: dict[str, int]) -> dict[str, Any]:
    ordered = [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]
    return {"customer_id": customer_id, "reference": reference, "lines": ordered}
