"""An AMQP 1.0 peer that stands in for Azure Service Bus, and the real client in a hurry."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.amqp_peer import AmqpPeer
from tests.servers import MissingServerError

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The client forgets to close a connection that the other side dropped, or that it was told to stop opening.

    Python closes it when it finds it, and the fixture `peer` sees to that.
    """
    for item in items:
        if item.path.parent.name == "azure":
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hurried:
    """asyncio, with pauses that take a twentieth of their time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 20)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[AmqpPeer]:
    # The client sleeps between looks at a link that it opens, and when it closes one: a second for each test.
    for module in (
        "_pyamqp.aio._client_async",
        "aio._base_handler_async",
        "aio._servicebus_sender_async",
        "aio._servicebus_receiver_async",
    ):
        monkeypatch.setattr(f"azure.servicebus.{module}.asyncio", Hurried())
    try:
        peer = AmqpPeer()
    except MissingServerError as error:
        if os.environ.get("REQUIRE_AZURE") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    with peer:
        yield peer
    gc.collect()
