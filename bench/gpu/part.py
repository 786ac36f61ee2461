"""The results of a step of a qualification, on disk."""

import json
from pathlib import Path
from typing import Any

from bench.report.files import write_whole


class Part:
    """The results of a step so far, written to disk after every addition, so that the step may be cut at any time."""

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
