"""Settings of DeepInversion, with the published ones as presets."""

from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Literal, Self, get_args

from kdkernels.inversion._moments import Over
from kdkernels.ops._checks import check_choice, check_integer, check_number, checked_distance
from kdkernels.ops._types import ChannelReduction, Mode, Moment

Compete = Literal["js", "nvlabs", "datafree"]
Schedule = Literal["constant", "warmup_cosine"]
L2Norm = Literal["image", "batch"]
PriorOf = Literal["augmented", "plain"]
Keep = Literal["last", "best", "best_per_image"]
_CHOICES = {
    "schedule": get_args(Schedule), "mode": get_args(Mode), "moment": get_args(Moment), "l2_norm": get_args(L2Norm),
    "prior_of": get_args(PriorOf), "compete": get_args(Compete), "keep": get_args(Keep), "over": get_args(Over),
}  # fmt: skip
_WEIGHTS = ("ce_weight", "feature_weight", "first_layer_weight", "tv_l1", "tv_l2", "l2", "compete_weight")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Stage:
    """Part of a synthesis with its own optimizer.

    Attributes:
        iterations: Number of optimizer steps.
        pool: Factor by which images are average-pooled for the network; jitter is divided by it.

    """

    iterations: int
    pool: int = 1


@dataclass(frozen=True)
class InversionConfig:
    r"""Objective and optimization of DeepInversion.

    .. math:: w_{ce}\,\mathrm{CE} + w_{tv1}\,\mathrm{TV}_{l1} + w_{tv2}\,\mathrm{TV}_{l2} + w_f R + w_{l2}\,\mathrm{L2}
              + w_c R_c

    with the priors of :func:`kdkernels.functional.image_prior_losses`, the feature term R of
    :class:`BatchNormStatistics`, and the competition term R_c against a student. A term of weight 0 is not computed.

    Attributes:
        stages: Parts of the synthesis, in order.
        batch_size: Images optimized together; the norms of TV_l2, and of L2 over the batch, depend on it.
        learning_rate: Learning rate of Adam.
        betas: Betas of Adam.
        schedule: ``"constant"``, or ``"warmup_cosine"``: 100 steps of linear warm-up in each stage, then a cosine to 0.
        ce_weight: Weight of the teacher's cross-entropy.
        feature_weight: Weight of the BatchNorm term.
        first_layer_weight: Weight of the first BatchNorm layer (in the order of ``modules()``) in the BatchNorm term;
            the other layers have weight 1.
        mode: Distance in the BatchNorm term; see :class:`BatchNormStatistics`.
        moment: Second moment compared in the BatchNorm term; see :class:`BatchNormStatistics`.
        reduction: Reduction over the channels of a layer in the BatchNorm term; see :class:`BatchNormStatistics`.
        mean_weight: Weight of the mean's part of the BatchNorm term.
        var_weight: Weight of the other part of the BatchNorm term.
        unbiased: Whether the variance of the images is divided by n - 1.
        over: What the statistics of the images are taken over: the ``"batch"``, each ``"image"``, or the images of each
            ``"class"`` in the batch, which are those of a label; see :class:`BatchNormStatistics`.
        tv_l1: Weight of the total variation in the l1 norm.
        tv_l2: Weight of the total variation in the l2 norm.
        l2: Weight of the images' l2 norm.
        l2_norm: ``"image"``, the mean of the images' norms, or ``"batch"``, the norm of the batch.
        prior_of: Images that the priors see: ``"augmented"`` or ``"plain"``.
        compete_weight: Weight of the competition term, which is computed only if a student is given.
        compete: Form of the competition term, at temperature 3: ``"js"``, 1 - JS exactly; ``"nvlabs"``,
            1 - clamp(J, 0, 1); ``"datafree"``, -J, where J is the published clamped divergence.
        jitter: Largest number of pixels by which the batch is rolled in each direction, once per iteration.
        flip: Probability of flipping the whole batch.
        clip: Whether to keep every channel in the range of real pixels; needs ``mean`` and ``std``.
        keep: Returned images: those of the ``"last"`` iteration; of the ``"best"`` loss in the last stage; or
            ``"best_per_image"``, each image of the iteration of that stage in which its own loss was lowest. That is
            the loss with the cross-entropy, the competition and, for ``l2_norm="image"``, the l2 norm of this image in
            place of their means over the images; the other terms, which belong to the batch, are as they are. The best
            images are those whose loss was computed; the published code takes them one optimizer step later.
        mean: Mean of each channel in the teacher's normalization.
        std: Standard deviation of each channel in the teacher's normalization.
        source: Source of the values.

    """

    stages: tuple[Stage, ...] = (Stage(2000),)
    batch_size: int = 256
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "constant"
    ce_weight: float = 1.0
    feature_weight: float = 10.0
    first_layer_weight: float = 1.0
    mode: Mode = "l2"
    moment: Moment = "var"
    reduction: ChannelReduction | None = None
    mean_weight: float = 1.0
    var_weight: float = 1.0
    unbiased: bool = False
    over: Over = "batch"
    tv_l1: float = 0.0
    tv_l2: float = 0.0
    l2: float = 0.0
    l2_norm: L2Norm = "image"
    prior_of: PriorOf = "augmented"
    compete_weight: float = 0.0
    compete: Compete = "js"
    jitter: int = 0
    flip: float = 0.0
    clip: bool = False
    keep: Keep = "last"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.stages or not isinstance(self.stages, (tuple, list)):
            raise ValueError(
                f"stages is {self.stages!r}; expected a tuple of at least one Stage, such as (Stage(2000),)"
            )
        for stage in self.stages:
            if not isinstance(stage, Stage):
                raise TypeError(f"stages holds {stage!r}; expected Stage({stage!r})")
            check_integer("iterations of a stage", stage.iterations, minimum=1)
            check_integer("pool of a stage", stage.pool, minimum=1)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        checked_distance(self.mode, self.moment, self.reduction, self.mean_weight, self.var_weight)
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("jitter", self.jitter, minimum=0)
        for name in ("learning_rate", "flip", *_WEIGHTS):
            check_number(name, getattr(self, name))
        if not 0 < self.learning_rate < inf:
            raise ValueError(f"learning_rate is {self.learning_rate!r}; expected a positive, finite number")
        for name in ("clip", "unbiased"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected True or False")
        for name in ("betas", "mean", "std"):
            values = getattr(self, name)
            if values is None and name != "betas":
                continue
            if not isinstance(values, (tuple, list)):
                raise TypeError(f"{name} is {values!r}; expected a tuple of numbers, such as (0.5, 0.9)")
            for value in values:
                check_number(f"a value of {name}", value)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas!r}; expected two numbers in [0, 1)")
        for name in _WEIGHTS:
            if not isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a finite number")
        if not any(getattr(self, name) for name in _WEIGHTS if name not in ("first_layer_weight", "compete_weight")):
            raise ValueError(
                "every weight is 0, which leaves nothing to optimize; expected one of ce_weight, feature_weight, "
                "tv_l1, tv_l2 and l2 to differ from 0"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip!r}; expected a probability in [0, 1]")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean is {self.mean!r} and std is {self.std!r}; expected both mean and std, or neither")
        if self.mean is not None and not all(map(isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean!r}; expected finite numbers")
        if self.std is not None and not all(0 < value < inf for value in self.std):
            raise ValueError(f"std is {self.std!r}; expected positive, finite numbers")

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the preset of that name in :data:`PRESETS`.

        Raises:
            ValueError: If no preset has that name.

        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; expected one of {', '.join(PRESETS)}")
        return PRESETS[name]  # type: ignore[return-value]

    def with_iterations(self, iterations: int) -> Self:
        """Return the same settings with this total of iterations, divided over the stages in the same proportion."""
        total = sum(stage.iterations for stage in self.stages)
        shares = [max(1, round(stage.iterations * iterations / total)) for stage in self.stages]
        return replace(
            self, stages=tuple(replace(stage, iterations=n) for stage, n in zip(self.stages, shares, strict=True))
        )


_IMAGENET = InversionConfig(
    stages=(Stage(2000),),
    batch_size=64,
    learning_rate=0.2,
    betas=(0.5, 0.9),
    schedule="warmup_cosine",
    feature_weight=0.05,
    first_layer_weight=10.0,
    tv_l2=1e-4,
    l2=1e-5,
    compete="nvlabs",
    jitter=30,
    clip=True,
    keep="best",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    source="NVlabs/DeepInversion, imagenet_inversion.py",
)
_TWO_STAGES = (Stage(2000, pool=2), Stage(1000))
_CIFAR = InversionConfig(
    stages=(Stage(2000),),
    batch_size=256,
    learning_rate=0.1,
    feature_weight=100.0,
    tv_l2=2.5e-5,
    l2_norm="batch",
    compete="nvlabs",
    jitter=2,
    source="NVlabs/DeepInversion, deepinversion_cifar10.py",
)

PRESETS: dict[str, InversionConfig] = {
    "nvlabs-imagenet-0": replace(_IMAGENET, stages=_TWO_STAGES),
    "nvlabs-imagenet-1": _IMAGENET,
    "nvlabs-imagenet-2": replace(_IMAGENET, stages=(Stage(20000),), learning_rate=0.2, betas=(0.9, 0.999), clip=False),
    "nvlabs-imagenet-0-readme": replace(
        _IMAGENET,
        stages=_TWO_STAGES,
        batch_size=84,
        learning_rate=0.25,
        feature_weight=0.01,
        flip=0.5,
        source="NVlabs/DeepInversion, README, its command",
    ),
    "nvlabs-cifar10": _CIFAR,
    "nvlabs-cifar10-readme": replace(
        _CIFAR, feature_weight=10.0, tv_l2=1e-3, source="NVlabs/DeepInversion, README, its better coefficients"
    ),
    "nvlabs-cifar10-paper": replace(
        _CIFAR, learning_rate=0.05, feature_weight=10.0, source="NVlabs/DeepInversion, README, parameters of the paper"
    ),
    "datafree-deepinv": InversionConfig(
        stages=(Stage(1000),),
        batch_size=256,
        learning_rate=0.1,
        betas=(0.5, 0.99),
        feature_weight=10.0,
        tv_l1=1e-3,
        l2_norm="batch",
        prior_of="plain",
        compete_weight=1.0,
        compete="datafree",
        jitter=4,  # an eighth of 32 pixels
        flip=0.5,
        clip=True,
        source="zju-vipa/DataFree, deepinv",
    ),
    "digits": InversionConfig(
        stages=(Stage(200),),
        batch_size=256,
        learning_rate=0.1,
        betas=(0.5, 0.9),
        feature_weight=10.0,
        tv_l2=1e-3,
        l2=1e-3,
        jitter=1,
        source="kdkernels, chosen on the validation part of the digits",
    ),
}
