"""What a step of a qualification has found out, on disk."""

import json
from pathlib import Path
from typing import Any

from bench.report.files import write_whole


class Part:
    """What a step has found out so far. It is on disk after every addition, so that a step may be cut at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}

    def add(self, **values: Any) -> None:
        self.content.update(values)
        write_whole(self.path, json.dumps(self.content, indent=2) + "\n")


def read_part(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
