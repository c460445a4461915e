"""A payment gateway that fails when it is told to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_mediator.examples.orders.payments import Payments

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Fault", "UnreliablePayments"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the authorisation of one order."""

    unreachable: int = 0
    """How many times in a row."""
    crashes: bool = False


class UnreliablePayments(Payments):
    """Authorises what has no fault; counts the errors that it raised, by type."""

    def __init__(self, faults: Mapping[str, Fault]) -> None:
        self.raised: Counter[str] = Counter()
        self._faults = faults
        self._asked: Counter[str] = Counter()

    async def authorise(self, key: str, customer_id: int, cents: int) -> str:
        """Raises what the order's fault says."""
        self._asked[key] += 1
        fault = self._faults.get(key)
        if fault is not None and fault.crashes:
            self.raised["ZeroDivisionError"] += 1
            return str(cents / 0)
        if fault is not None and self._asked[key] <= fault.unreachable:
            self.raised["ConnectionError"] += 1
            raise ConnectionError("the payment gateway does not answer")
        return f"demo-{key}"
