"""Consumers that are killed, stopped and told to end; what they had is another's, and takes effect once.

The numbers are those of the table in docs/guarantees.md.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess

import pytest

from pipeline_mediator import Context
from tests.faults.application import Moved, Noted
from tests.faults.consuming import GROUP
from tests.faults.scene import Scene

KILLED = -signal.SIGKILL
POSTGRESQL = pytest.mark.parametrize("database", ["postgresql"], indirect=True)


class Seen:
    """Notes what handlers begin with: tokens, each with the attempt that it is."""

    def __init__(self) -> None:
        self.attempts: list[tuple[str, int]] = []

    async def __call__(self, event: Moved | Noted, context: Context) -> None:
        self.attempts.append((event.token, context.delivery.attempt))


async def publish(scene: Scene, *accounts: str) -> list[str]:
    """An event of each of these keys, one after the other; their tokens."""
    commands = [scene.command(account) for account in accounts]
    await scene.send(*commands)
    await scene.drain()
    return [f"{command.operation}/0" for command in commands]


async def end_of(process: subprocess.Popen[str]) -> int:
    _, errors = await asyncio.to_thread(process.communicate, timeout=30)
    code: int = process.returncode
    assert "Traceback" not in errors, errors
    return code


async def test_05_a_consumer_killed_before_it_acknowledged_repeats_the_message_and_not_the_effect(
    scene: Scene,
) -> None:
    await publish(scene, "a")
    assert scene.program("consume_and_die_before_the_acknowledgement") == KILLED
    assert len(await scene.effects()) == 1
    assert not await scene.settled()
    seen = Seen()
    await scene.consume(before=seen)
    assert len(await scene.effects()) == 1
    assert seen.attempts == []


async def test_06_a_consumer_killed_before_its_commit_has_not_handled_the_message(scene: Scene) -> None:
    """The inbox has recorded it, and the effect is written, in a transaction that is gone."""
    (token,) = await publish(scene, "a")
    assert scene.program("consume_and_die_before_the_commit") == KILLED
    assert await scene.effects() == []
    seen = Seen()
    await scene.consume(before=seen)
    assert len(await scene.effects()) == 1
    assert [one for one, attempt in seen.attempts if attempt > 1] == [token]


@POSTGRESQL
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "competing"])
async def test_24_what_a_dead_consumer_had_is_taken_over(scene: Scene, *, ordered: bool) -> None:
    """What its handlers had begun, what waited in its memory, and what came after its death."""
    tokens = await publish(scene, *"abc" * 10)
    with scene.start("consume_and_hang") as process:
        try:
            await scene.until(lambda: scene.is_marked(tokens[2]))
        finally:
            process.kill()
    tokens += await publish(scene, "a", "b")
    assert await scene.effects() == []
    await scene.consume(ordered=ordered)
    assert len(await scene.effects()) == len(set(await scene.effects())) == len(tokens)
    if ordered:
        assert await scene.effects_of("a") == list(range(1, 12))


@POSTGRESQL
async def test_25_a_handler_whose_hold_is_lost_is_cancelled_and_the_other_effect_is_the_only_one(scene: Scene) -> None:
    """Stopped past `min_idle`, it goes on as if nothing had been; its message is another consumer's by now."""
    (token,) = await publish(scene, "a")
    with scene.start("consume_and_stop_in_the_handler") as process:
        try:
            await scene.stopped(process)
            seen = Seen()
            async with scene.consumer(before=seen):
                await scene.until(lambda: held_by_another(scene))
                process.send_signal(signal.SIGCONT)
                await scene.until(lambda: scene.is_marked(f"cancelled {token}"))
                await scene.until(scene.settled)
                # Nor does it come back to it.
                assert process.poll() is None
        finally:
            process.kill()
    assert [one for one, _ in seen.attempts] == [token]
    assert len(await scene.effects()) == 1


