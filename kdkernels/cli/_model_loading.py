"""Users' networks by name, and their weights from files."""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_model(name: str, arguments: str = "{}") -> nn.Module:
    """Build a network.

    Args:
        name: ``package.module:callable``, looked up from the current folder too; or the name of a model of torchvision
            or timm, whichever is installed and has it, built without weights.
        arguments: keyword arguments for the callable, as a JSON object.

    Raises:
        ValueError: there is no such callable or model, or it does not return a network.

    """
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"model arguments must be a JSON object such as '{{\"width\": 16}}', got {arguments!r}"
        ) from error
    if not isinstance(keywords, dict):
        raise ValueError(f"model arguments must be a JSON object such as '{{\"width\": 16}}', got {arguments!r}")
    model = _from_import(name, keywords) if ":" in name else _from_library(name, keywords)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def _from_import(name: str, keywords: dict[str, Any]) -> Any:
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(f"{name}: there is no module {error.name!r}, neither installed nor in this folder") from error
    if not callable(getattr(module, attribute, None)):
        raise ValueError(f"{name}: {module_name} has no callable {attribute!r}")
    return getattr(module, attribute)(**keywords)


def _from_library(name: str, keywords: dict[str, Any]) -> Any:
    installed = [library for library in ("torchvision", "timm") if importlib.util.find_spec(library) is not None]
    if "torchvision" in installed:
        from torchvision import models

        if name in models.list_models():
            return models.get_model(name, weights=None, **keywords)
    if "timm" in installed:
        import timm

        if timm.is_model(name):
            return timm.create_model(name, pretrained=False, **keywords)
    where = " and ".join(installed) if installed else "neither torchvision nor timm, which are not installed,"
    raise ValueError(f"{name!r}: {where} knows no such model; give your own as package.module:callable")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict into a network: safetensors, or a torch file of tensors and plain values only.

    A state dict inside a checkpoint (``"state_dict"``, ``"model"``, ``"student"``) is found, and the prefixes that
    DataParallel and torch.compile add are removed.

    Raises:
        ValueError: there is no such file, or its tensors are not those of the network.

    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r}")
    state: dict[str, Any]
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model", "student"):
        inner = state.get(key)
        if isinstance(inner, dict):
            state = inner
    for prefix in ("module.", "_orig_mod."):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [k for k in expected.keys() & state.keys() if expected[k].shape != getattr(state[k], "shape", None)]
    if missing or unexpected or shapes:
        faults = {"missing": missing, "not in the network": unexpected, "of another shape": sorted(shapes)}
        told = "; ".join(
            f"{text}: {', '.join(keys[:5])}{' ...' * (len(keys) > 5)}" for text, keys in faults.items() if keys
        )
        raise ValueError(f"{path} does not fit {type(model).__name__}: {told}")
    model.load_state_dict(state)


@torch.no_grad()
def outputs_of(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the number of classes that a network tells apart.

    Raises:
        ValueError: the network cannot take such images, or does not return logits [B, C].

    """
    parameter = next(model.parameters())
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits = model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:
        raise ValueError(f"the network cannot take images of shape {list(image_shape)}: {error}") from error
    finally:
        for module, mode in training:
            module.training = mode
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"the network must return logits [B, C], got {getattr(logits, 'shape', type(logits).__name__)}"
        )
    return logits.shape[1]
