"""The database's clock in SQL: hosts' clocks may differ by minutes, the database has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Float, literal, literal_column, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from pipeline_mediator.databases import seconds_ago

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ScalarSelect
    from sqlalchemy.sql.compiler import SQLCompiler
    from sqlalchemy.types import TypeEngine

__all__ = ["NOW", "moment", "seconds_since"]

NOW: Final = seconds_ago(literal_column("0"))
"""This moment; not the beginning of the transaction, which may have been long ago."""


def moment(seconds: float = 0.0) -> ScalarSelect[datetime]:
    """The time that many seconds ago, read once per statement: what an index is to be searched by must not change."""
    return select(seconds_ago(literal(seconds, Float()))).scalar_subquery()


class seconds_since(FunctionElement[float]):  # noqa: N801 - reads as the SQL function that it is
    """`seconds_since(column)`: how long ago that was; negative in the future."""

    type: TypeEngine[float] = Float()
    inherit_cache = True


@compiles(seconds_since, "postgresql")
def _on_postgresql(element: seconds_since, compiler: SQLCompiler, **options: Any) -> str:
    # Not extract(epoch from ...), which counts in decimals: a fifth of what reading a row costs.
    return f"date_part('epoch', clock_timestamp() - {compiler.process(element.clauses, **options)})"


@compiles(seconds_since, "mysql", "mariadb")
def _on_mysql(element: seconds_since, compiler: SQLCompiler, **options: Any) -> str:
    return f"TIMESTAMPDIFF(MICROSECOND, {compiler.process(element.clauses, **options)}, UTC_TIMESTAMP(6)) / 1e6"


@compiles(seconds_since, "sqlite")
def _on_sqlite(element: seconds_since, compiler: SQLCompiler, **options: Any) -> str:
    # Its clock has milliseconds; the rest is what is lost by counting in days.
    return f"round((julianday('now') - julianday({compiler.process(element.clauses, **options)})) * 86400.0, 3)"
