"""Beside publishing a relay cleans up, tells how much waits, and listens for the commits of others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint
from tenacity import wait_fixed

from pipeline_mediator.outbox import upkeep
from pipeline_mediator.outbox.protocol import StoredMessage
from tests.outbox.memory_store import MemoryStore
from tests.outbox.relay_fakes import LONG, Shop

if TYPE_CHECKING:
    from pipeline_mediator.outbox.protocol import Health


# -- cleaning ----------------------------------------------------------------------------------------------------------


async def test_it_cleans_up_in_small_batches_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_CLEANED", 10)
    shop = Shop(store=MemoryStore(keep=0.01))
    await shop.put(*(str(number) for number in range(25)))
    async with shop.relay(clean_every=0.02):
        await shop.broker.has(25)
        await shop.until(lambda: not shop.store.rows)
        await shop.put("one more")
        await shop.until(lambda: not shop.store.rows)
    assert max(shop.store.cleans) == 10


async def test_it_need_not_clean_up() -> None:
    shop = Shop(store=MemoryStore(keep=0.001))
    async with shop.relay(clean_every=None):
        await shop.put("a")
        await shop.broker.has(1)
        await anyio.sleep(0.05)
    assert shop.store.cleans == []


async def test_a_cleaning_that_fails_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MemoryStore):
        async def clean(self, limit: int, /) -> int:
            if not self.cleans:
                self.cleans.append(0)
                raise OSError("a payload")
            return await super().clean(limit)

    shop = Shop(store=Failing(keep=0.001))
    async with shop.relay(clean_every=0.02, name="shop"):
        await shop.put("a")
        await shop.until(lambda: len(shop.store.cleans) > 1 and not shop.store.rows)
    assert "shop: sent messages cannot be cleaned away (OSError)" in caplog.messages


async def test_what_is_away_is_not_asked_to_clean(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    shop.store.broken = OSError("away")
    async with shop.relay(clean_every=0.01, pauses=wait_fixed(LONG)):
        await shop.until(lambda: caplog.messages)
        await anyio.sleep(0.05)
    assert len([text for text in caplog.messages if "cleaned" in text]) <= 1


# -- how much waits ----------------------------------------------------------------------------------------------------


async def test_it_tells_how_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_LOOK_EVERY", 0.01)
    told: list[Health] = []
    later: list[Health] = []

    async def tell_later(health: Health) -> None:
        await checkpoint()
        later.append(health)

    shop = Shop()
    shop.broker.hangs["orders"] = anyio.Event()
    await shop.put("a", "b", key="k")
    async with shop.relay(on_health=told.append, stop_within=0.0):
        await shop.until(lambda: len(told) > 1)
    assert (told[1].pending, told[1].waiting, told[1].dead) == (1, 1, 0)
    assert told[1].oldest > 0
    async with shop.relay(on_health=tell_later, stop_within=0.0):
        await shop.until(lambda: later)
    assert await shop.relay().health() == later[-1] or later[-1].oldest > 0


async def test_whoever_is_told_may_fail(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(upkeep, "_LOOK_EVERY", 0.01)

    def fail(_: Health) -> None:
        raise ZeroDivisionError

    shop = Shop()
    async with shop.relay(on_health=fail):
        await shop.until(lambda: len(caplog.messages) > 1)
        await shop.put("a")
        await shop.broker.has(1)
    assert "outbox: how much waits is not known (ZeroDivisionError)" in caplog.messages


async def test_nobody_asks_so_nobody_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_LOOK_EVERY", 0.001)

    class Uncounted(MemoryStore):
        async def health(self) -> Health:
            pytest.fail("counting costs")

    shop = Shop(store=Uncounted())
    async with shop.relay():
        await shop.put("a")
        await shop.broker.has(1)
        await anyio.sleep(0.02)


GAUGES = """
import anyio
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from tests.outbox.relay_fakes import Shop
from pipeline_mediator.outbox import gauges

reader = InMemoryMetricReader()

def seen():
    found = reader.get_metrics_data()
    if found is None:
        return {}
    return {
        (one.name, point.attributes["pipeline_mediator.outbox"]): point.value
        for one in found.resource_metrics[0].scope_metrics[0].metrics for point in one.data.data_points
    }

async def main():
    one, two = Shop(), Shop()
    one.broker.hangs["orders"] = anyio.Event()
    await one.put("a", "b", key="k")
    async with one.relay(name="acme", stop_within=0.0):
        await one.until(lambda: one.broker.calls)
    assert seen() == {}, "no provider was set"
    metrics.set_meter_provider(MeterProvider([reader]))
    async with one.relay(name="acme", stop_within=0.0), two.relay(name="umbrella"):
        await one.until(lambda: len(seen()) == 8)
    values = seen()
    assert values["pipeline_mediator.outbox.pending", "acme"] == 1
    assert values["pipeline_mediator.outbox.waiting", "acme"] == 1
    assert values["pipeline_mediator.outbox.oldest", "acme"] > 0
    assert values["pipeline_mediator.outbox.dead", "umbrella"] == 0
    gauges._STALE = 0.0
    assert seen() == {}, "what is old is not shown"

anyio.run(main)
"""


def test_what_waits_is_shown_as_gauges() -> None:
    done = subprocess.run([sys.executable, "-c", GAUGES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- listening ---------------------------------------------------------------------------------------------------------


async def test_it_listens_as_long_as_it_runs() -> None:
    shop = Shop()
    async with shop.relay():
        await shop.until(lambda: shop.store.listeners == 1)
    assert shop.store.listeners == 0


async def test_what_was_committed_before_it_listened_is_not_forgotten() -> None:
    may_listen = anyio.Event()

    class Slow(MemoryStore):
        @asynccontextmanager
        async def listen(self) -> AsyncGenerator[None]:
            await may_listen.wait()
            yield

    shop = Shop(store=Slow())
    async with shop.relay(poll=LONG):
        await shop.until(lambda: shop.store.takes)
        await shop.store.add(None, [StoredMessage("a", "orders.placed", 1, "orders", "application/json", b"{}")])
        await anyio.sleep(0.02)
        assert shop.broker.ids == []
        may_listen.set()
        await shop.broker.has(1)


async def test_it_listens_when_that_is_possible(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop()
    shop.store.deaf = ConnectionRefusedError("no more connections")
    async with shop.relay(name="shop"):
        await shop.put("a")
        await shop.broker.has(1)
        await shop.until(lambda: len(caplog.messages) > 1)
        shop.store.deaf = None
        await shop.until(lambda: shop.store.listeners)
    assert "shop: commits of other processes are not heard (ConnectionRefusedError)" in caplog.messages[0]
    assert "shop: they are heard again" in caplog.messages[-1]
