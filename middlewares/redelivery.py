"""Lets a delivery that failed come again later, a few times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pipeline_mediator.errors import ConfigurationError, DeliveryExhaustedError, PermanentError
from pipeline_mediator.pipeline import Outside
from pipeline_mediator.telemetry import error_type
from pipeline_mediator.trouble import default_backoff, pause_after

if TYPE_CHECKING:
    from tenacity.wait import WaitBaseT

    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.message_brokers.protocol import Delivery
    from pipeline_mediator.pipeline import Next

__all__ = ["RedeliveryMiddleware"]


class RedeliveryMiddleware:
    """Decides that what a broker handed over and what failed comes again, until its `attempts` are used up.

        RedeliveryMiddleware()                                              # 10 attempts, a quarter of an hour
        RedeliveryMiddleware(attempts=5, wait=wait_exponential(max=60))     # tenacity's wait strategies, in seconds

    An attempt is a delivery: RetryMiddleware inside has attempts of its own within each, for what passes in a moment;
    this is for what takes longer. Brokers count: an attempt that ended with its process counts too, so a message that
    ends every process that handles it is given up, unhandled, with `DeliveryExhaustedError`.

    It only decides; the broker keeps the message meanwhile, and a restart changes nothing. A `PermanentError` does not
    come again, nor does what was committed. After the last attempt the error is left to DeadLetterMiddleware. The error
    goes on to whoever observes from outside; it is noted as "redelivery".

    Raises `ConfigurationError` for less than one attempt.
    """

    role: ClassVar[str] = "redelivery"
    rules: ClassVar = (
        Outside("retry", "a redelivery is for what a retry did not help"),
        Outside("transaction", "the outcome of the message is known when its transaction has ended"),
    )

    def __init__(self, attempts: int = 10, *, wait: WaitBaseT | None = None) -> None:
        if attempts < 1:
            raise ConfigurationError(f"RedeliveryMiddleware(attempts={attempts}): the first counts, at least 1 it is")
        self._attempts = attempts
        self._wait = default_backoff() if wait is None else wait

    @property
    def summary(self) -> str:
        """How often it is handed over."""
        return f"{self._attempts} attempts"

    def for_route(self, route: Route) -> RedeliveryMiddleware | None:
        """Stands in the chains of what came from a broker."""
        return self if route.origin == "broker" else None

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the rest of the chain; let it come again if that may help."""
        delivery = context.delivery
        if delivery is None:
            return await call_next(context)
        if delivery.attempt > self._attempts:
            raise DeliveryExhaustedError(delivery.attempt, self._attempts)
        try:
            return await call_next(context)
        except Exception as error:
            undecided = delivery.outcome is None and not context.unit.committed
            if undecided and delivery.attempt < self._attempts and not _is_permanent(error):
                self._postpone(delivery, context, error)
            raise

    def _postpone(self, delivery: Delivery, context: Context, error: Exception) -> None:
        from pipeline_mediator.message_brokers.protocol import Later

        delay = pause_after(delivery.attempt, self._wait)
        delivery.outcome = Later(delay)
        context.note("redelivery", deliveries=delivery.attempt, error=error_type(error), delay=delay)


def _is_permanent(error: Exception) -> bool:
    """Coming again helps if it helps any of the handlers that failed together."""
    group: Any = error
    if isinstance(error, ExceptionGroup):
        return all(map(_is_permanent, group.exceptions))
    return isinstance(error, PermanentError)
