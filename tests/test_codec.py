"""Messages survive the way to bytes and back, and what does not is refused by an error that says where and why."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
from cloudevents.core.bindings import amqp, http, kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from pipeline_mediator import cloudevents
from pipeline_mediator.codec import Codec, Facts
from pipeline_mediator.errors import (
    CodecError,
    ConfigurationError,
    DecodeError,
    EncodeError,
    MessageTooLargeError,
    MissingUpcasterError,
    UnknownMessageError,
)
from pipeline_mediator.messages import message

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
FACTS = Facts(message_id="42")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal


@message("orders.placed", version=2, key="order_id")
@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPlaced:
    order_id: UUID
    placed_at: datetime
    took: timedelta
    colour: Colour
    lines: list[Line]
    notes: dict[str, int | None]
    signature: bytes
    tags: frozenset[str] = frozenset()
    weight: float | None = None


@dataclass
class Plain:
    number: int


@dataclass(frozen=True)
class Frozen:
    number: int


@dataclass(slots=True)
class Slotted:
    number: int


@dataclass(kw_only=True)
class KeywordOnly:
    number: int


@attrs.define
class Attrs:
    number: int


class Struct(msgspec.Struct):
    number: int


class Model(pydantic.BaseModel, extra="forbid"):
    number: int
    nickname: str = pydantic.Field("", alias="nickName")

    @pydantic.computed_field
    def double(self) -> int:
        return 2 * self.number


@dataclass
class HoldsModel:
    model: Model


@dataclass
class Anything:
    value: Any = None
    others: list[Any] = field(default_factory=list[Any])
    by_name: dict[Any, Any] = field(default_factory=dict[Any, Any])


@attrs.define
class AttrsAnything:
    value: Any


class StructAnything(msgspec.Struct):
    value: Any


class Handle:
    """What nobody can write down."""


@dataclass
class HoldsHandle:
    handles: list[Handle]


@dataclass
class HoldsEither:
    either: Frozen | Line


@dataclass
class HoldsObject:
    value: object


class SaysNo(pydantic.BaseModel):
    number: int

    @pydantic.model_serializer
    def write(self, details: pydantic.SerializationInfo) -> int:
        if details.include is None:
            raise KeyError("secret")
        return 0

    @pydantic.field_validator("number")
    @classmethod
    def read(cls, number: int) -> int:
        raise KeyError("secret")


Homeless: Any = dataclass(type("Homeless", (), {"__annotations__": {"value": "NowhereDefined"}}))


@attrs.define
class Private:
    name: str
    _secret: str = ""


class NoFields:
    pass


def nested(levels: int, value: object) -> object:
    for _ in range(levels):
        value = [value]
    return value


codec = Codec(OrderPlaced, Anything, source="shop")


def in_years_everyone_counts(time: datetime) -> bool:
    return 1 < time.year < 9999


text = st.text(st.characters(exclude_categories=["Cs"]))
attribute = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn"]), min_size=1)
facts = st.builds(
    Facts,
    message_id=attribute,
    correlation_id=st.none() | attribute,
    causation_id=st.none() | attribute,
    key=st.none() | attribute,
    headers=st.dictionaries(text | st.sampled_from(["traceparent", "tracestate", "baggage"]), text, max_size=5),
    sequence=st.none() | attribute,
    time=st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5))])).filter(in_years_everyone_counts),
)
orders = st.builds(
    OrderPlaced,
    order_id=st.uuids(),
    placed_at=st.datetimes(timezones=st.just(UTC)),
    took=st.timedeltas(timedelta(days=-9999), timedelta(days=9999)),
    colour=st.sampled_from(Colour),
    lines=st.lists(st.builds(Line, sku=text, price=st.decimals(allow_nan=False, allow_infinity=False)), max_size=3),
    notes=st.dictionaries(text, st.none() | st.integers(), max_size=3),
    signature=st.binary(),
    tags=st.frozensets(text, max_size=3),
    weight=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)


@given(order=orders, facts=facts, binary=st.booleans())
def test_a_message_comes_back_as_it_was_and_so_does_what_travels_with_it(
    *, order: OrderPlaced, facts: Facts, binary: bool
) -> None:
    encoded = codec.encode(order, facts, binary=binary)
    decoded = codec.decode(encoded.body, encoded.content_type, encoded.headers)
    assert decoded.message == order
    assert decoded.facts == facts
    assert decoded.source == "shop"
    assert (encoded.name, encoded.version) == ("orders.placed", 2)


# The same fields in four kinds of class, each with a part of its own kind.


@dataclass(frozen=True, kw_only=True)
class DataclassSale:
    id: UUID
    at: datetime
    total: Decimal
    colour: Colour
    parts: list[Line]
    notes: dict[str, int | None]
    weight: float | None
    tags: frozenset[str]


@attrs.frozen(kw_only=True)
class AttrsLine:
    sku: str
    price: Decimal


@attrs.frozen(kw_only=True)
class AttrsSale:
    id: UUID
    at: datetime
    total: Decimal
    colour: Colour
    parts: list[AttrsLine]
    notes: dict[str, int | None]
    weight: float | None
    tags: frozenset[str]


class StructLine(msgspec.Struct, frozen=True):
    sku: str
    price: Decimal


class StructSale(msgspec.Struct, frozen=True, kw_only=True):
    id: UUID
    at: datetime
    total: Decimal
    colour: Colour
    parts: list[StructLine]
    notes: dict[str, int | None]
    weight: float | None
    tags: frozenset[str]


class ModelLine(pydantic.BaseModel, frozen=True):
    sku: str
    price: Decimal


class ModelSale(pydantic.BaseModel, frozen=True):
    id: UUID
    at: datetime
    total: Decimal
    colour: Colour
    parts: list[ModelLine]
    notes: dict[str, int | None]
    weight: float | None
    tags: frozenset[str]


def sales_of(kind: Callable[..., object], part: Callable[..., object]) -> st.SearchStrategy[object]:
    price = st.decimals(allow_nan=False, allow_infinity=False)
    return st.builds(
        kind,
        id=st.uuids(),
        at=st.datetimes(timezones=st.just(UTC)),
        total=price,
        colour=st.sampled_from(Colour),
        parts=st.lists(st.builds(part, sku=text, price=price), max_size=3),
        notes=st.dictionaries(text, st.none() | st.integers(), max_size=3),
        weight=st.none() | st.floats(allow_nan=False, allow_infinity=False),
        tags=st.frozensets(text, max_size=3),
    )


sale_codec = Codec(DataclassSale, AttrsSale, StructSale, ModelSale)


@given(
    sale=sales_of(DataclassSale, Line)
    | sales_of(AttrsSale, AttrsLine)
    | sales_of(StructSale, StructLine)
    | sales_of(ModelSale, ModelLine)
)
def test_the_fields_of_every_kind_of_class_come_back_as_they_were(sale: object) -> None:
    encoded = sale_codec.encode(sale, FACTS)
    assert sale_codec.decode(encoded.body, encoded.content_type).message == sale


@pytest.mark.parametrize("kind", [Plain, Frozen, Slotted, KeywordOnly, Attrs, Struct, Model])
def test_every_kind_of_class_travels(kind: Any) -> None:
    codec = Codec(kind)
    decoded = codec.decode(codec.encode(kind(number=3), FACTS).body)
    assert type(decoded.message) is kind
    assert decoded.message.number == 3


def test_a_pydantic_model_travels_by_its_aliases_and_without_computed_fields() -> None:
    codec = Codec(Model)
    body = codec.encode(Model(number=3, nickName="x"), FACTS).body
    assert json.loads(body)["data"] == {"number": 3, "nickName": "x"}
    assert codec.decode(body).message == Model(number=3, nickName="x")


def test_a_pydantic_model_travels_inside_a_dataclass() -> None:
    codec = Codec(HoldsModel)
    message = HoldsModel(Model(number=3, nickName="x"))
    assert codec.decode(codec.encode(message, FACTS).body).message == message


def test_what_may_be_anything_comes_back_as_plain_json() -> None:
    codec = Codec(HoldsObject)
    assert codec.decode(codec.encode(HoldsObject({"a": [1]}), FACTS).body).message == HoldsObject({"a": [1]})


def test_the_structured_form_is_a_strict_cloud_event() -> None:
    headers = {"tenant": "a\n", "traceparent": "00-ab-cd-01"}
    facts = Facts("42", "conversation", "cause", "customer-1", headers, NOON, sequence="0017")
    encoded = codec.encode(Anything(1), facts)
    event = json.loads(encoded.body)
    assert encoded.content_type == "application/cloudevents+json"
    assert event == {
        "specversion": "1.0",
        "id": "42",
        "source": "shop",
        "type": "Anything",
        "dataversion": 1,
        "time": "2026-05-01T12:00:00Z",
        "correlationid": "conversation",
        "causationid": "cause",
        "partitionkey": "customer-1",
        "sequence": "0017",
        "traceparent": "00-ab-cd-01",
        "headers": '{"tenant":"a\\n"}',
        "datacontenttype": "application/json",
        "data": {"value": 1, "others": [], "by_name": {}},
    }
    assert all(re.fullmatch("[a-z0-9]{1,20}", name) for name in event)


def test_the_binary_form_has_the_payload_in_the_body_and_the_rest_beside_it() -> None:
    encoded = codec.encode(Anything(1), Facts("42", key="7", time=NOON), binary=True)
    assert encoded.content_type == "application/json"
    assert json.loads(encoded.body) == {"value": 1, "others": [], "by_name": {}}
    assert encoded.headers["type"] == "Anything"
    assert encoded.headers["partitionkey"] == "7"
    assert encoded.headers["time"] == "2026-05-01T12:00:00+00:00"


@pytest.mark.parametrize("prefix", ["", "cloudEvents:", "cloudEvents_", "ce-", "ce_"])
def test_the_binary_form_is_read_under_every_bindings_prefix(prefix: str) -> None:
    encoded = codec.encode(Anything(1), FACTS, binary=True)
    headers = {prefix + name: value for name, value in encoded.headers.items()}
    assert codec.decode(encoded.body, encoded.content_type, headers).message == Anything(1)


def test_a_cloud_event_of_another_system_is_read() -> None:
    body = {"specversion": "1.0", "id": "1", "source": "/erp", "type": "Anything", "subject": "x", "data": {"value": 5}}
    decoded = codec.decode(json.dumps(body).encode(), "Application/CloudEvents+JSON; charset=utf-8")
    assert decoded.message == Anything(5)
    assert decoded.source == "/erp"
    assert decoded.facts == Facts("1")


def test_a_payload_in_base64_is_read() -> None:
    body = {"specversion": "1.0", "id": "1", "source": "x", "type": "Anything", "data_base64": "eyJ2YWx1ZSI6NX0="}
    assert codec.decode(json.dumps(body).encode()).message == Anything(5)


def test_the_time_is_the_clocks_unless_it_is_given() -> None:
    codec = Codec(Plain, clock=lambda: NOON)
    assert codec.decode(codec.encode(Plain(1), FACTS).body).facts.time == NOON


# Another implementation of CloudEvents, as reader and as writer


def read_by_the_sdk(body: bytes, content_type: str, headers: Mapping[str, str]) -> CloudEvent:
    properties = {f"cloudEvents:{name}": value for name, value in headers.items()}
    message = amqp.AMQPMessage({"content-type": content_type}, properties, body)
    event = amqp.from_amqp_event(message)
    assert isinstance(event, CloudEvent)  # 1.0; it has checked every attribute
    return event


@given(order=orders, facts=facts, binary=st.booleans())
def test_what_is_written_is_read_by_the_cloudevents_package(*, order: OrderPlaced, facts: Facts, binary: bool) -> None:
    encoded = codec.encode(order, facts, binary=binary)
    event = read_by_the_sdk(encoded.body, encoded.content_type, encoded.headers)
    assert (event.get_type(), event.get_source(), event.get_id()) == ("orders.placed", "shop", facts.message_id)
    assert int(event.get_extension("dataversion")) == 2
    assert facts.time is None or event.get_time() == facts.time
    assert event.get_extension("correlationid") == facts.correlation_id
    assert event.get_extension("causationid") == facts.causation_id
    assert event.get_extension("partitionkey") == facts.key
    assert event.get_extension("sequence") == facts.sequence
    data = event.get_data()
    assert isinstance(data, dict)
    assert data["order_id"] == str(order.order_id)
    assert [line["price"] for line in data["lines"]] == [str(line.price) for line in order.lines]


def written_by_the_sdk() -> CloudEvent:
    return CloudEvent(
        {
            "type": "Anything",
            "source": "/erp",
            "id": "1",
            "time": NOON,
            "datacontenttype": "application/json",
            "subject": "an attribute that nobody here asks for",
            "correlationid": "conversation",
            "causationid": "cause",
            "partitionkey": "customer-1",
            "sequence": "0017",
            "traceparent": "00-ab-cd-01",
            "dataversion": 1,
        },
        {"value": 5},
    )


def assert_is_what_the_sdk_wrote(body: bytes, content_type: str, headers: Mapping[str, str]) -> None:
    decoded = codec.decode(body, content_type, headers)
    assert decoded.message == Anything(5)
    assert decoded.source == "/erp"
    trace = {"traceparent": "00-ab-cd-01"}
    assert decoded.facts == Facts("1", "conversation", "cause", "customer-1", trace, NOON, "0017")


@pytest.mark.parametrize("write", [amqp.to_structured_event, amqp.to_binary_event])
def test_what_the_cloudevents_package_writes_for_amqp_is_read(write: Callable[[CloudEvent], amqp.AMQPMessage]) -> None:
    written = write(written_by_the_sdk())
    # As text, which is how the seam to a broker has them; the time was a number of milliseconds.
    headers = {name: str(value) for name, value in written.application_properties.items()}
    assert_is_what_the_sdk_wrote(written.application_data, written.properties["content-type"], headers)


def test_what_the_cloudevents_package_writes_for_kafka_is_read() -> None:
    written = kafka.to_binary_event(written_by_the_sdk())
    headers = {name: value.decode() for name, value in written.headers.items()}
    assert_is_what_the_sdk_wrote(written.value, headers["content-type"], headers)


def test_what_the_cloudevents_package_writes_for_http_is_read() -> None:
    # Without what HTTP's binding escapes, such as the blanks of the subject: undoing that is a transport's business.
    written = http.to_binary_event(written_by_the_sdk())
    assert_is_what_the_sdk_wrote(written.body, written.headers["content-type"], written.headers)


@given(
    value=st.dictionaries(text, st.none() | st.integers() | text), identity=attribute, time=st.none() | st.just(NOON)
)
def test_whatever_event_the_cloudevents_package_writes_is_read(
    value: dict[str, Any], identity: str, time: datetime | None
) -> None:
    attributes = {"type": "Anything", "source": "/erp", "id": identity} | ({} if time is None else {"time": time})
    decoded = codec.decode(JSONFormat().write(CloudEvent(attributes, {"value": value})), "application/cloudevents+json")
    assert decoded.message == Anything(value)
    assert decoded.facts.message_id == identity
    assert time is None or decoded.facts.time == time


# What cannot be written


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Anything(Handle()), "value"),
        (Anything(others=[1, Anything(Handle())]), "others[1].value"),
        (Anything(AttrsAnything(StructAnything(Handle()))), "value.value.value"),
        (Anything(by_name={"secret": Handle()}), "by_name[...]"),
        (Anything(by_name={("a", "b"): 1}), "by_name"),
        (Anything(others=["\ud800"]), "others[0]"),
        (Anything(others=[{"secret": [float("nan")]}]), "others[0][...][0]"),
        (Anything(nested(50, float("inf"))), "value" + "[0]" * 50),
        (Anything(nested(50, Handle())), "value" + "[0]" * 31),
        (Anything(Model.model_construct(number=Handle())), "value"),
    ],
)
def test_the_field_that_has_no_form_is_named(message: Anything, field: str) -> None:
    with pytest.raises(EncodeError, match=re.escape(f"field `{field}` of Anything")) as caught:
        codec.encode(message, FACTS)
    assert caught.value.field == field
    assert "secret" not in _all_text_of(caught.value)


def test_a_refused_message_is_not_kept_alive_by_the_error() -> None:
    message = Anything(Handle())
    alive = weakref.ref(message)
    gc.disable()
    try:
        with contextlib.suppress(EncodeError):
            codec.encode(message, FACTS)
        del message
        assert alive() is None
    finally:
        gc.enable()


def test_a_message_that_holds_itself_is_refused() -> None:
    message = Anything()
    message.others.append(message)
    with pytest.raises(EncodeError, match=r"`others` of Anything.*inside itself"):
        codec.encode(message, FACTS)


def test_the_field_that_pydantic_cannot_write_is_named() -> None:
    codec = Codec(Model)
    with pytest.raises(EncodeError, match="field `nickname` of Model"):
        codec.encode(Model.model_construct(number=1, nickname=Handle()), FACTS)


def test_what_a_models_own_methods_raise_is_neither_passed_on_nor_quoted() -> None:
    codec = Codec(SaysNo)
    event = {"specversion": "1.0", "id": "1", "source": "s", "type": "SaysNo", "data": {"number": 1}}
    with pytest.raises(EncodeError, match=r"^SaysNo cannot be encoded: pydantic refused it") as writing:
        codec.encode(SaysNo.model_construct(number=1), FACTS)
    with pytest.raises(DecodeError, match="refused with KeyError") as reading:
        codec.decode(json.dumps(event).encode())
    assert "secret" not in _all_text_of(writing.value) + _all_text_of(reading.value)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (HoldsHandle([]), "field `handles` of HoldsHandle.*Handle has no form"),
        (Private("x"), "field `_secret` of Private.*private"),
        (NoFields(), "NoFields.*dataclass"),
        (HoldsEither(Frozen(1)), "HoldsEither.*more than one dataclass"),
        (Homeless("x"), "Homeless.*could not be read back.*NowhereDefined"),
    ],
)
def test_a_type_that_would_not_come_back_whole_is_refused_when_it_is_first_sent(message: object, problem: str) -> None:
    with pytest.raises(EncodeError, match=problem):
        Codec(type(message)).encode(message, FACTS)


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (Facts(""), "attribute id"),
        (Facts("1", key=""), "attribute partitionkey"),
        (Facts("1", correlation_id="a\nb"), "attribute correlationid"),
        (Facts("1", time=NOON.replace(tzinfo=None)), "time zone"),
        (Facts("1", headers={f"{n}": "x" for n in range(65)}), "65 headers"),
        (Facts("1", headers={"a": "x" * 8192}), "8192 bytes"),
        (Facts("1", headers={"a": "\ud800"}), "header 'a'"),
    ],
)
def test_what_travels_along_must_have_a_form_too(facts: Facts, problem: str) -> None:
    with pytest.raises(EncodeError, match=problem):
        codec.encode(Anything(1), facts)


def test_a_type_that_is_not_in_the_catalog_is_not_written() -> None:
    with pytest.raises(UnknownMessageError, match="'Plain' in version 1"):
        codec.encode(Plain(1), FACTS)


@pytest.mark.parametrize("binary", [False, True])
def test_a_message_that_is_too_large_is_not_written(*, binary: bool) -> None:
    codec = Codec(Anything, max_size=1000)
    codec.encode(Anything("x" * 500), FACTS, binary=binary)
    with pytest.raises(MessageTooLargeError, match=r"Anything is 1[0-9]{3} bytes encoded, the limit is 1000"):
        codec.encode(Anything("x" * 1000), FACTS, binary=binary)


# What cannot be read


def test_size_is_looked_at_before_anything_else() -> None:
    with pytest.raises(MessageTooLargeError):
        Codec(max_size=10).decode(b"not JSON" * 2)
    with pytest.raises(MessageTooLargeError):
        Codec(max_size=10).decode(b"{}", "application/json", {"specversion": "1.0"})


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"specversion": "0.3"}, "$.specversion"),
        ({"specversion": None}, "$.specversion"),
        ({"id": ""}, "$.id"),
        ({"id": 5}, "$.id"),
        ({"source": "secret\ud800"}, "$"),
        ({"time": "secret"}, "$.time"),
        ({"time": "2026-05-01T12:00:00"}, "$.time"),
        ({"dataversion": "secret"}, "$.dataversion"),
        ({"dataversion": 0}, "$.dataversion"),
        ({"dataversion": 2**31}, "$.dataversion"),
        ({"datacontenttype": "text/secret"}, "$.datacontenttype"),
        ({"headers": "secret"}, "$.headers"),
        ({"headers": '{"secret": 5}'}, "$.headers[...]"),
        ({"data": {"order_id": "secret"}}, "$.order_id"),
        ({"data": {}}, "$"),
        ({"data": None}, "$"),
    ],
)
def test_the_place_that_is_wrong_is_named_and_its_content_is_not(change: dict[str, Any], where: str) -> None:
    event: dict[str, Any] = {"specversion": "1.0", "id": "1", "source": "s", "type": "orders.placed", "dataversion": 2}
    with pytest.raises(DecodeError) as caught:
        Codec(OrderPlaced, Plain).decode(json.dumps(event | change).encode())
    assert caught.value.where == where
    assert "secret" not in _all_text_of(caught.value)


@pytest.mark.parametrize(
    ("payload", "where", "problem"),
    [
        ({"number": "secret"}, "$.number", "int_parsing"),
        ({"number": 1, "secret": 1}, "$", "extra_forbidden"),
        ("secret", "$", "model_type"),
    ],
)
def test_what_pydantic_refuses_is_named_and_not_quoted(payload: object, where: str, problem: str) -> None:
    event = {"specversion": "1.0", "id": "1", "source": "s", "type": "Model", "data": payload}
    with pytest.raises(DecodeError, match=re.escape(f"Model cannot be decoded: {problem} (at {where})")) as caught:
        Codec(Model).decode(json.dumps(event).encode())
    assert "secret" not in _all_text_of(caught.value)


@pytest.mark.parametrize(
    ("body", "content_type", "problem"),
    [
        (b"", None, "truncated"),
        (b"{}", "application/json", "no CloudEvent"),
        (b"[]", "application/cloudevents-batch+json", "only application/cloudevents"),
        (b"\x00", "application/cloudevents+avro", "only application/cloudevents"),
        (b'{"data": ' + b"[" * 200_000, None, "too deep"),
    ],
)
def test_what_is_no_cloud_event_is_refused(body: bytes, content_type: str | None, problem: str) -> None:
    with pytest.raises(DecodeError, match=problem):
        codec.decode(body, content_type)


def test_an_unknown_name_is_answered_with_the_nearest_known() -> None:
    with pytest.raises(
        UnknownMessageError, match=r"'orders.place' in version 1.*'orders.placed' in version 2"
    ) as caught:
        codec.decode(b'{"specversion": "1.0", "id": "1", "source": "s", "type": "orders.place", "data": {}}')
    assert (caught.value.name, caught.value.version) == ("orders.place", 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dataversion", "secret"), ("dataversion", "9" * 5000), ("time", "9" * 20), ("time", "9" * 5000)],
)
def test_the_attribute_of_the_binary_form_that_is_wrong_is_named(name: str, value: str) -> None:
    headers = {"specversion": "1.0", "id": "1", "source": "s", "type": "Anything", name: value}
    with pytest.raises(DecodeError) as caught:
        codec.decode(b"{}", "application/json", headers)
    assert caught.value.where == f"$.{name}"
    assert value not in _all_text_of(caught.value)


def test_nothing_is_imported_by_what_the_wire_says() -> None:
    with pytest.raises(UnknownMessageError):
        codec.decode(b'{"specversion": "1.0", "id": "1", "source": "s", "type": "this.Zen", "data": {}}')
    assert "this" not in sys.modules


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
attributes = st.sampled_from(cloudevents.CloudEvent.__struct_fields__)


@given(body=st.binary(), headers=st.dictionaries(attributes, st.text()), content_type=st.none() | st.text())
def test_no_bytes_raise_anything_but_our_errors(body: bytes, headers: dict[str, str], content_type: str | None) -> None:
    _decode_anyhow(codec, body, content_type, headers)


@given(change=st.dictionaries(attributes, json_values))
def test_no_json_raises_anything_but_our_errors(change: dict[str, Any]) -> None:
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": "1",
        "source": "s",
        "type": "orders.placed",
        "dataversion": 2,
        "data": {},
    }
    _decode_anyhow(codec, json.dumps(event | change).encode())
    headers = {name: str(value) for name, value in (event | change).items()}
    _decode_anyhow(codec, json.dumps(change.get("data")).encode(), "application/json", headers)


@given(order=orders, position=st.integers(0), byte=st.integers(0, 255))
def test_no_damaged_message_raises_anything_but_our_errors(order: OrderPlaced, position: int, byte: int) -> None:
    body = bytearray(codec.encode(order, FACTS).body)
    body[position % len(body)] = byte
    _decode_anyhow(codec, bytes(body))


# The catalog


def test_two_types_of_one_name_and_version_are_refused_by_name() -> None:
    @message("orders.placed", version=2)
    class Other:
        pass

    with pytest.raises(ConfigurationError, match=r"OrderPlaced and .*Other .*'orders.placed' in version 2"):
        Codec(OrderPlaced).register(Other)


def test_one_name_may_have_several_versions() -> None:
    @message("orders.placed", version=1)
    class Older:
        pass

    assert dict(Codec(OrderPlaced, Older, OrderPlaced).types) == {
        ("orders.placed", 1): Older,
        ("orders.placed", 2): OrderPlaced,
    }


# Versions


@message("sales.made", version=3)
@dataclass(frozen=True)
class SaleMade:
    sale_id: UUID
    total: Decimal
    currency: str


def event_of_version(version: int, data: object) -> bytes:
    event = {"specversion": "1.0", "id": "1", "source": "s", "type": "sales.made", "dataversion": version, "data": data}
    return json.dumps(event).encode()


def codec_with_upcasters() -> Codec:
    """From 1 to 2 the total became a decimal, from 2 to 3 it got a currency."""
    codec = Codec(SaleMade)

    @codec.upcaster("sales.made", 2)
    def add_currency(payload: dict[str, Any]) -> dict[str, Any]:
        payload["currency"] = "EUR"
        return payload

    @codec.upcaster("sales.made", 1)
    def count_in_units(payload: dict[str, Any]) -> dict[str, Any]:
        return {"sale_id": UUID(payload["sale_id"]), "total": Decimal(payload["cents"]) / 100}

    return codec


SALE = UUID(int=7)


@pytest.mark.parametrize(
    ("version", "payload"),
    [
        (1, {"sale_id": str(SALE), "cents": 1250}),
        (2, {"sale_id": str(SALE), "total": "12.5"}),
        (3, {"sale_id": str(SALE), "total": "12.5", "currency": "EUR"}),
    ],
)
def test_every_older_version_is_read_as_the_current_one(version: int, payload: dict[str, Any]) -> None:
    decoded = codec_with_upcasters().decode(event_of_version(version, payload))
    assert decoded.message == SaleMade(SALE, Decimal("12.5"), "EUR")


def test_an_event_without_a_version_is_of_the_first() -> None:
    event = json.loads(event_of_version(1, {"sale_id": str(SALE), "cents": 1250}))
    del event["dataversion"]
    assert codec_with_upcasters().decode(json.dumps(event).encode()).message == SaleMade(SALE, Decimal("12.5"), "EUR")


@given(cents=st.integers(-(10**12), 10**12))
def test_an_upcast_message_is_written_and_read_as_any_other(cents: int) -> None:
    codec = codec_with_upcasters()
    sale = codec.decode(event_of_version(1, {"sale_id": str(SALE), "cents": cents})).message
    assert sale.total == Decimal(cents) / 100
    again = codec.encode(sale, FACTS)
    assert again.version == 3
    assert codec.decode(again.body).message == sale


def test_an_upcaster_is_still_the_function_that_it_was() -> None:
    codec = Codec(SaleMade)

    @codec.upcaster("sales.made", 2)
    def add_currency(payload: dict[str, Any]) -> dict[str, Any]:
        return payload | {"currency": "EUR"}

    assert add_currency({"total": 1}) == {"total": 1, "currency": "EUR"}


def test_an_older_version_without_an_upcaster_is_named_with_what_to_register() -> None:
    codec = Codec(SaleMade)
    with pytest.raises(MissingUpcasterError) as caught:
        codec.decode(event_of_version(1, {}))
    assert str(caught.value) == (
        "'sales.made' in version 1 cannot be read: here it is known in version 3, and nothing turns version 1 into 2. "
        "Register a function that does: @codec.upcaster('sales.made', 1)."
    )


def test_a_gap_between_the_upcasters_is_named() -> None:
    codec = Codec(SaleMade)

    @codec.upcaster("sales.made", 1)
    def count_in_units(payload: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError

    with pytest.raises(MissingUpcasterError, match=r"version 1 cannot .* known in version 3, .* version 2 into 3"):
        codec.decode(event_of_version(1, {}))


def test_a_version_newer_than_any_here_is_unknown() -> None:
    with pytest.raises(UnknownMessageError, match=r"'sales.made' in version 4 .*Nearest: 'sales.made' in version 3"):
        codec_with_upcasters().decode(event_of_version(4, {}))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"sale_id": str(SALE)}, "its upcaster .*count_in_units, from version 1, failed with KeyError"),
        ({"sale_id": "secret", "cents": 1}, "its upcaster .*count_in_units, from version 1, failed with ValueError"),
        ("secret", "its upcaster .*count_in_units, from version 1, failed with TypeError"),
    ],
)
def test_an_upcaster_that_fails_is_named_and_the_payload_is_not(data: object, problem: str) -> None:
    with pytest.raises(DecodeError, match=f"^sales.made cannot be decoded: {problem}") as caught:
        codec_with_upcasters().decode(event_of_version(1, data))
    assert "secret" not in _all_text_of(caught.value)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (None, "its upcaster .*forget, from version 2, returned None"),
        (Handle(), "what its upcasters made of version 2 has no form in JSON"),
        ({}, "missing required field"),
    ],
)
def test_what_an_upcaster_returns_has_to_be_a_payload(result: object, problem: str) -> None:
    codec = Codec(SaleMade)

    @codec.upcaster("sales.made", 2)
    def forget(payload: object) -> object:
        return result

    with pytest.raises(DecodeError, match=problem):
        codec.decode(event_of_version(2, {}))


def test_a_payload_of_an_older_version_that_is_no_json_is_refused() -> None:
    headers = {"specversion": "1.0", "id": "1", "source": "s", "type": "sales.made", "dataversion": "1"}
    with pytest.raises(DecodeError, match="JSON is malformed"):
        codec_with_upcasters().decode(b"no JSON", "application/json", headers)


def test_two_upcasters_from_one_version_are_refused_by_name() -> None:
    codec = codec_with_upcasters()

    def other(payload: object) -> object:
        return payload

    with pytest.raises(ConfigurationError, match=r"add_currency and .*other both .* 'sales.made' from version 2 to 3"):
        codec.upcaster("sales.made", 2)(other)


def test_a_version_has_a_type_or_an_upcaster() -> None:
    @message("sales.made", version=2)
    class Older:
        pass

    def add_currency(payload: object) -> object:
        return payload

    problem = r"'sales.made' in version 2 has a type, .*Older, and an upcaster, .*add_currency"
    with pytest.raises(ConfigurationError, match=problem):
        Codec(Older).upcaster("sales.made", 2)(add_currency)
    codec = Codec()
    codec.upcaster("sales.made", 2)(add_currency)
    with pytest.raises(ConfigurationError, match=problem):
        codec.register(Older)


def test_versions_start_at_one() -> None:
    with pytest.raises(ConfigurationError, match=r"upcaster\('sales.made', 0\): versions start at 1"):
        Codec().upcaster("sales.made", 0)


@pytest.mark.parametrize("source", ["", "two words", "bell\x07", "caf\u00e9"])
def test_a_source_that_is_no_uri_reference_is_refused(source: str) -> None:
    with pytest.raises(ConfigurationError, match="no source"):
        Codec(source=source)


def test_a_size_limit_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_size is 0"):
        Codec(max_size=0)


def test_nothing_third_party_is_loaded_until_a_message_is_encoded_and_pydantic_never() -> None:
    _run(
        "import sys",
        "from dataclasses import dataclass",
        "from pipeline_mediator.codec import Codec, Facts",
        "Order = dataclass(type('Order', (), {'__annotations__': {'number': int}}))",
        "codec = Codec(Order)",
        "assert not {'msgspec', 'anyio', 'pydantic'} & set(sys.modules)",
        "codec.decode(codec.encode(Order(1), Facts('1')).body)",
        "assert 'pydantic' not in sys.modules",
    )


def _decode_anyhow(
    codec: Codec, body: bytes, content_type: str | None = None, headers: Mapping[str, str] | None = None
) -> None:
    with contextlib.suppress(CodecError):
        codec.decode(body, content_type, headers)


def _all_text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=0))


def _run(*lines: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], check=True)
