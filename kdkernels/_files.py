"""Files that are written whole or not at all, and files of others that are read without being trusted."""

import argparse
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

SAVE_WEIGHTS = "torch.save(model.state_dict(), path)"
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch.save before 1.6


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when it is complete and on the disk.

    A process that is stopped, or a disk that is full, leaves the previous file.

    Raises:
        OSError: If the file cannot be written; the message names it.

    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.lexists(temporary):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"{path} could not be written ({reason}); free it or choose another path"
            ) from error
        raise


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write valid JSON atomically.

    Raises:
        ValueError: If a number is not finite, which JSON has no notation for.

    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def read_json(path: str | os.PathLike[str], remedy: str) -> Any:
    """Read JSON; the error names the file and the remedy.

    Raises:
        ValueError: If the file is damaged.

    """
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error


def read_tensor_file(path: str | os.PathLike[str]) -> Any:
    """Read a safetensors or a torch file onto the CPU, told apart by content; nothing in it is executed.

    Besides tensors and plain values, a torch file may hold NumPy scalars and arrays, and argparse's options.

    Raises:
        ValueError: If the file cannot be read; the message says what it is and what helps.

    """
    path = Path(path)
    start = _first_bytes(path)
    if start[:4] == b"PK\x03\x04" or start.startswith(TORCH_LEGACY):
        return _read_torch(path, is_zip=start[:2] == b"PK")
    if start[8:9] == b"{":  # after the length of the header
        return _read_safetensors(path)
    if start.startswith(b"version https://git-lfs"):
        what = "is a git-lfs pointer instead of the file; run `git lfs pull`"
    elif start.lstrip()[:1] == b"<":
        what = "is a web page, so its download failed; download it again"
    elif start[:1] == b"\x80":
        what = f"was written by pickle, which is not loaded because it may run code; write it with {SAVE_WEIGHTS}"
    else:
        what = (
            f"is neither a safetensors nor a torch file, as it begins with {start[:12]!r}; write it with {SAVE_WEIGHTS}"
        )
    raise ValueError(f"checkpoint '{path}' {what}")


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"checkpoint '{path}' is a folder; name the file of weights in it")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint '{path}' does not exist") from error
    except OSError as error:
        raise ValueError(f"checkpoint '{path}' cannot be opened ({error.strerror}); check its permissions") from error
    if not start:
        raise ValueError(f"checkpoint '{path}' is empty; it was not saved or copied to the end, so fetch it again")
    return start


def _read_torch(path: Path, *, is_zip: bool) -> Any:
    damaged = f"checkpoint '{path}' is damaged or truncated; copy or download it again"
    if is_zip:
        if not zipfile.is_zipfile(path):
            raise ValueError(damaged)
        with zipfile.ZipFile(path) as archive:
            inside = {name.rpartition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in inside or "constants.pkl" in inside:
            raise ValueError(
                f"checkpoint '{path}' is a TorchScript, exported or other archive, not a file of weights; where it was "
                f"made, run {SAVE_WEIGHTS}"
            )
    try:
        # Opened here, because torch.load itself goes by the extension.
        with path.open("rb") as file, torch.serialization.safe_globals(_plain_types()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way
        if isinstance(error, (OSError, MemoryError)):
            raise
        found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if found is None and "Unsupported operand" not in str(error):
            raise ValueError(damaged) from error
        what = f"Python objects ({found[1]})" if found else "a pickle of another protocol than torch.save's own"
        raise ValueError(
            f"checkpoint '{path}' holds {what}, which are not loaded because they may run code; where it was made, "
            f"save the weights alone with {SAVE_WEIGHTS}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    require_safetensors()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint '{path}' is damaged ({error}); copy or download it again") from error


def require_safetensors() -> None:
    """Raise unless safetensors is installed.

    Raises:
        ImportError: If it is not.

    """
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "images and weights are kept in safetensors files, but safetensors is not installed; run "
            "`pip install safetensors`"
        ) from error


def _plain_types() -> list[Any]:
    """Types that many checkpoints hold beside the weights; restoring one runs no code of the file."""
    scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    return [
        argparse.Namespace, np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in np.sctypeDict.values()},
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
        *((reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    ]  # fmt: skip
