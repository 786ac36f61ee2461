"""Images synthesized from a trained network."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels._networks import NonFiniteLossError, as_input_of, check_finite, count_classes, frozen, placement
from kdkernels.functional import image_prior_losses, js_div_with_logits
from kdkernels.inversion.batch_norm_statistics import BatchNormStatistics
from kdkernels.inversion.config import InversionConfig, Stage
from kdkernels.ops._checks import check_integer

COMPETE_TEMPERATURE = 3.0
WARM_UP = 100
CHECK_EVERY = 20  # iterations; a check waits for the device


@dataclass(frozen=True)
class Synthesis:
    """Synthesized images.

    Attributes:
        images: Shape [B, C, H, W], in the teacher's normalized space; fp32 (fp64 for a teacher in fp64).
        labels: Shape [B]; target class of each image.
        history: Weighted terms of the loss and their sum ``"loss"``, one value per iteration.

    """

    images: Tensor
    labels: Tensor
    history: dict[str, list[float]]


def learning_rate_at(config: InversionConfig, iteration: int, iterations: int) -> float:
    """Return the learning rate of an iteration, which is counted from 0 within its stage."""
    if config.schedule == "constant":
        return config.learning_rate
    if iteration < WARM_UP:
        return config.learning_rate * (iteration + 1) / WARM_UP
    return 0.5 * config.learning_rate * (1 + cos(pi * (iteration - WARM_UP) / (iterations - WARM_UP)))


class DeepInversion:
    """Synthesizes images that a trained network recognizes and whose features match its BatchNorm statistics.

    The images, the optimizer and the loss are in fp32 (fp64 for a teacher in fp64), also for a teacher in 16 bits; the
    images are converted for a network in 16 bits, and left in fp32 under ``torch.autocast``. In fp16 the loss is scaled
    for the backward by ``torch.amp.GradScaler``. Source: Yin et al., arXiv 1912.08795; each preset names its own.

    Args:
        teacher: Classifier that returns logits [B, C], with BatchNorm layers if ``config.feature_weight`` is not 0;
            left unchanged.
        image_shape: Shape [C, H, W] of an image.
        config: Settings: a preset, changed with ``dataclasses.replace`` if needed.
        student: Network of the adaptive form, which prefers images on which teacher and student disagree, with
            ``config.compete_weight``; frozen during the synthesis.

    Attributes:
        num_classes: Number of classes of the teacher.

    Raises:
        TypeError: If config is not an InversionConfig, or a size is not an integer.
        ValueError: If a network is not fit for it: it has values that are not finite, does not accept such images in
            every stage, does not return finite logits [B, C], passes no gradient to its images, the student has other
            classes, or the teacher has no BatchNorm layer; or if image_shape is not [C, H, W], or the normalization in
            config is missing although ``config.clip`` is set, or does not match the channels.

    """

    def __init__(
        self,
        teacher: nn.Module,
        image_shape: tuple[int, int, int],
        config: InversionConfig,
        *,
        student: nn.Module | None = None,
    ) -> None:
        if not isinstance(config, InversionConfig):
            raise TypeError(
                f"config must be an InversionConfig, such as InversionConfig.preset('digits'); got {config!r}"
            )
        if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
            raise ValueError(f"image_shape is {image_shape!r}; expected [C, H, W]")
        for name, size in zip("CHW", image_shape, strict=True):
            check_integer(f"{name} of image_shape", size, minimum=1)
        if config.clip and config.mean is None:
            raise ValueError("config.clip is True, which needs config.mean and config.std; they are None")
        if (
            config.mean is not None
            and config.std is not None
            and {len(config.mean), len(config.std)} != {image_shape[0]}
        ):
            raise ValueError(
                f"config.mean and config.std have {len(config.mean)} and {len(config.std)} values; expected "
                f"{image_shape[0]}, one per channel"
            )
        self.teacher = teacher
        self.image_shape = image_shape
        self.config = config
        self.student = student
        self.statistics: BatchNormStatistics | None = None
        if config.feature_weight != 0:
            self.statistics = BatchNormStatistics(teacher, mode=config.mode, moment=config.moment)
            self.layer_weights = [config.first_layer_weight] + [1.0] * (len(self.statistics.layers) - 1)
        self.num_classes = self._check("teacher", teacher)
        if student is not None:
            others = self._check("student", student)
            if others != self.num_classes:
                raise ValueError(
                    f"student returns {others} classes and teacher {self.num_classes}; they must be the same"
                )

    def _check(self, role: str, model: nn.Module) -> int:
        """Check a network on the images of every stage, and return its number of classes."""
        check_finite(model, role)
        channels, height, width = self.image_shape
        pools = {stage.pool for stage in self.config.stages}
        if min(height, width) < max(pools):
            raise ValueError(f"image_shape is {self.image_shape!r}, smaller than the pooling of a stage, {max(pools)}")
        return max(count_classes(model, (channels, height // pool, width // pool), role) for pool in pools)

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

        """
        with self._watching():
            return self._terms(images, labels, pool, shift, flip)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Freeze the networks, and tap the teacher's BatchNorm layers if a term needs them."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.teacher) if self.statistics is None else self.statistics)
            if self.student is not None:
                stack.enter_context(frozen(self.student))
            yield

    def _terms(
        self, images: Tensor, labels: Tensor, pool: int, shift: tuple[int, int], flip: bool
    ) -> dict[str, Tensor]:
        config = self.config
        # A view, because autocast keeps its copy in 16 bits of a leaf, although each step changes the images.
        augmented = F.avg_pool2d(images, pool) if pool > 1 else images.view_as(images)
        if shift != (0, 0):
            augmented = torch.roll(augmented, shift, (2, 3))
        if flip:
            augmented = augmented.flip(3)
        logits = self.teacher(as_input_of(self.teacher, augmented))
        terms: dict[str, Tensor] = {}
        if config.ce_weight != 0:
            terms["cross_entropy"] = config.ce_weight * F.cross_entropy(logits.to(images.dtype), labels)
        if self.statistics is not None:
            terms["features"] = config.feature_weight * self.statistics.loss(self.layer_weights)
        terms |= self._priors(images if config.prior_of == "plain" else augmented)
        if self.student is not None and config.compete_weight != 0:
            student_logits = self.student(as_input_of(self.student, augmented))
            terms["compete"] = config.compete_weight * self._compete(student_logits, logits)
        terms["loss"] = torch.stack(list(terms.values())).sum()
        return terms

    def _priors(self, images: Tensor) -> dict[str, Tensor]:
        config = self.config
        if config.tv_l1 == config.tv_l2 == config.l2 == 0:
            return {}
        tv_l1, tv_l2, l2 = image_prior_losses(images)
        if config.l2 != 0 and config.l2_norm == "batch":
            l2 = torch.linalg.vector_norm(images)
        weighted = {"tv_l1": (config.tv_l1, tv_l1), "tv_l2": (config.tv_l2, tv_l2), "l2": (config.l2, l2)}
        return {name: weight * term for name, (weight, term) in weighted.items() if weight != 0}

    def _compete(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.config.compete == "js":
            return 1 - js_div_with_logits(student, teacher, temperature=COMPETE_TEMPERATURE)
        j = js_div_with_logits(student, teacher, temperature=COMPETE_TEMPERATURE, legacy_clamp=True)
        return 1 - j.clamp(0, 1) if self.config.compete == "nvlabs" else -j

    def _clip(self, images: Tensor) -> None:
        """Clamp each channel to [-m/s, (1 - m)/s], the range of normalized pixels."""
        if not self.config.clip:
            return
        mean, std = (
            torch.tensor(values, dtype=images.dtype).to(images.device).view(1, -1, 1, 1)
            for values in (self.config.mean, self.config.std)
        )
        with torch.no_grad():
            images.copy_(torch.minimum(torch.maximum(images, -mean / std), (1 - mean) / std))

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
            progress: Function called after every iteration with its number and the terms of the loss, as tensors that
                the host has not waited for.

        Raises:
            TypeError: If labels are not a tensor, or generator is not a generator.
            ValueError: If labels are not [B] of int64, are empty, or are not classes of the teacher.
            NonFiniteLossError: If a term of the loss is NaN or infinite, noticed within 20 iterations. It names the
                first such term and its iteration; its ``state`` is the :class:`Synthesis` up to the last finite loss.

        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}; pass torch.tensor(labels)")
        if labels.dim() != 1 or labels.dtype != torch.int64 or len(labels) == 0:
            raise ValueError(f"labels must be a non-empty [B] of int64, got {list(labels.shape)} of {labels.dtype}")
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator is {generator!r}; expected torch.Generator().manual_seed(seed)")
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels are from {int(labels.min())} to {int(labels.max())}; the teacher has the classes 0 to "
                f"{self.num_classes - 1}"
            )
        with torch.inference_mode(False), torch.enable_grad(), self._watching():
            return _Run(self, labels.clone(), generator).run(progress)


