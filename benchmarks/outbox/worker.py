"""One process of a measurement: a relay, or who writes, or both. Told what to do by lines on its standard input.

Prints `{"ready": true}` when everything is connected, begins at the line "go", and ends at the line "stop" with what it
found out, as one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import process_time
from typing import Any

from benchmarks.outbox.databases import Address, address_of

Write = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Role:
    """What this process does."""

    relay: Callable[[], Coroutine[Any, Any, None]]
    """Until stopped, or else cancelled."""
    write: Write
    """Commit one more event; when that was asked for."""
    wake: Callable[[], None]
    """Tell the relay in this process of it."""
    stop: Callable[[], None] | None = None


async def work(options: argparse.Namespace) -> dict[str, Any]:
    sides = {"ours": _ours, "by hand": _by_hand, "python-cqrs": _python_cqrs}
    async with sides[options.side](address_of(options.database), options) as role:
        _say({"ready": True})
        await _line("go")
        began = process_time()
        relaying = asyncio.ensure_future(role.relay()) if options.relay else None
        committed: list[float] = []
        try:
            if options.write:
                if relaying is not None:
                    await asyncio.sleep(0.5)  # until it has begun, and found nothing
                for _ in range(options.write):
                    committed.append(await role.write())
                    role.wake()
                    await asyncio.sleep(options.pause)
            await _line("stop", unless=relaying)
        finally:
            if relaying is not None:
                (role.stop or relaying.cancel)()
                await asyncio.gather(relaying, return_exceptions=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"committed": committed, "peak_mib": peak / 1024, "cpu_s": process_time() - began}


async def _line(wanted: str, unless: asyncio.Future[None] | None = None) -> None:
    """Wait for it; raises what the relay raises, if that ends."""
    reading = asyncio.ensure_future(asyncio.to_thread(sys.stdin.readline))
    done, _ = await asyncio.wait([reading, *([unless] if unless else [])], return_when=asyncio.FIRST_COMPLETED)
    if unless in done:
        unless.result()
        raise RuntimeError("the relay has ended by itself")
    if reading.result().strip() != wanted:
        raise RuntimeError(f"told {reading.result()!r} instead of {wanted!r}")


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


@asynccontextmanager
async def _ours(address: Address, options: argparse.Namespace) -> AsyncGenerator[Role]:
    from benchmarks.outbox.events import stored
    from benchmarks.outbox.ours import ours
    from pipeline_mediator.outbox.relay import OutboxRelay

    messages = stored(options.write)
    async with ours(address.sqlalchemy, options.redis, notify=options.notify, keep=options.keep) as all_of_it:
        relay = OutboxRelay(all_of_it.mediator, batch=options.batch)

        async def write() -> float:
            return await all_of_it.write(next(messages))

        yield Role(relay.run, write, all_of_it.store.committed, relay.stop)


@asynccontextmanager
async def _by_hand(address: Address, options: argparse.Namespace) -> AsyncGenerator[Role]:
    from benchmarks.outbox.by_hand import PostgresByHand, SQLiteByHand
    from benchmarks.outbox.events import hand_rows

    rows = hand_rows(options.write)
    kind = PostgresByHand if address.postgresql else SQLiteByHand
    async with kind(address.driver, options.redis, options.batch, keep=options.keep) as by_hand:
        if options.notify and options.relay:
            await by_hand.listen()

        async def write() -> float:
            return await by_hand.write(next(rows), notify=options.notify)

        yield Role(by_hand.relay, write, by_hand.wake)


@asynccontextmanager
async def _python_cqrs(address: Address, options: argparse.Namespace) -> AsyncGenerator[Role]:
    from benchmarks.adapters.outbox_of_python_cqrs import relay_of

    async def nothing() -> float:
        raise NotImplementedError

    async with relay_of(address.sqlalchemy, options.redis, options.batch) as relay:
        yield Role(relay, nothing, lambda: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side")
    parser.add_argument("database")
    parser.add_argument("redis")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--relay", action="store_true")
    parser.add_argument("--notify", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--write", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.01)
    _say(asyncio.run(work(parser.parse_args())))


if __name__ == "__main__":
    main()
