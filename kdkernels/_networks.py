"""What the routines ask of a user's network before and while they use it."""

from itertools import chain

import torch
from torch import Tensor, nn

# What networks raise on inputs that they do not accept; many assert their size.
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError)


class NonFiniteLossError(FloatingPointError):
    """Raised when a loss is NaN or infinite; the state before it is kept.

    Attributes:
        term: Name of the first term that was not finite.
        iteration: Number of the first iteration whose loss was not finite, counted from 1.
        state: What the routine had at the last finite iteration; each routine documents it.

    """

    def __init__(self, message: str, *, term: str, iteration: int, state: object) -> None:
        super().__init__(message)
        self.term = term
        self.iteration = iteration
        self.state = state


class frozen:  # noqa: N801  (used like torch.no_grad)
    """Hold a network in eval mode with frozen parameters, and restore both on exit.

    Modes are changed by the network's own ``train()`` and ``eval()``. Where a module has one of its own, such as a
    layer that merges low-rank weights, its parameters and buffers are given back bit for bit. Gradients still flow
    through the network to its input.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        self._requires_grad = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self._training = [(module, module.training) for module in self.model.modules()]
        self._values: dict[str, Tensor] = {}
        if any(training for _, training in self._training):
            self._values = {name: tensor.detach().clone() for name, tensor in _changed_by_modes(self.model).items()}
            self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        return self.model

    def __exit__(self, *exception: object) -> None:
        for module, training in self._training:  # parents before their children, whose modes they set
            if module.training != training:
                module.train(training)
        if self._values:
            tensors = _changed_by_modes(self.model)
            with torch.no_grad():
                for name, value in self._values.items():
                    if not torch.equal(tensors[name], value):
                        tensors[name].copy_(value)
        for name, parameter in self.model.named_parameters():  # by name, because a mode may make other parameters
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))


def _changed_by_modes(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of the modules whose ``train()`` or ``eval()`` may do more than set a flag."""
    plain = (nn.Module.train, nn.Module.eval)
    return {
        f"{name}.{own}" if name else own: tensor
        for name, module in model.named_modules()
        if (type(module).train, type(module).eval) != plain or {"train", "eval"} & module.__dict__.keys()
        for own, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the floating-point dtype of a network's inputs: those of its first parameter or buffer.

    A network without either is taken to compute on the CPU in torch's default dtype.
    """
    for tensor in chain(model.parameters(), model.buffers()):  # the first alone, in every iteration of a synthesis
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def as_input_of(model: nn.Module, input: Tensor) -> Tensor:
    """Return an input on the device of a network and, if it is floating-point, in its dtype.

    Under ``torch.autocast`` the dtype is left alone, since autocast chooses one for each operation.
    """
    device, dtype = placement(model)
    if not input.is_floating_point() or torch.is_autocast_enabled(device.type):
        return input.to(device)
    return input.to(device, dtype)


def check_finite(model: nn.Module, role: str) -> None:
    """Raise unless every parameter and buffer of a network is finite, and a gradient can pass through it.

    Raises:
        ValueError: If one is not; the message names them. ``role`` says which network it is, such as "teacher".

    """
    tensors = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.is_floating_point()
    }
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(f"{role} has tensors on the meta device, which hold no values; load its weights first")
    if any(tensor.is_inference() for tensor in tensors.values()):
        raise ValueError(
            f"{role} was made inside torch.inference_mode(), so that no gradient can pass through it; use "
            "copy.deepcopy(model), made outside of it"
        )
    finite = [torch.isfinite(tensor.detach()).all().cpu() for tensor in tensors.values()]
    wrong = [name for name, flag in zip(tensors, finite, strict=True) if not flag]
    if wrong:
        raise ValueError(
            f"{role} holds values that are not finite in {', '.join(wrong[:5])}{' ...' * (len(wrong) > 5)}; "
            "load weights from before its training diverged"
        )


@torch.inference_mode(False)
@torch.enable_grad()
def count_classes(model: nn.Module, image_shape: tuple[int, ...], role: str) -> int:
    """Return the number of classes of a network, tried on two images in eval mode.

    Raises:
        ValueError: If it does not accept such images, does not return finite logits [B, C], or no gradient passes
            through it; probabilities are no logits.

    """
    device, dtype = placement(model)
    noise = torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0), device="cpu")
    images = torch.cat([torch.zeros_like(noise), noise]).to(device, dtype).requires_grad_()
    with frozen(model):
        try:
            logits = model(images)
        except REFUSALS as error:
            raise ValueError(
                f"{role} does not accept images of shape {list(image_shape)}: {str(error) or type(error).__name__}"
            ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{role} must return logits [B, C], but returned {got} for {len(images)} images; wrap it in a module that "
            "returns the logits alone"
        )
    if not logits.requires_grad:
        raise ValueError(
            f"{role} returns logits that pass no gradient to its images; remove torch.no_grad() and detach() from its "
            "forward"
        )
    values = logits.detach().float()
    if not torch.isfinite(values).all():
        raise ValueError(f"{role} returns logits that are not finite for an image of standard normal noise")
    if logits.shape[1] > 1 and values.min() >= 0 and torch.allclose(values.sum(1), values.new_ones(()), atol=1e-2):
        raise ValueError(
            f"{role} returns probabilities (each row is positive and sums to 1); expected logits, so leave out its "
            "softmax"
        )
    return logits.shape[1]
