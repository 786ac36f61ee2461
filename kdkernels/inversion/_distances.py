"""The distances of the statistics recorded in a forward from what they are compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.functional import batch_norm_stat_distances
from kdkernels.inversion._forwards import LayerUse, Record
from kdkernels.inversion._layers import At
from kdkernels.inversion._moments import Classes, Over
from kdkernels.inversion._moving_average import MovingAverage
from kdkernels.inversion._targets import Targets, class_targets, given_targets, running_targets
from kdkernels.ops._checks import check_choice, checked_distance, is_readable

Statistics = tuple[Tensor, Tensor]


class Numbers:
    """Numbers on a device, copied there again only when they change: a copy waits for the device."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None
        self.tensor: Tensor | None = None

    def like(self, like: Tensor, numbers: Sequence[float]) -> Tensor:
        """Return the numbers in the dtype and on the device of a tensor."""
        key = (tuple(numbers), like.dtype, like.device)
        if self.tensor is not None and key == self.key:
            return self.tensor
        tensor = torch.tensor(numbers, dtype=like.dtype).to(like.device)
        if not torch.is_inference_mode_enabled():  # autograd saves no inference tensor
            self.key, self.tensor = key, tensor
        return tensor


class Distances:
    """How the statistics of layers are compared with their targets.

    Args:
        layers: The layers by name.
        over: What each of the compared statistics is taken over.
        unbiased: Whether variances are divided by n - 1.
        at: Whether the statistics are those of inputs or outputs.
        fixed: Whether the running statistics are read again only when they change.
        targets: Targets by name; the running statistics for other layers.
        ema: Share of the moving average in what is compared, or None.
        options: Options of :func:`kdkernels.functional.batch_norm_stat_distances`.

    Attributes:
        channels: Number of channels of each layer by name.
        average: Moving average of the statistics, if there is one.

    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        *,
        over: Over,
        unbiased: bool,
        at: At,
        fixed: bool,
        targets: Targets | None,
        ema: float | None,
        options: Mapping[str, Any],
    ) -> None:
        check_choice("over", over, ("batch", "image", "class"))
        checked_distance(**options)
        self.names = list(layers)
        self.modules = list(layers.values())
        self.over: Over = over
        self.unbiased = unbiased
        self.at: At = at
        self.fixed = fixed
        self.options = options
        self.channels = {name: len(module.running_mean) for name, module in layers.items()}  # type: ignore[arg-type]
        self.targets = given_targets(targets, self.channels, by_class=over == "class")
        self.average = None if ema is None else MovingAverage(ema)
        if ema is not None and over != "batch":
            raise ValueError(f"ema is {ema!r}, but over={over!r} has no statistics that last; use over='batch'")
        self.forget_running()

    def forget_running(self) -> None:
        """Read the running statistics again the next time."""
        self._running: dict[tuple[int, ...], tuple[list[tuple[Tensor, int]], Statistics]] = {}

    def use_of(self, record: Record) -> LayerUse:
        """Return the use of a layer that a record is of."""
        return LayerUse(self.names[record.layer], record.use)

    def update_average(self, records: list[Record]) -> None:
        """Make the moving average what is compared in these records."""
        if self.average is None:
            raise ValueError("ema is None, so that there is no moving average to update; expected a share such as 0.9")
        for record in records:
            self.average.update(self.use_of(record), record.mean, record.var)

    def of(self, records: list[Record], labels: Tensor | None = None) -> Tensor:
        """Return the distance of each record: if images are told apart, the mean over them or over their classes."""
        if self.over == "class":
            return self._over_classes(records, labels)
        if labels is not None:
            raise ValueError(f"labels are given, but over={self.over!r} does not use them; leave them out")
        if self.over == "image":
            self._count_images(records)
            return self._measured(records, [(r.mean, r.var) for r in records]).mean(0)
        if self.average is None:
            return self._measured(records, [(r.mean, r.var) for r in records])
        return self._measured(records, [self.average.mixed(self.use_of(r), r.mean, r.var) for r in records])

    def _over_classes(self, records: list[Record], labels: Tensor | None) -> Tensor:
        images = self._count_images(records)
        if labels is None:
            raise ValueError("labels are missing; over='class' needs the label of each image: loss(labels=labels)")
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}; pass torch.tensor(labels)")
        if labels.shape != (images,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be [{images}] of int64, one for each image; got {list(labels.shape)} of {labels.dtype}"
            )
        device = records[0].mean.device
        labels = labels.to(device)
        classes = Classes(labels)
        pairs = []
        for record in records:
            if self.unbiased and is_readable(classes.images) and float(classes.images.min()) * record.values < 2:
                raise ValueError(
                    f"a class has a single value for each channel of layer {self.names[record.layer]}, whose unbiased "
                    "variance is not defined; expected two images of each class, or unbiased=False"
                )
            mean, var = record.mean.to(device), record.var.to(device)
            pairs.append(classes.merged(mean, var, record.values, self.unbiased))
        return classes.mean_of(self._measured(records, pairs, labels))

    def _count_images(self, records: list[Record]) -> int:
        first = records[0]
        for record in records:
            if len(record.mean) != len(first.mean):
                raise ValueError(
                    f"layer {self.names[record.layer]} got a batch of {len(record.mean)} and layer "
                    f"{self.names[first.layer]} one of {len(first.mean)}; over={self.over!r} needs one row for each "
                    "image in every layer. Leave the other layers out with layers="
                )
        return len(first.mean)

    def _measured(self, records: list[Record], pairs: Sequence[Statistics], labels: Tensor | None = None) -> Tensor:
        """Return the distances [records] of statistics [C] of each record, or [N, records] of [N, C]."""
        device = records[0].mean.device
        mean, var = (torch.cat([values.to(device) for values in side], -1) for side in zip(*pairs, strict=True))
        target_mean, target_var = (side.expand(mean.shape) for side in self._targets(records, labels))
        channels = [self.channels[self.names[record.layer]] for record in records]
        losses = batch_norm_stat_distances(
            mean.reshape(-1),
            var.reshape(-1),
            target_mean.reshape(-1),
            target_var.reshape(-1),
            channels * (len(mean) if mean.dim() == 2 else 1),
            **self.options,
        )
        return losses.view(*mean.shape[:-1], len(records))

    def _targets(self, records: list[Record], labels: Tensor | None) -> Statistics:
        """Return the targets of all records one after another, [C], or [N, C] if some depend on the label."""
        order = tuple(record.layer for record in records)
        sources = self._sources(order)
        if sources and order in self._running:
            known, statistics = self._running[order]
            same = (a is b and version == other for (a, version), (b, other) in zip(known, sources, strict=False))
            if len(known) == len(sources) and all(same):
                return statistics
        device = records[0].mean.device
        pairs = [self._target(record, labels) for record in records]
        rows = [len(mean) for mean, _ in pairs if mean.dim() == 2]
        if rows:
            pairs = [(mean.expand(rows[0], -1), var.expand(rows[0], -1)) for mean, var in pairs]
        means, variances = (torch.cat([values.to(device) for values in side], -1) for side in zip(*pairs, strict=True))
        if self.fixed and sources and not rows:
            self._running[order] = sources, (means, variances)
        return means, variances

    def _sources(self, order: tuple[int, ...]) -> list[tuple[Tensor, int]]:
        """Return the tensors that running statistics are made of and their versions; none where there are none."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():  # autograd saves no inference tensor
            return []
        names = ("running_mean", "running_var") + (("weight", "bias") if self.at == "output" else ())
        tensors = [getattr(self.modules[index], name, None) for index in order for name in names]
        found = [tensor for tensor in tensors if tensor is not None]
        return [] if any(t.is_inference() for t in found) else [(t, t._version) for t in found]

    def _target(self, record: Record, labels: Tensor | None) -> Statistics:
        """Return the target of a record, [C], or [N, C] if it depends on the label."""
        given = self.targets.get(record.layer)
        if given is not None and given[0].dim() == 2 and labels is not None:
            return class_targets(self.names[record.layer], *given, labels)
        return given or record.targets or running_targets(self.modules[record.layer], self.at)
