"""The layers of a network whose statistics are compared."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

# Where a module whose class is replaced for a while keeps the forward that its own class has
FORWARD = "_forward_without_fusion"
At = Literal["input", "output"]
Layers = Iterable[str] | type | UnionType | tuple[type, ...] | Callable[[str, nn.Module], bool]
_FORWARDS = (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)  # BatchNorm2d and 3d inherit that of 1d


def find_layers(model: nn.Module, layers: Layers | None, at: At) -> dict[str, nn.Module]:
    """Return the layers of a network to count, by name, in the order of ``model.modules()``.

    Raises:
        ValueError: If the network is a ScriptModule, no layer is chosen, a chosen one has no running statistics, or a
            name is not that of a layer.

    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model is a ScriptModule, made by torch.jit, whose layers cannot be watched; pass the network that it was "
            "made from"
        )
    found, others = {}, []
    for name, module in model.named_modules():
        if _keeps_statistics(module) and (at == "input" or is_affine(module)):
            found[name] = module
        elif _looks_like_one(module):
            others.append(f"{name} ({type(module).__name__})")
    if layers is not None:
        return _chosen(found, layers)
    if others and found:
        taken = "torch's BatchNorm layers alone, whose output is known"
        if at == "input":
            taken = "BatchNorm layers, and modules with a running_mean and running_var for each channel"
        warnings.warn(
            f"the statistics of {', '.join(others)} are not counted: at={at!r} takes {taken}. Choosing layers= "
            "silences this",
            stacklevel=3,
        )
    if not found:
        raise ValueError(
            f"model is {type(model).__name__}, which has no BatchNorm layer; expected at least one BatchNorm1d, "
            "BatchNorm2d, BatchNorm3d or SyncBatchNorm"
            + (f"; those of {', '.join(others)} cannot be compared at={at!r}" if others else "")
        )
    return _with_statistics(found)


def _keeps_statistics(module: nn.Module) -> bool:
    """Tell whether a module is a BatchNorm layer, or has running statistics by channel, as a frozen one has."""
    if isinstance(module, _BatchNorm):
        return True
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return (
        not isinstance(module, _InstanceNorm)
        and isinstance(mean, Tensor)
        and isinstance(var, Tensor)
        and mean.dim() == 1
        and mean.shape == var.shape
    )


def _looks_like_one(module: nn.Module) -> bool:
    return _keeps_statistics(module) or any(
        isinstance(getattr(module, name, None), Tensor) for name in ("running_mean", "running_var")
    )


def is_affine(module: nn.Module) -> bool:
    """Tell whether the output of a layer is known to be an affine function of its input, not an activation of one."""
    forward = getattr(type(module), FORWARD, type(module).forward)
    return isinstance(module, _BatchNorm) and forward in _FORWARDS


def _chosen(found: dict[str, nn.Module], layers: Layers) -> dict[str, nn.Module]:
    if isinstance(layers, str):
        raise ValueError(f"layers is {layers!r}; expected a list of names, such as [{layers!r}]")
    if isinstance(layers, nn.Module) or not (isinstance(layers, Iterable | UnionType) or callable(layers)):
        raise TypeError(
            f"layers is {layers!r}; expected a list of names, a type or a tuple of types, or a function of name and "
            "module"
        )
    kinds = tuple(layers) if isinstance(layers, (tuple, list)) else (layers,)
    if isinstance(layers, (type, UnionType)) or (kinds and all(isinstance(kind, type) for kind in kinds)):
        chosen = {name: module for name, module in found.items() if isinstance(module, kinds)}
    elif callable(layers):
        chosen = {name: module for name, module in found.items() if layers(name, module)}
    else:
        names = list(layers)
        unknown = [name for name in names if name not in found]
        if unknown:
            raise ValueError(f"layers names {unknown}; the layers with statistics are {', '.join(found)}")
        chosen = {name: module for name, module in found.items() if name in names}
    if not chosen:
        raise ValueError(f"layers chooses none of the layers with statistics, {', '.join(found)}")
    return _with_statistics(chosen)


def _with_statistics(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    without = [name for name, module in layers.items() if getattr(module, "running_mean", None) is None]
    if without:
        raise ValueError(
            f"model has layers without running statistics: {without}; expected track_running_stats=True, or layers= "
            "without them"
        )
    lazy = [name for name, module in layers.items() if is_lazy(module.running_mean)]  # type: ignore[arg-type]
    if lazy:
        raise ValueError(f"model has layers whose shape is not known yet: {lazy}; run it once on a batch of images")
    return layers


def weights_of(weights: Sequence[float] | Mapping[str, float], names: list[str]) -> list[float]:
    """Return one weight for each layer.

    Raises:
        ValueError: If their number is another, or a name is not that of a layer.

    """
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise ValueError(f"weights names {unknown}; the layers are {', '.join(names)}")
        return [float(weights.get(name, 1.0)) for name in names]
    if len(weights) != len(names):
        raise ValueError(f"weights has {len(weights)} values; expected one for each of the {len(names)} layers")
    return [float(weight) for weight in weights]
