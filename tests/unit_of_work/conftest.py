"""The database of the tests of TransactionMiddleware."""

from tests.middlewares.conftest import database, database_url

__all__ = ["database", "database_url"]
