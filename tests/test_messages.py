"""What a message type is called on the wire."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline_mediator.errors import BindError
from pipeline_mediator.messages import MessageName, key_of, message, message_name


@message("orders.placed", version=2, key="order_id")
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int


class GiftOrderPlaced(OrderPlaced):
    pass


def test_a_type_is_called_what_it_was_given() -> None:
    assert message_name(OrderPlaced) == MessageName("orders.placed", 2, "order_id")


def test_without_a_name_it_is_called_like_its_class() -> None:
    class Shipped:
        pass

    assert message_name(Shipped) == MessageName("Shipped", 1, None)


def test_a_subclass_does_not_inherit_the_name() -> None:
    assert message_name(GiftOrderPlaced) == MessageName("GiftOrderPlaced")


def test_the_key_is_the_value_of_the_named_field() -> None:
    assert key_of(OrderPlaced(order_id=7)) == "7"


def test_a_key_that_is_given_wins_over_the_field() -> None:
    assert key_of(OrderPlaced(order_id=7), "customer-1") == "customer-1"


def test_a_type_without_key_field_has_no_key() -> None:
    assert key_of(GiftOrderPlaced(order_id=7)) is None


@pytest.mark.parametrize("name", ["", "two words", "tab\there"])
def test_an_impossible_name_is_refused(name: str) -> None:
    with pytest.raises(BindError, match="wire name"):
        message(name)


def test_versions_start_at_one() -> None:
    with pytest.raises(BindError, match="version 0"):
        message("orders.placed", version=0)
