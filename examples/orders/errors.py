"""Why an order is refused. Trying again cannot help, so these are permanent: retry passes them on."""

from pipeline_mediator import PermanentError

__all__ = [
    "AlreadyCancelledError",
    "CreditExceededError",
    "OrderNotFoundError",
    "OrderRefusedError",
    "OutOfStockError",
    "RepeatedReferenceError",
    "UnknownCustomerError",
    "UnknownProductError",
]


class OrderNotFoundError(PermanentError):
    """There is no order of this number."""


class OrderRefusedError(PermanentError):
    """As things stand, this cannot be done."""


class UnknownCustomerError(OrderRefusedError):
    """There is no customer of this number."""


class UnknownProductError(OrderRefusedError):
    """There is no product of this SKU."""


class RepeatedReferenceError(OrderRefusedError):
    """The customer has sent this order before."""


class OutOfStockError(OrderRefusedError):
    """More is wanted than there is."""


class CreditExceededError(OrderRefusedError):
    """The customer would owe more than the limit."""


class AlreadyCancelledError(OrderRefusedError):
    """The order is cancelled."""
