"""BatchNorm layers that run together with their statistics."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdkernels.functional import batch_norm_act_stats
from kdkernels.inversion._forwards import is_replica
from kdkernels.inversion._fusion.check import activation_in
from kdkernels.inversion._fusion.classes import with_forward
from kdkernels.inversion._fusion.nodes import IDENTITY, Activation
from kdkernels.inversion._fusion.trace import Attributes, why_opaque
from kdkernels.inversion._layers import is_affine
from kdkernels.inversion._moments import check_values
from kdkernels.inversion._recomputation import in_backward

if TYPE_CHECKING:
    from kdkernels.inversion._fusion.network import Fusion


class Layer:
    """A layer whose statistics are recorded, by one op with its own computation where that is known.

    Attributes:
        activation: What the layer applies to what it normalizes, which is nothing in torch's own; None if it does
            something else, or it is not known yet.
        own: Whether it is one of torch's.
        decided: Whether it is known.
        replaceable: Whether the layer may get another forward.
        tried: The attributes that it had when it was tried, which what it does depends on.
        dtype: The dtype that it was tried in, which that of its output may depend on; None if it need not be tried.
        why: Why the layer cannot be fused; None if it can.

    """

    def __init__(self, fusion: "Fusion", index: int, name: str, module: nn.Module) -> None:
        self.fusion = fusion
        self.index = index
        self.name = name
        self.module = module
        self.original = type(module)
        self.forward: Callable[..., Any] = self.original.forward
        why = why_opaque(module)
        if why is not None and why.endswith("of torch") and is_affine(module):
            why = None
        self.why = why
        self.replaceable = why is None
        self.own = is_affine(module)
        self.decided = why is not None or self.own
        self.tried: dict[str, int] = {}
        self.dtype: torch.dtype | None = None
        self.activation: Activation | None = IDENTITY if why is None and self.own else None
        self.kind = with_forward(module, lambda module, *args, **kwargs: self.run(module, args, kwargs))

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer, its replica, or a copy of it, which records nothing."""
        fusion = self.fusion
        if not fusion.active or not (module is self.module or is_replica(module)):
            return self.forward(module, *args, **kwargs)
        input = None
        if len(args) + len(kwargs) == 1:
            (input,) = args or kwargs.values()
        if isinstance(input, Tensor):
            if not self.own and not torch.compiler.is_compiling():
                self._decide(module, input)
            if not fusion.plain and self.activation is not None and self.is_fit(module, input):
                output = self.fused(module, input, self.activation)
                if output is not None:
                    return output
        args, kwargs = fusion.tap(self.index, module, args, kwargs)
        return self.forward(module, *args, **kwargs)

    def is_fit(self, module: Any, input: Tensor) -> bool:
        """Tell whether the layer is one to fuse in this call: in eval mode, with parameters that get no gradient."""
        if module.training or not input.dtype.is_floating_point or self.dtype not in (None, input.dtype):
            return False
        parameters = module.running_mean, module.running_var, *self._affine(module)
        return not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters))

    def fused(
        self, module: Any, input: Tensor, activation: Activation, residual: Tensor | None = None
    ) -> Tensor | None:
        """Return activation(layer(input) + residual) and record the statistics of the input; None for a copy."""

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            check_values(input, self.fusion.reported, self.name)
            if hasattr(module, "_check_input_dim"):
                module._check_input_dim(input)
            return batch_norm_act_stats(
                input,
                module.running_mean,
                module.running_var,
                *self._affine(module),
                eps=getattr(module, "eps", 0.0),
                activation=activation.name,  # type: ignore[arg-type]
                negative_slope=activation.negative_slope,
                residual=residual,
                **self.fusion.reported._asdict(),
            )

        output = self.fusion.record(self.index, module, input, compute)
        if output is not None and in_backward() and output._is_view():
            return output.clone()  # a view of another function's output could not be changed in place
        return output

    @staticmethod
    def _affine(module: Any) -> tuple[Tensor | None, Tensor | None]:
        return getattr(module, "weight", None), getattr(module, "bias", None)

    def _decide(self, module: Any, input: Tensor) -> None:
        """Find out what the layer does by trying it, unless that is known."""
        if self.decided and self.dtype is input.dtype and self.tried == _public(self.module):
            return
        if module.training or not self.fusion.can_decide(module, (input,)):
            return
        self.activation, self.dtype = None, input.dtype
        parameters = module.running_mean, module.running_var, *self._affine(module)
        shape = (input.shape[1],) if input.dim() > 1 else ()
        self.decided, self.tried = True, _public(module)
        self.why = "is not one of torch's layers, and does something else than they do and a known activation"
        if not all(p is None or (isinstance(p, Tensor) and p.shape == shape) for p in parameters):
            return
        attributes = Attributes(module.modules())
        buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        activation = None
        try:
            activation = activation_in(module, lambda x: self.forward(module, x), input)
        # It may fail in any way on numbers that it was not made for; if it fails on its input, the call raises it.
        except Exception as error:
            self.why = f"fails when it is tried on other numbers ({type(error).__name__}: {error})"
        changed = attributes.restored()
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                changed = True
                buffer.copy_(values)
        if changed:
            self.why = "changes its attributes"
        elif activation is not None:
            self.activation, self.why = activation, None


def _public(module: nn.Module) -> dict[str, int]:
    """Return the identities of a module's own attributes and children."""
    attributes = {name: id(value) for name, value in vars(module).items() if not name.startswith("_")}
    return attributes | {name: id(child) for name, child in module._modules.items()}
