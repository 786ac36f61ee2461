"""Cases of the pointwise divergences: formulas, reductions, layouts, weights, and the edges of the formulas."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, FarCall, Workload, draw, layouts, one_of, register
from kdkernels.ops.pointwise_divergence import PASSES, binary_kl_div_with_logits, js_div, kl_div

REDUCTIONS = ("mean", "none", "sum", "batchmean")
SHAPES = ((1, 1), (5, 3), (7, 33), (64, 300), (3, 1000), (2, 5, 9, 11), (1, 4097))


def _reduce(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        loss = torch.where(weight == 0, 0.0, weight * loss)
    if reduction == "none":
        return loss
    count = loss.numel() if weight is None else weight.sum(dtype=loss.dtype)
    return loss.sum() / {"mean": count, "sum": 1, "batchmean": loss.shape[0]}[reduction]


def eager_kl(input: Tensor, target: Tensor, *, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """Return the elements of ``F.kl_div``, reduced."""
    return _reduce(F.kl_div(input, target, reduction="none", log_target=log_target), None, reduction)


def eager_js(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, beta: float = 0.5, reduction: str = "batchmean"
) -> Tensor:
    """Return the generalized divergence of log-probabilities as users write it."""
    if beta in (0, 1):
        log_v, log_w = (input, target) if beta == 0 else (target, input)
        return _reduce(F.kl_div(log_v, log_w, reduction="none", log_target=True), weight, reduction)
    log_m = torch.logaddexp(target + math.log(beta), input + math.log1p(-beta))
    teacher = F.kl_div(log_m, target, reduction="none", log_target=True)
    student = F.kl_div(log_m, input, reduction="none", log_target=True)
    return _reduce(beta * teacher + (1 - beta) * student, weight, reduction)


def eager_binary(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, temperature: float = 1.0, reverse: bool = False,
    target_type: str = "logits", reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Return the divergence of sigmoid outputs as users write it, from log-sigmoids."""
    log_q, log_not_q = F.logsigmoid(input / temperature), F.logsigmoid(-input / temperature)
    if target_type == "logits":
        log_p, log_not_p = F.logsigmoid(target / temperature), F.logsigmoid(-target / temperature)
    else:
        log_p, log_not_p = target.log(), torch.log1p(-target)
    pairs = ((log_p, log_q), (log_not_p, log_not_q))
    terms = ((a, b) if reverse else (b, a) for a, b in pairs)
    loss = sum(F.kl_div(v, w, reduction="none", log_target=True) for v, w in terms)
    assert isinstance(loss, Tensor)
    return _reduce(loss, weight, reduction)


