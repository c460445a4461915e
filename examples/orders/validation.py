"""What can be said of an order without looking into the database."""

import re

from .messages import PlaceOrder

__all__ = ["lines_are_sensible", "reference_is_plain"]

REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,39}")
MAX_LINES = 20
MAX_QUANTITY = 1_000


def reference_is_plain(command: PlaceOrder) -> None:
    """It is shown to people and written into CSV files."""
    if not REFERENCE.fullmatch(command.reference):
        raise ValueError("a reference is 1 to 40 letters, digits and hyphens, and does not begin with a hyphen")


def lines_are_sensible(command: PlaceOrder) -> None:
    """A product that stands in two lines is a mistake of the client's more often than a wish."""
    if not 1 <= len(command.lines) <= MAX_LINES:
        raise ValueError(f"an order has 1 to {MAX_LINES} lines, this one has {len(command.lines)}")
    if len({line.sku for line in command.lines}) < len(command.lines):
        raise ValueError("a product stands in two lines")
    for line in command.lines:
        if not 1 <= line.quantity <= MAX_QUANTITY:
            raise ValueError(f"a quantity is 1 to {MAX_QUANTITY}, not {line.quantity}")
