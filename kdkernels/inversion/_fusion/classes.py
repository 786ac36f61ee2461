"""Modules with another forward, as long as somebody looks."""

import copyreg
import functools
from collections import OrderedDict
from typing import Any

from torch import nn

from kdkernels.inversion._layers import FORWARD

_RECORDING = "kdkernels.inversion._recording"


def _without_own_hooks(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module without the hooks of a recording, which pickle does not know."""
    found = {
        name: {key for key, hook in hooks.items() if getattr(hook, "__module__", "") == _RECORDING}
        for name, hooks in attributes.items()
        if name in ("_forward_hooks", "_forward_pre_hooks")
    }
    kept = {
        name: OrderedDict((key, value) for key, value in hooks.items() if key not in own)
        for start, own in found.items()
        for name, hooks in attributes.items()
        if own and name.startswith(start)
    }
    return {**attributes, **kept}


def has_other_forward(module: nn.Module) -> bool:
    """Tell whether the class of a module is one of :func:`with_forward`."""
    return FORWARD in vars(type(module))


def with_forward(module: nn.Module, forward: Any) -> type[nn.Module]:
    """Return a class for a module that differs from its own by ``forward``, and is not seen in copies and pickles.

    The forward is a function of the module as well, since replicas and copies have the same class.
    """
    original = type(module)
    # torch.compile counts recompilations by code object.
    functools.update_wrapper(forward, original.forward)
    forward.__code__ = forward.__code__.replace(co_name=f"forward of {original.__name__}")

    def reduced(self: Any, protocol: Any) -> Any:
        how = super(kind, self).__reduce_ex__(protocol)
        if isinstance(how, str):
            return how
        make, values, *rest = how
        if rest and isinstance(rest[0], dict):
            rest[0] = _without_own_hooks(rest[0])
        if make is copyreg.__newobj__ and values == (kind,):  # type: ignore[attr-defined]
            # pickle would compare the class with that of the module.
            return (copyreg._reconstructor, (original, object, None), *rest)  # type: ignore[attr-defined]
        values = tuple(original if value is kind else value for value in values)
        return (original if make is kind else make, values, *rest)

    attributes = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduced,
        "forward": forward,
        FORWARD: original.forward,
    }
    make: Any = type(original)
    if any("__init_subclass__" in vars(base) for base in original.__mro__[:-1]):
        # Of which no class of the user is to hear
        kind = make(original.__name__, (nn.Module,), attributes)
        kind.__bases__ = (original,)
    else:
        kind = make(original.__name__, (original,), attributes)
    return kind  # type: ignore[no-any-return]
