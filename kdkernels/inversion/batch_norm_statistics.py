"""Statistics of every BatchNorm layer in a forward, and their distance from the running statistics."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from kdkernels._networks import frozen
from kdkernels.functional import batch_norm_tap
from kdkernels.inversion._distances import Distances
from kdkernels.inversion._forwards import Forward, LayerUse, Record, Replicas, is_replica, lock
from kdkernels.inversion._layers import At, Layers, find_layers, targets_of, weights_of
from kdkernels.inversion._recomputation import Recomputation, in_backward, in_first_run, joined
from kdkernels.ops._checks import check_choice
from kdkernels.ops._types import Mode, Moment


class BatchNormStatistics:
    r"""Context manager that compares the statistics of a network's BatchNorm layers with their running statistics.

    Inside the context, every BatchNorm layer reports the mean and variance of its input, computed in one pass whose
    backward is fused into the network's (:func:`kdkernels.functional.batch_norm_tap`). :meth:`loss` sums their
    distances from the running statistics:

    .. math:: R = \sum_l w_l \bigl(\lVert \mu_l - m_l \rVert_2 + \lVert v_l - r_l \rVert_2\bigr)

    for ``mode="l2"``; see :func:`kdkernels.functional.batch_norm_stat_loss` for the other modes.

    The records belong to a forward. A call of the network begins one, and :meth:`loss` is that of the latest; a loss
    stays valid when another forward follows. Where the network is run by something else than a call of it, as in
    ``model.forward_features(x)``, reading the loss ends the forward; if a layer ran twice before, it cannot be told
    whether in one forward or in two, and :meth:`loss` raises. :meth:`forward` marks one. A layer that does not run
    does not count, and one that runs under ``torch.no_grad()`` counts as a constant.

    The parts of a batch in ``DataParallel`` are merged. Activation checkpointing of both kinds is supported if the
    backward runs inside the ``with`` block; with ``use_reentrant=True`` it must be one backward of output and loss.

    Args:
        model: Network with BatchNorm layers that keep running statistics. A frozen batch normalization, or any other
            module with a ``running_mean`` and ``running_var`` for each channel, counts as one.
        mode: Distance: ``"l2"``, ``"squared"`` or ``"gaussian_kl"``.
        moment: Second moment to compare: ``"var"`` or ``"std"``.
        unbiased: Whether the batch variance is divided by n - 1.
        layers: Layers to count: a list of names, a type or a tuple of types, or a function of name and module. By
            default all; ``torch.nn.BatchNorm2d`` leaves BatchNorm1d out, as the published code does.
        uses: Uses of a layer that runs several times in a forward: ``"all"`` count, or the ``"last"``, as in the
            published code.
        at: Whether the statistics are those of the layers' ``"input"``, or of their ``"output"``, which are compared
            with what the layer makes of its running statistics: mean bias, variance weight^2 running_var /
            (running_var + eps). Outputs are those of torch's own layers in eval mode, and are copied.
        freeze: Whether to hold the network in eval mode with frozen parameters. Otherwise it is left as it is and
            gradients reach the parameters; the running statistics are those from before the layer's forward.

    Attributes:
        layers: Names of the layers in the order of ``model.modules()``, which is also the order of the weights.

    Raises:
        TypeError: If ``layers`` is not one of these.
        ValueError: If the model has no BatchNorm layer, or one without running statistics, or an argument is not
            accepted.

    Warns:
        UserWarning: If modules that look like a BatchNorm layer are not counted; it names them.

    On exit the network is what it was before: modes, through its own ``train()`` and ``eval()``, parameters, buffers
    and hooks. Source: Yin et al., "Dreaming to Distill", arXiv 1912.08795.

    Example:
        >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> images = torch.randn(4, 3, 8, 8, requires_grad=True)
        >>> with BatchNormStatistics(teacher) as statistics:
        ...     features = teacher(images)
        ...     (features.mean() + 10 * statistics.loss()).backward()
        >>> list(statistics.layers)
        ['1']

    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Mode = "l2",
        moment: Moment = "var",
        unbiased: bool = False,
        layers: Layers | None = None,
        uses: Literal["all", "last"] = "all",
        at: At = "input",
        freeze: bool = True,
    ) -> None:
        check_choice("mode", mode, ("l2", "squared", "gaussian_kl"))
        check_choice("moment", moment, ("var", "std"))
        check_choice("uses", uses, ("all", "last"))
        check_choice("at", at, ("input", "output"))
        self.model = model
        self.mode: Mode = mode
        self.moment: Moment = moment
        self.unbiased = unbiased
        self.uses = uses
        self.at: At = at
        self.freeze = freeze
        found = find_layers(model, layers, at)
        self.layers = list(found)
        self._modules = list(found.values())
        self._channels = [len(module.running_mean) for module in found.values()]  # type: ignore[arg-type]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._distances = Distances(self._modules, at=at, fixed=freeze, mode=mode, moment=moment)
        self._replicas = Replicas(self._modules)
        self._frozen = frozen(model) if freeze else nullcontext()
        self._reset()

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this BatchNormStatistics is already active; create another one")
        self._reset()
        self._frozen.__enter__()
        self._replicas.renew()
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._replicas.remove()
        self._reset()
        self._frozen.__exit__(kind, error, traceback)

    def _reset(self) -> None:
        self._forward = Forward(known=False)
        self._depth = 0  # of calls of the network inside one another
        self._recomputation = Recomputation(self.layers)
        self._distances.forget_running()

    # What happens in a forward

    def _enter(self, module: nn.Module) -> None:
        if in_backward() or module is not self.model:
            return
        if self._depth == 0:
            self._forward = Forward(known=True)
        self._depth += 1

    def _leave(self, module: nn.Module, output: Any) -> None:
        if in_backward() or module is not self.model or self._depth == 0:
            return
        if output is None and sys.exc_info()[1] is not None:
            self._forward.failed = True
        self._depth -= 1
        if self._depth == 0:
            self._forward.ended = True

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Mark what runs inside the ``with`` block as one forward, for a network that is not run by calling it."""
        if self._depth == 0:
            self._forward = Forward(known=True)
        self._depth += 1
        try:
            yield
        except BaseException:
            self._forward.failed = True
            raise
        finally:
            self._depth -= 1
            self._forward.ended = self._depth == 0

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
            if self._depth == 0 and self._forward.ended and not in_backward():
                self._forward = Forward(known=False)
            return self._forward
        if not is_replica(module):
            return None
        with lock:
            mark = self._replicas.mark_of(module)
            if mark is self._replicas.mark and self._depth == 0 and not in_backward():
                self._forward = Forward(known=True, mark=mark)
                self._replicas.renew()
            return None if mark is None else self._forward

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
        output, mean, var = batch_norm_tap(activation, unbiased=self.unbiased)
        if in_backward():
            grads = self._recomputation.take(index, mean) if torch.is_grad_enabled() else None
            return output if grads is None else joined(output, mean, var, *grads)
        if in_first_run():
            mean, var = self._recomputation.leave(index, mean, var)
        if torch.compiler.is_compiling() and forward.with_grad and not torch.is_grad_enabled():
            forward.compiled_without_grad = True
        targets = None
        if not self.freeze:
            target_mean, target_var = targets_of(self._modules[index], self.at)
            targets = target_mean.clone(), target_var.clone()
        values = activation.numel() // channels
        if is_replica(module):
            with lock:
                use = forward.number_use_of_replica(module)
                forward.records.append(Record(index, use, values, mean, var, targets))
        else:
            forward.records.append(Record(index, forward.number_use(index), values, mean, var, targets))
            if forward.repeated:
                forward.records.clear()  # they cannot be read
        return output

    # What is made of it

    def losses(self) -> dict[LayerUse, Tensor]:
        """Return the distance of each use of a layer in the latest forward, in the order in which they ran.

        The keys are (name of the layer, number of the use, counted from 0); the sum of the values is :meth:`loss`.

        Raises:
            RuntimeError: If the model was not called inside the ``with`` block, or it cannot be told which of the
                records belong to one forward.

        """
        records = self._forward.read(self.layers, self.unbiased, self.uses)
        names = [LayerUse(self.layers[record.layer], record.use) for record in records]
        return dict(zip(names, self._distances.of(records).unbind(), strict=True))

    def loss(self, weights: Sequence[float] | Mapping[str, float] | None = None) -> Tensor:
        """Return the weighted sum over the uses of layers in the latest forward.

        Args:
            weights: One weight for each of :attr:`layers`, or weights by name, 1 for the layers that are not named; all
                1 by default.

        Raises:
            RuntimeError: See :meth:`losses`.
            ValueError: If the number of weights differs from the number of layers, or a name is not that of a layer.

        """
        records = self._forward.read(self.layers, self.unbiased, self.uses)
        losses = self._distances.of(records)
        if weights is None:
            return losses.sum()
        of_layers = weights_of(weights, self.layers)
        chosen = torch.tensor([of_layers[record.layer] for record in records], dtype=losses.dtype)
        return (losses * chosen.to(losses.device)).sum()
