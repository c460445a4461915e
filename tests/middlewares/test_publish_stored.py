"""What an outbox kept goes to the broker as it was stored, and of one key never a later message after a refused one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import pytest

from pipeline_mediator.codec import Codec, Facts
from pipeline_mediator.errors import BrokerUnavailableError, DestinationError
from pipeline_mediator.events import IntegrationEvent
from pipeline_mediator.mediator import Mediator
from pipeline_mediator.message_brokers.protocol import BrokerFeatures, Outgoing
from pipeline_mediator.middlewares.outbox import OutboxMiddleware
from pipeline_mediator.middlewares.publish import MAX_PER_CALL, PublishMiddleware
from pipeline_mediator.middlewares.transaction import TransactionMiddleware
from pipeline_mediator.outbox.protocol import Published, Relayed, StoredMessage, StoredRow
from pipeline_mediator.pipeline import only
from tests.middlewares.shop import Memory, Place, Placed, RecordingBroker, Shipped, mediator_of


class Broker(RecordingBroker):
    """Refuses the message ids of `refuse`, and remembers each call."""

    def __init__(self, *refuse: int, ordered: bool = True, headers: bool = True) -> None:
        super().__init__()
        self.refuse = {str(one) for one in refuse}
        self.calls: list[list[Outgoing]] = []
        self._features = BrokerFeatures(system="recording", durable=True, headers=headers, ordered_by_key=ordered)
        self.on_call: Callable[[], None] = lambda: None

    @property
    def features(self) -> BrokerFeatures:
        return self._features

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        self.calls.append(list(batch))
        self.on_call()
        refused: set[str | None] = set()
        answers: list[Exception | None] = []
        for one in batch:
            if one.message_id in self.refuse or (
                self.features.ordered_by_key and one.key is not None and one.key in refused
            ):
                refused.add(one.key)
                answers.append(BrokerUnavailableError("no"))
            else:
                answers.append(None)
        return answers

    @property
    def called(self) -> list[list[int]]:
        return [[int(one.message_id) for one in call] for call in self.calls]


CODEC = Codec(Placed, source="shop")


def row(number: int, key: str | None = None) -> StoredRow:
    encoded = CODEC.encode(
        Placed(number), Facts(message_id=str(number), key=key, headers={"tenant": "acme"}), binary=True
    )
    stored = StoredMessage(
        str(number), encoded.name, encoded.version, "orders", encoded.content_type, encoded.body, encoded.headers, key
    )
    return StoredRow(number, stored, 0, 0.0)


class Nowhere:
    """An outbox that nobody writes to here."""


def mediator_with(broker: Broker, *more: Any) -> Mediator:
    return mediator_of(
        {},
        TransactionMiddleware(Memory().begin),
        OutboxMiddleware(Nowhere()),  # type: ignore[arg-type]
        *more,
        PublishMiddleware(broker, {Placed: "orders"}),
        codec=CODEC,
    )


async def publish(broker: Broker, *rows: StoredRow, deadline: float = 60.0) -> Published:
    mediator = mediator_with(broker)
    chain = mediator.relay_chain("Placed", 1, "orders")
    return await mediator.walk_relayed(chain, Relayed(rows, monotonic() + deadline))


async def test_a_batch_is_one_call() -> None:
    broker = Broker()
    published = await publish(broker, row(1, "a"), row(2, "a"), row(3))
    assert broker.called == [[1, 2, 3]]
    assert (published.accepted, published.refused) == ([1, 2, 3], [])


async def test_what_arrives_is_what_was_emitted_with_its_place_in_the_order() -> None:
    broker = Broker()
    await publish(broker, row(7, "a"))
    ((outgoing,),) = broker.calls
    assert (outgoing.destination, outgoing.name, outgoing.key) == ("orders", "Placed", "a")
    decoded = CODEC.decode(outgoing.body, outgoing.content_type, outgoing.headers)
    assert decoded.message == Placed(7)
    assert decoded.facts.sequence == "0000000000000000007"
    assert decoded.facts.headers == {"tenant": "acme"}


async def test_a_transport_without_headers_gets_the_structured_form() -> None:
    broker = Broker(headers=False)
    await publish(broker, row(7, "a"))
    ((outgoing,),) = broker.calls
    assert outgoing.content_type == "application/cloudevents+json"
    assert outgoing.headers == {}
    decoded = CODEC.decode(outgoing.body)
    assert (decoded.message, decoded.source) == (Placed(7), "shop")
    assert (decoded.facts.message_id, decoded.facts.key, decoded.facts.sequence) == ("7", "a", "0000000000000000007")
    assert decoded.facts.headers == {"tenant": "acme"}


async def test_a_refused_message_does_not_stop_other_keys() -> None:
    broker = Broker(1)
    published = await publish(broker, row(1, "a"), row(2, "b"), row(3))
    assert published.accepted == [2, 3]
    assert [number for number, _ in published.refused] == [1]


async def test_what_stands_behind_a_refused_message_of_its_key_was_not_tried() -> None:
    """It shall not be counted against it."""
    published = await publish(Broker(1), row(1, "a"), row(2, "a"), row(3, "a"))
    assert (published.accepted, [number for number, _ in published.refused]) == ([], [1])


async def test_a_long_batch_is_several_calls_and_a_refused_key_is_left_out_of_the_later_ones() -> None:
    broker = Broker(1)
    rows = [row(n, "a" if n in {1, MAX_PER_CALL + 5} else None) for n in range(1, 2 * MAX_PER_CALL + 1)]
    published = await publish(broker, *rows)
    assert len(broker.calls) == 2
    assert MAX_PER_CALL + 5 not in broker.called[1]
    assert MAX_PER_CALL + 5 not in [*published.accepted, *(number for number, _ in published.refused)]
    assert len(published.accepted) == 2 * MAX_PER_CALL - 2


async def test_a_broker_without_order_gets_each_key_once_a_call() -> None:
    broker = Broker(2, ordered=False)
    published = await publish(broker, row(1, "a"), row(2, "b"), row(3, "a"), row(4, "b"), row(5), row(6))
    assert broker.called == [[1, 2, 5, 6], [3]]
    assert published.accepted == [1, 5, 6, 3]
    assert [number for number, _ in published.refused] == [2]


async def test_nothing_is_sent_after_the_deadline() -> None:
    broker = Broker()
    published = await publish(broker, row(1), deadline=-1.0)
    assert (broker.calls, published.accepted, published.refused) == ([], [], [])


async def test_the_deadline_is_looked_at_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped in between may have lost its rows to another relay."""
    import pipeline_mediator.middlewares.publish as module

    broker = Broker()
    now = 0.0
    monkeypatch.setattr(module, "monotonic", lambda: now)

    def sleep() -> None:
        nonlocal now
        now += 100.0

    broker.on_call = sleep
    mediator = mediator_with(broker)
    chain = mediator.relay_chain("Placed", 1, "orders")
    rows = [row(n) for n in range(2 * MAX_PER_CALL)]
    published = await mediator.walk_relayed(chain, Relayed(rows, 60.0))
    assert len(broker.calls) == 1
    assert len(published.accepted) == MAX_PER_CALL


