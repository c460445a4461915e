"""What was refused backs off, is given up, or is nobody's fault but its destination's; the others go on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tenacity import wait_chain, wait_fixed

from pipeline_mediator import Mediator, PermanentError
from pipeline_mediator.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    MessageTooLargeError,
)
from pipeline_mediator.middlewares import PublishMiddleware
from pipeline_mediator.outbox.protocol import LANES
from tests.outbox.memory_store import MemoryStore
from tests.outbox.relay_fakes import LONG, Broker, OrderPlaced, PaymentTaken, Shop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline_mediator.message_brokers.protocol import Outgoing

UNAVAILABLE = BrokerUnavailableError("the broker cannot be reached")
REFUSED = BrokerRefusedError("wrong credentials")


def whole(**settings: Any) -> Shop:
    """Whose batches are of all lanes, so that a test knows what is in them."""
    return Shop(store=MemoryStore(lanes_at_a_time=LANES), **settings)


def of(*names: str, error: Callable[[], Exception]) -> Callable[[Outgoing], Exception | None]:
    """Refuses the messages with these ids."""
    return lambda outgoing: error() if outgoing.message_id in names else None


# -- the row's fault ---------------------------------------------------------------------------------------------------


async def test_a_refused_message_backs_off_and_the_others_go_on() -> None:
    shop = whole()
    shop.broker.refuse = of("b", error=lambda: BrokerRefusedError("not this one"))
    await shop.put("a", "b", "c")
    await shop.relay(backoff=wait_fixed(LONG)).drain()
    assert shop.broker.ids == ["a", "c"]
    row = shop.store.rows[2]
    assert (row.state, row.failures) == ("pending", 1)
    assert row.last_error == "BrokerRefusedError: not this one"
    assert row.available_at > anyio.current_time() + LONG / 2


async def test_later_messages_of_its_key_wait_for_it() -> None:
    shop = whole()
    shop.broker.refuse = of("k2", error=lambda: BrokerRefusedError("not this one"))
    await shop.put("k1", "k2", "k3", key="k")
    await shop.put("other", key="l")
    relay = shop.relay(backoff=wait_fixed(0.02))
    assert await relay.drain() == 2
    assert (await relay.health()).waiting == 1
    shop.broker.refuse = lambda _: None
    async with relay:
        await shop.broker.has(4)
    assert [name for name in shop.broker.ids if name != "other"] == ["k1", "k2", "k3"]


async def test_attempts_are_counted_and_the_back_off_grows() -> None:
    delays: list[int] = []

    def wait(state: Any) -> float:
        delays.append(state.attempt_number)
        return 0.0

    shop = whole()
    shop.broker.refuse = of("bad", error=lambda: BrokerRefusedError("not this one"))
    relay = shop.relay(attempts=4, backoff=wait)
    for number in range(6):
        await shop.put("bad" if number == 0 else f"good {number}")
        await relay.drain()
    assert delays == [1, 2, 3]
    (letter,) = await shop.store.dead_letters(10)
    assert (letter.message.message_id, letter.failures) == ("bad", 4)
    assert letter.error == "BrokerRefusedError: not this one"
    assert len(shop.broker.ids) == 5


@pytest.mark.parametrize("on_dead", ["block", "park"])
async def test_behind_a_dead_letter_the_rules_of_the_relay_hold(on_dead: str) -> None:
    shop = whole()
    shop.broker.refuse = of("k1", error=lambda: MessageTooLargeError("orders.placed", 2, 1))
    await shop.put("k1", "k2", "k3", key="k")
    relay = shop.relay(on_dead=on_dead, pauses=wait_fixed(LONG))
    assert await relay.drain() == (2 if on_dead == "park" else 0)
    assert (await relay.health()).dead == 1


async def test_what_is_too_large_is_given_up_at_once(caplog: pytest.LogCaptureFixture) -> None:
    shop = whole()
    shop.broker.refuse = of("large", error=lambda: MessageTooLargeError("orders.placed", 9_000_000, 1_000_000))
    await shop.put("large")
    await shop.relay().drain()
    (letter,) = await shop.store.dead_letters(10)
    assert letter.error.startswith("MessageTooLargeError: orders.placed is 9000000 bytes")
    assert len(shop.broker.calls) == 1
    assert "given up: message 1 for 'orders' (MessageTooLargeError" in caplog.text


async def test_any_other_verdict_on_one_message_is_final_if_the_destination_works() -> None:
    shop = whole()
    shop.broker.refuse = of("bad", error=lambda: PermanentError("never"))
    await shop.put("bad")
    relay = shop.relay()
    await relay.drain()
    assert shop.store.state_of(1) == "pending", "it may be the destination"
    await shop.put("good")
    await relay.drain()
    assert shop.store.state_of(1) == "dead"
    assert shop.store.rows[1].failures == 1


async def test_one_error_for_many_is_no_verdict_on_each() -> None:
    shop = whole()
    error = MessageTooLargeError("orders.placed", 2, 1)
    shop.broker.refuse = lambda _: error
    await shop.put("a", "b")
    await shop.relay().drain()
    assert {row.state for row in shop.store.rows.values()} == {"pending"}


async def test_an_unreadable_row_ends_as_a_dead_letter_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    shop = whole()
    await shop.put("a", "b")
    shop.store.rows[1].readable = False
    assert await shop.relay().drain() == 1
    assert shop.store.state_of(1) == "dead"
    assert "given up: message 1 that cannot be read (unreadable)" in caplog.text


async def test_a_type_without_a_destination_is_tried_again_before_it_is_given_up() -> None:
    """A relay of the version before may meet what the next one stores."""
    shop = whole()
    # With two of them, it cannot be told which one sends what is unknown.
    shop.mediator = Mediator(
        middlewares=[
            PublishMiddleware(shop.broker, {OrderPlaced: "orders"}),
            PublishMiddleware(Broker(), {PaymentTaken: "payments"}),
        ]
    )
    await shop.put("k1", key="k")
    await shop.put("k2", key="k", kind="orders.unheard_of")
    await shop.put("k3", key="k")
    await shop.put("dying", kind="orders.unheard_of")
    shop.store.rows[4].failures = 2
    await shop.relay(attempts=3, backoff=wait_fixed(0.02)).drain()
    assert shop.broker.ids == ["k1"]
    assert (shop.store.rows[2].state, shop.store.rows[2].failures) == ("pending", 1)
    assert shop.store.state_of(4) == "dead"
    assert (shop.store.rows[4].last_error or "").startswith(
        "DestinationError: a message for 'orders' is of a type that"
    )
    shop.mediator = Shop().mediator
    await shop.until(lambda: shop.store.rows[2].available_at < anyio.current_time())
    assert await shop.relay().drain() == 2


async def test_what_relays_died_over_is_given_up_unpublished() -> None:
    shop = Shop()
    await shop.put("k1", "k2", key="k")
    shop.store.relay_died_over(1)
    shop.store.rows[1].failures = 2
    relay = shop.relay(attempts=3, on_dead="park")
    assert await relay.drain() == 1
    assert shop.broker.ids == ["k2"]
    (letter,) = await shop.store.dead_letters(10)
    assert letter.error == "3 failures, the last of them because relays died while publishing it"


async def test_what_a_relay_died_over_once_is_published() -> None:
    shop = Shop()
    await shop.put("a")
    shop.store.relay_died_over(1)
    assert await shop.relay(attempts=3).drain() == 1


# -- the destination's fault -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UNAVAILABLE, REFUSED, OSError("gone"), ValueError("a mistake")])
async def test_a_destination_that_takes_nothing_is_left_alone_and_no_row_is_blamed(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    shop = whole()
    shop.broker.refuse = lambda outgoing: error if outgoing.destination == "orders" else None
    for number in range(4):
        await shop.put(f"o{number}", key=f"key {number}")
    relay = shop.relay(pauses=wait_fixed(0.01), attempts=2)
    async with relay:
        await shop.until(lambda: len(shop.broker.calls) >= 6)
        await shop.put("p", to="payments")
        await shop.broker.has(1)
        assert all((row.failures, row.state) == (0, "pending") for row in shop.store.rows.values())
        assert [len(call) for call in shop.broker.calls[:3]] == [4, 1, 1], "then one probe at a time"
        assert len(set(map(tuple, shop.broker.calls[1:5]))) == 4, "another one each time"
        tries = len([call for call in shop.broker.calls if call != ["p"]])
        shop.broker.refuse = lambda _: None
        await shop.broker.has(5)
    told = [text for text in caplog.messages if text.startswith("'orders' takes")]
    assert ["takes no messages" in text for text in told] == [True] * tries + [False], "one line for each try"
    assert told[-1].startswith("'orders' takes messages again, after")


async def test_its_pauses_grow_and_end_when_it_works() -> None:
    asked: list[int] = []

    def pauses(state: Any) -> float:
        asked.append(state.attempt_number)
        return 0.001

    shop = whole()
    shop.broker.refuse = lambda _: UNAVAILABLE
    await shop.put("a")
    async with shop.relay(pauses=pauses, poll=LONG):
        await shop.until(lambda: len(shop.broker.calls) >= 3)
        shop.broker.refuse = lambda _: None
        await shop.broker.has(1)
        shop.broker.refuse = lambda _: UNAVAILABLE
        await shop.put("b")
        await shop.until(lambda: asked[-1] == 1)
    assert asked[:3] == [1, 2, 3]


async def test_meanwhile_the_store_is_asked_for_the_others_only() -> None:
    shop = whole()
    shop.broker.refuse = lambda outgoing: UNAVAILABLE if outgoing.destination == "orders" else None
    await shop.put("a")
    async with shop.relay(pauses=wait_fixed(LONG)):
        await shop.until(lambda: shop.store.takes > 3)
    assert shop.store.left_out[:3] == [[], ["orders"], ["orders"]]
    assert len(shop.broker.calls) == 1


async def test_a_destination_that_hangs_holds_the_others_no_longer_than_the_lease_allows() -> None:
    shop = whole()
    hang = shop.broker.hangs["orders"] = anyio.Event()
    await shop.put("o", to="orders")
    await shop.put("p1", to="payments")
    async with shop.relay(lease=0.2, pauses=wait_fixed(LONG)):
        await shop.broker.has(1)
        await shop.put("p2", to="payments")
        await shop.broker.has(2)
        assert not hang.is_set()
    assert shop.store.rows[1].failures == 0
    assert shop.broker.ids == ["p1", "p2"]


async def test_a_hanging_destination_is_told(caplog: pytest.LogCaptureFixture) -> None:
    shop = whole()
    shop.broker.hangs["orders"] = anyio.Event()
    await shop.put("o")
    async with shop.relay(lease=0.05, pauses=wait_fixed(LONG)):
        await shop.until(lambda: caplog.messages)
    assert "'orders' takes no messages (BrokerUnavailableError: no answer within 0.0 s" in caplog.text


async def test_after_a_hang_it_is_left_alone_for_longer_than_it_took() -> None:
    class Slow(Broker):
        async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
            self.calls.append([])
            await anyio.sleep(0.03)
            return [UNAVAILABLE for _ in batch]

    shop = Shop(Slow())
    await shop.put("o")
    async with shop.relay(pauses=wait_fixed(0)):
        await shop.until(lambda: len(shop.broker.calls) == 1)
        await anyio.sleep(0.09)
        assert len(shop.broker.calls) == 1
        await shop.until(lambda: len(shop.broker.calls) == 2)


async def test_nothing_is_given_up_because_a_broker_is_unavailable() -> None:
    """Not even what is unavailable alone, while the others go through: one partition of a broker may be away."""
    shop = whole()
    shop.broker.refuse = of("bad", error=lambda: BrokerUnavailableError("no leader"))
    await shop.put("bad")
    for number in range(6):
        await shop.put(f"good {number}")
        await shop.relay(attempts=2, backoff=wait_fixed(0)).drain()
    row = shop.store.rows[1]
    assert row.state == "pending"
    assert row.failures > 2
    assert len(shop.broker.ids) == 6


# -- who is it? --------------------------------------------------------------------------------------------------------


class Dropping(Broker):
    """Drops the connection over the message "poison": of what comes with it or after it in a call, nothing is taken."""

    async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
        answers = await super().publish(list(itertools.takewhile(lambda one: one.message_id != "poison", batch))) or []
        return [*answers, *(UNAVAILABLE for _ in batch[len(answers) :])]


@pytest.mark.parametrize("position", [0, 3, 9])
async def test_a_message_that_makes_the_broker_drop_the_connection_is_found(position: int) -> None:
    shop = Shop(Dropping(), MemoryStore(lanes_at_a_time=LANES))
    names = [f"good {number}" for number in range(9)]
    names.insert(position, "poison")
    await shop.put(*names)
    async with shop.relay(backoff=wait_chain(wait_fixed(0.01), wait_fixed(LONG))):
        await shop.broker.has(9)
        await shop.put("later")
        await shop.broker.has(10)
        await shop.until(lambda: len(shop.store.rows) == 1)
    (row,) = shop.store.rows.values()
    assert row.message.message_id == "poison"
    assert row.failures >= 1
    assert sorted(shop.broker.ids) == sorted([name for name in names if name != "poison"] + ["later"])


async def test_what_failed_before_is_published_alone_behind_the_others() -> None:
    shop = whole()
    await shop.put("k1", "k2", key="k")
    await shop.put("a", "b", "c")
    shop.store.rows[1].failures = 1
    shop.store.rows[4].failures = 1
    assert await shop.relay().drain() == 5
    assert shop.broker.calls == [["a", "c"], ["k1"], ["b"], ["k2"]]


async def test_a_chain_that_raises_over_one_message_harms_no_other() -> None:
    class Raising(Broker):
        async def publish(self, batch: Sequence[Outgoing], /) -> Sequence[Exception | None]:
            if any(outgoing.message_id == "bad" for outgoing in batch):
                raise PermanentError("a mistake")
            return await super().publish(batch)

    shop = Shop(Raising(), MemoryStore(lanes_at_a_time=LANES))
    await shop.put("bad", "a", "b", "c")
    async with shop.relay():
        await shop.broker.has(3)
        await shop.put("d")
        await shop.broker.has(4)
        await shop.until(lambda: shop.store.state_of(1) == "dead" or len(shop.store.rows) == 1)
    assert sorted(shop.broker.ids) == ["a", "b", "c", "d"]


async def test_a_broker_that_is_not_ordered_by_key_still_keeps_the_order() -> None:
    shop = whole()
    shop.broker.features = type(shop.broker.features)(system="fake", durable=True, headers=True, ordered_by_key=False)
    shop.mediator = type(shop.mediator)(middlewares=shop.mediator.pipeline)
    shop.broker.refuse = of("k2", error=lambda: BrokerRefusedError("not this one"))
    await shop.put("k1", "k2", "k3", key="k")
    await shop.relay(backoff=wait_fixed(LONG)).drain()
    assert shop.broker.ids == ["k1"]


async def test_nothing_is_published_when_the_deadline_is_over() -> None:
    shop = whole()
    shop.store.is_late = True
    await shop.put("a")
    async with shop.relay(poll=LONG):
        await shop.until(lambda: shop.store.takes > 3)
        await anyio.sleep(0.05)
        assert shop.store.takes < 20, "and it rests"
    assert shop.broker.calls == []
    assert shop.store.rows[1].failures == 0


async def test_a_batch_without_a_row_that_can_be_read_is_not_the_end() -> None:
    shop = whole()
    await shop.put(*(str(number) for number in range(8)))
    for number in range(1, 8):
        shop.store.rows[number].readable = False
    assert await shop.relay(batch=1).drain() == 1
    assert len(await shop.store.dead_letters(10)) == 7


async def test_a_destination_that_took_nothing_gets_no_more_of_the_same_batch() -> None:
    shop = whole()
    shop.broker.refuse = lambda outgoing: UNAVAILABLE if outgoing.destination == "orders" else None
    await shop.put("k1", to="payments", key="k")
    await shop.put("k2", to="orders", key="k")
    await shop.put("l", to="orders", key="l")
    await shop.relay(pauses=wait_fixed(LONG)).drain()
    assert sorted(shop.broker.calls) == [["k1"], ["l"]]


async def test_unavailable_alone_while_others_were_taken_is_one_messages_fault() -> None:
    shop = whole()
    shop.broker.refuse = of("bad", error=lambda: UNAVAILABLE)
    await shop.put("a", "b", "bad")
    shop.store.rows[3].failures = 1
    await shop.relay(backoff=wait_fixed(LONG)).drain()
    assert shop.store.rows[3].failures == 2


async def test_unavailable_twice_in_a_row_is_the_destination() -> None:
    shop = whole()
    shop.broker.refuse = of("bad", "worse", "worst", error=lambda: UNAVAILABLE)
    await shop.put("a", "b", "bad", "worse", "worst")
    for number in (3, 4, 5):
        shop.store.rows[number].failures = 1
    await shop.relay(backoff=wait_fixed(LONG), pauses=wait_fixed(LONG)).drain()
    assert [shop.store.rows[number].failures for number in (3, 4, 5)] == [2, 1, 1]
    assert shop.broker.calls[1:] == [["bad"], ["worse"]]


async def test_refused_where_others_of_the_batch_were_taken_is_the_rows_fault() -> None:
    shop = whole()
    shop.broker.refuse = of("250", error=lambda: BrokerRefusedError("not this one"))
    await shop.put(*(str(number) for number in range(251)))
    assert await shop.relay(backoff=wait_fixed(LONG)).drain() == 250
    assert [len(call) for call in shop.broker.calls] == [250, 1]
    assert [row.failures for row in shop.store.rows.values()] == [1]
