"""Ops and the backends that compute them.

An op is defined once, by :func:`define`: its schema, its fake implementation and its autograd formula. Each backend
is an overload of it, ``torch.ops.kdkernels.<op>.<backend>``. A public function picks the overload; the autograd
formula calls the overload of the same backend, even if another has been chosen in the meantime.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdkernels.ops import _autograd, _loader, _tracing

Backend = Literal["auto", "native", "triton", "reference"]
BACKENDS = ("native", "triton", "reference")

_library = torch.library.Library("kdkernels", "DEF")
_ops: dict[str, "Op"] = {}
_requested: str = "auto"
_debug: bool = False


class Op:
    """An op with an overload for each backend."""

    def __init__(self, name: str, forward_mode: Callable[..., Any] | None, composed_of: str | None) -> None:
        self.name = name
        self.forward_mode = forward_mode
        self.composed_of = composed_of
        packet = getattr(torch.ops.kdkernels, name)
        self.overloads: dict[str, Any] = {backend: getattr(packet, backend) for backend in BACKENDS}
        self.functions: dict[str, type[torch.autograd.Function]] = {}
        self.applied: dict[str, Callable[..., Any]] = {}

    def run(self, backend: str, *arguments: Any) -> Any:
        """Compute with a backend.

        In eager mode an autograd function calls the overload, which costs half as much as a registered formula and
        works under ``torch.func``. A graph that is compiled or traced records the overload itself.
        """
        has_tangents = _tracing.in_forward_mode()
        if has_tangents and self.forward_mode is not None:
            return self.forward_mode(*arguments)
        if self.functions:
            if has_tangents or _tracing.is_transformed():
                if torch.compiler.is_dynamo_compiling():
                    _allow_in_graph()
                return _apply_function(self.name, backend, *arguments)
            if not _tracing.is_recorded():
                if torch.is_grad_enabled():
                    return self.applied[backend](*arguments)
                return _without_autograd(self.overloads[backend], arguments)
        return self.overloads[backend](*arguments)

    def compute(self, backend: str, *arguments: Any) -> Any:
        """Compute below autograd, in the implementation of an op that is composed of others."""
        return _without_autograd(self.overloads[backend], arguments)

    def run_on(self, device: torch.device, *arguments: Any) -> Any:
        """Compute with the backend chosen for a device."""
        return self.run(self.choose(device), *arguments)

    def choose(self, device: torch.device) -> str:
        """Return the backend for a device: the requested one, or the first available."""
        for backend in BACKENDS:
            if _requested in ("auto", backend) and self.available(backend, device):
                return backend
        raise RuntimeError(
            f"the backend {_requested!r} was requested, but {self.name} cannot use it on {device}: "
            f"{self.why_not(_requested, device)}. set_backend('auto') uses the first available backend."
        )

    def available(self, backend: str, device: torch.device) -> bool:
        """Tell whether a backend has this op for a device."""
        if self.composed_of is not None:
            return find(self.composed_of).available(backend, device)
        if backend == "reference":
            return True
        if (self.name, backend, device.type) not in _kernels:
            return False
        return backend != "native" or device.type != "cuda" or _loader.why_not_device(device.index) is None

    def why_not(self, backend: str, device: torch.device) -> str:
        """Return why a backend is not available."""
        if self.composed_of is not None:
            return find(self.composed_of).why_not(backend, device)
        reason = None
        if backend == "native":
            reason = _loader.why_missing(device.type)
            if reason is None and device.type == "cuda":
                reason = _loader.why_not_device(device.index)
        elif backend == "triton" and device.type == "cuda":
            reason = _loader.why_no_triton()
        name = "Triton" if backend == "triton" else backend
        return reason or f"kdkernels has no {name} kernel of {self.name} for devices of type {device.type!r}"


def find(name: str) -> Op:
    """Return an op by its name; how an op that is composed of others finds them."""
    return _ops[name]


def returns(cls: type[tuple[Tensor, ...]]) -> type[tuple[Tensor, ...]]:
    """Decorate the named tuple of a function's results, so that ``torch.export.save`` can serialize it."""
    torch.utils._pytree._register_namedtuple(cls, serialized_type_name=f"kdkernels.functional.{cls.__name__}")
    return cls


