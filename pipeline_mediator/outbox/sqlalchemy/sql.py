"""Forms of SQL that differ from database to database, or that keep a planner to the right index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, Boolean, any_, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Select
    from sqlalchemy.sql.compiler import SQLCompiler

__all__ = ["among", "by_index", "same"]


class same(FunctionElement[bool]):  # noqa: N801 - reads as the SQL function that it is
    """`same(column, value)`: equal, in a form that keeps PostgreSQL to the index that begins with this column.

    Of `WHERE column = value ORDER BY column, id LIMIT n` its planner knows that the column is constant, and may walk
    the primary key from the first row on instead. It does so where its statistics are old, which those of an outbox
    always are.
    """

    type = Boolean()
    inherit_cache = True


@compiles(same)
def _same(element: same, compiler: SQLCompiler, **options: Any) -> str:
    column, value = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} = {value}"


@compiles(same, "postgresql")
def _same_postgresql(element: same, compiler: SQLCompiler, **options: Any) -> str:
    column, value = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} BETWEEN {value} AND {value}"


def among(column: Column[Any], name: str, dialect: str) -> ColumnElement[bool]:
    """The column is one of the list given as parameter `name`: one array where there are arrays."""
    if dialect == "postgresql":
        return column == any_(bindparam(name, type_=ARRAY(column.type)))
    return column.in_(bindparam(name, expanding=True))


def by_index(query: Select[Any], table: Any, index: str) -> Select[Any]:
    """Keep MariaDB and MySQL to an index; their optimizer, too, prefers the primary key where there is a LIMIT."""
    for dialect in ("mysql", "mariadb"):
        query = query.with_hint(table, f"FORCE INDEX ({index})", dialect)
    return query
