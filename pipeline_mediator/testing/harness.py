"""An application under test: the whole pipeline, a broker that is none, and a record of what happened."""

from __future__ import annotations

from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias, TypeVar

from pipeline_mediator.chain import unwrapped
from pipeline_mediator.codec import Codec, Facts
from pipeline_mediator.errors import BrokerUnavailableError, ConfigurationError
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Dead, Delivery, Later, Outgoing
from pipeline_mediator.middlewares.publish import PublishMiddleware
from pipeline_mediator.outbox import OutboxRelay
from pipeline_mediator.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from pipeline_mediator.context import Context, Route
    from pipeline_mediator.events import Event
    from pipeline_mediator.pipeline import Middleware, Next
    from pipeline_mediator.requests import Request

__all__ = ["FakeBroker", "Harness", "Seen"]

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    M = TypeVarWithDefault("M", default=Any)
R = TypeVar("R")

Step: TypeAlias = Literal["sent", "emitted", "published", "handled", "failed", "postponed", "dead"]

_ROUNDS: Final = 1000

harnesses: Final[list[Harness]] = []
"""Those that are open, for the pytest plugin."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One thing that happened in a harness."""

    step: Step
    message: Any
    message_id: str
    correlation_id: str | None
    causation_id: str | None
    headers: Mapping[str, str]
    what: str = ""
    """The destination of what was published, the error of what failed, the reason of what is dead."""

    def __str__(self) -> str:
        return f"{self.step:<9} {self.message!r}{f': {self.what}' if self.what else ''}"


class FakeBroker:
    """A broker that keeps what is published, until somebody looks; in tests of one's own it may stand alone.

    `refuse`, if set, is asked about every message: the error that it returns is the broker's answer.
    """

    def __init__(self, *, headers: bool = True) -> None:
        self.features = BrokerFeatures(system="fake", durable=True, headers=headers, ordered_by_key=True)
        self.published: list[Outgoing] = []
        self.waiting: deque[Outgoing] = deque()
        """What was published and not handed over yet."""
        self.refuse: Callable[[Outgoing], Exception | None] | None = None

    def go_away(self) -> None:
        """Answer nothing but `BrokerUnavailableError`, until `come_back`."""
        self.refuse = lambda _: BrokerUnavailableError("the fake broker was told to be away")

    def come_back(self) -> None:
        """Accept everything."""
        self.refuse = None

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        """Accept all that `refuse` says nothing against; of one key, nothing behind a refused message."""
        answers: list[Exception | None] = []
        stopped: set[str] = set()
        for message in batch:
            refusal = None if self.refuse is None else self.refuse(message)
            if message.key in stopped:
                refusal = BrokerUnavailableError("an earlier message of its key was refused")
            if refusal is None:
                self.published.append(message)
                self.waiting.append(message)
            elif message.key is not None:
                stopped.add(message.key)
            answers.append(refusal)
        return answers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        pass


