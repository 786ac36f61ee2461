"""The folder of a run: used by one process at a time, and by one run alone."""

import copy
import errno
import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

from kdkernels._files import read_json, write_json
from kdkernels._settings import differences
from kdkernels._version import __version__
from kdkernels.checkpoints import fingerprint


@contextmanager
def run_folder(
    path: str | os.PathLike[str],
    settings: dict[str, Any],
    *,
    device: torch.device,
    may_grow: Collection[str] = (),
) -> Iterator[Path]:
    """Hold the folder of a run: made if needed, locked, and with the files of this run and no other.

    ``settings.json`` records the settings. A later run must have the same ones, but for numbers that may grow.

    Args:
        path: Folder.
        settings: All that decides the result: nested dictionaries of JSON values.
        device: Device of the run. As with the number of threads and the version of torch, a change is warned of.
        may_grow: Names of numbers that a later run may have larger, such as ``"config.rounds"``.

    Raises:
        ValueError: If the folder holds a run with other settings, another process is using it, or its settings.json is
            damaged.
        OSError: If it is not a folder, or cannot be written.

    """
    with locked_folder(path) as folder:
        notes = {
            "kdkernels": __version__,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }
        _claim(folder, json.loads(json.dumps(settings, default=_plain)), notes, may_grow)
        yield folder


@contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder if needed and keep other processes from using it; the system ends that with the process."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        reason = "a file of that name exists" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(error.errno, f"{path} cannot be used as an output folder ({reason}); choose another") from error
    with lock:
        if find_spec("fcntl") is not None:  # not on Windows, where nothing keeps two processes apart
            _lock(lock, path)
        yield path


def require_space(folder: Path, size: int) -> None:
    """Raise unless a run of that many bytes fits on the disk; the files that its folder has are part of it.

    Raises:
        OSError: If it does not fit.

    """
    held = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    free = shutil.disk_usage(folder).free
    if free < size - held:
        raise OSError(
            errno.ENOSPC,
            f"the run needs {(size - held) / 2**20:,.0f} MiB more in {folder}, but only {free / 2**20:,.0f} MiB are "
            "free; make room, or choose a folder on another disk",
        )


def _lock(lock: TextIO, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip()
        raise ValueError(
            f"another process (pid {owner}) is using {folder}; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise OSError(
            error.errno, f"{folder} cannot be locked ({error.strerror}); choose a folder on another disk"
        ) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()


def _claim(folder: Path, settings: dict[str, Any], notes: dict[str, Any], may_grow: Collection[str]) -> None:
    path = folder / "settings.json"
    if path.is_file():
        recorded = read_json(path, f"remove {folder} to start again, or choose another folder")
        if not isinstance(recorded, dict) or recorded.keys() != {"settings", "notes"}:
            raise ValueError(f"{path} is not from this version of kdkernels; remove {folder}, or choose another folder")
        found = copy.deepcopy(recorded["settings"])
        for name in may_grow:
            _follow_growth(found, settings, name.split("."))
        changes = differences(found, settings)
        if changes:
            raise ValueError(
                f"{folder} holds a run with other settings: {'; '.join(changes)}; choose another folder, or go on with "
                "the settings of that run"
            )
        others = differences(recorded["notes"], notes)
        if others:
            warnings.warn(
                f"{folder} was begun differently ({'; '.join(others)}), so results may differ in their last bits",
                stacklevel=4,
            )
        notes = recorded["notes"]
    write_json(path, {"settings": settings, "notes": notes})


def describe(model: torch.nn.Module) -> str:
    """Return the class of a network and the beginning of its fingerprint, by which settings tell it from others."""
    return f"{type(model).__name__} {fingerprint(model)[:16]}"


def _plain(value: Any) -> Any:
    """Return a NumPy or torch scalar as a Python number."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a setting is {value!r}; expected numbers, strings, lists and dictionaries")


def _follow_growth(found: Any, wanted: Any, names: list[str]) -> None:
    """Replace a recorded number by the wanted one if that is larger."""
    name, *below = names
    if not isinstance(found, dict) or not isinstance(wanted, dict) or name not in found or name not in wanted:
        return
    if below:
        _follow_growth(found[name], wanted[name], below)
    else:
        found[name] = max(found[name], wanted[name])
