"""Gives up on a delivery that failed for good, with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pipeline_mediator.errors import MediatorError
from pipeline_mediator.pipeline import Outside
from pipeline_mediator.telemetry import error_type

if TYPE_CHECKING:
    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.pipeline import Next

__all__ = ["DeadLetterMiddleware"]

_LONGEST_REASON = 1000


class DeadLetterMiddleware:
    """Decides that what a broker handed over and what failed is a dead letter, unless somebody inside knows better.

        Pipeline(DeadLetterMiddleware(), RedeliveryMiddleware(attempts=5), TransactionMiddleware(sessions.begin), ...)

    What RedeliveryMiddleware wants to see again comes again; everything else that raises is kept by the broker, body
    and headers as they came, with the reason: the type of the error and its text, cut after 1000 characters. So is what
    cannot be decoded. `pipeline-mediator dead-letters` shows, retries and drops them.

    It only decides. The consumer carries it out after the chain has ended; where the broker cannot write the dead
    letter, the message stays where it is. What was committed is never a dead letter. The error goes on to whoever
    observes from outside; it is noted as "dead letter".

    Source of the idea: the failure transport of Symfony Messenger.
    """

    role: ClassVar[str] = "dead letter"
    rules: ClassVar = (
        Outside("redelivery", "what is to come again is no dead letter yet"),
        Outside("retry", "an attempt that failed is no dead letter while there may be another"),
        Outside("transaction", "the outcome of the message is known when its transaction has ended"),
    )

    def for_route(self, route: Route) -> DeadLetterMiddleware | None:
        """Stands in the chains of what came from a broker."""
        return self if route.origin == "broker" else None

    async def __call__(self, context: Context, call_next: Next) -> Any:
        """Walk the rest of the chain; give up on what it could not handle."""
        try:
            return await call_next(context)
        except Exception as error:
            delivery = context.delivery
            if delivery is not None and delivery.outcome is None and not context.unit.committed:
                from pipeline_mediator.message_brokers.protocol import Dead

                delivery.outcome = Dead(_reason(error))
                context.note("dead letter", error=error_type(error))
            raise


def _reason(error: Exception) -> str:
    kind = type(error).__name__ if isinstance(error, MediatorError) else error_type(error)
    text = f"{kind}: {error}"
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"
