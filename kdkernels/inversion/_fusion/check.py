"""Whether a fused network computes what the network computes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.functional import batch_norm_act_stats
from kdkernels.inversion._forwards import Record
from kdkernels.inversion._fusion.nodes import IDENTITY, Activation, activation_of

Result = tuple[Any, list[Record]]
_COMPARED = (bool, int, float, str, tuple, torch.dtype, torch.device)
_CANDIDATES = (IDENTITY, *(Activation(name) for name in ("relu", "relu6", "leaky_relu", "silu", "hardswish")))


def tolerance(module: nn.Module, tensors: Sequence[Tensor]) -> float:
    """Return the largest relative difference that rounding explains: half of the digits of the coarsest dtype.

    A network adds to the rounding of its layers, and two orders of the same operations differ by some units in the last
    place in each; a wrong graph differs in its first digits.
    """
    dtypes = [tensor.dtype for tensor in (*tensors, *module.parameters()) if tensor.is_floating_point()]
    devices = {tensor.device.type for tensor in tensors}
    dtypes += [torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)]
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def difference(found: Result, expected: Result, bound: float) -> float | None:
    """Return the largest relative difference of two runs' outputs and statistics, or None if it is not a number.

    It is infinite where they differ in kind. The difference of a tensor is in units of its norm. Statistics differ by
    more where values are rounded: a mean in units of the standard deviation, and a variance in units of the product of
    both, or of the squared mean if that is rounded to ``bound``.
    """
    (output, records), (expected_output, expected_records) = found, expected
    leaves, expected_leaves = list(_leaves(output)), list(_leaves(expected_output))
    layers = [(record.layer, record.use) for record in records]
    if layers != [(record.layer, record.use) for record in expected_records]:
        return float("inf")
    if list(map(type, leaves)) != list(map(type, expected_leaves)):
        return float("inf")
    differences = []
    for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
        if not isinstance(leaf, Tensor):
            if leaf is not expected_leaf and not (type(leaf) in _COMPARED and leaf == expected_leaf):
                return float("inf")
            continue
        if leaf.shape != expected_leaf.shape or leaf.dtype != expected_leaf.dtype:
            return float("inf")
        differences.append(_relative(leaf, expected_leaf))
    for record, other in zip(records, expected_records, strict=True):
        spread = other.var.clamp_min(0).sqrt()
        rounding = spread * other.mean + bound * other.mean.square()
        differences += [
            _relative(record.mean, other.mean, torch.linalg.vector_norm(spread)),
            _relative(record.var, other.var, torch.linalg.vector_norm(rounding)),
        ]
    if not differences:
        return float("inf")
    device = differences[0].device
    largest = torch.stack([value.to(device) for value in differences]).max().item()
    return largest if largest == largest else None


def _leaves(output: Any) -> Iterator[Any]:
    """Yield the tensors and other values in an output, and the types and keys of what holds them."""
    if is_dataclass(output) and not isinstance(output, Mapping | type):
        output = {type(output): None, **vars(output)}
    if isinstance(output, Mapping | list | tuple):
        yield type(output)
        if isinstance(output, Mapping):
            yield tuple(output)
            output = list(output.values())
        for value in output:
            yield from _leaves(value)
    else:
        yield output


def _relative(found: Tensor, expected: Tensor, spread: Tensor | float = 0.0) -> Tensor:
    wide = torch.float32 if found.device.type == "mps" else torch.float64
    a, b = found.detach().to(wide), expected.detach().to(wide)
    if a.is_complex() or not found.dtype.is_floating_point:
        return torch.where((a != b).any(), float("inf"), 0.0).to(wide)
    error, scale = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b) + spread
    return torch.where(error == 0, 0.0, error / scale)


def normalized(module: Any, input: Tensor, activation: Activation) -> Tensor:
    """Return the output of a layer that normalizes by its running statistics and then activates."""
    return batch_norm_act_stats(
        input,
        module.running_mean,
        module.running_var,
        getattr(module, "weight", None),
        getattr(module, "bias", None),
        eps=float(getattr(module, "eps", 0.0)),
        activation=activation.name,  # type: ignore[arg-type]
        negative_slope=activation.negative_slope,
    ).output


def activation_in(module: Any, forward: Callable[[Tensor], Any], input: Tensor) -> Activation | None:
    """Return the activation that a layer applies to what it normalizes, or None if it does something else.

    It is found by values and gradients, on the input and on one that is normalized to numbers from -8 to 8, which tell
    the activations apart.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _activation_in(module, forward, input)


def _activation_in(module: Any, forward: Callable[[Tensor], Any], input: Tensor) -> Activation | None:
    shape = (1, -1, *[1] * (input.dim() - 2))
    mean, var, weight, bias = (
        values.detach().float().view(shape) if isinstance(values, Tensor) else torch.tensor(default)
        for values, default in (
            (module.running_mean, 0.0),
            (module.running_var, 1.0),
            (getattr(module, "weight", None), 1.0),
            (getattr(module, "bias", None), 0.0),
        )
    )
    noise = torch.rand(input.shape, generator=torch.Generator().manual_seed(0)).to(input.device) * 16 - 8
    scale = weight / (var + float(getattr(module, "eps", 0.0))).sqrt()
    spread = torch.where(scale.abs() > 1e-3, (noise - bias) / scale, noise) + mean
    samples = [input.detach().clone(), spread.to(input.dtype)]
    bound = tolerance(module, samples)
    expected = [_with_gradient(forward, sample) for sample in samples]
    if any(pair is None for pair in expected):
        return None
    inside = [activation_of(child) for child in module.modules() if child is not module]
    for candidate in dict.fromkeys([*filter(None, inside), *_CANDIDATES]):
        found = [_with_gradient(partial(normalized, module, activation=candidate), sample) for sample in samples]
        if all(_agree(pair, other, bound) for pair, other in zip(found, expected, strict=True)):
            return candidate
    return None


def _with_gradient(forward: Callable[[Tensor], Any], input: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the output and a gradient, or None if the output is not a tensor like the input."""
    leaf = input.clone().requires_grad_()
    output = forward(leaf * 1)  # which may be changed in place
    if not isinstance(output, Tensor) or output.shape != input.shape or output.dtype != input.dtype:
        return None
    if not output.requires_grad:
        return None
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    (grad,) = torch.autograd.grad(output, leaf, weights)
    return output.detach(), grad


def _agree(found: tuple[Tensor, Tensor] | None, expected: tuple[Tensor, Tensor] | None, bound: float) -> bool:
    assert expected is not None
    return found is not None and all(bool(_relative(a, b) <= bound) for a, b in zip(found, expected, strict=True))
