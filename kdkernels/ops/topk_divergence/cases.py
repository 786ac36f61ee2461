"""Cases of the divergence from a teacher's top classes: sizes, tails, layouts, padding, and edges of the formulas."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops._cases import Benchmark, Call, Case, FarCall, Workload, draw, layouts, one_of, register
from kdkernels.ops.topk_divergence import PASSES, topk_kl_div_with_logits, topk_teacher

SIZES = (
    (1, 1),
    (2, 1),
    (2, 2),
    (3, 2),
    (10, 4),
    (10, 10),
    (1000, 16),
    (1001, 64),
    (1001, 1001),
    (32000, 64),
    (32000, 1),
)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
REDUCTIONS = ("mean", "none", "sum", "batchmean")
TAILS = ("bucket", "renormalize", "ignore")


def ours(
    input: Tensor, values: Tensor, indices: Tensor, *more: Tensor, names: tuple[str, ...] = (), **options: Any
) -> Any:
    """Call the function with its optional tensors, whose names are given, in the positions of tensors."""
    given: dict[str, Any] = dict(zip(names, more, strict=True))
    return topk_kl_div_with_logits(input, values, indices, **given, **options)


def eager(
    input: Tensor,
    values: Tensor,
    indices: Tensor,
    *more: Tensor,
    names: tuple[str, ...] = (),
    temperature: float = 1.0,
    values_type: str = "log_probs",
    tail: str = "bucket",
    reverse: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Return the divergence as users write it, with log_softmax, gather and kl_div."""
    given = dict(zip(names, more, strict=True))
    log_q = F.log_softmax(input / temperature, -1)
    log_p = values / temperature if values_type == "logits" else values
    if "target_logsumexp" in given:
        log_p = log_p - given["target_logsumexp"].unsqueeze(-1)
    listed = log_q.gather(-1, indices)
    if tail == "renormalize":
        log_p, listed = F.log_softmax(log_p, -1), F.log_softmax(listed, -1)
    padding = values == -torch.inf
    if padding.any():
        listed = listed.masked_fill(padding, -torch.inf if reverse else 0.0)
    if reverse:
        log_p = log_p.masked_fill(padding, 0.0)
    loss = (
        F.kl_div(log_p, listed.exp(), reduction="none") if reverse else F.kl_div(listed, log_p.exp(), reduction="none")
    ).sum(-1)
    if tail == "bucket" and indices.shape[-1] < input.shape[-1]:
        p_rest = (1 - torch.where(padding, 0.0, log_p.exp()).sum(-1)).clamp(min=0)
        others = log_q.exp()
        if padding.any():
            ones = torch.cat((torch.ones_like(others), others[..., :1]), -1)
            others = others * ones.scatter(-1, torch.where(padding, input.shape[-1], indices), 0.0)[..., :-1]
        else:
            others = others.scatter(-1, indices, 0.0)
        q_rest = others.sum(-1)
        w, v = (q_rest, p_rest) if reverse else (p_rest, q_rest)
        loss = loss + F.kl_div(v.log(), w, reduction="none")
    weight = given.get("position_weight", torch.ones_like(loss))
    loss = torch.where(weight == 0, 0.0, weight * loss)
    if reduction == "none":
        return loss
    return loss.sum() / (weight.sum() if reduction == "mean" else input.shape[0] if reduction == "batchmean" else 1)


def eager_by_subtraction(input: Tensor, values: Tensor, indices: Tensor, *, temperature: float) -> Tensor:
    """Return the same with q_R = 1 - sum of q, which is cheaper and loses a small q_R."""
    listed = F.log_softmax(input / temperature, -1).gather(-1, indices)
    p, q = values.exp(), listed.exp()
    p_rest, q_rest = ((1 - side.sum(-1)).clamp(min=1e-30) for side in (p, q))
    loss = F.kl_div(listed, values, reduction="none", log_target=True).sum(-1)
    return (loss + p_rest * (p_rest.log() - q_rest.log())).mean()


def cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    """Yield the cases: every value of the grid at least once, in changing combinations."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(draw, dtype=torch.float64, device=device, generator=generator)

    def teacher(shape: tuple[int, ...], k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        values, indices = topk_teacher(normal(shape) * 2, k, temperature=temperature)
        return values.to(dtype), indices

    def samples(
        shape: tuple[int, ...], k: int, change: Callable[[Tensor], Tensor] = lambda x: x, count: int = 3
    ) -> tuple[tuple[Tensor, ...], ...]:
        return tuple((change((normal(shape) * 2).to(dtype)), *teacher(shape, k)) for _ in range(count))

    def case(name: str, of: tuple[tuple[Tensor, ...], ...], both: bool = True, **options: Any) -> Case:
        return Case(name, partial(ours, **options), partial(eager, **options), of, (0, 1) if both else (0,))

    for i, (classes, k) in enumerate(SIZES):
        rows = max(2, min(32, 4096 // classes))
        for reverse in (False, True):
            options: dict[str, Any] = {
                "temperature": TEMPERATURES[i % 4],
                "tail": TAILS[(i + reverse) % 3],
                "reverse": reverse,
                "reduction": REDUCTIONS[(i + 2 * reverse) % 4],
            }
            direction = "reverse" if reverse else "forward"
            yield case(f"{k} of {classes}, {options['tail']}, {direction}", samples((rows, classes), k), **options)
    for tail in TAILS:
        for reverse in (False, True):
            for k in (1, 5):
                of = samples((16, 300), k)
                yield case(f"{tail}, reverse={reverse}, {k} of 300", of, tail=tail, reverse=reverse, temperature=2.0)

    for layout in ("contiguous", "transposed", "sliced", "part", "offset"):
        of = samples((3, 7, 40), 5, lambda x, layout=layout: layouts(x)[layout], 2)  # type: ignore[misc]
        yield case(f"{layout}", of, reduction="none", reverse=layout == "part")
        of = samples((2, 6, 700), 9, lambda x, layout=layout: layouts(x)[layout], 2)  # type: ignore[misc]
        yield case(f"{layout} of 700 classes", of, tail="renormalize" if layout == "part" else "bucket")
    of = tuple((s[:, :-1], v[:, 1:], i[:, 1:]) for s, v, i in samples((2, 9, 300), 8))
    yield case("shifted slices", of, reduction="sum")
    yield case("a row without a batch", samples((300,), 8), reduction="sum")

    # Padding, weights, and logits
    for tail in TAILS:
        for reverse in (False, True):
            of = samples((12, 90), 6)
            for _, values, indices in of:
                values[::2, 4:], indices[::2, 4:] = -torch.inf, 0
            yield case(f"padding, {tail}, reverse={reverse}", of, both=False, tail=tail, reverse=reverse)
    weights = [torch.rand(4, 5, generator=generator) * (torch.rand(4, 5, generator=generator) > 0.3) for _ in range(3)]
    of = tuple((*s, w.to(device)) for s, w in zip(samples((4, 5, 60), 7), weights, strict=True))
    for i, reduction in enumerate(REDUCTIONS):
        options = {"names": ("position_weight",), "reduction": reduction, "tail": TAILS[i % 3]}
        yield case(f"weights, {reduction}", of, **options)
    for tail in TAILS:
        of_logits = []
        for student, *_ in samples((12, 80), 6):
            logits = normal((12, 80)).to(dtype) * 2
            values, indices = logits.topk(6)
            of_logits.append(
                (
                    student,
                    values,
                    indices,
                    (logits.double() / 2).logsumexp(-1).to(torch.float32 if dtype.itemsize < 8 else dtype),
                )
            )
        options = {"names": ("target_logsumexp",), "values_type": "logits", "temperature": 2.0, "tail": tail}
        differentiable = (0, 1) if tail == "renormalize" else (0, 1, 3)
        yield Case(
            f"logits, {tail}", partial(ours, **options), partial(eager, **options), tuple(of_logits), differentiable
        )

    # Edges
    yield case("large logits", tuple((s * 100, v, i) for s, v, i in samples((8, 60), 6)), both=False)
    confident = []
    for student, values, indices in samples((8, 400), 4):
        confident.append((student.scatter_add(-1, indices, torch.full_like(values, 27.0)), values, indices))
    yield case("the student's rest has a mass of 1e-12", tuple(confident))
    yield case("the student's rest has a mass of 1e-12, reverse", tuple(confident), reverse=True)
    close = []
    for logits in (normal((8, 200)) * 2 for _ in range(3)):
        values, indices = topk_teacher(logits, 12)
        close.append(((logits + 1e-3 * normal((8, 200))).to(dtype), values.to(dtype), indices))
    yield case("teacher close to student", tuple(close))
    if dtype == torch.bfloat16:
        of = samples((8, 60), 6)
        for other in (torch.float32, torch.float64):
            yield case(f"{other} student", tuple((s.to(other), v, i) for s, v, i in of))
            yield case(f"{other} teacher", tuple((s, v.to(other), i) for s, v, i in of), reverse=True)


FUNCTION = "topk_kl_div_with_logits"
LISTED = 64


def workload(function: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Workload:
    """Return a row of the benchmark: the likeliest 64 classes of a teacher, or a quarter of few, at temperature 2.

    Variants: the other direction, and both sides renormalized.
    """
    if len(shape) < 2:
        raise ValueError(f"shape must have a dimension of positions and one of classes, got {list(shape)}")
    one_of(variant, ("", "reverse", "renormalize"))
    options: dict[str, Any] = {"temperature": 2.0}
    plain: Callable[..., Any] = partial(eager_by_subtraction, **options)
    if variant:
        options.update({"reverse": True} if variant == "reverse" else {"tail": "renormalize"})
        plain = partial(eager, **options)

    def make(device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        student, teacher = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(3) for _ in range(2)
        )
        values, indices = topk_teacher(teacher, min(LISTED, max(1, shape[-1] // 4)), temperature=2.0)
        return student, values, indices

    passes = (0, 1) if variant == "renormalize" else PASSES[FUNCTION]
    return Workload(
        "topk_divergence", function, shape, dtype, variant, partial(topk_kl_div_with_logits, **options), plain, make,
        dict.fromkeys(("cpu", "cuda"), passes),
    )  # fmt: skip


def calls() -> list[Call]:
    """Return small calls in float64."""
    x, teacher = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    values, indices = topk_teacher(teacher, 3)
    values = values - 3.0  # so that half of them are log-probabilities too
    logits, places = teacher.topk(2)
    sums = teacher.div(2.0).logsumexp(-1) + 3.0
    weight = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    rows = torch.randn(2, 2, 5, dtype=torch.float64).transpose(0, 1)
    teacher_of_rows = topk_teacher(torch.randn(2, 2, 5, dtype=torch.float64), 2)
    of_rows = teacher_of_rows.values - 3.0, teacher_of_rows.indices
    both = (0, 1)
    with_sums: dict[str, Any] = {"names": ("target_logsumexp",), "values_type": "logits", "temperature": 2.0}
    return [
        Call("bucket", ours, (x, values, indices), both),
        Call("reverse", partial(ours, reverse=True, temperature=1.5, reduction="none"), (x, values, indices), both),
        Call("renormalize logits", partial(ours, values_type="logits", tail="renormalize"), (x, logits, places), both),
        Call("renormalize, reverse", partial(ours, tail="renormalize", reverse=True), (rows, *of_rows), both),
        Call("ignore", partial(ours, tail="ignore", reduction="sum"), (x, values, indices), both),
        Call("ignore, reverse", partial(ours, tail="ignore", reverse=True), (rows, *of_rows), both),
        Call("logits", partial(ours, **with_sums), (x, logits, places, sums), (0, 1, 3)),
        Call(
            "weights", partial(ours, names=("position_weight",), reduction="none"), (x, values, indices, weight), both
        ),
    ]


def _first_classes(input: Tensor, **options: Any) -> Any:
    values = torch.full((*input.shape[:-1], 2), -1.5, device=input.device)
    indices = torch.tensor([0, 3], device=input.device).expand(values.shape)
    return topk_kl_div_with_logits(input, values, indices, **options)


BF16 = torch.bfloat16
# Goals for forward and backward with two CPU threads, against the default mode of torch.compile.
GOALS = {"faster than eager": 2.5, "faster than compile": 3.0}
register(
    __package__,
    accuracy=cases,
    calls=calls,
    far_calls=(FarCall(_first_classes, (3, 70)), FarCall(partial(_first_classes, reverse=True), (2, 1500))),
    functions=(FUNCTION,),
    workload=workload,
    benchmarks=(
        Benchmark(FUNCTION, (512, 32000), quick=True, compared=True, goals=GOALS),
        Benchmark(FUNCTION, (512, 32000), BF16, quick=True),
        Benchmark(FUNCTION, (512, 32000), variant="reverse"),
        Benchmark(FUNCTION, (512, 32000), variant="renormalize"),
        Benchmark(FUNCTION, (256, 1000)),
        Benchmark(FUNCTION, (128, 128256)),
        Benchmark(FUNCTION, (128, 151936), BF16),
    ),
)  # fmt: skip
