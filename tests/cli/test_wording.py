"""What is shown holds no credentials, and nothing that a terminal obeys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_mediator.cli.wording import first_line, printable, seconds, told, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://ada:secret@host:6379/0 is away", "redis://***@host:6379/0 is away"),
        ("redis://:secret@host/0", "redis://***@host/0"),
        ("rediss://secret@host/0", "rediss://***@host/0"),
        ("postgresql+asyncpg://ada:p%40ss@host/shop?x=1", "postgresql+asyncpg://***@host/shop?x=1"),
        ("amqp://ada:se@cr/et@host, and amqp://b:c@d", "amqp://***@host, and amqp://***@d"),
        (
            "Endpoint=sb://bus.example/;SharedAccessKeyName=root;SharedAccessKey=abc+/=;EntityPath=orders",
            "Endpoint=sb://bus.example/;SharedAccessKeyName=root;SharedAccessKey=***;EntityPath=orders",
        ),
        ("host=db password=secret user=ada", "host=db password=*** user=ada"),
        ("https://host/path, mail ada@host", "https://host/path, mail ada@host"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_credentials_are_left_out(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[31mb\r\n\x9b\u202ec é") == "a\\x1b[31mb\\r\\n\\x9b\\u202ec é"
    assert printable("two\n\tlines\x07", lines=True) == "two\n\tlines\\x07"


@given(st.text())
def test_whatever_comes_is_printable(text: str) -> None:
    assert printable(text).isprintable()


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), st.text())
def test_no_password_is_left(password: str, text: str) -> None:
    assert f":{password}@" not in without_credentials(f"{text} redis://ada:{password}@host")


def test_an_error_is_told_with_its_notes() -> None:
    error = ValueError("it is broken")
    error.add_note("and that is why")
    assert told(error) == "it is broken\nand that is why"
    assert told(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0.0 s"), (59.94, "59.9 s"), (61.0, "1 min 1 s"), (3720.0, "1 h 2 min"), (93600.0, "1 d 2 h")],
)
def test_durations_are_as_coarse_as_they_are_long(number: float, text: str) -> None:
    assert seconds(number) == text
