"""The program as a whole: what it loads, what it says when something is missing, how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from pipeline_mediator.cli.main import main
from tests.cli.called import Called
from tests.cli.processes import ROOT, SECONDS, running
from tests.cli.shops import SHOP

COMMANDS = ["describe", "check", "consume", "relay", "demo", "outbox", "dead-letters"]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )


# -- what it needs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--help"], ["relay", "--help"], ["outbox", "retry", "--help"], ["dead-letters", "--help"]]
)
def test_help_loads_neither_clients_nor_databases(arguments: list[str]) -> None:
    code = f"""
import json, sys
from pipeline_mediator.cli.main import main
assert main({arguments!r}) == 0
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})), file=sys.stderr)
"""
    done = python(code)
    assert done.stdout.startswith("Usage: pipeline-mediator ")
    loaded: set[str] = set(json.loads(done.stderr))
    assert "typer" in loaded
    assert not loaded & {"anyio", "azure", "httpx", "msgspec", "opentelemetry", "redis", "rich", "sqlalchemy"}


@pytest.mark.parametrize(("library", "name"), [("typer", "Typer"), ("rich", "Rich")])
def test_a_missing_library_names_the_extra(
    library: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["describe", "shop:mediator"]) == 2
    told = capsys.readouterr().err
    assert (
        told == f'pipeline-mediator: this command needs {name}. Install it with: pip install "pipeline-mediator[cli]"\n'
    )


def test_the_demo_needs_neither() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["rich", "typer"]))
from pipeline_mediator.cli.main import main
sys.exit(main(["demo", "--describe", "json"]))
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)


def test_the_program_is_installed_under_its_name() -> None:
    import tomllib

    project = ROOT / "pyproject.toml"
    if not project.is_file():
        pytest.skip("looks at a checkout")
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert scripts == {"pipeline-mediator": "pipeline_mediator.cli.main:main"}


# -- how it is called --------------------------------------------------------------------------------------------------


def test_help_lists_every_command(call: Callable[..., Called]) -> None:
    called = call("--help")
    assert called.code == 0
    assert [command for command in COMMANDS if f"\n  {command} " not in called.out] == []


def test_the_demo_is_a_command_of_it(call: Callable[..., Called], capsys: pytest.CaptureFixture[str]) -> None:
    called = call("demo", "--help")
    assert called.code == 0
    assert "usage: pipeline-mediator demo" in called.out
    assert "--orders N" in called.out
    assert call("demo", "--orders", "none").code == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "Usage: pipeline-mediator"),
        (["outbox"], "Usage: pipeline-mediator outbox"),
        (["outbocks"], "Did you mean 'outbox'?"),
        (["describe"], "Missing argument 'TARGET'"),
        (["describe", "a:b", "--format", "dot"], "Invalid value for '--format'"),
        (["describe", "a:b", "--verbose"], "No such option: --verbose"),
        (["consume", "a:b", "--concurrency", "0"], "Invalid value for '--concurrency'"),
        (["describe", "nowhere.app:create"], "pipeline-mediator: there is no module 'nowhere'"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert complaint in shown.err


def test_an_application_that_ends_itself_is_heard(
    write: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = write("def create():\n    raise SystemExit(7)\n")
    assert main(["describe", f"{name}:create"]) == 7

    name = write("raise SystemExit('DATABASE_URL is not set')\n")
    assert main(["describe", f"{name}:create"]) == 2
    assert capsys.readouterr().err == "pipeline-mediator: DATABASE_URL is not set\n"


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_question(write: Callable[[str], str]) -> None:
    """On a terminal, where the answer is waited for in the middle of everything."""
    name = write(SHOP)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline_mediator", "outbox", "purge", f"{name}:create_mediator", "--all"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    with process:
        try:
            assert process.stderr is not None
            said = ""
            while not said.endswith("[y/N] "):
                more = process.stderr.read(1)
                assert more, said
                said += more
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)
    assert process.returncode == 130
    assert rest.endswith("pipeline-mediator: stopped\n")
    assert "Traceback" not in rest


def test_ctrl_c_ends_what_waits_for_a_server(write: Callable[[str], str]) -> None:
    name = write("import anyio\nasync def create():\n    print('waiting', flush=True)\n    await anyio.sleep(60)\n")
    with running("describe", f"{name}:create", apart=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=SECONDS)
        assert process.returncode == 130
        assert told == "pipeline-mediator: stopped\n"
