"""Forms of SQL that differ from database to database, or that keep a planner to the right index.

Rows are reached by their keys alone: a planner that reads the whole of a small table instead, which MariaDB's likes to,
waits for the locks of other relays, and two of them end in a deadlock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import ARRAY, Boolean, Text, any_, bindparam, delete, select, text, update
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Column, ColumnElement, Delete, Dialect, Executable, Select, Table, Update
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine

__all__ = ["MYSQL", "among", "by_index", "delete_among", "lock_among", "same", "update_among"]

MYSQL = frozenset({"mysql", "mariadb"})


class same(FunctionElement[bool]):  # noqa: N801 - reads as the SQL function that it is
    """`same(column, value)`: equal, in a form that keeps PostgreSQL to the index that begins with this column.

    Of `WHERE column = value ORDER BY column, id LIMIT n` its planner knows that the column is constant, and may walk
    the primary key from the first row on instead. It does so where its statistics are old, which those of an outbox
    always are.
    """

    type: TypeEngine[bool] = Boolean()
    inherit_cache = True

    def self_group(self, against: Any = None) -> same:
        """As it is: for databases without booleans SQLAlchemy would write `column = value = 1`, and no index serves."""
        return self


@compiles(same)
def _same(element: same, compiler: SQLCompiler, **options: Any) -> str:
    column, value = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} = {value}"


@compiles(same, "postgresql")
def _same_on_postgresql(element: same, compiler: SQLCompiler, **options: Any) -> str:
    column, value = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} BETWEEN {value} AND {value}"


def by_index(query: Select[Any], table: Any, index: str) -> Select[Any]:
    """Keep MariaDB and MySQL to an index; their planner, too, prefers the primary key where there is a LIMIT."""
    for dialect in MYSQL:
        query = query.with_hint(table, f"FORCE INDEX ({index})", dialect)
    return query


def among(column: Column[Any], name: str, dialect: str) -> ColumnElement[bool]:
    """The column is one of the list given as parameter `name`: one array where there are arrays."""
    if dialect == "postgresql":
        return column == any_(bindparam(name, type_=ARRAY(column.type)))
    return column.in_(bindparam(name, expanding=True))


def update_among(key: Column[Any], name: str, dialect: str) -> Update:
    """Update the rows whose keys are in the list given as parameter `name`."""
    statement = update(key.table).where(among(key, name, dialect))
    for each in MYSQL:
        statement = statement.with_hint("FORCE INDEX (PRIMARY)", dialect_name=each)
    return statement


def delete_among(key: Column[Any], name: str, dialect: str) -> Delete | Executable:
    """Delete the rows whose keys are in the list given as parameter `name`."""
    if dialect in MYSQL:
        return _for_each(f"DELETE {_TARGET} FROM", key, name)
    return delete(key.table).where(among(key, name, dialect))


def lock_among(
    key: Column[Any], name: str, dialect: str, *, also: Sequence[Any] = (), skip_locked: bool = True
) -> Executable:
    """Lock the rows whose keys are in the list given as parameter `name`, and read keys and what else is wanted.

    What others have locked is left out, or waited for.
    """
    if dialect in MYSQL:
        columns = ", ".join(f"{_TARGET}.{_quoted(column.name)}" for column in (key, *also))
        ending = "FOR UPDATE SKIP LOCKED" if skip_locked else "FOR UPDATE"
        return _for_each(f"SELECT {columns} FROM", key, name, ending)
    return select(key, *also).where(among(key, name, dialect)).order_by(key).with_for_update(skip_locked=skip_locked)


_TARGET = "target"


def _for_each(beginning: str, key: Column[Any], name: str, ending: str = "") -> Executable:
    """One look-up by the primary key for each in the list: a DELETE takes no hint, and a locking SELECT ignores it."""
    table: Table = key.table
    wanted = f"JSON_TABLE(:{name}, '$[*]' COLUMNS (number BIGINT PATH '$')) AS wanted"
    target = f"{_PREPARER.format_table(table)} AS {_TARGET} FORCE INDEX (PRIMARY)"
    condition = f"{_TARGET}.{_quoted(key.name)} = wanted.number"
    statement = f"{beginning} {wanted} STRAIGHT_JOIN {target} ON {condition} {ending}"
    return text(statement).bindparams(bindparam(name, type_=_Numbers()))


_PREPARER = mysql.dialect().identifier_preparer


def _quoted(name: str) -> str:
    return _PREPARER.quote(name)


class _Numbers(TypeDecorator["Sequence[int]"]):
    """A list of numbers, as JSON."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Sequence[int] | None, dialect: Dialect) -> str:
        return msgspec.json.encode(value).decode()
