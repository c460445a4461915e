"""A message's JSON: msgspec for dataclasses, attrs classes and Structs, pydantic's own methods for its models."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from pipeline_mediator.errors import DecodeError, EncodeError, name_of
from pipeline_mediator.payload_faults import (
    ADVICE,
    attempt,
    check_finite,
    check_type,
    find_fault,
    what_is_wrong,
    what_pydantic_says,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["PayloadForm", "payload_form", "upcast"]


@dataclass(frozen=True, slots=True)
class PayloadForm:
    """How one message type is written to JSON and read from it."""

    encode: Callable[[Any], bytes]
    decode: Callable[[msgspec.Raw | bytes], Any]


def payload_form(message_type: type) -> PayloadForm:
    """The form of `message_type`, to be built once per type.

    Its `encode` raises `EncodeError` naming the field, its `decode` `DecodeError` naming the place but never the value.
    Raises `EncodeError` at once for a type that could be written but not read back: better at the sender than in
    another process, where the message would be given up on.
    """
    return _model_form(message_type) if _is_model(message_type) else _msgspec_form(message_type)


def upcast(name: str, version: int, payload: msgspec.Raw | bytes, upcasters: Iterable[Callable[[Any], Any]]) -> bytes:
    """The JSON of an older version after these upcasters, the first of which takes it in `version`.

    Raises `DecodeError` for what is no JSON, and for an upcaster that fails, named but not quoted.
    """
    value, error = attempt(msgspec.json.decode, payload)
    if error is not None:
        raise DecodeError(name, *what_is_wrong(error))
    for number, upcaster in enumerate(upcasters, version):
        value, error = attempt(upcaster, value)
        if error is None and value is not None:
            continue
        failed = "returned None instead of a payload" if error is None else f"failed with {type(error).__name__}"
        raise DecodeError(name, "$", f"its upcaster {name_of(upcaster)}, from version {number}, {failed}")
    written, error = attempt(_ENCODER.encode, value)
    if error is not None:
        raise DecodeError(name, "$", f"what its upcasters made of version {version} has no form in JSON")
    return bytes(written)


def _msgspec_form(message_type: type) -> PayloadForm:
    try:
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(message_type, dec_hook=_read_model)
    except Exception as error:
        raise EncodeError(message_type, None, f"it could not be read back: {error}. {ADVICE}") from error
    holds_floats = check_type(message_type, allowed=_is_model)

    def encode(message: Any) -> Any:
        payload, error = attempt(_ENCODER.encode, message)
        if error is not None:
            # Not `from error`, here and below: its text may quote the message.
            raise find_fault(message, _ENCODER.encode)
        if holds_floats and b"null" in payload:
            check_finite(message)
        return payload

    def decode(payload: msgspec.Raw | bytes) -> Any:
        message, error = attempt(decoder.decode, payload)
        if error is not None:
            raise DecodeError(message_type.__name__, *what_is_wrong(error))
        return message

    return PayloadForm(encode, decode)


def _model_form(message_type: Any) -> PayloadForm:
    def encode(message: Any) -> Any:
        payload, error = attempt(_dump, message)
        if error is not None:
            problem = f"pydantic refused it with {type(error).__name__}. {ADVICE}"
            raise EncodeError(message_type, refused_field(message), problem)
        return payload

    def refused_field(message: Any) -> str | None:
        for name in message_type.model_fields:
            if attempt(_dump, message, {name})[1] is not None:
                return str(name)
        return None

    def decode(payload: msgspec.Raw | bytes) -> Any:
        message, error = attempt(message_type.model_validate_json, bytes(payload))
        if error is not None:
            raise DecodeError(message_type.__name__, *what_pydantic_says(error))
        return message

    return PayloadForm(encode, decode)


def _is_model(cls: type[Any]) -> bool:
    # A class can only be a pydantic model if its program has loaded pydantic; so this never does.
    pydantic = sys.modules.get("pydantic.main")
    return pydantic is not None and issubclass(cls, pydantic.BaseModel)


def _dump(model: Any, include: set[str] | None = None) -> bytes:
    # By alias and without computed fields: what is written must be what the model reads.
    text: str = model.model_dump_json(by_alias=True, round_trip=True, include=include)
    return text.encode()


def _write_model(value: Any) -> msgspec.Raw:
    """A pydantic model inside a message of another kind."""
    kind: type[Any] = value.__class__
    if not _is_model(kind):
        raise TypeError(f"Encoding objects of type {kind.__name__} is unsupported")
    return msgspec.Raw(_dump(value))


def _read_model(cls: type, value: Any) -> Any:
    if not _is_model(cls):
        return value
    model: Any = cls
    return model.model_validate_json(_ENCODER.encode(value))


_ENCODER: Final = msgspec.json.Encoder(enc_hook=_write_model)
