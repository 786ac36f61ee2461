"""What a network's BatchNorm layers report while it runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdkernels._networks import frozen
from kdkernels.inversion._forwards import Forward, Record, Replicas, is_replica, lock, number_of
from kdkernels.inversion._layers import At
from kdkernels.inversion._moments import Reported, tap
from kdkernels.inversion._recomputation import Recomputation, in_backward, in_first_run, joined
from kdkernels.inversion._targets import running_targets


class Recording:
    """Records the statistics of the layers of a network in each of its forwards.

    Args:
        model: The network.
        layers: The layers by name.
        reported: Which statistics.
        uses: Uses of a layer that count.
        at: Whether the statistics are those of the layers' inputs or outputs.
        freeze: Whether to hold the network in eval mode with frozen parameters.

    Attributes:
        latest: The latest forward.

    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        *,
        reported: Reported,
        uses: Literal["all", "last"],
        at: At,
        freeze: bool,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.reported = reported
        self.uses = uses
        self.at: At = at
        self.freeze = freeze
        self._modules = list(layers.values())
        self._channels = [len(module.running_mean) for module in self._modules]  # type: ignore[arg-type]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replicas = Replicas(self._modules)
        self._frozen = frozen(model) if freeze else nullcontext()
        self._reset()

    def start(self) -> None:
        """Watch the network from now on."""
        if self._handles:
            raise RuntimeError("this BatchNormStatistics is already active; create another one")
        self._reset()
        self._frozen.__enter__()
        self._replicas.renew()
        self._replicas.number()
        # Functions, because a copy of the network would copy this object with its methods.
        self._handles = [
            self.model.register_forward_pre_hook(lambda module, arguments: self._enter(module), prepend=True),
            self.model.register_forward_hook(
                lambda module, arguments, output: self._leave(module, output), always_call=True
            ),
        ]
        for index, module in enumerate(self._modules):
            if self.at == "input":
                handle = module.register_forward_pre_hook(self._before(index), with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._after(index))
            self._handles.append(handle)

    def stop(self) -> None:
        """Leave the network as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._replicas.remove()
        self._reset()
        self._frozen.__exit__(None, None, None)

    def _reset(self) -> None:
        self.latest = Forward(known=False)
        self._depth = 0  # of calls of the network inside one another
        self.recomputation = Recomputation(self.layers)

    def read(self) -> list[Record]:
        """Return the records of the latest forward that count, one of each use of a layer.

        Raises:
            RuntimeError: See :meth:`Forward.read`.

        """
        return self.latest.read(self.layers, self.reported.unbiased, self.uses)

    def _enter(self, module: nn.Module) -> None:
        if in_backward() or module is not self.model:
            return
        if self._depth == 0:
            self.latest = Forward(known=True)
        self._depth += 1

    def _leave(self, module: nn.Module, output: Any) -> None:
        if in_backward() or module is not self.model or self._depth == 0:
            return
        if output is None and sys.exc_info()[1] is not None:
            self.latest.failed = True
        self._depth -= 1
        if self._depth == 0:
            self.latest.ended = True

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Mark what runs inside the ``with`` block as one forward, for a network that is not run by calling it."""
        if self._depth == 0:
            self.latest = Forward(known=True)
        self._depth += 1
        try:
            yield
        except BaseException:
            self.latest.failed = True
            raise
        finally:
            self._depth -= 1
            self.latest.ended = self._depth == 0

    def _before(self, index: int) -> Any:
        def tap(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if arguments:
                return (self._tapped(index, module, arguments[0]), *arguments[1:]), keywords
            name = next((name for name, value in keywords.items() if isinstance(value, Tensor)), None)
            if name is None:
                raise ValueError(f"layer {self.layers[index]} was called without a tensor; expected its input")
            return arguments, {**keywords, name: self._tapped(index, module, keywords[name])}

        return tap

    def _after(self, index: int) -> Any:
        def tap(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            if module.training and module is self._modules[index]:
                raise RuntimeError(
                    f"layer {self.layers[index]} ran in train mode, where its output has the same statistics whatever "
                    "its input; at='output' needs it in eval mode, as with freeze=True"
                )
            tapped = self._tapped(index, module, output)
            # A view of the output could not be changed in place, as by the activation that often comes next.
            return tapped.clone() if tapped.requires_grad else tapped

        return tap

    def _forward_of(self, index: int, module: nn.Module) -> Forward | None:
        """Return the forward that a layer or its replica runs in, or None for a copy of the layer with its hooks."""
        if module is self._modules[index]:
            if self._depth == 0 and self.latest.ended and not in_backward():
                self.latest = Forward(known=False)
            return self.latest
        if not is_replica(module):
            return None
        with lock:
            mark = self._replicas.mark_of(module)
            if mark is self._replicas.mark and self._depth == 0 and not in_backward():
                self.latest = Forward(known=True, mark=mark)
                self._replicas.renew()
            return None if mark is None else self.latest

    def _tapped(self, index: int, module: nn.Module, activation: Tensor) -> Tensor:
        """Record the statistics of an activation and return it, with their gradients joined to its own."""
        forward = self._forward_of(index, module)
        if forward is None:
            return activation
        channels = self._channels[index]
        if activation.dim() < 2 or activation.shape[1] != channels:
            raise ValueError(
                f"layer {self.layers[index]} got an activation of shape {list(activation.shape)}; expected [N, C, ...] "
                f"with C = {channels}. Leave it out with layers="
            )
        output, mean, var = tap(activation, self.reported, self.layers[index])
        if in_backward():
            grads = self.recomputation.take(index, mean) if torch.is_grad_enabled() else None
            return output if grads is None else joined(output, mean, var, *grads)
        if in_first_run():
            mean, var = self.recomputation.leave(index, mean, var)
        if torch.compiler.is_compiling() and forward.with_grad and not torch.is_grad_enabled():
            forward.compiled_without_grad = True
        targets = None
        if not self.freeze:
            target_mean, target_var = running_targets(self._modules[index], self.at)
            targets = target_mean.clone(), target_var.clone()
        values = activation.numel() // mean.numel()
        if is_replica(module):
            with lock:
                use, part = forward.number_use_of_replica(module), number_of(module)
                forward.records.append(Record(index, use, values, mean, var, targets, part))
        else:
            forward.records.append(Record(index, forward.number_use(index), values, mean, var, targets))
            if forward.repeated:
                forward.records.clear()  # they cannot be read
        return output
