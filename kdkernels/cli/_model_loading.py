"""Loads a user's network by name, and its weights from a file."""

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
        name: ``package.module:callable``, optionally from the current folder, or the name of a torchvision or timm
            model. Library models are built without weights.
        arguments: Keyword arguments of the callable, as a JSON object.

    Raises:
        ValueError: If the callable or model does not exist or does not return a network.

    """
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError:
        keywords = None
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
        raise ValueError(f"{name}: module {error.name!r} is neither installed nor in the current folder") from error
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
    known = f"is not in {' or '.join(installed)}" if installed else "needs torchvision or timm; neither is installed"
    raise ValueError(f"model {name!r} {known}. Name a model of your own as package.module:callable")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict into a network, from safetensors or from a torch file of tensors and plain values only.

    A state dict nested in a checkpoint (``"state_dict"``, ``"model"``, ``"student"``) is found. Prefixes added by
    DataParallel and torch.compile are removed.

    Raises:
        ValueError: If the file does not exist or its tensors do not match the network's.

    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
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
        faults = {"missing": missing, "unexpected": unexpected, "different shape": sorted(shapes)}
        details = "; ".join(
            f"{text}: {', '.join(keys[:5])}{' ...' * (len(keys) > 5)}" for text, keys in faults.items() if keys
        )
        raise ValueError(f"{path} does not match {type(model).__name__}: {details}")
    model.load_state_dict(state)


@torch.no_grad()
def outputs_of(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the number of classes of a network.

    Raises:
        ValueError: If the network does not accept such images or does not return logits [B, C].

    """
    parameter = next(model.parameters())
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits = model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:
        raise ValueError(f"the network does not accept images of shape {list(image_shape)}: {error}") from error
    finally:
        for module, mode in training:
            module.training = mode
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            f"the network must return logits [B, C], got {getattr(logits, 'shape', type(logits).__name__)}"
        )
    return logits.shape[1]
