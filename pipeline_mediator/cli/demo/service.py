"""The order service as a process of its own, with its relay; settings come by stdin, and the port goes to stdout."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import uvicorn

from pipeline_mediator.cli.demo.command import set_up_logging
from pipeline_mediator.cli.demo.listener import listen_to_subscription
from pipeline_mediator.cli.demo.receipts import Receipts
from pipeline_mediator.examples.orders.database import create_engine
from pipeline_mediator.examples.orders.mediator import create_mediator, create_pipeline
from pipeline_mediator.examples.orders.payments import SandboxPayments
from pipeline_mediator.examples.orders.web import create_web
from pipeline_mediator.message_brokers import MemoryBroker, MessageBroker
from pipeline_mediator.outbox import OutboxRelay

__all__ = ["Settings", "main"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told."""

    database: str
    redis: str | None
    """None: a broker within the process, and a subscriber too."""
    stream_prefix: str
    receipts: str
    """The file of that subscriber."""
    log: str | None


def main() -> None:
    """Serve until killed."""
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
    _end_with_parent()
    set_up_logging(settings.log)
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with AsyncExitStack() as stack:
        engine = create_engine(settings.database)
        stack.push_async_callback(engine.dispose)
        mediator = create_mediator(create_pipeline(engine, await _broker(settings, stack)), SandboxPayments())
        await stack.enter_async_context(mediator)
        await stack.enter_async_context(OutboxRelay(mediator))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        print(listener.getsockname()[1], flush=True)
        server = uvicorn.Server(uvicorn.Config(create_web(mediator), lifespan="off", log_config=None))
        await server.serve(sockets=[listener])


async def _broker(settings: Settings, stack: AsyncExitStack) -> MessageBroker:
    if settings.redis is None:
        broker = MemoryBroker()
        receipts = stack.enter_context(Receipts(Path(settings.receipts)))
        await stack.enter_async_context(listen_to_subscription(broker.subscribe("orders", name="demo"), receipts))
        return broker
    from pipeline_mediator.message_brokers import RedisStreamBroker

    return RedisStreamBroker(settings.redis, stream_prefix=settings.stream_prefix)


def _end_with_parent() -> None:
    """Nobody else would end this process if the demo itself is killed: that closes the pipe that is our input."""

    def wait() -> None:
        # Not by sys.stdin, whose lock the interpreter wants when it ends.
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    main()
