"""What a report says about the machine and the tree. Needs no PyTorch."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def facts(command: str) -> dict[str, Any]:
    """Return what every report says at the top."""
    return {
        "command": command, "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(), "machine": processor(),
        "cores": cores(), "python": platform.python_version(),
    }  # fmt: skip


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        family = f"family {names.get('cpu family', '?')}, model {names.get('model', '?')}"
        return f"{names.get('model name', platform.machine())} ({family})"
    return platform.processor() or platform.machine()


def caches() -> dict[str, int]:
    """Return the size of each cache level in bytes."""
    units = {"K": 1 << 10, "M": 1 << 20}
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction" and size[-1:] in units:
            found[f"L{level}"] = int(size[:-1]) * units[size[-1]]
    return found
