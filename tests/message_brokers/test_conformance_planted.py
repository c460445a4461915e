"""The suite for brokers notices what is wrong: each fault that is planted in a copy of MemoryBroker fails a test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import anyio
import pytest
from anyio.lowlevel import checkpoint

from pipeline_mediator.errors import BrokerError
from pipeline_mediator.message_brokers.memory import MemoryBroker, MemorySubscription
from pipeline_mediator.message_brokers.memory_dead_letters import MemoryDeadLetterQueue
from pipeline_mediator.message_brokers.protocol import Ack, Dead, DeadDelivery, Delivery, Later, Outgoing
from pipeline_mediator.testing.broker_suite import BrokerSuite, TransportFeatures

FEATURES = TransportFeatures(
    several_clients=False,
    answers_when_settled=True,
    keeps_while_nobody_listens=False,
    competes=False,
    outlives_subscription=False,
    keeps_postponed=False,
    keeps_dead_letters=False,
    many=50,
    seconds=1.0,
    quiet=0.03,
)


class Broker:
    """A MemoryBroker, unless a fault says otherwise."""

    features = MemoryBroker().features

    def __init__(self) -> None:
        self.memory = MemoryBroker(timeout=0.8)

    def outgoing(self, message: Outgoing) -> Outgoing:
        return message

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        return await self.memory.publish([self.outgoing(message) for message in batch])

    def subscribe(self, *destinations: str, name: str) -> MemorySubscription:
        return self.memory.subscribe(*destinations, name=name)

    async def __aenter__(self) -> Self:
        await self.memory.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.memory.__aexit__(kind, error, trace)


class Letters:
    """The dead letters of a MemorySubscription, unless a fault says otherwise."""

    def __init__(self, memory: MemoryDeadLetterQueue, broker: Broker) -> None:
        self.memory = memory
        self.broker = broker

    async def count(self) -> int:
        return await self.memory.count()

    async def list(self, limit: int, *, after: str | None = None) -> Sequence[DeadDelivery]:
        return await self.memory.list(limit, after=after)

    async def retry(self, ids: Sequence[str]) -> int:
        return await self.memory.retry(ids)

    async def drop(self, ids: Sequence[str]) -> int:
        return await self.memory.drop(ids)


class Subscription:
    """A MemorySubscription, unless a fault says otherwise."""

    letters: type[Letters] = Letters

    def __init__(self, memory: MemorySubscription, broker: Broker) -> None:
        self.memory = memory
        self._letters = self.letters(memory.dead_letters, broker)

    @property
    def name(self) -> str:
        return self.memory.name

    @property
    def dead_letters(self) -> Letters:
        return self._letters

    async def receive(self, limit: int) -> Sequence[Delivery]:
        return await self.memory.receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        return await self.memory.settle(deliveries)

    async def __aenter__(self) -> Self:
        await self.memory.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.memory.__aexit__(kind, error, trace)


# Faults of publishing


class AnswersTooFew(Broker):
    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        return (await super().publish(batch))[1:]


class FailsForNothing(Broker):
    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        return await super().publish(batch) if batch else [None]


class TakesBodiesForText(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, body=message.body.decode(errors="replace").encode())


class CutsBodies(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, body=message.body[:65_536])


class ForgetsContentTypes(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, content_type="application/octet-stream")


class ForgetsIds(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, message_id=f"mine-{message.message_id}")


class KeysByDefault(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, key=message.key or "")


class ForgetsKeys(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, key=None)


class ForgetsHeaders(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, headers={})


class StripsHeaders(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, headers={name: value.strip() for name, value in message.headers.items()})


class MixesDestinations(Broker):
    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, destination="orders")


class RaisesAtTheEnd(Broker):
    def __init__(self) -> None:
        super().__init__()
        self.left = False

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        if self.left:
            raise BrokerError("closed")
        return await super().publish(batch)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left = True
        await super().__aexit__(kind, error, trace)


class ClosesForAll(Broker):
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for queue in self.memory._queues.values():  # pyright: ignore[reportPrivateUsage]
            queue.close()
        await super().__aexit__(kind, error, trace)


class NeedsToBeEntered(Broker):
    users = 0

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        return await super().publish(batch) if self.users else [BrokerError("not entered") for _ in batch]

    async def __aenter__(self) -> Self:
        self.users += 1
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.users -= 1
        await super().__aexit__(kind, error, trace)


class SubscribesToTheFirst(Broker):
    def subscribe(self, *destinations: str, name: str) -> MemorySubscription:
        return super().subscribe(destinations[0], name=name)


class GivesTheFirstGroupAll(Broker):
    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Exception | None]:
        queues = self.memory._queues  # pyright: ignore[reportPrivateUsage]
        for later in list(queues)[1:]:
            del queues[later]
        return await super().publish(batch)


class OrdersNothing(Broker):
    """Each message has a lane of its own; the receiver sees its key."""

    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, key=None, headers={**message.headers, "partitionkey": message.key or ""})


class OrdersAll(Broker):
    """All messages share a lane."""

    def outgoing(self, message: Outgoing) -> Outgoing:
        return replace(message, key="all", headers={**message.headers, "partitionkey": message.key or ""})


# Faults of receiving and settling


class ShowsKeys(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        deliveries = await super().receive(limit)
        for delivery in deliveries:
            delivery.key = delivery.headers["partitionkey"] or None
        return deliveries


class LosesWhenCancelled(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        deliveries = await super().receive(limit)
        for _ in range(3):
            await anyio.sleep(0.001)
        return deliveries


class IgnoresLimits(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        return await super().receive(1000)


class DoesNotWait(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        with anyio.move_on_after(0.005):
            return await super().receive(limit)
        return []


class DeliversTwice(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        deliveries = await super().receive(limit)
        return [delivery for delivery in deliveries for _ in range(2)][:limit]


class HandsOutAgain(Subscription):
    """A hold that ends after a moment."""

    out: Sequence[Delivery] = ()

    async def receive(self, limit: int) -> Sequence[Delivery]:
        with anyio.move_on_after(0.01):
            self.out = await super().receive(limit)
            return self.out
        return self.out or await super().receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        answers = await super().settle(deliveries)
        self.out = ()
        return answers


class OneAtATime(Subscription):
    """Receiving and settling share a connection."""

    def __init__(self, memory: MemorySubscription, broker: Broker) -> None:
        super().__init__(memory, broker)
        self.lock = anyio.Lock()

    async def receive(self, limit: int) -> Sequence[Delivery]:
        async with self.lock:
            return await super().receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        async with self.lock:
            return await super().settle(deliveries)


class CallsItselfOtherwise(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        deliveries = await super().receive(limit)
        for delivery in deliveries:
            delivery.subscription = "consumer-1"
        return deliveries


class CountsFromZero(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        deliveries = await super().receive(limit)
        for delivery in deliveries:
            delivery.attempt -= 1
        return deliveries


class Outcomes(Subscription):
    """Another outcome is carried out than the one that was decided."""

    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return delivery.outcome

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        decided = [delivery.outcome for delivery in deliveries]
        for delivery, other in zip(deliveries, [self.other(one, deliveries) for one in deliveries], strict=True):
            delivery.outcome = other
        answers = await super().settle(deliveries)
        for delivery, outcome in zip(deliveries, decided, strict=True):
            delivery.outcome = outcome
        return answers


class NeverDone(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return Later(0.01) if delivery.attempt < 3 else delivery.outcome


class AllLikeTheFirst(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return deliveries[0].outcome


class CountsWhatIsGivenBack(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return delivery.outcome or Later()


class LosesWhatIsGivenBack(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return delivery.outcome or Ack()


class DoesNotDelay(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return Later() if isinstance(delivery.outcome, Later) else delivery.outcome


class DoesNotCount(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return None if isinstance(delivery.outcome, Later) else delivery.outcome


class DeadComesAgain(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return Later() if isinstance(delivery.outcome, Dead) else delivery.outcome


class ForgetsReasons(Outcomes):
    def other(self, delivery: Delivery, deliveries: Sequence[Delivery]) -> Any:
        return Dead("rejected") if isinstance(delivery.outcome, Dead) else delivery.outcome


class WaitsForAll(Subscription):
    """What is postponed stops the subscription."""

    due = 0.0

    async def receive(self, limit: int) -> Sequence[Delivery]:
        await anyio.sleep_until(self.due)
        return await super().receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        if any(isinstance(delivery.outcome, Later) for delivery in deliveries):
            self.due = anyio.current_time() + 10
        return await super().settle(deliveries)


class LosesHeadersOnTheWay(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        deliveries = await super().receive(limit)
        for delivery in deliveries:
            if delivery.attempt > 1:
                delivery.headers = {}
        return deliveries


class SettlesByMessage(Subscription):
    """Not by delivery: the first attempt's settlement settles the second."""

    latest: dict[str | None, Delivery]

    async def receive(self, limit: int) -> Sequence[Delivery]:
        deliveries = await super().receive(limit)
        self.latest = {delivery.message_id: delivery for delivery in deliveries}
        return deliveries

    async def settle(self, deliveries: Sequence[Delivery]) -> Sequence[Exception | None]:
        for delivery in deliveries:
            self.latest[delivery.message_id].outcome = delivery.outcome
        return await super().settle([self.latest[delivery.message_id] for delivery in deliveries])


