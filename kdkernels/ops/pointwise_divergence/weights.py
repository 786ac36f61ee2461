"""Weights of elements: those of a row may be an expanded view, which is kept one."""

import torch
from torch import Tensor

from kdkernels.ops import _tracing
from kdkernels.ops._positions import checked_position_weight


def checked_element_weight(weight: Tensor | None, input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the weight of each element in the dtype that is computed in, or raise; an expanded one stays expanded."""
    fits = isinstance(weight, Tensor) and weight.layout is torch.strided and weight.shape == input.shape
    if weight is None or not fits or _tracing.is_jit_traced():
        return checked_position_weight(weight, input, input.shape, dtype)
    distinct = weight
    for dim, stride in enumerate(weight.stride()):
        if stride == 0 and weight.shape[dim] > 1:
            distinct = distinct.narrow(dim, 0, 1)
    checked = checked_position_weight(distinct, input, distinct.shape, dtype)
    return None if checked is None else checked.expand(input.shape)
