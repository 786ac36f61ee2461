"""Images synthesized from a trained network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Self

import torch
from torch import Tensor, nn

from kdkernels._memory_format import MemoryFormat
from kdkernels.inversion._augmentation import positions_of
from kdkernels.inversion._loop import Loop, Synthesis
from kdkernels.inversion._network import Autocast, Execution, Network, compiler_errors_explained
from kdkernels.inversion._objective import Evaluation, Objective
from kdkernels.inversion.config import InversionConfig
from kdkernels.ops._checks import check_integer


class DeepInversion:
    """Synthesizes images that a trained network recognizes and whose features match its BatchNorm statistics.

    The images, the statistics, the optimizer and the loss are in fp32 (fp64 for a teacher in fp64), also for a teacher
    in 16 bits and whatever autocast is; the images are converted for a network in 16 bits, and left in fp32 under
    ``torch.autocast``. In fp16 the loss is scaled for the backward by ``torch.amp.GradScaler``. Source: Yin et al.,
    arXiv 1912.08795; each preset names its own.

    Args:
        teacher: Classifier that returns logits [B, C], with BatchNorm layers if ``config.feature_weight`` is not 0;
            left unchanged.
        image_shape: Shape [C, H, W] of an image.
        config: Settings: a preset, changed with ``dataclasses.replace`` if needed.
        student: Network of the adaptive form, which prefers images on which teacher and student disagree, with
            ``config.compete_weight``; frozen during the synthesis.
        memory_format: Memory format in which the networks compute: ``torch.channels_last``,
            ``torch.contiguous_format``, ``torch.preserve_format`` (that of their weights), or ``"auto"``: on a CPU
            channels_last, where it is faster, unless a network does not accept it; on other devices the format that the
            weights have. The weights are converted for the synthesis, and are given back as they were.
        autocast: Dtype in which the networks compute where ``torch.autocast`` allows it: ``"bf16"``, ``"fp16"``, or
            ``"auto"``, which is bf16 on a GPU or CPU with instructions for it, and fp32 elsewhere. By default there is
            none but the caller's own ``torch.autocast``.
        compile: Whether the networks run through ``torch.compile``, once for each size of a stage in every call of
            :meth:`synthesize`. That takes from seconds (a network of 8 layers) to minutes (of 50); calls after the
            first find most of it in the compiler's cache.
        cuda_graph: Whether an iteration on a GPU is captured in a CUDA graph, which spares the host its part: ``True``,
            ``False``, or ``"auto"``: where it can be captured, which excludes fp16.

    Attributes:
        num_classes: Number of classes of the teacher.
        execution: How it runs: the last four arguments.

    Raises:
        TypeError: If config is not an InversionConfig, or a size is not an integer.
        ValueError: If a network is not fit for it: it has values that are not finite, does not accept such images in
            every stage, does not return finite logits [B, C], passes no gradient to its images, the student has other
            classes, or the teacher has no BatchNorm layer; or if image_shape is not [C, H, W], or the normalization in
            config is missing although ``config.clip`` is set, or does not match the channels; or if the networks or the
            device cannot run as the other arguments ask for.

    Example:
        >>> config = InversionConfig.preset("digits").with_iterations(2)
        >>> inverter = DeepInversion(teacher, (1, 8, 8), config)
        >>> result = inverter.synthesize(torch.arange(10), generator=torch.Generator().manual_seed(0))
        >>> list(result.images.shape)
        [10, 1, 8, 8]

    """

    def __init__(
        self,
        teacher: nn.Module,
        image_shape: tuple[int, int, int],
        config: InversionConfig,
        *,
        student: nn.Module | None = None,
        memory_format: MemoryFormat = "auto",
        autocast: Autocast | None = None,
        compile: bool = False,
        cuda_graph: bool | Literal["auto"] = "auto",
    ) -> None:
        _check(image_shape, config)
        if not isinstance(cuda_graph, bool) and cuda_graph != "auto":
            raise ValueError(f"cuda_graph is {cuda_graph!r}; accepted are True, False, 'auto'")
        self.teacher, self.student = teacher, student
        self.image_shape = image_shape
        self.config = config
        self.execution: Execution = {
            "memory_format": memory_format, "autocast": autocast, "compile": compile, "cuda_graph": cuda_graph,
        }  # fmt: skip
        channels, height, width = image_shape
        pools = {stage.pool for stage in config.stages}
        if min(height, width) < max(pools):
            raise ValueError(f"image_shape is {image_shape}, smaller than the pooling of a stage, {max(pools)}")
        shapes = [(channels, height // pool, width // pool) for pool in sorted(pools)]
        networks = [
            Network(model, role, shapes, memory_format=memory_format, autocast=autocast, compile=compile)
            for role, model in (("teacher", teacher), ("student", student))
            if model is not None
        ]
        self.num_classes = networks[0].num_classes
        if student is not None and networks[1].num_classes != self.num_classes:
            raise ValueError(
                f"student returns {networks[1].num_classes} classes and teacher {self.num_classes}; they must be the "
                "same"
            )
        self._objective = Objective(config, networks[0], networks[1] if student is not None else None)
        if cuda_graph is True and networks[0].device.type != "cuda":
            raise ValueError(f"cuda_graph is True, but teacher is on {networks[0].device}; use cuda_graph='auto'")

    def against(self, student: nn.Module) -> Self:
        """Return the adaptive form of this object, with the same settings and another student."""
        return type(self)(self.teacher, self.image_shape, self.config, student=student, **self.execution)

    def describe_execution(self) -> dict[str, str | bool | None]:
        """Return what decides the result of how it runs, as plain values for the record of a run."""
        autocast = self._objective.teacher.autocast
        return {
            "memory_format": str(self.execution["memory_format"]),
            "autocast": None if autocast is None else str(autocast),
            "compile": self.execution["compile"],
        }

    def objective(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        pool: int = 1,
        shift: tuple[int, int] = (0, 0),
        flip: bool = False,
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the loss and their sum ``"loss"``.

        Args:
            images: Shape [B, C, H, W].
            labels: Shape [B].
            pool: Factor of the average pooling in front of the network.
            shift: Pixels by which the pooled batch is rolled down and to the right.
            flip: Whether to flip the batch left to right.

        Raises:
            TypeError: If pool or an offset is not an integer.
            ValueError: If a shape is another, or shift does not have two offsets.

        """
        with self._objective.ready():
            evaluation = self._evaluate(images, labels, pool, shift, flip)
        return self._named(evaluation)

    def gradient_norms(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        pool: int = 1,
        shift: tuple[int, int] = (0, 0),
        flip: bool = False,
    ) -> dict[str, Tensor]:
        """Return the l2 norm of the images' gradient of each weighted term of the loss, and of their sum ``"loss"``.

        They show which term decides where the images go. Each takes a forward and a backward of its own.

        Args:
            images: Shape [B, C, H, W].
            labels: Shape [B].
            pool: See :meth:`objective`.
            shift: See :meth:`objective`.
            flip: See :meth:`objective`.

        Raises:
            TypeError, ValueError: See :meth:`objective`.

        """
        norms = {}
        with torch.inference_mode(False), torch.enable_grad(), self._objective.ready():
            images = images.detach().clone().requires_grad_()
            for name in [*self._objective.names, "loss"]:
                # Another forward for each, because compiled code gives the memory of a graph away in its backward.
                term = self._named(self._evaluate(images, labels, pool, shift, flip))[name]
                with compiler_errors_explained(self.execution["compile"]):
                    norms[name] = torch.linalg.vector_norm(torch.autograd.grad(term, images)[0])
        return norms

    def _evaluate(self, images: Tensor, labels: Tensor, pool: int, shift: tuple[int, int], flip: bool) -> Evaluation:
        check_integer("pool", pool, minimum=1)
        if images.dim() != 4 or labels.shape != images.shape[:1] or min(images.shape[2:]) < pool:
            raise ValueError(
                f"images have the shape {list(images.shape)} and labels {list(labels.shape)}; expected [B, C, H, W] "
                f"and [B], with images as large as pool={pool} or larger"
            )
        if not isinstance(shift, (tuple, list)) or len(shift) != 2:
            raise ValueError(f"shift is {shift!r}; expected the pixels down and to the right, such as (1, -2)")
        for offset in shift:
            check_integer("an offset of shift", offset)
        positions = None
        if any(shift) or flip:
            height, width = (size // pool for size in images.shape[2:])
            positions = positions_of(height, width, shift, flip, images.device)
        with compiler_errors_explained(self.execution["compile"]):
            return self._objective(images, labels, pool, positions)

    def _named(self, evaluation: Evaluation) -> dict[str, Tensor]:
        return dict(zip(self._objective.names, evaluation.terms.unbind(), strict=True)) | {"loss": evaluation.loss}

    def synthesize(
        self,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: Callable[[int, dict[str, Tensor]], None] | None = None,
    ) -> Synthesis:
        """Synthesize one image for each label.

        It may be called inside ``torch.no_grad()`` or ``torch.inference_mode()``, and inside ``torch.autocast``.

        Args:
            labels: Class indices [B], int64. Norms over the batch in the loss depend on B; the coefficients were chosen
                for ``config.batch_size``.
            generator: CPU generator of the initial images, the jitter and the flips, so that a seed gives the same
                values on every device; torch's default generator if None.
            progress: Function called after every iteration with its number and what the history has of it, as tensors
                that the host has not waited for.

        Raises:
            TypeError: If labels are not a tensor, or generator is not a generator.
            ValueError: If labels are not [B] of int64, are empty, or are not classes of the teacher.
            RuntimeError: If ``torch.compile`` fails, or ``cuda_graph`` is True and an iteration cannot be captured.
            NonFiniteLossError: If a term of the loss is NaN or infinite, noticed within 20 iterations. It names the
                first such term and its iteration; its ``state`` is the :class:`Synthesis` up to the last finite loss.

        """
        with self.loop(labels, generator=generator) as loop:
            while loop.done < loop.total:
                loop.step()
                if progress is not None:
                    progress(loop.done, loop.terms())
            return loop.result()

    @contextmanager
    def loop(
        self, labels: Tensor, *, generator: torch.Generator | None = None, images: Tensor | None = None
    ) -> Iterator[Loop]:
        """Hold the networks ready and give the loop of :meth:`synthesize`, whose ``step()`` takes one iteration.

        Args:
            labels: See :meth:`synthesize`.
            generator: See :meth:`synthesize`.
            images: Initial images; drawn from the generator by default.

        """
        self._check_labels(labels)
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator is {generator!r}; expected torch.Generator().manual_seed(seed)")
        teacher = self._objective.teacher
        with torch.inference_mode(False), torch.enable_grad(), self._objective.ready():
            shape = len(labels), *self.image_shape
            if images is None:
                images = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            elif images.shape != shape:
                raise ValueError(f"images have the shape {list(images.shape)}; expected {list(shape)}")
            dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
            images = images.detach().to(teacher.device, dtype, copy=True, memory_format=torch.contiguous_format)
            scaled = torch.float16 in (teacher.dtype, teacher.autocast or self._callers_autocast())
            graph = False if teacher.device.type != "cuda" else self.execution["cuda_graph"]
            if scaled and graph is True:
                raise ValueError(
                    "cuda_graph is True, but the networks compute in fp16, whose GradScaler works on the host; use "
                    "autocast='bf16' or cuda_graph='auto'"
                )
            yield Loop(
                self._objective,
                images,
                labels.to(teacher.device, copy=True),
                generator,
                scaled=scaled,
                cuda_graph=False if scaled else graph,
            )

    def _callers_autocast(self) -> torch.dtype | None:
        device = self._objective.teacher.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def _check_labels(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}; pass torch.tensor(labels)")
        if labels.dim() != 1 or labels.dtype != torch.int64 or len(labels) == 0:
            raise ValueError(f"labels must be a non-empty [B] of int64, got {list(labels.shape)} of {labels.dtype}")
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels are from {int(labels.min())} to {int(labels.max())}; the teacher has the classes 0 to "
                f"{self.num_classes - 1}"
            )


def _check(image_shape: tuple[int, int, int], config: InversionConfig) -> None:
    """Raise unless the shape is one, the settings are some, and they fit each other."""
    if not isinstance(config, InversionConfig):
        raise TypeError(f"config must be an InversionConfig, such as InversionConfig.preset('digits'); got {config!r}")
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"image_shape is {image_shape!r}; expected [C, H, W]")
    for name, size in zip("CHW", image_shape, strict=True):
        check_integer(f"{name} of image_shape", size, minimum=1)
    if config.clip and config.mean is None:
        raise ValueError("config.clip is True, which needs config.mean and config.std; they are None")
    if config.mean is not None and config.std is not None and {len(config.mean), len(config.std)} != {image_shape[0]}:
        raise ValueError(
            f"config.mean and config.std have {len(config.mean)} and {len(config.std)} values; expected "
            f"{image_shape[0]}, one per channel"
        )
