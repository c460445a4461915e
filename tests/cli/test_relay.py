"""The relay as a process: it loads what it is told to, publishes, and ends as it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from textwrap import dedent

import pytest

from pipeline_mediator.cli.main import main

ROOT = Path(__file__).parents[2]
SECONDS = 20
"""That no process of these takes."""

_numbers = count()

SHOP = """
    from pipeline_mediator import Mediator
    from pipeline_mediator.errors import BrokerUnavailableError
    from pipeline_mediator.middlewares import PublishMiddleware
    from tests.outbox.relay_fakes import DESTINATIONS, Broker, Shop

    class Talking(Broker):
        away = False

        async def publish(self, batch):
            for outgoing in batch:
                print("publishing", outgoing.message_id, flush=True)
            return await super().publish(batch)

        async def __aenter__(self):
            if self.away:
                raise BrokerUnavailableError("nobody is at home")
            return self

    class Outbox:
        role = "outbox"
        store = None

        def for_route(self, route):
            return None

        async def __call__(self, context, call_next):
            return await call_next(context)

    broker = Talking()
    shop = Shop(broker)
    Outbox.store = shop.store

    class app:
        def create():
            return Mediator(middlewares=[Outbox(), PublishMiddleware(broker, DESTINATIONS)])

    mediator = app.create()

    async def create_mediator():
        await shop.put("a", "b")
        return app.create()

    async def create_hanging():
        import anyio
        broker.hangs["orders"] = anyio.Event()
        return await create_mediator()

    async def create_lonely():
        broker.away = True
        return await create_mediator()

    async def create_slowly():
        import anyio
        print("creating", flush=True)
        await anyio.sleep(60)

    async def create_unwelcome():
        broker.refuse = lambda _: BrokerUnavailableError("nobody is at home")
        return await create_mediator()

    async def create_broken():
        shop.store.broken = ConnectionRefusedError("no database")
        return app.create()
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[[str], str]]:
    """Writes a module into the current directory, and gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: list[str] = []

    def write(text: str) -> str:
        names.append(f"shop_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(dedent(text))
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def shop(write: Callable[[str], str]) -> str:
    return write(SHOP)


# -- draining ----------------------------------------------------------------------------------------------------------


def test_it_publishes_what_is_due(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["relay", f"{shop}:create_mediator", "--drain"]) == 0
    assert sorted(capsys.readouterr().out.split()) == ["a", "b", "publishing", "publishing"]


def test_it_tells_what_it_left(shop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert main(["relay", f"{shop}:create_unwelcome", "--drain"]) == 1
    assert "0 messages published; left: 2 pending, 0 waiting, 0 dead" in caplog.messages


@pytest.mark.parametrize("attribute", ["mediator", "app.create", "create_mediator"])
def test_a_mediator_will_do_and_whatever_makes_one(attribute: str, shop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    settings = ["--batch", "10", "--poll", "0.1", "--attempts", "3", "--lease", "9", "--on-dead", "park", "--name", "x"]
    assert main(["relay", f"{shop}:{attribute}", "--drain", *settings]) == 0
    assert (
        f"{2 if attribute == 'create_mediator' else 0} messages published; left: 0 pending, 0 waiting, 0 dead"
        in caplog.messages
    )


# -- what cannot be done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("{shop}", "'{shop}' names nothing: it should look like shop.app:create_mediator"),
        (":create", "':create' names nothing"),
        ("{shop}x:create", "there is no module '{shop}x', neither in {here} nor among what is installed"),
        ("nowhere.app:create", "there is no module 'nowhere'"),
        ("{shop}:create_mediators", "there is no 'create_mediators' in {shop}. Did you mean create_mediator"),
        ("{shop}:app.missing", "there is no 'missing' in {shop}."),
        ("{shop}:DESTINATIONS", "{shop}:DESTINATIONS is a dict; needed is a Mediator, or what returns one"),
        ("{shop}:Talking", "{shop}:Talking returns a Talking; needed is a Mediator"),
        ("{shop}:broker.has", "{shop}:broker.has failed: TypeError: Broker.has() missing 1 required"),
    ],
)
def test_a_target_that_is_none_is_told(
    target: str, complaint: str, shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["relay", target.format(shop=shop)]) == 2
    shown = capsys.readouterr()
    assert complaint.format(shop=shop, here=tmp_path) in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n1 / 0\n", "cannot be imported: ZeroDivisionError: division by zero ({file}:2)"),
        ("import no_such_library\n", "cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"),
        ("def create():\n    raise KeyError('DATABASE_URL')\n", "create failed: KeyError: 'DATABASE_URL' ({file}:2)"),
        (
            "from pipeline_mediator import Mediator\ndef create():\n    return Mediator()\n",
            "no OutboxMiddleware stands in the mediator's pipeline",
        ),
    ],
)
def test_a_mistake_of_the_applications_is_told_with_its_place(
    text: str, complaint: str, write: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(text)
    assert main(["relay", f"{name}:create"]) == 2
    assert complaint.format(file=tmp_path / f"{name}.py") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["create_mediator", "--batch", "0"], "batch=0, and has to be at least 1"),
        (["create_broken", "--drain"], "the outbox cannot be read: ConnectionRefusedError: no database"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: list[str], complaint: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["relay", f"{shop}:{arguments[0]}", *arguments[1:]]) == 2
    assert complaint in capsys.readouterr().err


# -- a process ---------------------------------------------------------------------------------------------------------


@contextmanager
def running(*arguments: str) -> Generator[subprocess.Popen[str]]:
    """The command as a process, with everything that it says in its output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline_mediator", "relay", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    too_long = threading.Timer(SECONDS, process.kill)
    too_long.start()
    with process:
        try:
            yield process
        finally:
            too_long.cancel()
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    pytest.fail(f"it never said {text!r}, but {''.join(said)}")


def test_it_runs_until_it_is_told_to_end(shop: str) -> None:
    with running(f"{shop}:create_mediator") as relay:
        read_until(relay, "outbox: relay started")
        read_until(relay, "publishing b")
        relay.send_signal(signal.SIGTERM)
        read_until(relay, "SIGTERM: the batch at hand is finished, then it ends")
        read_until(relay, "outbox: relay stopped")
        assert relay.wait(SECONDS) == 0


def test_told_twice_it_ends_at_once(shop: str) -> None:
    with running(f"{shop}:create_hanging", "--stop-within", "60") as relay:
        read_until(relay, "publishing a")
        relay.send_signal(signal.SIGTERM)
        read_until(relay, "the batch at hand is finished")
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(SECONDS) == 128 + signal.SIGTERM


def test_told_to_end_it_says_what_is_left(shop: str) -> None:
    with running(f"{shop}:create_hanging", "--drain", "--stop-within", "0") as relay:
        read_until(relay, "publishing a")
        relay.send_signal(signal.SIGTERM)
        read_until(relay, "0 messages published; left: 2 pending, 0 waiting, 0 dead")
        assert relay.wait(SECONDS) == 1


def test_told_to_end_before_it_began_it_ends(shop: str) -> None:
    with running(f"{shop}:create_slowly") as relay:
        read_until(relay, "creating")
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(SECONDS) == 128 + signal.SIGTERM


def test_it_begins_without_its_broker(shop: str) -> None:
    with running(f"{shop}:create_lonely") as relay:
        read_until(relay, "nobody is at home")
        read_until(relay, "publishing b")
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(SECONDS) == 0
