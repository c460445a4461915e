"""An adapter without its library names the extra; a library with something missing of its own is not hidden."""

from __future__ import annotations

import importlib
import sys

import pytest

from pipeline_mediator.errors import MissingExtraError

ADAPTERS = {"rodi": "RodiContainer", "di": "DIContainer", "dishka": "DishkaContainer"}


def import_afresh(monkeypatch: pytest.MonkeyPatch, library: str, *, without: str) -> None:
    """Import the adapter as if nothing had been imported yet and `without` were not installed."""
    adapter = f"pipeline_mediator.container.{library}"
    for name in list(sys.modules):
        if name == adapter or name.split(".")[0] in {library, without}:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, without, None)  # how the import system spells "absent"
    importlib.import_module(adapter)


@pytest.mark.parametrize(("library", "adapter"), ADAPTERS.items())
def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, library: str, adapter: str) -> None:
    with pytest.raises(MissingExtraError) as failure:
        import_afresh(monkeypatch, library, without=library)
    assert str(failure.value) == (
        f'{adapter} needs {library}. Install it with: pip install "pipeline-mediator[{library}]"'
    )


@pytest.mark.parametrize(
    ("library", "without"), [("rodi", "contextvars"), ("di", "graphlib2"), ("dishka", "dishka.exceptions")]
)
def test_library_that_is_broken_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, library: str, without: str
) -> None:
    with pytest.raises(ModuleNotFoundError, match=without) as failure:
        import_afresh(monkeypatch, library, without=without)
    assert not isinstance(failure.value, MissingExtraError)