def _without_autograd(overload: Any, arguments: tuple[Any, ...]) -> Any:
    """Call an overload where autograd records nothing, without its formula, which would only pass the call on."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*arguments)


def _apply_function(name: str, backend: str, *arguments: Any) -> Any:
    return _ops[name].functions[backend].apply(*arguments)


def _allow_in_graph() -> None:
    """Let a compiled transform call the autograd function as it is.

    Dynamo would look into it, take the transformed tensors for constants, and drop the backward without a word.
    """
    torch.compiler.allow_in_graph(_apply_function)


# Run while Dynamo traces, as torch.compiler.assume_constant_result would have it; see _loader.why_not_device.
_allow_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _function(
    overload: Any,
    setup: Callable[..., None],
    formula: Callable[..., Any],
    forward_formula: Callable[..., Any] | None,
) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            if _tracing.is_transformed() or _tracing.is_recorded():
                return overload(*arguments)
            return _without_autograd(overload, arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return formula(ctx, *cotangents)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            if forward_formula is None:
                raise NotImplementedError(
                    f"kdkernels::{overload._opname} has no forward-mode derivative (jvp, jacfwd, hessian, dual tensors)"
                    "; use reverse mode instead: vjp, jacrev, jacrev(jacrev(f)), torch.autograd.grad"
                )
            return forward_formula(ctx, *tangents)

    Function.__name__ = Function.__qualname__ = f"{overload._opname}_{overload._overloadname}"
    return Function


_kernels: set[tuple[str, str, str]] = set()


def find_kernels() -> None:
    """Record which devices each overload has a kernel for; called after the libraries are loaded."""
    for op in _ops.values():
        for backend in op.overloads:
            for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA")):
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{op.name}.{backend}", key):
                    _kernels.add((op.name, backend, device_type))


def define(
    name: str,
    signature: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    forward_mode: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
    triton: bool = True,
    composed_of: str | None = None,
) -> Op:
    """Define an op for every backend.

    Args:
        name: Name of the op.
        signature: Signature without the name, such as ``(Tensor input) -> Tensor``.
        reference: Implementation in PyTorch, for any device.
        fake: Shapes and dtypes of the results, from fake tensors; it checks the shapes of the arguments.
        setup_context: Function that saves what the backward needs; ``ctx.backend`` is set before it is called.
        backward: Autograd formula; ``ctx.backend`` is the backend of the forward.
        forward_mode: Function in differentiable PyTorch that runs instead where tensors may carry tangents.
        jvp: Forward-mode formula, from the context and the tangents of all arguments; with neither, they raise.
        triton: Whether ``triton.py`` of the op's folder, if there is one, has this op.
        composed_of: Name of the op that ``reference`` calls. Then ``reference`` serves every backend that this op has:
            it gets the name of the backend before the arguments.

    """
    for backend in BACKENDS:
        _library.define(f"{name}.{backend}{signature}")
    op = _ops[name] = Op(name, forward_mode, composed_of)
    for backend in BACKENDS:
        qualified = f"kdkernels::{name}.{backend}"
        torch.library.register_fake(qualified, fake, lib=_library)
        if backward is not None:
            setup = _with_backend(backend, setup_context)
            torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)
            function = op.functions[backend] = _function(op.overloads[backend], setup, backward, jvp)
            op.applied[backend] = _autograd.plain_apply(function)
    if composed_of is not None:
        for backend in BACKENDS:
            _library.impl(f"{name}.{backend}", partial(reference, backend), "CompositeExplicitAutograd")
        return op
    _library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
    package = reference.__module__.rpartition(".")[0]
    has_triton = triton and importlib.util.find_spec(f"{package}.triton") is not None
    for key in _loader.triton_keys() if has_triton else ():
        _library.impl(f"{name}.triton", _triton_launcher(package, name), key)
    return op


def _triton_launcher(package: str, name: str) -> Callable[..., Any]:
    """Return the function ``name`` of an op's ``triton.py``, which is imported at the first call."""

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{package}.triton"), name)(*arguments)

    return launch


def _with_backend(backend: str, setup_context: Callable[..., None] | None) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def _checked(backend: str) -> str:
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; accepted are {', '.join(map(repr, get_args(Backend)))}")
    return backend


class set_backend:  # noqa: N801  (used like torch.set_grad_enabled)
    """Choose the backend of all ops, for the process or inside a ``with`` block.

    Args:
        backend: ``"auto"`` uses the first of native, triton and reference that has the op for the device. ``"native"``
            (C++ on the CPU, CUDA C++ on a GPU), ``"triton"`` and ``"reference"`` (pure PyTorch, any device) never fall
            back: if the backend does not have an op, calling it raises ``RuntimeError`` with the reason. The initial
            choice is the environment variable ``KDKERNELS_BACKEND``, or ``"auto"``.

    The choice applies to the whole process, not to a thread. A backward pass uses the backend of its forward.

    """

    def __init__(self, backend: Backend) -> None:
        global _requested
        self._previous = _requested
        _requested = _checked(backend)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _requested
        _requested = self._previous


def get_backend() -> str:
    """Return the requested backend, ``"auto"`` unless set otherwise."""
    return _requested


def set_debug(enabled: bool) -> None:
    """Check tensor values on GPUs too, at the cost of a synchronization in every call.

    A label out of range or a temperature tensor that is not positive raises on the CPU. On a GPU the loss is NaN
    instead, unless this is switched on.
    """
    global _debug
    _debug = bool(enabled)


def checks_values(device: torch.device) -> bool:
    """Tell whether to check values before calling a kernel that does not check them itself."""
    return _debug and device.type != "cpu"


def values_are_visible(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's values may be read here: on the CPU, or on a device if debugging is on."""
    return tensor.device.type == "cpu" or _debug


def explain(device_type: str) -> dict[str, tuple[str, str]]:
    """Return, for each op, the backend that it uses on a type of device, and why."""
    device, result = torch.device(device_type), {}
    for name, op in _ops.items():
        if name.endswith("_backward"):
            continue
        try:
            chosen = op.choose(device)
        except RuntimeError as error:
            result[name] = ("none", str(error))
            continue
        better = BACKENDS[: BACKENDS.index(chosen)] if _requested == "auto" else ()
        reason = "; ".join(f"not {b}: {op.why_not(b, device)}" for b in better)
        if _requested != "auto":
            reason = "requested"
        result[name] = (chosen, reason or "the first choice")
    return result


_requested = _checked(os.environ.get("KDKERNELS_BACKEND", "auto"))
