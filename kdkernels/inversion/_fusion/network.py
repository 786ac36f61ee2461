"""A network whose BatchNorm layers run together with what follows them, and with their statistics."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.functional import batch_norm_act_stats
from kdkernels.inversion._forwards import Record, is_replica
from kdkernels.inversion._fusion.classes import has_other_forward
from kdkernels.inversion._fusion.containers import Container, FusedForward
from kdkernels.inversion._fusion.layers import Layer
from kdkernels.inversion._fusion.trace import has_hooks, hooks_of, why_opaque
from kdkernels.inversion._moments import Reported
from kdkernels.inversion._recomputation import in_backward
from kdkernels.ops._registry import explain
from kdkernels.ops._tracing import has_values, is_transformed

Compute = Callable[[], tuple[Tensor, Tensor, Tensor]]


class Fusion:
    """Gives modules other forwards while it is active.

    Each layer gets one that computes its statistics with it. Each module with layers inside gets one that is made of
    its graph, if the first call shows that it computes the same. Modules are given another class, so that a forward
    sees the module or the replica that it is a forward of, and nothing but the class has to be given back.

    Args:
        model: Network.
        layers: Layers by name.
        record: Function of the number of a layer, the module, its input and a function that computes the output and the
            statistics; records them and returns the output, or None if the module is a copy of the layer.
        tap: Function of the number of a layer, the module and its arguments, which returns the arguments with the input
            tapped.
        aside: Returns a context in which records are kept apart, and yields their list.
        reported: Which statistics are recorded.

    Attributes:
        active: Whether the modules have the other forwards.
        plain: Whether nothing is fused all the same, and the layers are tapped.
        deciding: Whether a forward is being compared.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        *,
        record: Callable[[int, nn.Module, Tensor, Compute], Tensor | None],
        tap: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
        aside: Callable[[], AbstractContextManager[list[Record]]],
        reported: Reported,
    ) -> None:
        self.model = model
        self.record = record
        self.tap = tap
        self.aside = aside
        self.reported = reported
        self.active = self.plain = self.deciding = False
        self.numbers = {module: index for index, module in enumerate(layers.values())}
        self.layers: list[Layer] = []
        self.containers: dict[nn.Module, Container] = {}
        self.opaque: dict[str, str] = {}
        self.why: str | None = None  # nothing is fused
        self._names = list(layers)
        self._structure: list[Any] = []
        self._given: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []

    def start(self) -> set[int]:
        """Give the modules their other forwards, and return the numbers of the layers that tap themselves."""
        self.why = None
        if any(has_other_forward(module) for module in self.model.modules()):
            self.why = "another BatchNormStatistics is active on the network"
            return set()
        slow = {device for device in map(_device_of, self.numbers) if not _has_kernel(device)}
        if slow:
            self.why = f"the fused layer has no kernel for {', '.join(sorted(slow))}, where taps are faster"
            return set()
        structure = [
            (name, id(module), type(module), module.training, has_hooks(module))
            for name, module in self.model.named_modules()
        ]
        if structure != self._structure:
            self._structure = structure
            self.layers = [
                Layer(self, index, name, module)
                for name, (module, index) in zip(self._names, self.numbers.items(), strict=True)
            ]
            self._find_containers()
        layers = [layer for layer in self.layers if layer.replaceable]
        places: list[Layer | Container] = [*layers, *self.containers.values()]
        for place in places:
            place.module.__class__ = place.kind
            self._given.append((place.module, place.kind, place.original))
        self.active = True
        return {layer.index for layer in layers}

    def stop(self) -> None:
        """Give the modules their own classes back."""
        self.active = False
        for module, kind, original in self._given:
            if type(module) is kind:
                module.__class__ = original
        self._given = []

    def _find_containers(self) -> None:
        self.containers, self.opaque = {}, {}
        for name, module in self.model.named_modules():
            if module in self.numbers or not any(inner in self.numbers for inner in module.modules()):
                continue
            why = why_opaque(module)
            if why is None:
                self.containers[module] = Container(self, name, module)
            elif type(module).forward is not nn.Module.forward:  # as that of a list of modules is
                self.opaque[name] = why

    def through(self, module: nn.Module) -> set[nn.Module]:
        """Return the modules that a module's graph looks through: those with layers inside, and itself."""
        return {
            inner
            for inner in module.modules()
            if inner is module or (inner in self.containers and why_opaque(inner) is None and not has_hooks(inner))
        }

    def has_hooks(self, module: nn.Module) -> bool:
        """Tell whether a module has hooks of users, who would see that it runs more often."""
        own = module in self.numbers and not has_other_forward(module)
        hooks = [hook for hooks in hooks_of(module) for hook in hooks.values()]
        # Those of torch compute weights, as the older forms of weight and spectral normalization do.
        return sum(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks) > int(own)

    def can_decide(self, module: nn.Module, tensors: Sequence[Tensor]) -> bool:
        """Tell whether a forward can be tried now, and its results compared."""
        return not (
            not has_values()
            or is_replica(module)
            or in_backward()
            or is_transformed()
            or any(tensor.is_meta for tensor in tensors)
            or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        )

    # What is fused

    def describe(self) -> str:
        """Return what is fused, layer by layer, and why not more."""
        if self.why is not None:
            return f"Nothing is fused: {self.why}."
        fused = [
            (container, found)
            for container in self.containers.values()
            for found in container.forwards.values()
            if isinstance(found, FusedForward)
        ]
        lines = []
        for container in self.containers.values():
            name = f"{container.name or 'the network'} ({container.original.__name__})"
            if container.refused:
                lines.append(f"{name}: {container.refused}")
            errors = [found.error for found in container.forwards.values() if isinstance(found, FusedForward)]
            if errors:
                lines.append(f"{name}: traced; it differs from its own output by {max(errors):.1e} (relative)")
            if not container.forwards and container.refused is None and container.module is self.model:
                lines.append(f"{name}: not traced yet, because {container.waits}")
            reasons = [why for why in container.forwards.values() if isinstance(why, str) and why != container.refused]
            lines += [f"{name}: not traced, because {why}" for why in dict.fromkeys(reasons)]
        lines += [f"{name or 'the network'}: not traced, because it {why}" for name, why in self.opaque.items()]
        for layer in self.layers:
            parts = [part for _, found in fused for part in found.fused.parts.get(layer.index, ())]
            reasons = [why for _, found in fused for why in found.fused.reasons.get(layer.index, ())]
            reasons += [why for place in self.containers.values() for why in place.reasons.get(layer.index, ())]
            lines.append(f"{layer.name or 'the network'}: {_described(layer, parts, reasons)}")
        return "\n".join(lines)


def _device_of(module: nn.Module) -> str:
    return module.running_mean.device.type  # type: ignore[return-value]


def _has_kernel(device_type: str) -> bool:
    """Tell whether the fused layer is more than operations of PyTorch on a device; on a CPU it saves memory anyway."""
    return device_type == "cpu" or explain(device_type)[batch_norm_act_stats.__name__][0] != "reference"


def _described(layer: Layer, parts: list[str], reasons: list[str]) -> str:
    why = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
    if parts:
        return f"{', '.join(dict.fromkeys(parts))}{why}"
    if layer.activation is not None:
        own = f" + {layer.activation}" if layer.activation.name is not None else " alone"
        return f"BatchNorm{own}{why}"
    return f"tapped, because it {layer.why}" if layer.decided else "decided when it runs"