class WaitsForEver(Subscription):
    async def receive(self, limit: int) -> Sequence[Delivery]:
        try:
            return await super().receive(limit)
        except BrokerError:
            await anyio.sleep(60)
            raise


# Faults of dead letters


class NewestFirst(Subscription):
    class letters(Letters):  # noqa: N801
        async def list(self, limit: int, *, after: str | None = None) -> Sequence[DeadDelivery]:
            return list(reversed(await super().list(limit, after=after)))


class TheFirstPageAgain(Subscription):
    class letters(Letters):  # noqa: N801
        async def list(self, limit: int, *, after: str | None = None) -> Sequence[DeadDelivery]:
            return await super().list(limit)


class StaysDead(Subscription):
    class letters(Letters):  # noqa: N801
        async def retry(self, ids: Sequence[str]) -> int:
            return len(ids)


class RetriesAndKeeps(Subscription):
    class letters(Letters):  # noqa: N801
        async def retry(self, ids: Sequence[str]) -> int:
            kept = dict(self.memory._letters._letters)  # pyright: ignore[reportPrivateUsage]
            retried = await super().retry(ids)
            self.memory._letters._letters.update(kept)  # pyright: ignore[reportPrivateUsage]
            return retried


class RetriesForAllGroups(Subscription):
    class letters(Letters):  # noqa: N801
        async def retry(self, ids: Sequence[str]) -> int:
            letters = [one for one in await super().list(100) if one.id in ids]
            await super().drop(ids)
            for letter in letters:
                one = letter.delivery
                message = Outgoing(one.destination, one.body, "", str(one.message_id), "n", one.key, one.headers)
                for queue in self.broker.memory._queues.values():  # pyright: ignore[reportPrivateUsage]
                    await queue.put(message)
            return len(letters)


