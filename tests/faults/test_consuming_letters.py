"""Messages that cannot be handled end as dead letters, as they came, and nothing waits behind them.

The numbers are those of the table in docs/guarantees.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline_mediator import Context
from pipeline_mediator.message_brokers import RedisStreamBroker
from tests.faults.application import Moved, Noted
from tests.faults.consuming import GROUP, subscription_of
from tests.faults.scene import MIN_IDLE, Scene
from tests.faults.test_consuming_deaths import POSTGRESQL, Seen, publish

STREAM = "faults.moved"
DEAD = f"{{{STREAM}}}:{GROUP}:dead"

WHOLE = {
    "id": "by-hand-1",
    "specversion": "1.0",
    "source": "elsewhere",
    "type": "faults.moved",
    "dataversion": "1",
    "partitionkey": "a",
    "datacontenttype": "application/json",
    "data": b'{"token":"by-hand/0","account":"a","place":7}',
}
"""An event as somebody else writes it."""

UNREADABLE: dict[str, Mapping[Any, Any]] = {
    "not JSON": {**WHOLE, "data": b"\xff\xfe{not json"},
    "another shape": {**WHOLE, "data": b'{"token":7}'},
    "unknown type": {**WHOLE, "type": "faults.never_heard_of"},
    "unknown version": {**WHOLE, "dataversion": "99"},
    "no attributes": {"data": WHOLE["data"]},
    "no data": {name: value for name, value in WHOLE.items() if name != "data"},
    "attributes that are no text": {**WHOLE, "source": b"\xff\xff", "id": b"", "specversion": b"\x00"},
    "nothing of an event": {b"\xff": b"\xfe"},
}


class PoisonError(Exception):
    """Raised by a handler each time."""


async def test_the_event_written_by_hand_is_one(scene: Scene) -> None:
    """Or the tests below would show nothing."""
    await scene.client.xadd(STREAM, WHOLE)
    await scene.consume()
    assert await scene.effects() == ["by-hand-1"]


@POSTGRESQL
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "competing"])
async def test_32_what_cannot_be_decoded_is_kept_as_it_came_and_others_go_on(scene: Scene, *, ordered: bool) -> None:
    await publish(scene, "a")
    written = {await scene.client.xadd(STREAM, fields): fields for fields in UNREADABLE.values()}
    await publish(scene, "a", "b")
    await scene.consume(ordered=ordered)
    assert await scene.effects_of("a") == [1, 2]
    assert await scene.effects_of("b") == [1]
    dead = await scene.dead_letters()
    assert sorted(one.delivery.body for one in dead) == sorted(fields.get("data", b"") for fields in written.values())
    assert all(one.reason and one.delivery.attempt == 1 for one in dead)
    kept = {fields[b"dead-id"]: fields for _, fields in await scene.client.xrange(DEAD)}
    assert kept.keys() == written.keys()
    assert all(raw(fields).items() <= kept[entry].items() for entry, fields in written.items())


@POSTGRESQL
async def test_32_a_dead_letter_that_is_retried_and_dies_again_has_not_grown(scene: Scene) -> None:
    await scene.client.xadd(STREAM, UNREADABLE["not JSON"])
    await scene.consume()
    ((first, kept),) = await scene.client.xrange(DEAD)
    async with RedisStreamBroker(scene.redis) as broker:
        letters = subscription_of(broker, MIN_IDLE).dead_letters
        assert letters is not None
        for _ in range(2):
            (dead,) = await letters.list(10)
            assert await letters.retry([dead.id]) == 1
            async with scene.consumer():
                await scene.until(lambda: has_dead(scene, 1))
    ((last, again),) = await scene.client.xrange(DEAD)
    (after,) = await scene.dead_letters()
    assert last != first
    assert {**again, b"dead-id": b""} == {**kept, b"dead-id": b""}
    # The client above shows once a field that is there twice.
    assert not {name for name in after.delivery.headers if name.startswith("dead-")}


@POSTGRESQL
async def test_31_a_message_that_always_fails_is_given_up_and_others_go_on(scene: Scene) -> None:
    attempts: list[int] = []

    async def fail(event: Moved | Noted, context: Context) -> None:
        if isinstance(event, Moved) and (event.account, event.place) == ("a", 1):
            attempts.append(context.delivery.attempt)
            raise PoisonError

    (poison, *_) = await publish(scene, "a", "b", "a", "b")
    await scene.consume(after=fail, attempts=4)
    # In each delivery RetryMiddleware has attempts of its own.
    assert sorted(set(attempts)) == [1, 2, 3, 4]
    (dead,) = await scene.dead_letters()
    assert poison in dead.delivery.body.decode()
    assert "PoisonError" in dead.reason
    assert (dead.delivery.attempt, dead.delivery.destination) == (4, STREAM)
    assert await scene.effects_of("a") == [2]
    assert await scene.effects_of("b") == [1, 2]


@POSTGRESQL
async def test_34_a_dead_letter_that_is_retried_is_handled_as_it_came_and_by_its_group_alone(scene: Scene) -> None:
    ill = True
    headers: list[Mapping[str, str]] = []
    elsewhere = Seen()

    async def fail(_event: Moved | Noted, context: Context) -> None:
        assert context.delivery.attempt == 1
        headers.append(context.delivery.headers)
        if ill:
            raise PoisonError

    await publish(scene, "a")
    await scene.consume(before=fail, attempts=1)
    (dead,) = await scene.dead_letters()
    async with scene.consumer(name="elsewhere", before=elsewhere):
        await scene.until(lambda: has_effects(scene, 1))
        ill = False
        async with RedisStreamBroker(scene.redis) as broker, scene.consumer(before=fail, attempts=1):
            letters = subscription_of(broker, MIN_IDLE).dead_letters
            assert letters is not None
            assert await letters.retry([dead.id]) == 1
            await scene.until(lambda: has_effects(scene, 2))
            await publish(scene, "b")
            await scene.until(lambda: has_effects(scene, 4))
    assert len(elsewhere.attempts) == await scene.client.xlen(STREAM) == 2
    assert headers[0] == headers[-2] == dead.delivery.headers
    assert await scene.effects_of("a") == [1, 1]
    assert await scene.dead_letters() == []


@POSTGRESQL
async def test_33_a_dead_letter_that_cannot_be_written_leaves_the_message_until_it_can(scene: Scene) -> None:
    """Another kind of thing has its name. Others are handled meanwhile."""
    async with scene.consumer(ordered=False):
        await publish(scene, "b")
        await scene.until(lambda: has_effects(scene, 1))
        await scene.client.set(DEAD, "no stream")
        await scene.client.xadd(STREAM, UNREADABLE["not JSON"])
        await publish(scene, "c")
        await scene.until(lambda: has_effects(scene, 2))
        await scene.until(lambda: was_delivered(scene, 2))
        await scene.client.delete(DEAD)
        await scene.until(lambda: has_dead(scene, 1))
    (dead,) = await scene.dead_letters()
    assert dead.delivery.body == UNREADABLE["not JSON"]["data"]


@POSTGRESQL
async def test_33_a_dead_letter_for_which_there_is_no_memory_is_written_when_there_is(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    begun, full = asyncio.Event(), asyncio.Event()

    async def fail(_event: Moved | Noted, _context: Context) -> None:
        begun.set()
        await full.wait()
        raise PoisonError

    await publish(scene, "a")
    async with scene.consumer(before=fail, attempts=1):
        await begun.wait()
        await scene.client.config_set("maxmemory", 1)
        full.set()
        await scene.until(lambda: says(caplog, "cannot tell the broker"))
        assert not await scene.settled()
        assert not await scene.client.exists(DEAD)
        await scene.client.config_set("maxmemory", 0)
        await scene.until(lambda: has_dead(scene, 1))
    (dead,) = await scene.dead_letters()
    assert "PoisonError" in dead.reason


async def says(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def was_delivered(scene: Scene, times: int) -> bool:
    entries = await scene.client.xpending_range(STREAM, GROUP, "-", "+", 10)
    return any(entry["times_delivered"] >= times for entry in entries)


async def has_dead(scene: Scene, number: int) -> bool:
    there: int = await scene.client.xlen(DEAD)
    return there == number and await scene.settled()


async def has_effects(scene: Scene, number: int) -> bool:
    return len(await scene.effects()) == number


def raw(fields: Mapping[Any, Any]) -> dict[bytes, bytes]:
    return {as_bytes(name): as_bytes(value) for name, value in fields.items()}


def as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
