"""Input statistics of every BatchNorm layer in a forward, and their distance from the running statistics."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from kdkernels._networks import frozen
from kdkernels.functional import batch_norm_stat_distances, batch_norm_tap
from kdkernels.ops._types import Mode, Moment

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BatchNormStatistics:
    r"""Context manager that collects the input statistics of all BatchNorm layers of a network.

    Inside the context, the network is in eval mode and its parameters are frozen. Every BatchNorm1d, BatchNorm2d,
    BatchNorm3d and SyncBatchNorm layer reports the mean and variance of its input, computed in one pass whose backward
    is fused into the network's (:func:`kdkernels.functional.batch_norm_tap`). :meth:`loss` sums their distances from
    the running statistics:

    .. math:: R = \sum_l w_l \bigl(\lVert \mu_l - m_l \rVert_2 + \lVert v_l - r_l \rVert_2\bigr)

    for ``mode="l2"``; see :func:`kdkernels.functional.batch_norm_stat_loss` for the other modes. On exit the network's
    modes, gradients and buffers are exactly what they were before.

    Args:
        model: Network with BatchNorm layers that keep running statistics.
        mode: Distance: ``"l2"``, ``"squared"`` or ``"gaussian_kl"``.
        moment: Second moment to compare: ``"var"`` or ``"std"``.
        unbiased: Whether the batch variance is divided by n - 1.

    Attributes:
        layers: Names of the layers in the order of ``model.modules()``, which is also the order of the weights.

    Raises:
        ValueError: If the model has no BatchNorm layer, or one without running statistics.

    Example::

        with BatchNormStatistics(teacher) as statistics:
            logits = teacher(images)
            (cross_entropy(logits, labels) + 10 * statistics.loss()).backward()

    """

    def __init__(self, model: nn.Module, *, mode: Mode = "l2", moment: Moment = "var", unbiased: bool = False) -> None:
        self.model = model
        self.mode: Mode = mode
        self.moment: Moment = moment
        self.unbiased = unbiased
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, BATCH_NORM)]
        if not named:
            raise ValueError(
                f"model is {type(model).__name__}, which has no BatchNorm layer; expected at least one BatchNorm1d, "
                "BatchNorm2d, BatchNorm3d or SyncBatchNorm"
            )
        without = [name for name, module in named if module.running_mean is None]
        if without:
            raise ValueError(
                f"model has layers without running statistics: {without}; expected track_running_stats=True"
            )
        self.layers = [name for name, _ in named]
        self._modules = [module for _, module in named]
        self._records: list[tuple[int, Tensor, Tensor]] = []
        self._running: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._frozen = frozen(model)

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this BatchNormStatistics is already active; create another one")
        self._frozen.__enter__()
        self._handles = [self.model.register_forward_pre_hook(self._start, prepend=True)]
        for index, module in enumerate(self._modules):
            self._handles.append(module.register_forward_pre_hook(self._tap_of(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._records = []
        self._running = {}
        self._frozen.__exit__()

    def _start(self, module: nn.Module, arguments: Any) -> None:
        self._records = []

    def _tap_of(self, index: int) -> Any:
        def tap(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            activation, mean, var = batch_norm_tap(arguments[0], unbiased=self.unbiased)
            self._records.append((index, mean, var))
            return (activation, *arguments[1:])

        return tap

    def _running_statistics(self, order: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the concatenated running statistics of the layers that ran, cached because the model is frozen."""
        if order not in self._running:
            modules = [self._modules[index] for index in order]
            means, variances = [m.running_mean for m in modules], [m.running_var for m in modules]
            self._running[order] = torch.cat(means), torch.cat(variances)  # type: ignore[arg-type]
        return self._running[order]

    def losses(self) -> Tensor:
        """Return the distance of each layer, in execution order of the latest forward.

        Raises:
            RuntimeError: If the model was not called inside the ``with`` block.

        """
        if not self._records:
            raise RuntimeError("no BatchNorm layer has run yet; call the model inside the with block first")
        order, means, variances = zip(*self._records, strict=True)
        running_mean, running_var = self._running_statistics(order)
        return batch_norm_stat_distances(
            torch.cat(means),
            torch.cat(variances),
            running_mean,
            running_var,
            [len(mean) for mean in means],
            mode=self.mode,
            moment=self.moment,
        )

    def loss(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return the weighted sum over the layers of the latest forward; a layer that ran twice counts twice.

        Args:
            weights: One weight for each of :attr:`layers`; all 1 by default.

        Raises:
            RuntimeError: If the model was not called inside the ``with`` block.
            ValueError: If the number of weights differs from the number of layers.

        """
        losses = self.losses()
        if weights is None:
            return losses.sum()
        if len(weights) != len(self.layers):
            raise ValueError(
                f"weights has {len(weights)} values; expected one for each of the {len(self.layers)} layers"
            )
        chosen = torch.tensor([float(weights[index]) for index, _, _ in self._records], dtype=losses.dtype)
        return (losses * chosen.to(losses.device)).sum()
