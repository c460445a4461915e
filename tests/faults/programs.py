"""Programs of the named scenarios, each with its accident at one certain point; arguments: NAME DATABASE REDIS."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
from sqlalchemy import event as events

from pipeline_mediator.errors import LeaseLostError
from pipeline_mediator.outbox.protocol import Policy
from tests.faults.application import Moved, Noted
from tests.faults.brokers import HookedBroker, die, stop
from tests.faults.life import end_with_parent
from tests.faults.scene import Scene, scene_on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy import Connection

    from pipeline_mediator import Context


async def die_before_the_commit(scene: Scene) -> None:
    """When all rows are written."""
    _die_at_commit(scene)
    await scene.send(scene.command("a", notes=1))


async def die_after_the_commit(scene: Scene) -> None:
    await scene.send(scene.command("a", notes=1))
    die()


async def relay_and_die_after_the_broker_accepted(scene: Scene) -> None:
    await scene.drain(HookedBroker(scene.redis, after=die))


async def relay_and_die_with_a_part_accepted(scene: Scene) -> None:
    await scene.drain(HookedBroker(scene.redis, after=die, limit=3))


async def relay_and_stop_before_the_broker_is_asked(scene: Scene) -> None:
    with suppress(LeaseLostError):
        await scene.drain(HookedBroker(scene.redis, before=stop), lease=1.0)


async def relay_and_stop_after_the_broker_accepted(scene: Scene) -> None:
    with suppress(LeaseLostError):
        await scene.drain(HookedBroker(scene.redis, after=stop), lease=1.0)


async def relay_until_empty(scene: Scene) -> None:
    """Beside others who do the same."""
    await scene.until_drained()


async def relay_once(scene: Scene) -> None:
    await scene.drain()


async def send_one(scene: Scene) -> None:
    await scene.send(scene.command("a"))


async def take_and_stop(scene: Scene) -> None:
    async with scene.store().take(10, Policy(lease=5.0)):
        stop()


async def take_for_an_hour_and_stop(scene: Scene) -> None:
    async with scene.store().take(10, Policy(lease=3600.0)):
        stop()


async def consume_and_die_before_the_commit(scene: Scene) -> None:
    """When the inbox has recorded the message and its effect is written."""

    async def die_soon(_event: object, _context: Context) -> None:
        _die_at_commit(scene)

    await scene.consume(after=die_soon)


async def consume_and_die_before_the_acknowledgement(scene: Scene) -> None:
    """When the handler's transaction is committed."""
    await scene.consumer(before_settling=die).run()


async def consume_and_die_in_each_handler_of_a(scene: Scene) -> None:
    """A poison: whoever handles it ends."""

    async def die_of_it(event: Moved | Noted, _context: Context) -> None:
        if isinstance(event, Moved) and event.account == "a":
            die()

    await scene.consume(before=die_of_it, attempts=3)


async def consume_and_hang(scene: Scene) -> None:
    """With what its handlers have begun, and with what was read ahead."""

    async def hang(event: Moved | Noted, _context: Context) -> None:
        await scene.mark(event.token)
        await asyncio.sleep(3600)

    await scene.consumer(before=hang).run()


async def consume_and_stop_in_the_handler(scene: Scene) -> None:
    """Past the time for which it holds the message; continued, the handler would go on."""

    async def stop_and_go_on(event: Moved | Noted, _context: Context) -> None:
        stop()
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await scene.mark(f"cancelled {event.token}")
            raise

    await scene.consumer(before=stop_and_go_on).run()


async def consume_and_stop_before_the_acknowledgement(scene: Scene) -> None:
    await scene.consumer(before_settling=stop).run()


async def clean_and_die_before_the_commit(scene: Scene) -> None:
    _die_at_commit(scene)
    await scene.store().clean(1000)


PROGRAMS: dict[str, Callable[[Scene], Awaitable[None]]] = {
    program.__name__: program
    for program in (
        die_before_the_commit,
        die_after_the_commit,
        relay_and_die_after_the_broker_accepted,
        relay_and_die_with_a_part_accepted,
        relay_and_stop_before_the_broker_is_asked,
        relay_and_stop_after_the_broker_accepted,
        relay_until_empty,
        relay_once,
        send_one,
        take_and_stop,
        take_for_an_hour_and_stop,
        consume_and_die_before_the_commit,
        consume_and_die_before_the_acknowledgement,
        consume_and_die_in_each_handler_of_a,
        consume_and_hang,
        consume_and_stop_in_the_handler,
        consume_and_stop_before_the_acknowledgement,
        clean_and_die_before_the_commit,
    )
}


def _die_at_commit(scene: Scene) -> None:
    def die_now(_connection: Connection) -> None:
        die()

    events.listen(scene.engine.sync_engine, "commit", die_now)


async def run(name: str, database: str, redis: str) -> None:
    """One of the programs, on tables that are there."""
    end_with_parent()
    async with scene_on(database, redis) as scene:
        await PROGRAMS[name](scene)


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
