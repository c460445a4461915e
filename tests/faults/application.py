"""The application under test: accounts that are moved under a lock, a row beside each event, and all of the outbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from pipeline_mediator import Command, Context, IntegrationEvent, Mediator, RequestMap, message
from pipeline_mediator.codec import Codec
from pipeline_mediator.inbox.sqlalchemy import inbox_table
from pipeline_mediator.message_brokers.protocol import MessageBroker
from pipeline_mediator.middlewares import (
    OutboxMiddleware,
    PublishMiddleware,
    RetryMiddleware,
    TransactionMiddleware,
)
from pipeline_mediator.outbox.protocol import OutboxStore
from pipeline_mediator.outbox.sqlalchemy import outbox_tables
from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

__all__ = [
    "ACCOUNTS",
    "EFFECTS",
    "FACTS",
    "INBOX",
    "METADATA",
    "OPERATIONS",
    "OUTBOX",
    "STREAMS",
    "Move",
    "Moved",
    "Noted",
    "RefusedError",
    "accounts",
    "codec",
    "engine_of",
    "mediator_of",
    "tokens_of",
]

METADATA = MetaData()
OUTBOX = outbox_tables(METADATA)
INBOX = inbox_table(METADATA)
ACCOUNTS = Table("accounts", METADATA, Column("name", String(20), primary_key=True), Column("moves", Integer))
OPERATIONS = Table("operations", METADATA, Column("operation", String(60), primary_key=True))
FACTS = Table(
    "facts",
    METADATA,
    Column("token", String(80), primary_key=True),
    Column("operation", String(60)),
    Column("account", String(20), nullable=True),
    Column("place", Integer),
)
EFFECTS = Table(
    "effects",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("message_id", String(60)),
    Column("token", String(80)),
    Column("account", String(20), nullable=True),
    Column("place", Integer),
)
"""What a consumer did, a row for each time that it did it; ids count up as the handlers write."""


@message("faults.moved", key="account")
@dataclass(frozen=True)
class Moved(IntegrationEvent):
    token: str
    account: str
    place: int


@message("faults.noted")
@dataclass(frozen=True)
class Noted(IntegrationEvent):
    token: str
    place: int


STREAMS = ("faults.moved", "faults.noted")


@dataclass(frozen=True)
class Move(Command[None]):
    """Moves each of the accounts, emitting a keyed event each, and then emits some without a key."""

    operation: str
    accounts: tuple[str, ...]
    notes: int = 0
    nested: bool = False
    """The last events are emitted by a command that joins."""
    refuses: bool = False
    """The handler raises when all is done."""
    commits: bool = False
    """The handler commits by itself."""


@dataclass(frozen=True)
class Note(Command[None]):
    operation: str
    first: int
    notes: int


class RefusedError(Exception):
    """Raised by a handler on purpose."""


def accounts(number: int = 12) -> list[str]:
    return [f"account-{n}" for n in range(number)]


def tokens_of(command: Move) -> list[str]:
    """Of the events that it emits."""
    return [f"{command.operation}/{n}" for n in range(len(command.accounts) + command.notes)]


async def move(command: Move, session: AsyncSession, context: Context) -> None:
    await session.execute(insert(OPERATIONS).values(operation=command.operation))
    # In one order everywhere, or two commands wait for each other.
    for token, account in zip(tokens_of(command), sorted(command.accounts), strict=False):
        await session.execute(update(ACCOUNTS).where(ACCOUNTS.c.name == account).values(moves=ACCOUNTS.c.moves + 1))
        place = (await session.execute(select(ACCOUNTS.c.moves).where(ACCOUNTS.c.name == account))).scalar_one()
        await _keep(session, token, command.operation, account, place)
        context.emit(Moved(token, account, place))
    noting = Note(command.operation, len(command.accounts), command.notes)
    if command.nested:
        await context.send(noting)
    else:
        await note(noting, session, context)
    if command.refuses:
        raise RefusedError
    if command.commits:
        await session.commit()


async def note(command: Note, session: AsyncSession, context: Context) -> None:
    for n in range(command.first, command.first + command.notes):
        await _keep(session, f"{command.operation}/{n}", command.operation, None, n)
        context.emit(Noted(f"{command.operation}/{n}", n))


async def _keep(session: AsyncSession, token: str, operation: str, account: str | None, place: int) -> None:
    await session.execute(insert(FACTS).values(token=token, operation=operation, account=account, place=place))


def codec() -> Codec:
    return Codec(Moved, Noted, source="faults")


def engine_of(url: str, **options: Any) -> AsyncEngine:
    engine = create_async_engine(url, **options)
    return prepare_sqlite(engine) if engine.dialect.name == "sqlite" else engine


def mediator_of(engine: AsyncEngine, store: OutboxStore, broker: MessageBroker, attempts: int = 2) -> Mediator:
    return Mediator(
        RequestMap().bind(Move, move).bind(Note, note),
        middlewares=[
            RetryMiddleware(attempts),
            TransactionMiddleware(async_sessionmaker(engine, expire_on_commit=False).begin),
            OutboxMiddleware(store),
            PublishMiddleware(broker),
        ],
        codec=codec(),
    )