def ours_js(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """Call the function with the weights in the position of a tensor."""
    return js_div(input, target, position_weight=weight, **options)


def ours_binary(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """Call the function with the weights in the position of a tensor."""
    return binary_kl_div_with_logits(input, target, position_weight=weight, **options)


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every shape, formula, reduction and layout at least once."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=torch.float64, device=device, generator=generator)
    both = (0, 1)

    def logits(shape: tuple[int, ...], scale: float = 2.0) -> tuple[Tensor, Tensor]:
        return (normal(shape) * scale).to(dtype), (normal(shape) * scale).to(dtype)

    def logs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return tuple(F.log_softmax(normal(shape) * 2, -1).to(dtype) for _ in "qp")  # type: ignore[return-value]

    def probabilities(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        log_q, _ = logs(shape)
        return log_q, F.softmax(normal(shape) * 2, -1).to(dtype)

    forms: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Any]] = {
        "kl": (kl_div, eager_kl, probabilities),
        "kl of logs": (partial(kl_div, log_target=True), partial(eager_kl, log_target=True), logs),
        "js": (ours_js, eager_js, logs),
        "js, beta 0.1": (partial(ours_js, beta=0.1), partial(eager_js, beta=0.1), logs),
        "js, beta 0": (partial(ours_js, beta=0.0), partial(eager_js, beta=0.0), logs),
        "js, beta 1": (partial(ours_js, beta=1.0), partial(eager_js, beta=1.0), logs),
        "binary": (ours_binary, eager_binary, logits),
        "binary at 3": (partial(ours_binary, temperature=3.0), partial(eager_binary, temperature=3.0), logits),
        "binary, reverse": (partial(ours_binary, reverse=True), partial(eager_binary, reverse=True), logits),
    }
    for i, (name, (ours, eager, make)) in enumerate(forms.items()):
        for j, shape in enumerate(SHAPES):
            reduction = REDUCTIONS[(i + j) % 4]
            samples = tuple(make(shape) for _ in range(2))
            yield Case(
                f"{name} of {shape}, {reduction}", partial(ours, reduction=reduction),
                partial(eager, reduction=reduction), samples, both,
            )  # fmt: skip

    def given_probabilities(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return logits(shape)[0], (normal(shape) * 2).sigmoid().clamp(0.01, 0.99).to(dtype)

    for reverse in (False, True):
        options: dict[str, Any] = {"target_type": "probs", "temperature": 2.0, "reverse": reverse}
        functions = partial(ours_binary, **options), partial(eager_binary, **options)
        yield Case(
            f"probabilities, reverse {reverse}", *functions, tuple(given_probabilities((9, 40)) for _ in "ab"), both
        )

    for layout in ("transposed", "sliced", "part", "offset", "channels_last"):
        for name in ("kl", "js", "binary"):
            ours, eager, make = forms[name]
            samples = tuple(tuple(layouts(side)[layout] for side in make((2, 6, 5, 40))) for _ in range(2))
            yield Case(
                f"{name}, {layout}", partial(ours, reduction="none"), partial(eager, reduction="none"), samples, both
            )
    pair = logits((2, 6, 5, 40))
    mixed = ((layouts(pair[0])["channels_last"], layouts(pair[1])["part"]),)
    yield Case("two layouts", binary_kl_div_with_logits, eager_binary, mixed, both)
    log_q, p = probabilities((6, 50))
    yield Case("an expanded target", kl_div, eager_kl, ((log_q, p[:1].expand(6, -1)), (log_q, p[:, :1].expand(-1, 50))))
    yield Case("short rows", kl_div, eager_kl, ((layouts(log_q)["part"][:, :3], p[:, :3]),), both)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for name, reduction in (("js", "mean"), ("binary", "mean"), ("binary", "none"), ("binary, reverse", "sum")):
        ours, eager, make = forms[name]
        weights = [torch.rand((12, 45), generator=generator, dtype=torch.float64).to(compute) for _ in range(2)]
        weights = [(w * (w > 0.3)).to(device) for w in weights]
        samples = tuple((*make((12, 45)), weight) for weight in weights)
        functions = partial(ours, reduction=reduction), partial(eager, reduction=reduction)
        yield Case(f"{name}, weights, {reduction}", *functions, samples, both)

    pairs = tuple((s, (s.double() + 0.01 * t.double()).to(dtype)) for s, t in (logits((8, 60)) for _ in range(2)))
    yield Case("binary, close", binary_kl_div_with_logits, eager_binary, pairs, both)
    far = tuple(logits((8, 60), scale=1e4) for _ in range(2))
    yield Case("binary, large logits", binary_kl_div_with_logits, eager_binary, far, both)
    yield Case("js of close sides", js_div, eager_js, tuple((-s.abs(), -t.abs()) for s, t in pairs), both)
    if dtype == torch.bfloat16:
        for other in (torch.float32, torch.float64):
            s, t = logits((8, 60))
            yield Case(f"{other} student", binary_kl_div_with_logits, eager_binary, ((s.to(other), t),), both)
            yield Case(f"{other} teacher", binary_kl_div_with_logits, eager_binary, ((s, t.to(other)),), both)


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: the sum over a batch, with the gradient of the student's side."""
    one_of(variant, ("",))

    def make(device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        sides = [torch.randn(shape, generator=generator, device=device).mul_(3) for _ in range(2)]
        if function == "kl_div":
            sides = [F.log_softmax(sides[0], -1), F.softmax(sides[1], -1)]
        elif function == "js_div":
            sides = [F.log_softmax(side, -1) for side in sides]
        return tuple(side.to(dtype) for side in sides)

    functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "kl_div": (partial(kl_div, reduction="batchmean"), partial(F.kl_div, reduction="batchmean")),
        "js_div": (js_div, eager_js),
        "binary_kl_div_with_logits": (binary_kl_div_with_logits, eager_binary),
    }
    return Workload(
        "pointwise_divergence", function, shape, dtype, variant, *functions[function], make,
        dict.fromkeys(("cpu", "cuda"), PASSES[function]),
    )  # fmt: skip


def calls() -> list[Call]:
    """Return small calls in float64."""
    s, t = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    log_q, log_p = s.log_softmax(1), t.log_softmax(1)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64).expand(3, 5)
    both = (0, 1)
    return [
        Call("kl_div", partial(kl_div, reduction="batchmean"), (log_q, log_p.exp()), both),
        Call("kl_div of logs", partial(kl_div, log_target=True, reduction="none"), (log_q, log_p), both),
        Call("kl_div, broadcast", kl_div, (log_q, log_p.exp()[:1]), both),
        Call("js_div", partial(ours_js, beta=0.3), (log_q, log_p, weight), both),
        Call("js_div at an end", partial(js_div, beta=1.0, reduction="none"), (log_q, log_p), both),
        Call("binary", partial(ours_binary, temperature=2.0), (s, t, weight), both),
        Call("binary, reverse", partial(binary_kl_div_with_logits, reverse=True, reduction="none"), (s, t), both),
        Call("binary, probs", partial(binary_kl_div_with_logits, target_type="probs"), (s, t.sigmoid()), both),
    ]


KL, JS, BINARY = FUNCTIONS = ("kl_div", "js_div", "binary_kl_div_with_logits")
register(
    __package__,
    accuracy=cases,
    calls=calls,
    far_calls=(
        FarCall(binary_kl_div_with_logits, (2, 300), inputs=2),
        FarCall(partial(kl_div, log_target=True), (2, 70), inputs=2),
    ),
    functions=FUNCTIONS,
    workload=workload,
    benchmarks=(
        Benchmark(KL, (256, 1000), quick=True),
        Benchmark(BINARY, (256, 1000), quick=True),
        *(Benchmark(function, (256, 32000)) for function in FUNCTIONS),
        Benchmark(BINARY, (256, 1000), torch.bfloat16),
        Benchmark(BINARY, (128, 20)),
    ),
    # A GPU takes the reference until there are kernels.
    gpu_benchmarks=(),
)
