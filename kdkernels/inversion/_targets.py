"""Statistics to compare with: those of the layers themselves, or given ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdkernels.inversion._layers import At
from kdkernels.ops._checks import check_floating, check_number, is_readable

Targets = Mapping[str, tuple[Tensor, Tensor]]


def running_targets(module: Any, at: At) -> tuple[Tensor, Tensor]:
    """Return the mean and variance that a layer's statistics are compared with.

    For outputs, what normalization by the running statistics and the affine function make of them.
    """
    mean, var = module.running_mean, module.running_var
    if at == "input":
        return mean, var
    weight, bias = module.weight, module.bias
    var = var / (var + module.eps)
    if weight is not None:
        var = var * weight.detach().square()
    return torch.zeros_like(mean) if bias is None else bias.detach(), var


def given_targets(
    targets: Targets | None, channels: Mapping[str, int], *, by_class: bool
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return copies of the given targets by the number of the layer.

    Args:
        targets: Targets by name.
        channels: Number of channels of each layer by name.
        by_class: Whether a target may have a row for each class.

    Raises:
        TypeError: If they are not pairs of floating-point tensors by name.
        ValueError: If a name is not that of a layer, or a shape is not accepted.

    """
    if targets is None:
        return {}
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets is a {type(targets).__name__}; expected {{name of a layer: (mean, var)}}")
    unknown = [name for name in targets if name not in channels]
    if unknown:
        raise ValueError(f"targets names {unknown}; the layers are {', '.join(channels)}")
    given = {}
    for layer, (name, size) in enumerate(channels.items()):
        if name not in targets:
            continue
        pair = targets[name]
        if not isinstance(pair, (tuple, list)):
            raise TypeError(f"targets[{name!r}] is a {type(pair).__name__}; expected the pair (mean, var)")
        if len(pair) != 2:
            raise ValueError(f"targets[{name!r}] holds {len(pair)}; expected the pair (mean, var)")
        for which, tensor in zip(("mean", "var"), pair, strict=True):
            _check_target(f"the {which} of targets[{name!r}]", tensor, size, by_class)
        if pair[0].shape != pair[1].shape:
            raise ValueError(
                f"targets[{name!r}] has a mean of shape {list(pair[0].shape)} and a var of shape "
                f"{list(pair[1].shape)}; they must be the same"
            )
        given[layer] = (pair[0].detach().clone(), pair[1].detach().clone())
    return given


def _check_target(name: str, tensor: Tensor, channels: int, by_class: bool) -> None:
    check_floating(name, tensor)
    rows = by_class and tensor.dim() == 2 and len(tensor) > 0 and tensor.shape[1] == channels
    if tensor.shape != (channels,) and not rows:
        also = f", or [classes, {channels}]" if by_class else "; one row for each class needs over='class'"
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{channels}]{also}")
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient is computed for it; detach it")


def class_targets(name: str, mean: Tensor, var: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a target [classes, C] that belong to labels [N]; NaN for a label that has none.

    Raises:
        ValueError: If a label on the CPU has none.

    """
    known = (labels >= 0) & (labels < len(mean))
    if is_readable(known) and not bool(known.all()):
        raise ValueError(
            f"labels are from {int(labels.min())} to {int(labels.max())}; targets[{name!r}] has rows for the classes "
            f"0 to {len(mean) - 1}"
        )
    rows = torch.where(known, labels, 0).to(mean.device)
    there = known[:, None].to(mean.device)
    return torch.where(there, mean[rows], torch.nan), torch.where(there, var[rows], torch.nan)


def demixed_targets(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    momentum: float = 0.1,
    values: Mapping[str, int] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Batch statistics of a training step, from the running statistics before and after it.

    A BatchNorm layer in train mode moves its running statistics s by :math:`s' = (1 - m)\,s + m\,b` with the momentum m
    and the statistics b of the batch. So

    .. math:: b = \frac{s' - (1 - m)\,s}{m}

    are statistics of the batch, which federated learning reveals and which are compared with by the ``targets`` of
    :class:`BatchNormStatistics`. The variance is the unbiased one, divided by n - 1, because that is what enters a
    running variance: compare with ``unbiased=True``, or give ``values``. Rounding errors of the running statistics
    grow by 1 / m. Source: NVlabs/DeepInversion, federated learning, with m = 0.1.

    Args:
        before: State dict of the network before the step.
        after: State dict of the network after it.
        momentum: Momentum of the layers.
        values: Number n of values per channel by layer, batch size times positions; variances are then divided by n.

    Returns:
        (mean, var) of the batch by layer, in the dtype of the running statistics.

    Raises:
        ValueError: If momentum is not in (0, 1], the networks have other layers or shapes, there is none with running
            statistics, a layer counts another number of batches than one between them, or ``values`` lacks a layer.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        >>> before = {name: value.clone() for name, value in network.state_dict().items()}
        >>> features = network(torch.randn(8, 3, 6, 6))
        >>> targets = demixed_targets(before, network.state_dict())
        >>> statistics = BatchNormStatistics(network, targets=targets, unbiased=True)

    """
    check_number("momentum", momentum)
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum is {momentum!r}; expected a number in (0, 1], such as the layers' momentum")
    suffix = "running_mean"
    keys = {**before, **after}
    layers = [key[: -len(suffix)] for key in keys if key == suffix or key.endswith("." + suffix)]
    if not layers:
        raise ValueError("before and after have no running statistics; expected state dicts with BatchNorm layers")
    demixed = {}
    for layer in layers:
        name = layer.removesuffix(".")
        _check_one_step(layer, before, after)
        pair = []
        for key in (layer + "running_mean", layer + "running_var"):
            if key not in before or key not in after or before[key].shape != after[key].shape:
                raise ValueError(f"before and after differ in {key}; expected state dicts of the same network")
            old, new = before[key].detach().double(), after[key].detach().double()
            pair.append((new - (1 - momentum) * old.to(new.device)) / momentum)
        if values is not None:
            if name not in values:
                raise ValueError(f"values lacks the layer {name!r}; expected its number of values per channel")
            pair[1] = pair[1] * ((values[name] - 1) / values[name])
        dtype = after[layer + suffix].dtype
        demixed[name] = (pair[0].to(dtype), pair[1].to(dtype))
    return demixed


def _check_one_step(layer: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    key = layer + "num_batches_tracked"
    if key in before and key in after:
        steps = int(after[key]) - int(before[key])
        if steps != 1:
            raise ValueError(
                f"{key} grows by {steps} from before to after; expected 1, because the statistics of several batches "
                "cannot be told apart. Copy the tensors of the state dict before the step"
            )
