"""Every Python block of the README and of docs/ runs, and prints what the page says it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What the README's second block takes from an application.
APPLICATION = """
from dataclasses import dataclass
import rodi
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from pipeline_mediator import IntegrationEvent
from pipeline_mediator.container.rodi import RodiContainer
from pipeline_mediator.message_brokers import RedisStreamBroker
from pipeline_mediator.middlewares import *
from pipeline_mediator.outbox.sqlalchemy import SQLAlchemyOutbox, outbox_tables
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite
from sqlalchemy.orm import DeclarativeBase

class Base(DeclarativeBase): ...

engine = prepare_sqlite(create_async_engine("sqlite+aiosqlite://"))
sessions = async_sessionmaker(engine)
services = rodi.Container()

@dataclass(frozen=True)
class PlaceOrder(Command[int]):
    quantity: int

@dataclass(frozen=True)
class OrderPlaced(IntegrationEvent):
    order_id: int

class PlaceOrderHandler:
    def __init__(self, session: AsyncSession) -> None: ...
    async def handle(self, command: PlaceOrder) -> int: ...

def check_quantity(command: PlaceOrder) -> None: ...
async def WarnBuyer(event: StockRanLow) -> None: ...
async def NotifyWarehouse(event: OrderPlaced) -> None: ...
"""


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text()) if name == language]


def run(code: str) -> str:
    """In a process of its own, as a reader would."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_example_prints_what_the_readme_says() -> None:
    example = blocks(ROOT / "README.md", "python")[0]
    assert run(example) == blocks(ROOT / "README.md", "text")[0]


def test_the_stack_of_the_readme_is_accepted() -> None:
    example, stack = blocks(ROOT / "README.md", "python")[:2]
    described = run(f"{example}\n{APPLICATION}\n{stack}\nmediator.check()\nprint(mediator.describe())")
    assert "PublishMiddleware" in described
    assert "RedisStreamBroker → orders" in described


@pytest.mark.parametrize("name", ["outbox", "consuming"])
def test_the_example_prints_what_its_page_says(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    assert run(blocks(page, "python")[0]) == blocks(page, "text")[0]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page: Path) -> None:
    run("\n".join(blocks(page, "python")))


def test_the_example_of_the_harness_tells_its_story() -> None:
    page = ROOT / "docs" / "testing.md"
    printed = run(blocks(page, "python")[0])
    # How long it is postponed is left to chance.
    assert re.sub(r"[\d.]+ s", "1.0 s", printed) == blocks(page, "text")[0]
