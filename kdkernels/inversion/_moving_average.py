"""An exponential moving average of the statistics of layers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kdkernels.inversion._forwards import LayerUse
from kdkernels.ops._checks import check_floating, check_number


class MovingAverage:
    """The moving average that a share of what is compared comes from.

    Args:
        share: Share of the average.

    Attributes:
        statistics: Averages of mean and variance of each use of a layer.

    """

    def __init__(self, share: float) -> None:
        check_number("ema", share)
        if not 0 <= share < 1:
            raise ValueError(f"ema is {share!r}; expected a number in [0, 1), such as 0.9")
        self.share = float(share)
        self.statistics: dict[LayerUse, tuple[Tensor, Tensor]] = {}

    def mixed(self, use: LayerUse, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is compared: the statistics with the average mixed in, if there is one yet."""
        if use not in self.statistics:
            return mean, var
        averages = (values.to(mean.device, mean.dtype) for values in self.statistics[use])
        mixed = [(1 - self.share) * now + self.share * then for now, then in zip((mean, var), averages, strict=True)]
        return mixed[0], mixed[1]

    def update(self, use: LayerUse, mean: Tensor, var: Tensor) -> None:
        """Make the average what is compared now."""
        with torch.inference_mode(False), torch.no_grad():
            mixed = self.mixed(use, mean, var)
            if use not in self.statistics:
                self.statistics[use] = (mixed[0].clone(), mixed[1].clone())
                return
            # In place, for a CUDA graph that reads it
            for then, now in zip(self.statistics[use], mixed, strict=True):
                then.copy_(now)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by ``"<layer>.<use>.mean"`` and ``"<layer>.<use>.var"``."""
        return {
            f"{use.layer}.{use.use}.{name}": values
            for use, pair in self.statistics.items()
            for name, values in zip(("mean", "var"), pair, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor], channels: Mapping[str, int]) -> None:
        """Replace the averages.

        Args:
            state: What :meth:`state_dict` returns.
            channels: Number of channels of each layer.

        Raises:
            TypeError: If a value is not a floating-point tensor.
            ValueError: If a key is not accepted, one of a pair is missing, or a shape does not fit the layer.

        """
        pairs: dict[LayerUse, dict[str, Tensor]] = {}
        for key, values in state.items():
            layer, use, which = ("", "", "", *key.rsplit(".", 2))[-3:]
            if layer not in channels or not use.isdecimal() or which not in ("mean", "var"):
                raise ValueError(
                    f"state has the key {key!r}; expected <layer>.<use>.mean and .var, where the layers are "
                    f"{', '.join(channels)}"
                )
            check_floating(f"state[{key!r}]", values)
            if values.shape != (channels[layer],):
                raise ValueError(f"state[{key!r}] has shape {list(values.shape)}; expected [{channels[layer]}]")
            pairs.setdefault(LayerUse(layer, int(use)), {})[which] = values.detach().clone()
        for of, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(f"state has only the {next(iter(pair))} of {of.layer}.{of.use}; expected both")
        self.statistics = {of: (pair["mean"], pair["var"]) for of, pair in pairs.items()}
