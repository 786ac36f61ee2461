"""A network as the synthesis runs it: its memory format, its precision, and whether it is compiled."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from kdkernels._memory_format import MEMORY_FORMATS, MemoryFormat, weights_in, why_not_channels_last
from kdkernels._networks import check_finite, count_classes, placement
from kdkernels.ops._checks import check_choice

Autocast = Literal["bf16", "fp16", "auto"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Whether autocast="auto" takes bf16 on CPUs that compute in it; set by the accuracy on the digits.
AUTO_TAKES_BF16_ON_CPU = True


class Execution(TypedDict, total=False):
    """How a synthesis runs, as opposed to what it optimizes; see :class:`DeepInversion`."""

    memory_format: MemoryFormat
    autocast: Autocast | None
    compile: bool
    cuda_graph: bool | Literal["auto"]


def autocast_dtype(
    autocast: Autocast | None, device: torch.device, dtype: torch.dtype, role: str = "network"
) -> torch.dtype | None:
    """Return the dtype of autocast for a network of that dtype; None for no autocast of its own.

    Raises:
        ValueError: If ``autocast`` is not accepted, or the network is not in fp32.

    """
    if autocast is None:
        return None
    check_choice("autocast", autocast, ("bf16", "fp16", "auto"))
    if autocast == "auto":
        return torch.bfloat16 if dtype == torch.float32 and _computes_in_bf16(device) else None
    if dtype != torch.float32:
        raise ValueError(
            f"autocast is {autocast!r}, but the {role} is in {dtype}; expected torch.float32, or autocast=None"
        )
    return DTYPES[autocast]


def _computes_in_bf16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bf16; without them it is slower than fp32."""
    if device.type == "cpu":
        return AUTO_TAKES_BF16_ON_CPU and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class Network:
    """A network that turns fp32 or fp64 images into logits of the same dtype.

    Args:
        model: Classifier.
        role: What it is, such as "teacher".
        image_shapes: Shapes [C, H, W] of the images that it will get.
        memory_format: Memory format of its images and weights; ``"auto"`` is ``torch.channels_last`` on a CPU if the
            network accepts it, and else ``torch.preserve_format``.
        autocast: See :class:`DeepInversion`.
        compile: Whether it runs through ``torch.compile``.

    Attributes:
        num_classes: Number of classes.
        dtype: Dtype of its parameters.
        autocast: Dtype of its autocast; None if it has none of its own.

    Raises:
        ValueError: If it is not fit for these images or settings.

    """

    def __init__(
        self,
        model: nn.Module,
        role: str,
        image_shapes: list[tuple[int, int, int]],
        *,
        memory_format: MemoryFormat,
        autocast: Autocast | None,
        compile: bool,
    ) -> None:
        if memory_format != "auto" and memory_format not in MEMORY_FORMATS:
            accepted = ", ".join(map(str, MEMORY_FORMATS))
            raise ValueError(f"memory_format is {memory_format!r}; accepted are 'auto', {accepted}")
        if not isinstance(compile, bool):
            raise TypeError(f"compile is {compile!r}; expected True or False")
        check_finite(model, role)
        self.model, self.role = model, role
        self.device, self.dtype = placement(model)
        self.autocast = autocast_dtype(autocast, self.device, self.dtype, role)
        with self._autocasting():
            self.num_classes = max(count_classes(model, shape, role) for shape in image_shapes)
        self.memory_format = self._chosen(memory_format, image_shapes)
        self.compile = compile
        self._compiled: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def _chosen(self, memory_format: MemoryFormat, image_shapes: list[tuple[int, int, int]]) -> torch.memory_format:
        if memory_format == "auto" and self.device.type != "cpu":
            return torch.preserve_format
        if isinstance(memory_format, torch.memory_format) and memory_format != torch.channels_last:
            return memory_format
        reasons = [reason for shape in image_shapes if (reason := why_not_channels_last(self.model, shape)) is not None]
        if reasons and memory_format != "auto":
            raise ValueError(
                f"memory_format is torch.channels_last, in which the {self.role} cannot compute ({reasons[0]}); use "
                "memory_format='auto' or torch.contiguous_format"
            )
        return torch.preserve_format if reasons else torch.channels_last

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Hold the weights in the memory format, and what is compiled for as long as the hooks stay the same."""
        with weights_in(self.model, self.memory_format):
            try:
                yield
            finally:
                self._compiled.clear()

    def _autocasting(self) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of images on its device, in their dtype."""
        with self._autocasting():
            # Autocast, which may be the caller's, chooses a dtype for each operation.
            dtype = images.dtype if torch.is_autocast_enabled(self.device.type) else self.dtype
            input = images.to(self.device, dtype, memory_format=self.memory_format)
            logits: Tensor = self._compiled_for(input)(input) if self.compile else self.model(input)
        return logits.to(images.device, images.dtype)

    def _compiled_for(self, input: Tensor) -> Callable[[Tensor], Tensor]:
        shape, model = input.shape, self.model
        if shape not in self._compiled:
            model(input.detach())  # BatchNormStatistics fuses layers with others in a call that is not compiled

            def call(input: Tensor) -> Tensor:
                return model(input)  # type: ignore[no-any-return]

            # torch.compile gives up after some compilations of one code object, and these are as many as there are
            # networks, sizes and runs.
            call.__code__ = call.__code__.replace(co_name=f"{self.role}_of_{'x'.join(map(str, shape))}")
            self._compiled[shape] = torch.compile(call, dynamic=False)
        return self._compiled[shape]


@contextmanager
def compiler_errors_explained(compile: bool) -> Iterator[None]:
    """Raise what the compiler could not do as one sentence.

    Raises:
        RuntimeError: If ``torch.compile`` fails inside the ``with`` block.

    """
    if not compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RuntimeError(
            f"torch.compile cannot compile the networks ({reason.strip()}); use compile=False"
        ) from error
