"""What the tables of outbox and inbox need of every database: its clock, and what is wrong with a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline_mediator.errors import MissingExtraError

try:
    from sqlalchemy import BigInteger, DateTime, Integer, SmallInteger, inspect
    from sqlalchemy.dialects import mysql
    from sqlalchemy.ext.compiler import compiles
    from sqlalchemy.sql.functions import FunctionElement
except ModuleNotFoundError as error:  # pragma: no cover - shown in a subprocess
    if error.name is None or error.name.partition(".")[0] != "sqlalchemy":
        raise
    raise MissingExtraError("pipeline_mediator.databases", "SQLAlchemy", "sqlalchemy") from error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sqlalchemy import Connection, Inspector, Table
    from sqlalchemy.engine.interfaces import Dialect, ReflectedColumn
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine

__all__ = ["Timestamp", "differences", "missing_from", "seconds_ago"]

Timestamp = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
"""A point in time. What has no time zone there, MariaDB's and SQLite's, is UTC."""

_MISSING_ON_POSTGRESQL = frozenset({"42P01", "42703", "3F000"})
"""SQLSTATE of an undefined table, column, schema."""
_MISSING_ON_MYSQL = frozenset({1049, 1054, 1146})
"""Error numbers of an unknown database, column, table."""
_MISSING_ON_SQLITE = ("no such table", "no such column", "has no column named", "unknown database")


class seconds_ago(FunctionElement["datetime"]):  # noqa: N801 - a function to whoever uses it
    """The database's clock, in UTC, that many seconds ago: `seconds_ago(0)` is now, `seconds_ago(-60)` in a minute.

    The time of this moment, not of the transaction's beginning.
    """

    type: TypeEngine[datetime] = Timestamp
    inherit_cache = True


@compiles(seconds_ago, "postgresql")
def _on_postgresql(element: seconds_ago, compiler: SQLCompiler, **options: Any) -> str:
    return f"(clock_timestamp() - make_interval(secs => {compiler.process(element.clauses, **options)}))"


@compiles(seconds_ago, "mysql", "mariadb")
def _on_mysql(element: seconds_ago, compiler: SQLCompiler, **options: Any) -> str:
    return f"(UTC_TIMESTAMP(6) - INTERVAL {compiler.process(element.clauses, **options)} SECOND)"


@compiles(seconds_ago, "sqlite")
def _on_sqlite(element: seconds_ago, compiler: SQLCompiler, **options: Any) -> str:
    # Six digits, as SQLAlchemy reads them.
    ago = f"(0.0 - {compiler.process(element.clauses, **options)}) || ' seconds'"
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {ago}) || '000')"


def missing_from(error: DBAPIError) -> str | None:
    """What the database says if it failed because a table or a column is not there; None if it is something else."""
    origin = error.orig
    state = getattr(origin, "sqlstate", None)
    number = origin.args[0] if origin is not None and origin.args else None
    said = str(origin)
    if state in _MISSING_ON_POSTGRESQL or number in _MISSING_ON_MYSQL or any(it in said for it in _MISSING_ON_SQLITE):
        return said.partition("\n")[0]
    return None


def differences(connection: Connection, table: Table) -> list[str]:
    """In what the table in the database is not what it should be, as text; empty if it will do.

    What it has more than needed does not matter, unless it is a column that has to be given.
    """
    inspector = inspect(connection)
    if not inspector.has_table(table.name, schema=table.schema):
        return ["it does not exist"]
    return [
        *_of_columns(connection.dialect, table, inspector.get_columns(table.name, schema=table.schema)),
        *_of_keys(table, inspector),
    ]


def _of_columns(dialect: Dialect, table: Table, reflected: list[ReflectedColumn]) -> Iterator[str]:
    there = {column["name"]: column for column in reflected}
    for wanted in table.columns:
        found = there.get(wanted.name)
        if found is None:
            yield f"column {wanted.name} is missing"
            continue
        if not _fits(wanted.type.dialect_impl(dialect), found["type"], dialect):
            yield f"column {wanted.name} is {found['type']} and should be {wanted.type.compile(dialect)}"
        if not wanted.primary_key and bool(wanted.nullable) != bool(found["nullable"]):
            yield f"column {wanted.name} is {'NULL' if found['nullable'] else 'NOT NULL'} and should not be"
    for name, found in there.items():
        if name not in table.columns and not found["nullable"] and found["default"] is None:
            yield f"column {name} is unknown here and has to be given: it is NOT NULL without a default"


def _of_keys(table: Table, inspector: Inspector) -> Iterator[str]:
    key = [column.name for column in table.primary_key]
    found = inspector.get_pk_constraint(table.name, schema=table.schema)["constrained_columns"]
    if found != key:
        yield f"the primary key is ({', '.join(found)}) and should be ({', '.join(key)})"
    indexed = [index["column_names"] for index in inspector.get_indexes(table.name, schema=table.schema)]
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        names = [column.name for column in index.columns]
        if names not in indexed:
            yield f"an index on ({', '.join(names)}) is missing, {index.name}"


def _fits(wanted: TypeEngine[Any], found: TypeEngine[Any], dialect: Dialect) -> bool:
    if _family(wanted) is not _family(found):
        return False
    if isinstance(wanted, DateTime) and isinstance(found, DateTime):
        return dialect.name != "postgresql" or bool(wanted.timezone) == bool(found.timezone)
    if isinstance(wanted, Integer) and isinstance(found, Integer):
        return dialect.name == "sqlite" or _size(wanted) <= _size(found)
    needed, room = getattr(wanted, "length", None), getattr(found, "length", None)
    return room is None or (needed is not None and needed <= room)


def _family(kind: TypeEngine[Any]) -> type | None:
    try:
        return kind.python_type
    except NotImplementedError:  # of a type that SQLAlchemy does not know
        return None


def _size(integer: Integer) -> int:
    return 2 if isinstance(integer, SmallInteger) else 8 if isinstance(integer, BigInteger) else 4