async def test_a_broker_that_raises_is_taken_to_have_refused() -> None:
    class Raising(Broker):
        async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
            raise RuntimeError("a bug")

    published = await publish(Raising(), row(1), row(2))
    assert [(number, type(error)) for number, error in published.refused] == [(1, RuntimeError), (2, RuntimeError)]


async def test_it_walks_what_stands_in_the_relays_chain() -> None:
    """A message's own middlewares have seen it when it was emitted."""
    seen: list[Any] = []

    class Counting:
        def for_route(self, route: Any) -> Any:
            return self if route.origin == "relay" else None

        async def __call__(self, context: Any, call_next: Any) -> Any:
            seen.append(len(context.message))
            return await call_next(context)

    async def local(context: Any, call_next: Any) -> Any:
        raise AssertionError

    broker = Broker()
    mediator = mediator_with(broker, Counting(), local)
    await mediator.walk_relayed(mediator.relay_chain("Placed", 1, "orders"), Relayed([row(1), row(2)], monotonic() + 9))
    assert seen == [2]


async def test_conditions_choose_what_stands_in_the_relays_chain_too() -> None:
    seen: list[Any] = []

    async def watch(context: Any, call_next: Any) -> Any:
        seen.append(len(context.message))
        return await call_next(context)

    class Everywhere:
        def for_route(self, route: Any) -> Any:
            return watch

        async def __call__(self, context: Any, call_next: Any) -> Any:
            return await call_next(context)

    broker = Broker()
    mediator = mediator_of(
        {},
        only(Everywhere(), when=lambda route: route.origin == "relay"),
        TransactionMiddleware(Memory().begin),
        OutboxMiddleware(Nowhere()),  # type: ignore[arg-type]
        only(Placed, PublishMiddleware(broker)),
    )
    chain = mediator.relay_chain("Placed", 1, "Placed")
    await mediator.walk_relayed(chain, Relayed([row(1), row(2)], monotonic() + 9))
    assert seen == [2]
    assert broker.called == [[1, 2]]


