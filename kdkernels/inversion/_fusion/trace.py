"""The graph of a module's forward, or why there is none that does the same."""

import gc
import operator
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdkernels.inversion._layers import FORWARD

Form = tuple[tuple[int | str, type, Any], ...]
_CONSTANTS = (type(None), bool, int, float, str)
ONE_TENSOR: Form = ((0, Tensor, None),)
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_DEVICES = ("cpu", "cuda", "xpu", "mps")


class NotTraced(Exception):  # noqa: N818  (it is a result, not an error)
    """Says why a module has no graph that does what its forward does."""


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form | None:
    """Return how a module is called: where its tensors are, and its other arguments; None where it takes others."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return ONE_TENSOR
    form: list[tuple[int | str, type, Any]] = []
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for name, value in named:
        if isinstance(value, Tensor):
            form.append((name, Tensor, None))
        elif type(value) in _CONSTANTS:
            form.append((name, type(value), value))
        else:
            return None
    return tuple(form)


def arguments_of(form: Form, tensors: Iterable[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call in this form."""
    values = iter(tensors)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, kind, constant in form:
        value = next(values) if kind is Tensor else constant
        if isinstance(name, int):
            args.append(value)
        else:
            kwargs[name] = value
    return args, kwargs


def has_hooks(module: nn.Module) -> bool:
    """Tell whether calling a module does more than run its forward."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """Return the dictionaries that hold the hooks of a module's calls."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def why_opaque(module: nn.Module) -> str | None:
    """Return why it is not known what a call of a module does, apart from its hooks; None if its class says it."""
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrized"
    if isinstance(module, torch.jit.ScriptModule):
        return "is a ScriptModule"
    if kind.__module__.split(".")[0] == "torch" and not isinstance(module, nn.Sequential | fx.GraphModule):
        return f"is {kind.__name__} of torch"
    if "forward" in vars(module):
        return "has a forward of its own, set on the object"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    return None


class Attributes:
    """The attributes of modules as they are now, with what lists and dictionaries among them hold."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._saved = [
            (module, dict(vars(module)), [(value, _contents(value)) for value in vars(module).values()])
            for module in modules
        ]

    def restored(self) -> bool:
        """Give the modules these attributes back, and tell whether they had others."""
        different = False
        for module, attributes, containers in self._saved:
            for container, contents in containers:
                if contents is not None and not _same(_contents(container), contents):
                    different = True
                    _fill(container, contents)
            if not _same(vars(module), attributes):
                different = True
                vars(module).clear()
                vars(module).update(attributes)
        return different


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, OrderedDict, set, deque) else None


def _same(found: Any, expected: Any) -> bool:
    """Tell whether two containers hold the same objects."""
    if isinstance(found, set):
        return found == expected  # type: ignore[no-any-return]
    if len(found) != len(expected):
        return False
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(found[key] is expected[key] for key in expected)
    return all(map(operator.is_, found, expected))


def _fill(container: Any, contents: Any) -> None:
    container.clear()
    container.update(contents) if isinstance(container, dict | set) else container.extend(contents)


def trace(module: nn.Module, form: Form, through: set[nn.Module]) -> fx.Graph:
    """Return the graph of a module's forward, which looks through these modules and calls the others.

    Raises:
        NotTraced: If the forward decides by values, works with other things than tensors, keeps something, or runs a
            part of it under a context that a graph does not have.

    """
    tracer = _Tracer(form, through)
    tracer.traced_func_name = FORWARD if hasattr(type(module), FORWARD) else "forward"
    attributes = Attributes(module.modules())
    applied = False

    def notice(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal applied
        applied = applied or frame.f_code is _APPLY

    profile: Any = sys.getprofile()
    why = None
    sys.setprofile(notice)
    try:
        graph = tracer.trace(module)
    # A forward may do anything with a value that it takes for a tensor, so that any error may come.
    except Exception as error:
        why = str(error) if isinstance(error, NotTraced) else f"its forward cannot be traced: {_first_line(error)}"
    finally:
        if profile is None or callable(profile):
            sys.setprofile(profile)
        else:
            profile.enable()  # that of cProfile, which is no function
    if attributes.restored():
        why = why or "its forward changes attributes"
    if why is None and applied:
        why = "its forward applies an autograd function, whose backward would be lost"
    if _forgotten(tracer.made) and why is None:
        why = "its forward keeps an activation"
    if why is not None:
        raise NotTraced(why)
    return graph


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _forgotten(made: list[weakref.ref[fx.Proxy]]) -> bool:
    """Remove what is left of a tracing from lists and dictionaries of the user, and tell whether there was some."""
    if all(reference() is None for reference in made):
        return False
    gc.collect()
    kept = [proxy for reference in made if (proxy := reference()) is not None]
    for proxy in kept:
        for holder in gc.get_referrers(proxy):
            if isinstance(holder, list) and holder is not kept:
                holder[:] = [value for value in holder if value is not proxy]
            elif isinstance(holder, dict):
                for key in [key for key, value in holder.items() if value is proxy]:
                    del holder[key]
    return bool(kept)


def _context() -> tuple[Any, ...]:
    """Return the contexts that torch's functions depend on, which a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES),
        torch.is_autocast_cache_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.get_default_dtype(),
    )


class _Proxy(fx.Proxy):
    """A value whose augmented assignments change it in place, as they change a tensor."""

    def __hash__(self) -> int:
        return id(self)


def _augmented(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(_Proxy, f"__i{_name}__", _augmented(getattr(operator, f"__i{_name}__")))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, form: Form, through: set[nn.Module]) -> None:
        super().__init__()
        self.form = form
        self.through = through
        self.made: list[weakref.ref[fx.Proxy]] = []
        self.context = _context()
        self.thread = threading.get_ident()  # torch.fx replaces Module.__call__, for other threads too

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.through

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        count = sum(kind is Tensor for _, kind, _ in self.form)
        tensors = [self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(count)]
        args, kwargs = arguments_of(self.form, tensors)
        return lambda *values: root_fn(*values, **kwargs), [self.root, *args]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise NotTraced(
                "a part of its forward runs under a context, such as torch.no_grad(), torch.autocast or activation "
                "checkpointing"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not self._is_of_root(a):
            raise NotTraced("its forward makes tensors that do not depend on its input")
        return super().create_arg(a)

    def _is_of_root(self, tensor: Tensor) -> bool:
        return (
            any(tensor is other for other in (*self.root.parameters(), *self.root.buffers()))
            or tensor in self.tensor_attrs
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.made.append(weakref.ref(proxy))
        return proxy
