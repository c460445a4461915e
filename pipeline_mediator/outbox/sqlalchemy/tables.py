"""The two tables of an outbox, in the application's own MetaData."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Table,
    Text,
    and_,
    literal_column,
)
from sqlalchemy.dialects import mysql

from pipeline_mediator.databases import Timestamp

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, FromClause, MetaData

__all__ = [
    "DEAD",
    "DELAYED",
    "NAME_LENGTH",
    "PENDING",
    "SENT",
    "WAITING",
    "WHOLE",
    "OutboxTables",
    "outbox_tables",
    "unsent",
]

PENDING: Final = literal_column("0", SmallInteger)
"""Due. States are literals, never parameters: a partial index is only used where the planner sees the value."""
DELAYED: Final = literal_column("1", SmallInteger)
"""Not before `available_at`, and not while its destination is left out."""
WAITING: Final = literal_column("2", SmallInteger)
"""Behind an earlier message of its key that is delayed, waiting or dead."""
DEAD: Final = literal_column("3", SmallInteger)
"""Given up."""
SENT: Final = literal_column("4", SmallInteger)
"""Published, and kept for a while."""

WHOLE: Final = 64
"""The row behind the last lane stands for the whole outbox: who cleans locks it, SQLite's only lease is kept in it."""

NAME_LENGTH: Final = 255
"""Characters that a name, an id, a destination or a key may have."""

_Name = String(NAME_LENGTH)
_Long = Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
_Bytes = LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
# SQLite numbers rows by itself, and never again with the number of a deleted one, only for this type.
_Id = BigInteger().with_variant(Integer(), "sqlite")

_OPTIONS: dict[str, Any] = {
    "sqlite_autoincrement": True,
    **{
        f"{name}_{option}": value
        for name in ("mysql", "mariadb")
        # Bytewise: two keys that a language holds equal are two keys.
        for option, value in {"engine": "InnoDB", "default_charset": "utf8mb4", "collate": "utf8mb4_bin"}.items()
    },
}


@dataclass(frozen=True, slots=True)
class OutboxTables:
    """The tables of one outbox."""

    rows: Table
    """One row per message."""
    lanes: Table
    """One row per lane: who publishes it, and how often whoever did so died."""


def outbox_tables(metadata: MetaData, *, name: str = "outbox", schema: str | None = None) -> OutboxTables:
    """Define the tables of an outbox, so that `create_all` and Alembic see them with the application's own.

        OUTBOX = outbox_tables(Base.metadata)

    They are called `name` and `name_lanes`, in `schema` or else in the schema of the MetaData.
    """
    schema = metadata.schema if schema is None else schema
    return OutboxTables(_rows(metadata, name, schema), _lanes(metadata, f"{name}_lanes", schema))


def unsent(rows: FromClause, state: ColumnElement[int]) -> ColumnElement[bool]:
    """In this state, and not sent: SQLite compares conditions word by word to see whether a partial index will do."""
    return and_(rows.c.state == state, rows.c.state < SENT)


def _rows(metadata: MetaData, name: str, schema: str | None) -> Table:
    rows = Table(
        name,
        metadata,
        # Not Identity(): where a database has none, Alembic would find a difference for ever.
        Column("id", _Id, primary_key=True),
        Column("message_id", _Name, nullable=False),
        Column("name", _Name, nullable=False),
        Column("version", Integer, nullable=False),
        Column("destination", _Name, nullable=False),
        Column("content_type", _Name, nullable=False),
        Column("headers", _Long, nullable=False),
        Column("body", _Bytes, nullable=False),
        Column("key", _Name),
        # The key of what is delayed, waiting or dead, for as long as later messages of that key wait for it.
        Column("hold", _Name),
        Column("lane", SmallInteger, nullable=False),
        Column("state", SmallInteger, nullable=False),
        Column("failures", Integer, nullable=False),
        Column("last_error", _Long),
        Column("created_at", Timestamp, nullable=False),
        Column("available_at", Timestamp, nullable=False),
        Column("sent_at", Timestamp),
        schema=schema,
        **_OPTIONS,
    )
    c = rows.c
    # Partial, so that what was sent and is kept, or was never in trouble, costs them nothing. MariaDB and MySQL know no
    # partial index; there the state comes first, and NULLs stand apart.
    _index(f"ix_{name}_lane", c.state, c.lane, c.id, where=c.state < SENT)
    _index(f"ix_{name}_hold", c.hold, c.id, where=c.hold.is_not(None))
    _index(f"ix_{name}_delayed", c.state, c.destination, c.available_at, where=c.state == DELAYED)
    _index(f"ix_{name}_sent", c.sent_at, where=c.sent_at.is_not(None))
    return rows


def _index(name: str, *columns: Column[object], where: ColumnElement[bool]) -> None:
    Index(name, *columns, postgresql_where=where, sqlite_where=where)


def _lanes(metadata: MetaData, name: str, schema: str | None) -> Table:
    return Table(
        name,
        metadata,
        Column("lane", SmallInteger, primary_key=True, autoincrement=False),
        # Batches in a row that were taken and never left.
        Column("crashes", Integer, nullable=False),
        # How many rows are still to be taken one at a time, to find the one that kills its relay.
        Column("alone", Integer, nullable=False),
        Column("served_at", Timestamp, nullable=False),
        Column("owner", _Name),
        Column("expires_at", Timestamp),
        schema=schema,
        **{option: value for option, value in _OPTIONS.items() if option != "sqlite_autoincrement"},
    )
