"""Files from which an interrupted run resumes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a process that is stopped leaves the previous one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    torch.save({**state, "torch_rng": torch.get_rng_state()}, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read a checkpoint of tensors and plain values and restore torch's generator; return None if there is no file."""
    if not Path(path).is_file():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch_rng"])
    return state


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def claim_folder(folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Record the settings of a run in its folder, or compare them with those recorded by an earlier run.

    Raises:
        ValueError: If the folder holds a run with other settings; the files of the two would be mixed.

    """
    path = Path(folder) / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n")
        return
    found = json.loads(path.read_text())
    differing = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings ({', '.join(differing)}); choose another folder or remove it"
        )
