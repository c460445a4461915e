"""The payment gateway, as the handlers see it."""

from typing import Protocol

__all__ = ["Payments", "SandboxPayments"]


class Payments(Protocol):
    """Sets money aside on a customer's account; what nobody collects within days is given back by itself."""

    async def authorise(self, key: str, customer_id: int, cents: int) -> str:
        """The number of the authorisation. Asked again with the same key, the gateway gives its first answer.

        Raises `ConnectionError` when the gateway cannot be reached.
        """
        ...


class SandboxPayments(Payments):
    """Authorises everything."""

    async def authorise(self, key: str, customer_id: int, cents: int) -> str:
        """The number is made from the key."""
        return f"sandbox-{key}"