class _Run:
    """A synthesis under way."""

    def __init__(self, inverter: DeepInversion, labels: Tensor, generator: torch.Generator | None) -> None:
        self.inverter, self.config, self.generator = inverter, inverter.config, generator
        device, dtype = placement(inverter.teacher)
        self.labels = labels.to(device)
        master = torch.float64 if dtype == torch.float64 else torch.float32
        noise = torch.randn(len(labels), *inverter.image_shape, generator=generator, dtype=torch.float32)
        self.images = noise.to(device, master).requires_grad_()
        self.best_loss = torch.full((), float("inf"), device=device, dtype=master)
        self.best_images = self.images.detach().clone()
        self.finite_images = self.images.detach().clone()  # those of the last finite loss
        self.history: list[dict[str, Tensor]] = []
        self.checked = 0
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
        # Gradients of a mean over all pixels would underflow in fp16.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16 or autocast)

    def run(self, progress: Callable[[int, dict[str, Tensor]], None] | None) -> Synthesis:
        """Run all stages."""
        total = sum(stage.iterations for stage in self.config.stages)
        for stage in self.config.stages:
            optimizer = torch.optim.Adam([self.images], lr=self.config.learning_rate, betas=self.config.betas)
            self.best_loss.fill_(float("inf"))
            for iteration in range(stage.iterations):
                optimizer.param_groups[0]["lr"] = learning_rate_at(self.config, iteration, stage.iterations)
                self._step(stage, optimizer)
                if len(self.history) % CHECK_EVERY == 0 or len(self.history) == total:
                    self._check_finite(total)
                if progress is not None:
                    progress(len(self.history), self.history[-1])
        best = self.config.keep == "best"
        return self._result(self.best_images if best else self.images.detach(), len(self.history))

    def _step(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        shift, flip = self._augmentation(stage.pool)
        terms = self.inverter._terms(self.images, self.labels, stage.pool, shift, flip)
        (self.images.grad,) = torch.autograd.grad(self.scaler.scale(terms["loss"]), self.images)
        # Before the step, while the images have this loss. The device decides; the host does not wait.
        loss, images = terms["loss"].detach(), self.images.detach()
        self.finite_images = torch.where(loss.isfinite(), images, self.finite_images)
        if self.config.keep == "best":
            better = loss < self.best_loss
            self.best_loss = torch.where(better, loss, self.best_loss)
            self.best_images = torch.where(better, images, self.best_images)
        self.scaler.step(optimizer)
        self.scaler.update()
        self.inverter._clip(self.images)
        self.history.append({name: term.detach() for name, term in terms.items()})

    def _augmentation(self, pool: int) -> tuple[tuple[int, int], bool]:
        """Draw the roll and the flip of an iteration, shared by the whole batch."""
        jitter = self.config.jitter // pool
        down, right = torch.randint(-jitter, jitter + 1, (2,), generator=self.generator).tolist()
        flip = self.config.flip > 0 and torch.rand((), generator=self.generator).item() < self.config.flip
        return (down, right), flip

    def _check_finite(self, total: int) -> None:
        """Raise if a loss since the last check was not finite, or the last step left images that are not."""
        recent = self.history[self.checked :]
        images_finite = self.images.detach().isfinite().all()
        finite = torch.stack([*(terms["loss"].isfinite() for terms in recent), images_finite]).tolist()
        # Every step whose gradient is not finite halves the scale; one below 1 has nothing to do with fp16.
        finite[-1] = finite[-1] and not (self.scaler.is_enabled() and self.scaler.get_scale() < 1)
        if all(finite):
            self.checked = len(self.history)
            return
        first = self.checked + finite.index(False)  # counted from 0; past the history if only the images are not finite
        term, iteration = "gradient", first
        if first < len(self.history):
            values = {name: value.item() for name, value in self.history[first].items()}
            term = next(name for name, value in values.items() if not abs(value) < float("inf"))
            iteration = first + 1
            described = f"the term {term!r} of the loss is {values[term]}"
        else:
            described = "the gradient of the loss is not finite, although the loss is,"
        raise NonFiniteLossError(
            f"{described} in iteration {iteration} of {total}; lower the learning rate or the weight of the term",
            term=term,
            iteration=iteration,
            state=self._result(self.finite_images, first),
        )

    def _result(self, images: Tensor, iterations: int) -> Synthesis:
        history = self.history[:iterations]
        names = self.history[0]
        return Synthesis(
            images,
            self.labels,
            {name: torch.stack([terms[name] for terms in history]).tolist() if history else [] for name in names},
        )