class Harness:
    """Runs an application's messages through its own pipeline, with a fake broker in the place of each real one.

        async def test_orders() -> None:
            mediator = create_mediator("sqlite+aiosqlite://")
            async with Harness(mediator) as app:
                order_id = await app.send(PlaceOrder("book"))
                await app.idle()
                assert app.published(OrderPlaced) == [OrderPlaced(order_id)]
                assert len(app.handled(OrderPlaced)) == 1

    The mediator that is given is taken apart and not used: its maps, container, codec and pipeline go into `mediator`,
    whose Publish middlewares have the same destinations in `broker`. Everything else is real: transactions, outbox,
    inbox. Nothing runs in the background: `idle` relays what the outboxes hold and hands over what was published, as a
    consumer would, until there is nothing left; `pass_time` does the same after a while that does not have to be waited
    for. So a test sees the same every time.

    `sent`, `emitted`, `published`, `handled`, `dead_letters` and `postponed` list messages, of one type or of all, in
    the order in which it happened; `log` has everything with its ids and headers, and `story()` is that to read. With
    pytest, a test that fails shows it. `handled` is what local handlers have ended well with; whether the transaction
    around them did is for the database to say.

    Raises `ConfigurationError` for what is no mediator. Source of the idea: MassTransit's test harness.
    """

    def __init__(self, mediator: Mediator, *, subscription: str = "harness") -> None:
        if not isinstance(mediator, Mediator):
            raise ConfigurationError(f"Harness takes a Mediator, not a {type(mediator).__name__}")
        self.broker = FakeBroker()
        self.log: list[Seen] = []
        self.dead_letters: list[Delivery] = []
        self.postponed: list[tuple[float, Delivery]] = []
        """What comes again, and when on the harness's clock, which began at 0."""
        self._subscription = subscription
        self._now = 0.0
        codec = mediator.codec
        self.mediator = Mediator(
            mediator.requests,
            mediator.container,
            event_map=mediator.events,
            middlewares=Pipeline(_Entered(self), *mediator.pipeline.each(self._with_fake_broker), _Handled(self)),
            codec=codec,
            new_id=mediator.new_id,
        )
        self._codec: Codec = codec
        outboxes: list[Any] = [one for one in self.mediator.pipeline if getattr(one, "role", None) == "outbox"]
        stores = {id(one.store): one.store for one in outboxes}
        self._relays = [OutboxRelay(self.mediator, store) for store in stores.values()]
        self._stack = AsyncExitStack()

    # -- what a test does ----------------------------------------------------------------------------------------------

    async def send(self, request: Request[R], /, **options: Any) -> R:
        """As `Mediator.send`."""
        return await self.mediator.send(request, **options)

    async def emit(self, event: Event, /, **options: Any) -> None:
        """As `Mediator.emit`."""
        await self.mediator.emit(event, **options)

    async def deliver(
        self,
        message: object,
        *,
        message_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        attempt: int = 1,
        destination: str = "harness",
    ) -> Delivery:
        """Hand a message over as a broker would; its `outcome` says what the pipeline decided.

        Raises what the handler raised if the pipeline decided nothing.
        """
        self._codec.register(type(message))
        facts = Facts(message_id or self.mediator.new_id(), headers=headers or {})
        encoded = self._codec.encode(message, facts, binary=True)
        delivery = Delivery(
            destination,
            encoded.body,
            encoded.content_type,
            encoded.headers,
            facts.message_id,
            None,
            attempt,
            self._subscription,
        )
        await self._hand_over(delivery)
        return delivery

    async def deliver_raw(
        self, body: bytes, content_type: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Delivery:
        """Hand over bytes, whatever they are."""
        delivery = Delivery("harness", body, content_type, headers or {}, None, None, 1, self._subscription)
        await self._hand_over(delivery)
        return delivery

    async def idle(self) -> None:
        """Relay and hand over until nothing is left that could be done now.

        Not waited for: what is postponed, and what an outbox keeps because `broker` refuses it. Raises what a handler
        raised where the pipeline decided nothing about it, and `RuntimeError` if messages cause each other for ever.
        """
        for _ in range(_ROUNDS):
            relayed = [await relay.drain() for relay in self._relays]
            handed_over = await self._hand_over_what_waits()
            if not handed_over and not any(relayed):
                return
        raise RuntimeError(f"not idle after {_ROUNDS} rounds: do messages cause each other for ever?\n{self.story()}")

    async def pass_time(self, seconds: float) -> None:
        """Let what is postponed for less come again, in order, and wait until idle."""
        self._now += seconds
        due = sorted((one for one in self.postponed if one[0] <= self._now), key=lambda one: one[0])
        self.postponed = [one for one in self.postponed if one[0] > self._now]
        for _, delivery in due:
            delivery.attempt += 1
            delivery.outcome = None
            await self._hand_over(delivery)
        await self.idle()

    # -- what a test asks ----------------------------------------------------------------------------------------------

    def sent(self, message_type: type[M] | None = None) -> list[M]:
        """The requests that were sent, from outside and from handlers."""
        return self._seen("sent", message_type)

    def emitted(self, message_type: type[M] | None = None) -> list[M]:
        """The events that were emitted."""
        return self._seen("emitted", message_type)

    def published(self, message_type: type[M] | None = None) -> list[M]:
        """What the broker has accepted, decoded."""
        self._note_published()
        return self._seen("published", message_type)

    def handled(self, message_type: type[M] | None = None) -> list[M]:
        """What local handlers have ended well with, wherever it came from."""
        return self._seen("handled", message_type)

    def story(self) -> str:
        """What happened, a line for each thing."""
        self._note_published()
        return "\n".join(map(str, self.log)) or "nothing happened"

    # -- how it works --------------------------------------------------------------------------------------------------

    def _with_fake_broker(self, middleware: Middleware) -> Middleware:
        inner: object = unwrapped(middleware)
        return inner.to(self.broker) if isinstance(inner, PublishMiddleware) else middleware

    def _seen(self, step: Step, message_type: type[M] | None) -> list[M]:
        wanted: type[Any] = object if message_type is None else message_type
        return [one.message for one in self.log if one.step == step and isinstance(one.message, wanted)]

    def note(self, step: Step, context: Context, what: str = "") -> None:
        """Write down what happened to a message; for the middlewares of the harness."""
        message: object = context.message
        self.log.append(
            Seen(
                step,
                message,
                context.message_id,
                context.correlation_id,
                context.causation_id,
                dict(context.headers),
                what,
            )
        )

    def _note_published(self) -> None:
        while self.broker.published:
            outgoing = self.broker.published.pop(0)
            decoded = self._codec.decode(outgoing.body, outgoing.content_type, outgoing.headers)
            facts = decoded.facts
            self.log.append(
                Seen(
                    "published",
                    decoded.message,
                    facts.message_id,
                    facts.correlation_id,
                    facts.causation_id,
                    facts.headers,
                    outgoing.destination,
                )
            )

    async def _hand_over_what_waits(self) -> int:
        waiting = len(self.broker.waiting)
        for _ in range(waiting):
            self._note_published()
            outgoing = self.broker.waiting.popleft()
            await self._hand_over(
                Delivery(
                    outgoing.destination,
                    outgoing.body,
                    outgoing.content_type,
                    outgoing.headers,
                    outgoing.message_id,
                    outgoing.key,
                    1,
                    self._subscription,
                )
            )
        return waiting

    async def _hand_over(self, delivery: Delivery) -> None:
        try:
            await self.mediator.deliver(delivery)
        except Exception:
            if delivery.outcome is None:
                raise
        outcome = delivery.outcome
        if isinstance(outcome, Later):
            self.postponed.append((self._now + outcome.delay, delivery))
            self._note_delivery("postponed", delivery, f"{outcome.delay:.1f} s")
        elif isinstance(outcome, Dead):
            self.dead_letters.append(delivery)
            self._note_delivery("dead", delivery, outcome.reason)

    def _note_delivery(self, step: Step, delivery: Delivery, what: str) -> None:
        name = delivery.headers.get("type", "a message") if delivery.headers else "a message"
        self.log.append(Seen(step, name, delivery.message_id or "", None, None, delivery.headers, what))

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.mediator)
        harnesses.append(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._note_published()
        await self._stack.aclose()


class _Entered:
    """Outermost: what the application asked for."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness

    def for_route(self, route: Route) -> _Entered | None:
        return self if route.origin == "local" else None

    async def __call__(self, context: Context, call_next: Next) -> Any:
        route = context.route
        message: object = context.message
        if route is not None and route.kind != "event":
            self._harness.note("sent", context)
        elif context.mediator.routes.of_event(type(message))[0].route is route:
            # An event with local handlers and a destination has two chains, and was emitted once.
            self._harness.note("emitted", context)
        return await call_next(context)


class _Handled:
    """Innermost: what the handlers did."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness

    def for_route(self, route: Route) -> _Handled | None:
        return None if route.origin == "relay" or route.destination is not None else self

    async def __call__(self, context: Context, call_next: Next) -> Any:
        try:
            result = await call_next(context)
        except Exception as error:
            self._harness.note("failed", context, f"{type(error).__name__}: {error}")
            raise
        self._harness.note("handled", context)
        return result