class DropsAll(Subscription):
    class letters(Letters):  # noqa: N801
        async def drop(self, ids: Sequence[str]) -> int:
            await super().drop([letter.id for letter in await super().list(1000)])
            return len(ids)


class CountsWhatIsNotThere(Subscription):
    class letters(Letters):  # noqa: N801
        async def drop(self, ids: Sequence[str]) -> int:
            await super().drop(ids)
            return len(ids)


class ShowsOthers(Subscription):
    class letters(Letters):  # noqa: N801
        async def list(self, limit: int, *, after: str | None = None) -> Sequence[DeadDelivery]:
            await checkpoint()
            letters = self.memory._letters._letters.values()  # pyright: ignore[reportPrivateUsage]
            return [letter for letter, _ in letters]


class CountsOne(Subscription):
    class letters(Letters):  # noqa: N801
        async def count(self) -> int:
            return min(1, await super().count())


class PlantedTransport:
    def __init__(self, broker: type[Broker], subscription: type[Subscription]) -> None:
        self._broker = broker()
        self._subscription = subscription

    def broker(self) -> Broker:
        return self._broker

    def subscribe(self, broker: Any, *destinations: str, name: str) -> Subscription:
        return self._subscription(self._broker.subscribe(*destinations, name=name), self._broker)

    async def crash(self, subscription: object) -> None:
        raise NotImplementedError


class Suite(BrokerSuite):
    features = FEATURES
    __test__ = False


