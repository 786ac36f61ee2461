"""The distances of the statistics recorded in a forward from what they are compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdkernels.functional import batch_norm_stat_distances
from kdkernels.inversion._forwards import Record
from kdkernels.inversion._layers import At, targets_of
from kdkernels.ops._types import Mode, Moment


class Distances:
    """How the statistics of layers are compared with their running statistics.

    Args:
        modules: The layers.
        at: Whether the statistics are those of inputs or outputs.
        fixed: Whether the running statistics stay the same between two calls of :meth:`forget_running`.
        mode: See :class:`kdkernels.inversion.BatchNormStatistics`.
        moment: See :class:`kdkernels.inversion.BatchNormStatistics`.

    """

    def __init__(self, modules: Sequence[nn.Module], *, at: At, fixed: bool, mode: Mode, moment: Moment) -> None:
        self.modules = modules
        self.at: At = at
        self.fixed = fixed
        self.mode: Mode = mode
        self.moment: Moment = moment
        self.forget_running()

    def forget_running(self) -> None:
        """Read the running statistics again the next time."""
        self._running: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def of(self, records: list[Record]) -> Tensor:
        """Return the distance of each record."""
        device = records[0].mean.device
        means, variances = [r.mean.to(device) for r in records], [r.var.to(device) for r in records]
        return batch_norm_stat_distances(
            torch.cat(means),
            torch.cat(variances),
            *self._targets(records),
            [len(mean) for mean in means],
            mode=self.mode,
            moment=self.moment,
        )

    def _targets(self, records: list[Record]) -> tuple[Tensor, Tensor]:
        """Return the concatenated targets of records."""
        order = tuple(record.layer for record in records)
        if order in self._running:
            return self._running[order]
        device = records[0].mean.device
        pairs = [r.targets or targets_of(self.modules[r.layer], self.at) for r in records]
        means, variances = (torch.cat([values.to(device) for values in side]) for side in zip(*pairs, strict=True))
        if self.fixed:
            self._running[order] = means, variances
        return means, variances
