"""The engine, and tables with something to sell in them."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from pipeline_mediator.unit_of_work.sqlalchemy import prepare_sqlite

from .tables import Base, Customer, Product

__all__ = ["create_engine", "create_tables"]


def create_engine(url: str) -> AsyncEngine:
    """An engine for this URL; SQLite needs to be told not to lose updates."""
    engine = create_async_engine(url)
    return prepare_sqlite(engine) if engine.dialect.name == "sqlite" else engine


async def create_tables(engine: AsyncEngine) -> None:
    """Create what is not there yet; empty tables are given products and customers. A real service has migrations."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session, session.begin():
        if await session.scalar(select(Product).limit(1)) is None:
            session.add_all(_products())
            session.add_all(_customers())


def _products() -> list[Product]:
    return [
        Product(sku="book", price_cents=1_990, available=400, reorder_level=80),
        Product(sku="chair", price_cents=12_900, available=60, reorder_level=15),
        Product(sku="desk", price_cents=34_900, available=25, reorder_level=5),
        Product(sku="lamp", price_cents=4_950, available=150, reorder_level=30),
        Product(sku="paper", price_cents=495, available=2_000, reorder_level=500),
        Product(sku="pen", price_cents=120, available=5_000, reorder_level=1_000),
    ]


def _customers() -> list[Customer]:
    return [
        Customer(name="Ada", credit_limit_cents=2_500_000),
        Customer(name="Grace", credit_limit_cents=1_000_000),
        Customer(name="Edsger", credit_limit_cents=400_000),
        Customer(name="Barbara", credit_limit_cents=150_000),
    ]
