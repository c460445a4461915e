"""The folders on disk are those that are built into the wheel, and each link in the package leads to one of them."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline_mediator"

pytestmark = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason="looks at a checkout; here are only the tests, and the package is installed"
)


@pytest.fixture(scope="module")
def setuptools() -> Any:
    """`[tool.setuptools]` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folders_with_modules() -> list[Path]:
    """Of the package, those behind its links too."""
    found = os.walk(PACKAGE, followlinks=True)
    return [Path(folder) for folder, _, files in found if any(file.endswith(".py") for file in files)]


def test_every_package_on_disk_is_built(setuptools: Any) -> None:
    on_disk = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders_with_modules())
    assert setuptools["packages"] == on_disk


def test_every_folder_with_modules_is_a_regular_package() -> None:
    assert [folder for folder in folders_with_modules() if not (folder / "__init__.py").is_file()] == []


def test_what_stands_elsewhere_is_linked_into_the_package(setuptools: Any) -> None:
    """The build is told where the real files are; everything else finds them by the links."""
    links = {
        ".".join(path.relative_to(ROOT).parts): str(path.readlink()) for path in PACKAGE.rglob("*") if path.is_symlink()
    }
    told: dict[str, str] = {name: folder for name, folder in setuptools["package-dir"].items() if "." in name}
    assert "pipeline_mediator.middlewares" in told
    assert links == {name: "../" * name.count(".") + folder for name, folder in told.items()}
    assert not [folder for folder in told.values() if (ROOT / folder).is_symlink()]


def test_the_typing_marker_is_shipped(setuptools: Any) -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert setuptools["package-data"]["pipeline_mediator"] == ["py.typed"]
