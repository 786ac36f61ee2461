"""What a network's BatchNorm layers report while it runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdkernels._networks import frozen
from kdkernels.inversion._forwards import Forward, Record, Replicas, is_replica, lock, number_of
from kdkernels.inversion._fusion.network import Compute, Fusion
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
        fuse: Whether to fuse layers with their statistics and with what follows them, where that can be done.

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
        fuse: bool,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.reported = reported
        self.uses = uses
        self.at: At = at
        self.freeze = freeze
        self.fuse = fuse
        self._modules = list(layers.values())
        self._channels = [len(module.running_mean) for module in self._modules]  # type: ignore[arg-type]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replicas = Replicas(self._modules)
        self._frozen = frozen(model) if freeze else nullcontext()
        self._fusion: Fusion | None = None
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fusion": None}  # it is of this network, and made when it is needed

    def start(self) -> None:
        """Watch the network from now on."""
        if self._handles:
            raise RuntimeError("this BatchNormStatistics is already active; create another one")
        self._reset()
        self._frozen.__enter__()
        try:
            self._watch()
        except BaseException:
            self.stop()
            raise

    def _watch(self) -> None:
        self._replicas.renew()
        self._replicas.number()
        # Functions, because a copy of the network would copy this object with its methods.
        self._handles = [
            self.model.register_forward_pre_hook(lambda module, arguments: self._enter(module), prepend=True),
            self.model.register_forward_hook(
                lambda module, arguments, output: self._leave(module, output), always_call=True
            ),
        ]
        fused = self._start_fusion()
        for index, module in enumerate(self._modules):
            if index in fused:
                continue
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
        if self._fusion is not None:
            self._fusion.stop()
        self._replicas.remove()
        self._reset()
        self._frozen.__exit__(None, None, None)

    def _start_fusion(self) -> set[int]:
        """Replace what can be fused, and return the numbers of the layers that need no tap."""
        if self._why_not_fused() is not None:
            return set()
        if self._fusion is None:
            self._fusion = Fusion(
                self.model,
                dict(zip(self.layers, self._modules, strict=True)),
                record=self._recorded,
                tap=self._tapped_arguments,
                aside=self._aside,
                reported=self.reported,
            )
        return self._fusion.start()

    def _why_not_fused(self) -> str | None:
        if not self.fuse:
            return "fuse=False"
        if self.at == "output":
            return "at='output' compares what the layers return"
        return None if self.freeze else "freeze=False leaves the network trainable, and fused layers train nothing"

    def describe(self) -> str:
        """Return what is fused, and why not more."""
        why = self._why_not_fused()
        if why is not None:
            return f"Nothing is fused: {why}."
        return "Nothing is fused outside the with block." if self._fusion is None else self._fusion.describe()

    def _reset(self) -> None:
        self._is_trial = False
        self.latest = Forward(known=False)
        self._depth = 0  # of calls of the network inside one another
        self.recomputation = Recomputation(self.layers)

    @contextmanager
    def _aside(self) -> Iterator[list[Record]]:
        """Keep what is recorded in the block apart from the latest forward."""
        latest, depth = self.latest, self._depth
        self.latest, self._depth, self._is_trial = Forward(known=True), 1, True
        try:
            yield self.latest.records
        finally:
            self.latest, self._depth, self._is_trial = latest, depth, False

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
        return lambda module, arguments, keywords: self._tapped_arguments(index, module, arguments, keywords)

    def _tapped_arguments(
        self, index: int, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (self._tapped(index, module, arguments[0]), *arguments[1:]), keywords
        name = next((name for name, value in keywords.items() if isinstance(value, Tensor)), None)
        if name is None:
            raise ValueError(f"layer {self.layers[index]} was called without a tensor; expected its input")
        return arguments, {**keywords, name: self._tapped(index, module, keywords[name])}

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
        """Return an activation whose statistics are recorded, with their gradients joined to its own."""
        output = self._recorded(index, module, activation, lambda: tap(activation, self.reported, self.layers[index]))
        return activation if output is None else output

    def _recorded(self, index: int, module: nn.Module, activation: Tensor, compute: Compute) -> Tensor | None:
        """Record the statistics of an activation, which are computed with an output, and return the output.

        Return None if the module is a copy of the layer; nothing is computed then.
        """
        forward = self._forward_of(index, module)
        if forward is None:
            return None
        channels = self._channels[index]
        if activation.dim() < 2 or activation.shape[1] != channels:
            raise ValueError(
                f"layer {self.layers[index]} got an activation of shape {list(activation.shape)}; expected [N, C, ...] "
                f"with C = {channels}. Leave it out with layers="
            )
        output, mean, var = compute()
        if in_backward():
            grads = self.recomputation.take(index, mean) if torch.is_grad_enabled() else None
            return output if grads is None else joined(output, mean, var, *grads)
        if in_first_run() and not self._is_trial:
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