class TestWhichBrokerPublishes:
    @staticmethod
    def two() -> tuple[Mediator, Broker, Broker]:
        first, second = Broker(), Broker()
        mediator = mediator_of(
            {},
            TransactionMiddleware(Memory().begin),
            OutboxMiddleware(Nowhere()),  # type: ignore[arg-type]
            PublishMiddleware(first, {Placed: "orders"}),
            PublishMiddleware(second, {Shipped: "orders"}),
        )
        return mediator, first, second

    async def test_that_whose_mapping_has_the_type(self) -> None:
        mediator, first, second = self.two()
        for name in ("Placed", "Shipped"):
            chain = mediator.relay_chain(name, 1, "orders")
            await mediator.walk_relayed(chain, Relayed([row(1)], monotonic() + 9))
        assert len(first.calls) == len(second.calls) == 1

    def test_of_an_older_version_too(self) -> None:
        """Its rows may still wait when the type has moved on."""
        mediator, _, _ = self.two()
        assert mediator.relay_chain("Placed", 7, "orders") is mediator.relay_chain("Placed", 1, "orders")

    def test_an_unknown_type_cannot_be_told_apart(self) -> None:
        mediator, _, _ = self.two()
        with pytest.raises(DestinationError, match="not known here"):
            mediator.relay_chain("Cancelled", 1, "orders")

    def test_where_there_is_one_broker_an_unknown_type_is_published_as_it_was_stored(self) -> None:
        """A relay need not know every type of the applications that write into its outbox."""
        mediator = mediator_with(Broker())
        assert mediator.relay_chain("Cancelled", 1, "orders") is mediator.relay_chain("Placed", 1, "orders")

    def test_a_type_that_nobody_publishes_any_more_is_refused(self) -> None:
        mediator = mediator_of(
            {},
            TransactionMiddleware(Memory().begin),
            OutboxMiddleware(Nowhere()),  # type: ignore[arg-type]
            PublishMiddleware(Broker(), {Placed: "orders"}),
            codec=Codec(Shipped),
        )
        with pytest.raises(DestinationError, match="Shipped was stored for 'orders', but no Publish middleware"):
            mediator.relay_chain("Shipped", 1, "orders")

    def test_types_of_one_destination_share_a_chain(self) -> None:
        """Of one key they stay in order, whatever their types."""
        mediator = mediator_of(
            {},
            TransactionMiddleware(Memory().begin),
            OutboxMiddleware(Nowhere()),  # type: ignore[arg-type]
            PublishMiddleware(Broker(), {IntegrationEvent: "shop"}),
            codec=Codec(Placed, Shipped),
        )
        assert mediator.relay_chain("Placed", 1, "shop") is mediator.relay_chain("Shipped", 1, "shop")
        assert mediator.relay_chain("Placed", 1, "elsewhere") is not mediator.relay_chain("Placed", 1, "shop")


def test_the_pipelines_outbox_is_found() -> None:
    store: Any = Nowhere()
    mediator = mediator_of(
        {},
        TransactionMiddleware(Memory().begin),
        OutboxMiddleware(store),
        PublishMiddleware(Broker(), {Placed: "orders"}),
    )
    assert mediator.outbox is store
    assert mediator_of({Place: _place}).outbox is None


async def _place(command: Place) -> int:
    return command.n


class Away(Broker):
    """Cannot be reached, until it can."""

    def __init__(self) -> None:
        super().__init__()
        self.away = True
        self.entered = 0
        self.left = 0

    async def __aenter__(self) -> Any:
        if self.away:
            raise BrokerUnavailableError("the broker cannot be reached.")
        self.entered += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.left += 1


class TestABrokerThatIsAwayAtTheStart:
    async def test_does_not_keep_an_application_with_an_outbox_from_starting(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        broker = Away()
        mediator = mediator_with(broker)
        async with mediator:
            assert "cannot be reached. What is emitted waits in the outbox meanwhile." in caplog.text
            broker.away = False
            chain = mediator.relay_chain("Placed", 1, "orders")
            for number in (1, 2):
                await mediator.walk_relayed(chain, Relayed([row(number)], monotonic() + 9))
            assert (broker.entered, broker.left) == (1, 0)
        assert (broker.entered, broker.left) == (1, 1)

    async def test_is_not_left_if_it_never_came(self) -> None:
        broker = Away()
        async with mediator_with(broker):
            pass
        assert broker.left == 0

    async def test_is_an_error_where_nothing_keeps_what_is_meant_for_it(self) -> None:
        mediator = mediator_of({}, PublishMiddleware(Away(), {Placed: "orders"}))
        with pytest.raises(BrokerUnavailableError):
            async with mediator:
                pass
