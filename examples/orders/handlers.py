"""What happens on each message. All of it runs in the transaction that the pipeline began."""

from collections.abc import AsyncIterator

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from pipeline_mediator import Context, EventMap, RequestMap

from .errors import OrderNotFoundError, RepeatedReferenceError, UnknownCustomerError, UnknownProductError
from .messages import (
    CancelOrder,
    ExportedOrder,
    ExportOrders,
    GetOrder,
    Line,
    OrderCancelled,
    OrderPlaced,
    OrderView,
    PlaceOrder,
    Receipt,
    StockRanLow,
)
from .payments import Payments
from .tables import Customer, Order, OrderLine, Product, Reorder

__all__ = ["events", "requests"]


class PlaceOrderHandler:
    """Takes the products, adds to the debt, and has the money authorised."""

    def __init__(self, session: AsyncSession, payments: Payments) -> None:
        self._session = session
        self._payments = payments

    async def handle(self, command: PlaceOrder, context: Context) -> Receipt:
        """Rows are locked in one order everywhere (customer, then products by SKU), so that no two orders deadlock."""
        customer = await self._session.get(Customer, command.customer_id, with_for_update=True)
        if customer is None:
            raise UnknownCustomerError(f"there is no customer {command.customer_id}")
        await self._refuse_repeated(command)
        products = await lock_products(self._session, command.lines)

        ran_low = [line.sku for line in command.lines if products[line.sku].take(line.quantity)]
        lines = [
            OrderLine(sku=line.sku, quantity=line.quantity, price_cents=products[line.sku].price_cents)
            for line in command.lines
        ]
        total = sum(line.quantity * line.price_cents for line in lines)
        customer.owe(total)
        order = Order(customer_id=customer.id, reference=command.reference, total_cents=total, lines=lines)
        self._session.add(order)
        await self._session.flush()

        # Last, so that nothing is authorised for an order that is refused. Another attempt sends the same key.
        order.authorisation = await self._payments.authorise(f"{customer.id}/{order.reference}", customer.id, total)

        for sku in ran_low:
            context.emit(StockRanLow(sku, order.id))
        context.emit(OrderPlaced(order.id, customer.id, total, command.lines))
        return Receipt(order.id, total)

    async def _refuse_repeated(self, command: PlaceOrder) -> None:
        same = select(Order.id).where(Order.customer_id == command.customer_id, Order.reference == command.reference)
        if order_id := await self._session.scalar(same):
            raise RepeatedReferenceError(f"{command.reference} was sent before and is order {order_id}")


class CancelOrderHandler:
    """Gives back what PlaceOrder took."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def handle(self, command: CancelOrder, context: Context) -> None:
        """The order is locked first: of two cancellations at once, one is refused."""
        order = await self._session.get(Order, command.order_id, with_for_update=True)
        if order is None:
            raise OrderNotFoundError(f"there is no order {command.order_id}")
        order.cancel()
        customer = await self._session.get_one(Customer, order.customer_id, with_for_update=True)
        customer.owed_cents -= order.total_cents
        lines = await lines_of(self._session, order)
        products = await lock_products(self._session, lines)
        for line in lines:
            products[line.sku].available += line.quantity
        context.emit(OrderCancelled(order.id, order.total_cents))


async def get_order(query: GetOrder, session: AsyncSession) -> OrderView:
    """One order with its lines."""
    order = await session.get(Order, query.order_id)
    if order is None:
        raise OrderNotFoundError(f"there is no order {query.order_id}")
    lines = await lines_of(session, order)
    return OrderView(order.id, order.customer_id, order.reference, order.status, order.total_cents, lines)


class ExportOrdersHandler:
    """Reads row by row, so that the export may be larger than the memory."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def handle(self, query: ExportOrders) -> AsyncIterator[ExportedOrder]:
        """The client's speed decides how fast rows are read."""
        columns = select(Order.id, Order.customer_id, Order.reference, Order.status, Order.total_cents)
        async for row in await self._session.stream(columns.order_by(Order.id)):
            yield ExportedOrder(*row)


async def reorder(event: StockRanLow, session: AsyncSession) -> None:
    """Ask the supplier for more; if the order is rolled back, so is this."""
    session.add(Reorder(sku=event.sku, order_id=event.order_id))


async def lock_products(session: AsyncSession, lines: tuple[Line, ...]) -> dict[str, Product]:
    """The products of these lines by SKU, locked until the commit."""
    wanted = {line.sku for line in lines}
    found = await session.scalars(
        select(Product).where(Product.sku.in_(wanted)).order_by(Product.sku).with_for_update()
    )
    products = {product.sku: product for product in found}
    if unknown := sorted(wanted - products.keys()):
        raise UnknownProductError(f"there is no product {', '.join(unknown)}")
    return products


async def lines_of(session: AsyncSession, order: Order) -> tuple[Line, ...]:
    """What was ordered."""
    rows = await session.scalars(select(OrderLine).where(OrderLine.order_id == order.id).order_by(OrderLine.sku))
    return tuple(Line(row.sku, row.quantity) for row in rows)


requests = (
    RequestMap()
    .bind(PlaceOrder, PlaceOrderHandler)
    .bind(CancelOrder, CancelOrderHandler)
    .bind(GetOrder, get_order)
    .bind(ExportOrders, ExportOrdersHandler)
)
events = EventMap().bind(StockRanLow, reorder)
