"""Lines of JSON that are appended as soon as a figure is known: whatever ends the process, they stay."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(path: Path | None, line: Mapping[str, Any]) -> None:
    """Nothing if there is no file to append to."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path | None) -> list[dict[str, Any]]:
    """The lines so far; one that was cut off when the process was killed is left out."""
    if path is None or not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
