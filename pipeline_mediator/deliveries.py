"""What a broker hands over, on its way into the pipeline: decoded, or given up with a reason."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from pipeline_mediator.context import HOPS, Context, hops_of
from pipeline_mediator.errors import CodecError, HandlerNotFoundError, UnknownMessageError
from pipeline_mediator.message_brokers.protocol import Ack, Undecodable
from pipeline_mediator.requests import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pipeline_mediator.chain import Chain
    from pipeline_mediator.codec import Decoded
    from pipeline_mediator.errors import MediatorError
    from pipeline_mediator.mediator import Mediator
    from pipeline_mediator.message_brokers.protocol import Delivery

    Walk = Callable[[object, Context | None], Coroutine[Any, Any, Any]]

__all__ = ["Arrivals"]

logger = logging.getLogger(__name__)

_ACK: Final = Ack()


class Arrivals:
    """The way in for one mediator's deliveries; what `Mediator.deliver` promises is done here."""

    def __init__(self, mediator: Mediator, walker: Callable[[Chain], Walk]) -> None:
        self._mediator = mediator
        self._walker = walker
        self._ways: dict[type, tuple[Chain, Walk] | None] = {}
        self._refused: tuple[Chain, Walk] | None = None

    async def walk(self, delivery: Delivery, *, skip_unknown: bool) -> None:
        """Decode it and walk its chain; a decision about its outcome is left to who stands in there."""
        try:
            decoded = self._mediator.codec.decode(delivery.body, delivery.content_type, delivery.headers)
        except CodecError as error:
            if skip_unknown and isinstance(error, UnknownMessageError):
                self._pass_over(delivery, str(error))
                return
            unreadable = error
        else:
            await self._walk_decoded(delivery, decoded)
            return
        await self._walk_refused(delivery, unreadable)

    async def _walk_decoded(self, delivery: Delivery, decoded: Decoded) -> None:
        message: object = decoded.message
        facts, message_type = decoded.facts, type(message)
        way = self._ways.get(message_type) or self._way_of(message_type)
        delivery.source, delivery.sequence = decoded.source, facts.sequence
        if way is None:
            if isinstance(message, Request):
                # An event may be meant for others; a command is meant for whoever gets it.
                refusal = HandlerNotFoundError(message_type, "it came from a broker. Bind one with RequestMap.bind.")
                await self._walk_refused(delivery, refusal)
                return
            self._pass_over(delivery, f"nobody here handles {message_type.__name__}")
            return
        chain, walk = way
        context = Context(message, chain.route, self._mediator)
        context.identify(
            message_id=facts.message_id,
            correlation_id=facts.correlation_id,
            causation_id=facts.causation_id,
            key=facts.key,
        )
        headers = context.headers
        headers.update(facts.headers)
        headers[HOPS] = str(hops_of(headers) + 1)
        await _decide(delivery, context, walk)

    async def _walk_refused(self, delivery: Delivery, error: MediatorError) -> None:
        if self._refused is None:
            chain = self._mediator.routes.undecodable()
            self._refused = (chain, self._walker(chain))
        chain, walk = self._refused
        context = Context(Undecodable(delivery.body, error), chain.route, self._mediator)
        context.identify(message_id=delivery.message_id)
        del error
        await _decide(delivery, context, walk)

    def _way_of(self, message_type: type) -> tuple[Chain, Walk] | None:
        if message_type not in self._ways:
            chain = self._mediator.routes.delivered(message_type)
            self._ways[message_type] = None if chain is None else (chain, self._walker(chain))
        return self._ways[message_type]

    def _pass_over(self, delivery: Delivery, why: str) -> None:
        logger.debug("%s: a message from %s is passed over: %s", delivery.subscription, delivery.destination, why)
        delivery.outcome = _ACK


async def _decide(delivery: Delivery, context: Context, walk: Walk) -> None:
    """Walk; what was committed is done with whatever was raised, and what raises nothing too unless it was decided."""
    context.delivery = delivery
    try:
        await walk(context.message, context)
    except BaseException:
        if context.begun_unit is not None and context.begun_unit.committed:
            delivery.outcome = _ACK
        raise
    if delivery.outcome is None:
        delivery.outcome = _ACK
