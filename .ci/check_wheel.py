"""Check that a wheel holds every module of the checkout once, as a real file, and nothing else.

python .ci/check_wheel.py dist/pipeline_mediator-0.1.0-py3-none-any.whl
"""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]


def shipped_by_checkout() -> set[str]:
    """The paths that a wheel of this checkout has; what is linked into the package stands there for real."""
    walked = os.walk(ROOT / "pipeline_mediator", followlinks=True)
    paths = [Path(folder, file).relative_to(ROOT) for folder, _, files in walked for file in files]
    return {path.as_posix() for path in paths if path.suffix == ".py" or path.name == "py.typed"}


def faults_of(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        entries = archive.infolist()
    counted = Counter(entry.filename for entry in entries if ".dist-info/" not in entry.filename)
    expected = shipped_by_checkout()
    return [
        *(f"missing: {name}" for name in sorted(expected - counted.keys())),
        *(f"does not belong there: {name}" for name in sorted(counted.keys() - expected)),
        *(f"stands there {times} times: {name}" for name, times in counted.items() if times > 1),
        *(f"a link: {entry.filename}" for entry in entries if stat.S_ISLNK(entry.external_attr >> 16)),
    ]


def main() -> int:
    wheel = Path(sys.argv[1])
    faults = faults_of(wheel)
    for fault in faults:
        print(f"{wheel.name}: {fault}")
    if not faults:
        print(f"{wheel.name}: {len(shipped_by_checkout())} files, each once")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
