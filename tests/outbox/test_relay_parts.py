"""What a relay is made of, where the whole does not show it."""

from __future__ import annotations

import asyncio
import math
import statistics
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from tenacity import wait_fixed

from pipeline_mediator.concurrency import from_any_thread
from pipeline_mediator.errors import BrokerUnavailableError, DestinationError
from pipeline_mediator.outbox.bell import Bell
from pipeline_mediator.outbox.destinations import Destinations
from pipeline_mediator.outbox.protocol import StoredMessage, StoredRow
from pipeline_mediator.outbox.waves import in_waves, probe_of, sorted_out
from pipeline_mediator.trouble import Trouble, default_backoff, default_pauses, pause_after

if TYPE_CHECKING:
    from collections.abc import Sequence

LONG = 30.0


# -- bell --------------------------------------------------------------------------------------------------------------


async def test_a_bell_that_was_rung_ends_the_next_wait() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    assert await bell.wait(LONG)
    assert await bell.wait(LONG)
    bell.clear()
    assert not await bell.wait(0.001)


async def test_no_ring_of_another_thread_is_lost() -> None:
    bell = Bell()
    work: list[int] = []
    done: list[int] = []

    def ring() -> None:
        for number in range(2000):
            work.append(number)
            bell.ring()

    thread = threading.Thread(target=ring)
    thread.start()
    with anyio.fail_after(10):
        while len(done) < 2000:
            bell.clear()
            while work:
                done.append(work.pop())
            if len(done) < 2000:
                assert await bell.wait(5.0)
    thread.join()


def test_a_bell_may_be_rung_when_its_event_loop_has_ended() -> None:
    """Closed over a task that waits for it, which nobody ran to its end."""
    bells: list[Bell] = []
    tasks: list[Any] = []

    async def begin() -> None:
        bells.append(Bell())
        tasks.append(asyncio.create_task(bells[0].wait(LONG)))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    bells[0].ring()
    bells[0].clear()
    thread = threading.Thread(target=bells[0].ring)
    thread.start()
    thread.join()
    assert not tasks[0].done()
    tasks[0]._log_destroy_pending = False


async def test_another_thread_reaches_the_event_loop() -> None:
    reached = anyio.Event()
    thread = threading.Thread(target=from_any_thread(reached.set))
    thread.start()
    with anyio.fail_after(5):
        await reached.wait()
    thread.join()


# -- pauses ------------------------------------------------------------------------------------------------------------


def test_a_message_has_a_quarter_of_an_hour_and_more_to_get_through() -> None:
    """Long enough for a rolling deployment, or for somebody to mend a queue; and no two messages alike."""
    backoff = default_backoff()
    totals = [sum(pause_after(failures, backoff) for failures in range(1, 10)) for _ in range(500)]
    assert 600 < statistics.mean(totals) < 1800
    assert len(set(totals)) == len(totals)
    assert max(pause_after(1000, backoff) for _ in range(100)) <= 900


def test_what_is_away_is_tried_soon_and_then_twice_a_minute() -> None:
    pauses = default_pauses()
    assert all(0.5 <= pause_after(1, pauses) <= 1 for _ in range(100))
    assert all(0.5 <= pause_after(100, pauses) <= 30 for _ in range(100))


# -- trouble -----------------------------------------------------------------------------------------------------------


async def test_a_long_text_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    Trouble("it fails", "it works", wait_fixed(0)).again(BrokerUnavailableError("x" * 10_000))
    assert len(caplog.text) < 1000
    assert "…" in caplog.text


async def test_an_error_of_this_library_needs_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble("it fails", "it works", wait_fixed(0), stack=True)
    for error in (BrokerUnavailableError("away"), OSError(), OSError(), ValueError()):
        trouble.again(error)
    assert [record.exc_info is not None for record in caplog.records] == [False, True, False, True]


# -- waves -------------------------------------------------------------------------------------------------------------


def row(number: int, to: str, key: str | None = None, failures: int = 0) -> StoredRow:
    return StoredRow(number, StoredMessage(str(number), f"for {to}", 1, to, "", b"", {}, key), failures, 0.0)


def chain_of(name: str, version: int, destination: str) -> str:
    if destination == "nowhere":
        raise DestinationError("nobody publishes it")
    return destination


def numbers(rows: Sequence[StoredRow]) -> list[int]:
    return [one.id for one in rows]


def test_rows_without_a_key_are_published_at_once() -> None:
    waves, places = in_waves([row(1, "a"), row(2, "b"), row(3, "a"), row(4, "b")], chain_of)
    assert [[numbers(group.rows) for group in wave] for wave in waves] == [[[1, 3], [2, 4]]]
    assert [place.destination for place in places] == ["a", "b"]


def test_a_key_that_goes_elsewhere_waits_for_the_next_wave() -> None:
    rows = [row(1, "a", "k"), row(2, "b", "k"), row(3, "b", "k"), row(4, "a", "k"), row(5, "b", "l"), row(6, "a", "l")]
    waves, _ = in_waves(rows, chain_of)
    assert [[numbers(group.rows) for group in wave] for wave in waves] == [[[1], [5]], [[2, 3], [6]], [[4]]]


def test_types_that_go_to_one_place_are_published_together() -> None:
    waves, places = in_waves(
        [row(1, "a", "k"), StoredRow(2, StoredMessage("2", "another", 1, "a", "", b"", {}, "k"), 0, 0.0)], chain_of
    )
    assert [[numbers(group.rows) for group in wave] for wave in waves] == [[[1, 2]]]
    assert len(places) == 1


def test_what_nobody_publishes_is_a_place_of_its_own() -> None:
    waves, places = in_waves([row(1, "a", "k"), row(2, "nowhere", "k"), row(3, "a", "k")], chain_of)
    assert [[numbers(group.rows) for group in wave] for wave in waves] == [[[1]], [[2]], [[3]]]
    assert [place.error is None for place in places] == [True, False]


def test_no_rows_no_waves() -> None:
    assert in_waves([], chain_of) == ([], [])


def test_a_probe_is_another_one_each_time_and_never_behind_one_of_its_key() -> None:
    rows = [row(1, "a", "k"), row(2, "a", "k"), row(3, "a"), row(4, "a", "l"), row(5, "a", "m", failures=1)]
    assert [probe_of(rows, failures).id for failures in range(1, 5)] == [3, 4, 1, 3]
    assert probe_of(rows[4:], 1).id == 5


def test_what_failed_is_published_alone_and_its_key_behind_it() -> None:
    rows = [row(1, "a", "k"), row(2, "a", "k", failures=1), row(3, "a", "k", failures=1), row(4, "a"), row(5, "a", "k")]
    first, alone, behind = sorted_out(rows)
    assert (numbers(first), numbers(alone), numbers(behind)) == ([1, 4], [2], [3, 5])


# -- destinations ------------------------------------------------------------------------------------------------------


async def test_a_pause_that_ends_between_two_looks_is_not_slept_through() -> None:
    """The relay would wait until it polls, though there is somebody to try again."""
    destinations = Destinations(wait_fixed(0.01))
    destinations.refused("orders", BrokerUnavailableError("away"), 0.0)
    assert destinations.left_out() == ["orders"]
    await anyio.sleep(0.02)
    assert destinations.next_probe() == 0.0
    assert destinations.left_out() == []
    assert destinations.next_probe() == math.inf


async def test_one_that_was_just_refused_is_waited_for() -> None:
    destinations = Destinations(wait_fixed(10))
    assert destinations.left_out() == []
    destinations.refused("orders", BrokerUnavailableError("away"), 0.0)
    assert 9 < destinations.next_probe() <= 10
