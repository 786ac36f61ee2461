"""Modules with BatchNorm layers inside, whose forward is a graph where it can be."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from kdkernels.inversion._forwards import is_replica
from kdkernels.inversion._fusion.check import Result, difference, tolerance
from kdkernels.inversion._fusion.classes import with_forward
from kdkernels.inversion._fusion.graph import Fused, fuse
from kdkernels.inversion._fusion.nodes import IDENTITY, Activation
from kdkernels.inversion._fusion.trace import (
    Attributes,
    Form,
    NotTraced,
    arguments_of,
    form_of,
    hooks_of,
    trace,
    why_opaque,
)

if TYPE_CHECKING:
    from kdkernels.inversion._fusion.network import Fusion

ATTEMPTS = 4  # at a decision that does not last
KINDS_OF_CALLS = 16
Key = tuple[Form, bool, bool]


class FusedForward:
    """A forward made of a graph.

    Args:
        run: Function of the module and of the tensors that it is called with.
        fused: What it fuses.
        error: Relative difference from the module's own output and statistics.
        through: Modules that the graph looks through, whose attributes are part of it.
        called: Modules among them that are called all the same.
        layers: Layers, whose attributes are read in each run.

    """

    def __init__(
        self,
        run: Callable[..., Any],
        fused: Fused,
        error: float,
        through: set[nn.Module],
        called: nn.Module,
        layers: dict[nn.Module, int],
    ) -> None:
        self.run = run
        self.fused = fused
        self.error = error
        silent = (through | fused.skipped) - {called}
        self._hooks = [hooks for module in silent for hooks in hooks_of(module)]
        fixed = [module for module in through | fused.skipped if module not in layers]
        namespaces: list[dict[str, Any]] = [
            namespace for module in fixed for namespace in (vars(module), module._modules)
        ]
        self._through = [(module, list(module._modules.items())) for module in through]
        self._attributes = [(namespace, tuple(namespace.values())) for namespace in namespaces]

    def is_hooked(self) -> bool:
        """Tell whether there are hooks that it would not run."""
        return any(self._hooks) or bool(_has_any_global_hook())

    def is_current(self) -> bool:
        """Tell whether the modules have the attributes that the graph was made with."""
        return all(
            len(namespace) == len(values) and all(map(operator.is_, namespace.values(), values))
            for namespace, values in self._attributes
        )

    def is_current_in_graph(self) -> bool:
        """Tell the same where ``torch.compile`` records a graph, which is then made again when it changes."""
        if self.is_hooked():
            return False
        for module, children in self._through:
            if module.training:
                return False
            for name, child in children:
                if getattr(module, name) is not child:
                    return False
        return True


class Container:
    """A module with layers inside, and its forwards by the way it is called.

    Attributes:
        forwards: Fused forwards, or why there is none.
        refused: Why there never is one; empty if the reason is that of a module around it.
        waits: Why it is not known yet whether there is one.
        reasons: Why single layers are not fused with what follows them, if none is.

    """

    def __init__(self, fusion: "Fusion", name: str, module: nn.Module) -> None:
        self.fusion = fusion
        self.name = name
        self.module = module
        self.original = type(module)
        self.forward: Callable[..., Any] = self.original.forward
        self.forwards: dict[Key, FusedForward | str] = {}
        self.refused: str | None = None
        self.reasons: dict[int, list[str]] = {}
        self.attempts = 0
        self.waits = "no call of it outside torch.compile has shown whether it can be"
        self.kind = with_forward(module, lambda module, *args, **kwargs: self.run(module, args, kwargs))

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module, its replica, or a copy of it."""
        fused = self._choose(module, args, kwargs)
        if fused is None:
            return self.forward(module, *args, **kwargs)
        return fused.run(module, *(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    def _choose(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FusedForward | None:
        fusion = self.fusion
        if not fusion.active or fusion.plain or self.refused is not None:
            return None
        if module is not self.module and not is_replica(module):
            return None
        form = form_of(args, kwargs)
        if form is None:
            return None
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not tensors:
            return None
        key = form, torch.is_grad_enabled(), torch.is_autocast_enabled(tensors[0].device.type)
        found = self.forwards.get(key)
        if torch.compiler.is_compiling():
            return found if isinstance(found, FusedForward) and found.is_current_in_graph() else None
        if isinstance(found, FusedForward):
            if found.is_hooked():
                return None
            if found.is_current():
                return found
        elif found is not None or len(self.forwards) == KINDS_OF_CALLS:
            return None
        if fusion.deciding or not fusion.can_decide(module, tensors) or self._is_busy():
            return None
        self.waits = "the outputs of its first calls were not finite"
        decision = self._decide(form, args, kwargs, tensors)
        if decision is None:
            return None
        self.forwards[key] = decision
        return decision if isinstance(decision, FusedForward) else None

    def _is_busy(self) -> bool:
        """Tell whether the module is in a state that has no fused forward, and that may pass."""
        if any(module.training for module in self.module.modules()):
            self.waits = "a module inside is in train mode"
        elif _has_any_global_hook():
            self.waits = "there are hooks for all modules"
        else:
            return False
        return True

    def _decide(
        self, form: Form, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> FusedForward | str | None:
        """Return the fused forward, or why there is none; None if this input does not tell."""
        self.attempts += 1
        if self.attempts > ATTEMPTS * (len(self.forwards) + 1):
            return "its attributes change, or its output is not finite"
        why = why_opaque(self.module)
        if why is not None:
            return why
        hooked = [name for name, module in self.module.named_modules() if name and self.fusion.has_hooks(module)]
        if hooked:
            return f"{', '.join(hooked[:3])}{' ...' * (len(hooked) > 3)} inside has hooks"
        through = self.fusion.through(self.module)
        try:
            graph = trace(self.module, form, through)
        except NotTraced as error:
            return str(error)
        self.fusion.deciding = True
        try:
            return self._compare(graph, through, form, args, kwargs, tensors)
        finally:
            self.fusion.deciding = False

    def _compare(
        self,
        graph: fx.Graph,
        through: set[nn.Module],
        form: Form,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
    ) -> FusedForward | str | None:
        try:
            expected = self._tried(lambda values: self._plain(form, values), tensors)
        # The call itself comes next: if the error is one of the module, it raises it, and else describe() has it.
        except Exception as error:
            self.waits = f"its forward raised in a trial without gradients ({type(error).__name__}: {error})"
            return None
        layers = self.fusion.layers
        fused = fuse(graph, self.module, self.fusion.numbers, lambda i: layers[i].activation is IDENTITY, self._make)
        if not fused.parts:
            why = "nothing that could be fused follows its layers"
            self.reasons = fused.reasons
            for module in through:
                self.fusion.containers[module].refused = ""
            self.refused = why
            return why
        run = _compiled(graph, f"<fused forward of {self.original.__name__}>")
        try:
            found = self._tried(lambda values: run(self.module, *values), tensors)
        # A graph that is wrong may fail in any way.
        except Exception as error:
            return f"its graph fails: {type(error).__name__}: {error}"
        bound = tolerance(self.module, tensors)
        distance = difference(found, expected, bound)
        if distance is None:
            return None
        if distance == float("inf"):
            return "its graph gives outputs of another kind"
        if distance > bound:
            return f"its graph gives another output or other statistics (relative difference {distance:.2g})"
        return FusedForward(run, fused, distance, through, self.module, self.fusion.numbers)

    def _plain(self, form: Form, tensors: list[Tensor]) -> Any:
        """Run the module's own forward, without anything fused."""
        args, kwargs = arguments_of(form, tensors)
        self.fusion.plain = True
        try:
            return self.forward(self.module, *args, **kwargs)
        finally:
            self.fusion.plain = False

    def _tried(self, run: Callable[[list[Tensor]], Any], tensors: list[Tensor]) -> Result:
        """Return what a forward returns and records, without leaving a trace of it."""
        attributes = Attributes(self.module.modules())
        buffers = [(b, b._version, b.clone()) for b in self.module.buffers() if not b.is_inference()]
        devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        copies = [tensor.detach().clone() for tensor in tensors]  # which a network may change in place
        try:
            with self.fusion.aside() as records, torch.no_grad(), torch.random.fork_rng(devices):
                output = run(copies)
                return (output, copies), list(records)
        finally:
            attributes.restored()
            with torch.no_grad():
                for buffer, version, values in buffers:
                    if buffer._version != version:
                        buffer.copy_(values)

    def _make(self, index: int, activation: Activation, number: int) -> Callable[..., Tensor]:
        """Return the function that takes the place of a layer and of what follows it."""
        layer = self.fusion.layers[index]

        def fused(module: nn.Module, input: Tensor, residual: Any = None) -> Tensor:
            alike = residual is None or (
                isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype
            )
            if alike and layer.activation is IDENTITY and layer.is_fit(module, input):
                found = layer.fused(module, input, activation, residual)
                if found is not None:
                    return found
            output = module(input)
            return activation(output if residual is None else output + residual)

        fused.__name__ = fused.__qualname__ = f"layer_{number}"  # one for each use, for the graph's code
        return fused


def _compiled(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """Return a graph's code as a function of the module and its tensors."""
    for node in graph.nodes:
        node.type = None  # an annotation may name what only the user's file knows
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, name, "exec"), names)
    return names["forward"]  # type: ignore[no-any-return]
