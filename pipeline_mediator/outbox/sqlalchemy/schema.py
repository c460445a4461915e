"""What is wrong with the tables of an outbox as they are in the database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import inspect

from pipeline_mediator.databases import differences
from pipeline_mediator.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

    from pipeline_mediator.outbox.sqlalchemy.tables import OutboxTables

__all__ = ["schema_error", "validate"]

_OLDEST = {"MariaDB": (10, 6), "MySQL": (8, 0, 1)}
"""The first that have SKIP LOCKED."""


def schema_error(tables: OutboxTables, problems: Sequence[str]) -> SchemaError:
    """These are the problems; what to do is the same for all of them."""
    fix = (
        "Let MetaData.create_all or a migration create what outbox_tables defines; where the table is older, a "
        "migration changes it (alembic revision --autogenerate)."
    )
    return SchemaError(tables.rows.fullname, problems, fix)


async def validate(engine: AsyncEngine, tables: OutboxTables) -> None:
    """Raise `SchemaError` with every difference."""
    async with engine.connect() as connection:
        problems = await connection.run_sync(_problems, tables)
    if problems:
        raise schema_error(tables, problems)


def _problems(connection: Connection, tables: OutboxTables) -> list[str]:
    return [
        *_of_server(connection),
        *differences(connection, tables.rows),
        *(f"table {tables.lanes.fullname}: {problem}" for problem in differences(connection, tables.lanes)),
        *_of_storage(connection, tables),
    ]


def _of_server(connection: Connection) -> Iterator[str]:
    dialect = connection.dialect
    if dialect.name not in {"mysql", "mariadb"}:
        return
    name = "MariaDB" if getattr(dialect, "is_mariadb", False) else "MySQL"
    version = getattr(dialect, "_mariadb_normalized_version_info", None) or dialect.server_version_info or ()
    if version < _OLDEST[name]:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, _OLDEST[name]))
        yield f"the server is {name} {found} and should be {needed} or newer, for SKIP LOCKED"


def _of_storage(connection: Connection, tables: OutboxTables) -> Iterator[str]:
    if connection.dialect.name not in {"mysql", "mariadb"}:
        return
    inspector = inspect(connection)
    for table in (tables.rows, tables.lanes):
        if not inspector.has_table(table.name, schema=table.schema):
            continue
        options = inspector.get_table_options(table.name, schema=table.schema)
        engine = next((str(value) for name, value in options.items() if name.endswith("_engine")), "InnoDB")
        if engine.lower() != "innodb":
            yield f"table {table.fullname} is kept by {engine} and should be by InnoDB: it needs transactions"
