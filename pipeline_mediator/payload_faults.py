"""Which part of a message cannot be written as JSON, and what is wrong with a JSON text, said without repeating it.

Called when a type is first written, and when something has failed; only `check_finite` may run for every message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec
from msgspec import inspect

from pipeline_mediator.errors import EncodeError

__all__ = ["ADVICE", "attempt", "check_finite", "check_type", "find_fault", "what_is_wrong", "what_pydantic_says"]

ADVICE: Final = (
    "Use str, numbers, bool, bytes, date and time types, UUID, Decimal, enums, and lists, dicts, dataclasses, attrs "
    "classes, msgspec Structs or pydantic models of these."
)


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """The result and None, or None and the error: what users write into a class may raise anything."""
    try:
        return function(*arguments), None
    except Exception as error:  # noqa: BLE001 - a validator, a serializer or __post_init__ raises what it likes
        # Without its traceback, which would tie a knot with the frame that keeps it, and hold the message until gc.
        return None, error.with_traceback(None)


# -- types that would not come back as they were sent ------------------------------------------------------------------


def check_type(message_type: type, allowed: Callable[[type], bool]) -> bool:
    """Refuse a type with a part that could be written, but not read back; say whether it may hold a float.

    `allowed` tells which classes that msgspec does not know have a form all the same.
    """
    root = inspect.type_info(message_type)
    if isinstance(root, inspect.CustomType):
        raise EncodeError(
            message_type, None, "it has no fields to write. Make it a dataclass, attrs class, Struct or pydantic model."
        )
    holds_floats = False
    for path, part in _parts_of_type(root):
        if isinstance(part, inspect.CustomType) and part.cls is not object and not allowed(part.cls):
            raise EncodeError(message_type, path, f"{part.cls.__name__} has no form in JSON. {ADVICE}")
        if isinstance(part, inspect.DataclassType) and (private := _private_attribute(part.cls)):
            problem = (
                f"{part.cls.__name__} is an attrs class, and of those private attributes are not written. Rename it."
            )
            raise EncodeError(message_type, f"{path}.{private}".lstrip("."), problem)
        holds_floats = holds_floats or isinstance(part, inspect.FloatType | inspect.AnyType | inspect.CustomType)
    return holds_floats


def _parts_of_type(root: inspect.Type) -> Iterator[tuple[str, inspect.Type]]:
    """Every type that a type is made of, itself included, with the path of the field that it stands in.

    What msgspec tells about a type is Structs again: their fields lead to the parts, whatever kind of type it is.
    """
    waiting: list[tuple[str, object]] = [("", root)]
    seen = set[int]()
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, inspect.Field):
            waiting.append((f"{path}.{node.name}".lstrip("."), node.type))
        elif isinstance(node, inspect.Type) and id(node) not in seen:
            seen.add(id(node))
            yield path, node
            for name in node.__struct_fields__:
                value: Any = getattr(node, name)
                parts: Any = value if value.__class__ is tuple else (value,)
                waiting.extend((path, part) for part in parts)


def _private_attribute(cls: type) -> str | None:
    attributes: Iterable[Any] = getattr(cls, "__attrs_attrs__", ())
    return next((attribute.name for attribute in attributes if attribute.name.startswith("_")), None)


# -- values that cannot be written -------------------------------------------------------------------------------------

_DEPTH: Final = 32
"""How many levels of a message are searched for the part that is refused."""


def find_fault(message: object, encode: Callable[[object], bytes]) -> EncodeError:
    """The error that names the innermost part of `message` that `encode` refuses."""
    path, part = "", message
    error = attempt(encode, message)[1]
    for _ in range(_DEPTH):
        for step, child in _children(part):
            if (refusal := attempt(encode, child)[1]) is not None:
                path, part, error = path + step, child, refusal
                break
        else:
            break
        if isinstance(error, RecursionError):
            break  # every level of it is refused alike
    return EncodeError(type(message), path.lstrip(".") or None, f"{_reason(error)}. {ADVICE}")


def check_finite(message: object) -> None:
    """JSON has no NaN and no infinity: msgspec writes null, which nobody can read back as the number it was."""
    waiting: list[tuple[str, object]] = [("", message)]
    while waiting:  # ends: what has been encoded does not contain itself
        path, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise EncodeError(type(message), path.lstrip("."), "JSON carries no NaN and no infinity")
        waiting.extend((path + step, child) for step, child in _children(value))


def _children(value: Any) -> Iterator[tuple[str, object]]:
    """The parts of a value; what stands in a dict's keys is payload and stays out of the path."""
    kind: type[Any] = value.__class__
    if issubclass(kind, Mapping):
        yield from (("[...]", item) for item in value.values())
    elif issubclass(kind, list | tuple | set | frozenset):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    else:
        yield from ((f".{name}", getattr(value, name, None)) for name in _field_names(kind))


def _field_names(cls: type[Any]) -> Iterable[str]:
    if hasattr(cls, "__attrs_attrs__"):
        return [attribute.name for attribute in cls.__attrs_attrs__]
    return getattr(cls, "__struct_fields__", None) or getattr(cls, "__dataclass_fields__", {})


# -- texts of errors, without what they quote --------------------------------------------------------------------------

_QUOTES_NOTHING: Final = re.compile(
    r"Expected |Object missing required field |Input data was truncated|JSON is malformed"
    r"|Invalid (RFC3339|UUID|decimal|base64)|Encoding objects of type |Only dicts with "
)
"""The beginnings of msgspec's messages that do not repeat a value; all others are kept back."""


def what_is_wrong(error: Exception) -> tuple[str, str]:
    """Where in a JSON text it is wrong, and what."""
    if isinstance(error, msgspec.MsgspecError):
        problem, _, where = str(error).partition(" - at ")
        return where.strip("`") or "$", problem if _QUOTES_NOTHING.match(problem) else "a value that is not valid"
    return "$", _reason(error)


def what_pydantic_says(error: Any) -> tuple[str, str]:
    """Where the first mistake is, and pydantic's own name for it: its text may quote the input.

    So may its path, with the keys of a dict and the names of fields that there are not; only a field of the model is
    named.
    """
    if not hasattr(error, "errors"):
        return what_is_wrong(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, fields = str(first["type"]), first["loc"]
    return f"$.{fields[0]}" if fields and kind != "extra_forbidden" else "$", kind


def _reason(error: Exception | None) -> str:
    if isinstance(error, TypeError) and _QUOTES_NOTHING.match(str(error)):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return "it holds a lone surrogate, which UTF-8 cannot carry"
    if isinstance(error, UnicodeDecodeError):
        return "text that is not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deep, or inside itself"
    return f"refused with {type(error).__name__}"
