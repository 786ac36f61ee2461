"""How a call is run: by autograd alone, under a transform of ``torch.func``, in forward mode, or recorded."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.fx import Proxy
from torch.overrides import has_torch_function

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # active in make_fx
_FAKE = torch._C._TorchDispatchModeKey.FAKE
Function = TypeVar("Function", bound=Callable[..., Any])


def is_transformed() -> bool:
    """Tell whether a ``torch.func`` transform is active."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Tell whether tensors may carry tangents."""
    return torch.autograd.forward_ad._current_level >= 0


def is_jit_traced() -> bool:
    """Tell whether ``torch.jit.trace`` runs; the ONNX exporter without dynamo uses it too."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, no-any-return]


def is_recorded() -> bool:
    """Tell whether a call becomes part of a graph: compiled, exported, or traced by ``torch.jit``."""
    return torch.compiler.is_compiling() or is_jit_traced()


def has_values() -> bool:
    """Tell whether tensors have values that Python may read: neither a graph nor fake tensors are being made."""
    modes = (torch._C._get_dispatch_mode(key) for key in (_PROXY, _FAKE))
    return not is_recorded() and all(mode is None for mode in modes)


def needs_registered_ops() -> bool:
    """Tell whether autograd functions of Python lose their gradients or fail, and only registered ops keep them.

    That is so where a graph is exported or traced, under the transforms of ``torch.func``, and in forward mode.
    """
    if is_transformed() or in_forward_mode():
        return True
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return is_jit_traced() or torch._C._get_dispatch_mode(_PROXY) is not None


def as_one_node(function: Function) -> Function:
    """Let ``torch.fx.symbolic_trace`` record a call of a function as one node, as it does with torch's functions."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if has_torch_function(values):  # which proxies have in a torch.fx.Transformer too, where no tracer runs
            for value in values:
                if isinstance(value, Proxy):
                    return value.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    # torch.compile counts recompilations by code object, which each function has its own of.
    call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