async def held_by_another(scene: Scene) -> bool:
    """Whether a second consumer has the entry: it was delivered again."""
    entries = await scene.client.xpending_range("faults.moved", GROUP, "-", "+", 10)
    return any(entry["times_delivered"] > 1 for entry in entries)


async def test_25_what_a_stopped_consumer_acknowledges_late_is_done_already(scene: Scene) -> None:
    """It had committed; another has had the message since, and the next one of the key."""
    await publish(scene, "a")
    with scene.start("consume_and_stop_before_the_acknowledgement") as process:
        try:
            await scene.stopped(process)
            tokens = await publish(scene, "a")
            seen = Seen()
            async with scene.consumer(before=seen):
                await scene.until(scene.settled)
                process.send_signal(signal.SIGCONT)
                tokens += await publish(scene, "a")
                await scene.until(scene.settled)
        finally:
            process.kill()
    assert await scene.effects_of("a") == [1, 2, 3]
    assert [token for token, _ in seen.attempts] == tokens


@POSTGRESQL
async def test_31_a_message_that_ends_every_process_is_given_up(scene: Scene) -> None:
    (token,) = await publish(scene, "a")
    for _ in range(3):
        assert scene.program("consume_and_die_in_each_handler_of_a") == KILLED
    await scene.consume(attempts=3)
    (dead,) = await scene.dead_letters()
    assert token in dead.delivery.body.decode()
    assert "DeliveryExhaustedError" in dead.reason
    await publish(scene, "a")
    await scene.consume(attempts=3)
    assert await scene.effects_of("a") == [2]


@POSTGRESQL
async def test_31_beside_a_message_that_ends_every_process_others_go_on(scene: Scene) -> None:
    await publish(scene, "a", *"bc" * 10)
    for _ in range(3):
        assert scene.program("consume_and_die_in_each_handler_of_a") == KILLED
    await scene.consume(attempts=3)
    assert len(await scene.dead_letters()) == 1
    assert await scene.effects_of("b") == await scene.effects_of("c") == list(range(1, 11))


@POSTGRESQL
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT], ids=lambda told: told.name)
async def test_41_told_to_end_a_slow_handler_finishes_and_nothing_new_is_begun(
    scene: Scene, told: signal.Signals
) -> None:
    (token,) = await publish(scene, "a")
    with scene.serve("--grace", "20") as process:
        try:
            await scene.until(lambda: scene.is_marked(token))
            process.send_signal(told)
            (later,) = await publish(scene, "b")
            assert process.poll() is None
            await scene.mark("go")
            assert await end_of(process) == 0
        finally:
            process.kill()
    assert await scene.effects_of("a") == [1]
    assert not await scene.is_marked(later)
    await scene.consume()
    assert await scene.effects_of("b") == [1]
    assert len(await scene.effects()) == 2


@POSTGRESQL
@pytest.mark.parametrize("told_twice", [False, True], ids=["grace ends", "told twice"])
async def test_41_what_is_not_done_in_time_is_given_back_at_once_and_counts_as_no_attempt(
    scene: Scene, *, told_twice: bool
) -> None:
    tokens = await publish(scene, "a", "a", "b")
    with scene.serve("--grace", "20" if told_twice else "0.2") as process:
        try:
            await scene.until(lambda: scene.is_marked(tokens[0]))
            process.send_signal(signal.SIGTERM)
            if told_twice:
                # Of the same kind, two at once would be one.
                process.send_signal(signal.SIGINT)
            assert await end_of(process) in ({128 + signal.SIGTERM, 128 + signal.SIGINT} if told_twice else {0})
        finally:
            process.kill()
    assert await scene.effects() == []
    seen = Seen()
    # Not after min_idle: what is given back is there.
    await scene.consume(before=seen, min_idle=600.0)
    assert sorted(seen.attempts) == [(token, 1) for token in sorted(tokens)]
    assert await scene.effects_of("a") == [1, 2]
