"""Modules with coefficients: scalars that belong to a formula and are no weights."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kdkernels.ops import _tracing


def coefficient_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of coefficients on a device: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def shown(value: object) -> object:
    """Return a coefficient as ``repr`` shows it."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() != 0:
        return f"tensor of shape {tuple(value.shape)}"
    plain = type(value) in (Tensor, Parameter) and not value.is_meta
    return f"{value.item():g}" if plain and _tracing.has_values() else "?"


class Coefficients(Module):
    """A module whose coefficients move with it but keep their value: ``.half()`` and the like are for weights."""

    def set_coefficient(self, name: str, value: object) -> None:
        """Set an argument; a tensor becomes a buffer, outside checkpoints as numbers are."""
        if isinstance(value, Tensor) and not isinstance(value, Parameter):
            self.register_buffer(name, value, persistent=False)
        else:
            setattr(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; a number for a coefficient that is a buffer is written into it.

        A compiled module would be compiled again for another buffer.
        """
        buffer = self.__dict__.get("_buffers", {}).get(name)
        kind = Integral if buffer is not None and not buffer.dtype.is_floating_point else Real
        if buffer is not None and buffer.numel() == 1 and isinstance(value, kind):
            buffer.fill_(float(value))
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]

    def initial_value(self, name: str) -> float:
        """Return the first value of a coefficient: NaN, which losses refuse, if a tensor without values was given."""
        return math.nan if self._buffers[name].dtype.is_floating_point else 0  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self._buffers.update({name: buffer.to(torch.float32) for name, buffer in exact.items()})
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            assert moved is not None
            dtype = coefficient_dtype(moved.device) if buffer.dtype == torch.float64 else buffer.dtype
            self._buffers[name] = moved.to(dtype) if buffer.is_meta else buffer.to(moved.device, dtype)
            if buffer.is_meta and not moved.is_meta:  # new memory, which holds anything
                self._buffers[name].fill_(self.initial_value(name))  # type: ignore[union-attr]
        return self