BROKEN: list[tuple[type[Broker], type[Subscription], str]] = [
    (AnswersTooFew, Subscription, "each_message_of_a_batch_has_an_answer"),
    (FailsForNothing, Subscription, "an_empty_batch_has_no_answers"),
    (TakesBodiesForText, Subscription, "bytes_arrive_as_they_were"),
    (CutsBodies, Subscription, "large_message_arrives_whole"),
    (ForgetsContentTypes, Subscription, "content_type_arrives"),
    (ForgetsIds, Subscription, "message_id_arrives"),
    (ForgetsKeys, Subscription, "key_arrives_or_that_there_is_none"),
    (KeysByDefault, Subscription, "key_arrives_or_that_there_is_none"),
    (ForgetsHeaders, Subscription, "headers_arrive"),
    (StripsHeaders, Subscription, "headers_may_hold_any_text"),
    (MixesDestinations, Subscription, "destinations_are_kept_apart"),
    (RaisesAtTheEnd, Subscription, "a_broker_that_was_left_answers_one_by_one_and_raises_nothing"),
    (ClosesForAll, Subscription, "broker_is_open_until_its_last_user_leaves"),
    (NeedsToBeEntered, Subscription, "subscription_holds_its_broker_open"),
    (SubscribesToTheFirst, Subscription, "several_destinations_can_be_subscribed_to"),
    (GivesTheFirstGroupAll, Subscription, "each_group_gets_a_copy"),
    (OrdersNothing, ShowsKeys, "of_one_key_one_is_out_at_a_time"),
    (OrdersNothing, ShowsKeys, "a_postponed_one_is_not_overtaken_by_its_key"),
    (OrdersNothing, ShowsKeys, "one_that_is_given_back_is_not_overtaken_by_its_key"),
    (OrdersAll, ShowsKeys, "other_keys_go_on_while_one_is_out"),
    (Broker, CallsItselfOtherwise, "delivery_says_where_it_comes_from_and_that_it_is_the_first_attempt"),
    (Broker, CountsFromZero, "delivery_says_where_it_comes_from_and_that_it_is_the_first_attempt"),
    (Broker, LosesWhenCancelled, "cancelling_receive_loses_none"),
    (Broker, IgnoresLimits, "no_more_is_handed_over_than_asked_for"),
    (Broker, DoesNotWait, "receive_waits_for_the_first"),
    (Broker, DeliversTwice, "many_messages_arrive_once_each"),
    (Broker, HandsOutAgain, "what_is_out_is_kept_from_others_however_long_it_takes"),
    (Broker, OneAtATime, "receiving_and_settling_work_beside_each_other"),
    (Broker, NeverDone, "what_is_done_does_not_come_again"),
    (Broker, AllLikeTheFirst, "each_of_a_batch_is_settled_by_its_own_outcome"),
    (Broker, CountsWhatIsGivenBack, "what_is_given_back_comes_again_at_once_and_counts_as_no_attempt"),
    (Broker, LosesWhatIsGivenBack, "what_is_given_back_comes_again_at_once_and_counts_as_no_attempt"),
    (Broker, DoesNotDelay, "later_is_not_before_its_time"),
    (Broker, DoesNotCount, "later_counts_attempts"),
    (Broker, WaitsForAll, "others_are_delivered_while_one_waits_for_its_time"),
    (Broker, LosesHeadersOnTheWay, "what_comes_again_is_what_it_was"),
    (Broker, SettlesByMessage, "settling_twice_does_no_harm"),
    (Broker, WaitsForEver, "subscription_that_has_ended_says_so"),
    (Broker, DeadComesAgain, "what_is_given_up_does_not_come_again"),
    (Broker, DeadComesAgain, "a_key_goes_on_behind_a_dead_letter"),
    (Broker, ForgetsReasons, "dead_letter_keeps_reason_bytes_and_provenance"),
    (Broker, NewestFirst, "dead_letters_are_listed_in_pages_oldest_first"),
    (Broker, TheFirstPageAgain, "dead_letters_are_listed_in_pages_oldest_first"),
    (Broker, CountsOne, "dead_letters_are_listed_in_pages_oldest_first"),
    (Broker, StaysDead, "a_retried_one_is_delivered_again_and_no_dead_letter_any_more"),
    (Broker, RetriesAndKeeps, "a_retried_one_is_delivered_again_and_no_dead_letter_any_more"),
    (Broker, RetriesForAllGroups, "a_retried_one_goes_to_its_own_group_only"),
    (Broker, ShowsOthers, "a_retried_one_goes_to_its_own_group_only"),
    (Broker, DropsAll, "dropped_ones_are_gone_and_no_others"),
    (Broker, CountsWhatIsNotThere, "ids_that_are_not_there_are_not_counted"),
]

WITH: dict[str, dict[str, Any]] = {
    "bytes_arrive_as_they_were": {"body": bytes(range(256))},
    "headers_may_hold_any_text": {"text": " spaces around "},
}


def run(broker: type[Broker], subscription: type[Subscription], name: str) -> None:
    transport = PlantedTransport(broker, subscription)

    async def test() -> None:
        await getattr(Suite(), f"test_{name}")(transport, **WITH.get(name, {}))

    try:
        anyio.run(test)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


@pytest.mark.parametrize(
    ("broker", "subscription", "name"),
    BROKEN,
    ids=[
        f"{(broker if subscription in (Subscription, ShowsKeys) else subscription).__name__}-{name}"
        for broker, subscription, name in BROKEN
    ],
)
def test_a_planted_fault_is_noticed(broker: type[Broker], subscription: type[Subscription], name: str) -> None:
    with pytest.raises((AssertionError, TimeoutError, BrokerError, pytest.fail.Exception)):
        run(broker, subscription, name)


@pytest.mark.parametrize("name", sorted({name for *_, name in BROKEN}))
def test_without_a_fault_nothing_is_noticed(name: str) -> None:
    run(Broker, Subscription, name)
