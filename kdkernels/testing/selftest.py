"""Compares every op with its float64 reference; used by the tests and ``kdkernels doctor``."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels.ops import _registry
from kdkernels.ops._cases import Case, cases_of, registry

# The bar is twice eager PyTorch's error, or 1e-6 of the result's scale; 16 bits add their own rounding.
ALLOWED_ULP = 8.0
ALLOWED_ULP_16_BITS = 1.0
REFERENCE_ULP = 64.0  # as a backend, the reference has plain formulas and no compensated sums
COARSE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Accuracy:
    """The largest error of one result over a case's samples, in units in the last place of the result.

    Attributes:
        name: Name of the case and the result.
        ours: Error of the kernels.
        eager: Error of the same formula in eager PyTorch in the same dtype.
        allowed: Error allowed however accurate eager PyTorch is.

    """

    name: str
    ours: float
    eager: float
    allowed: float = ALLOWED_ULP

    @property
    def passed(self) -> bool:
        """Whether the error is at most twice eager PyTorch's or within the allowed error."""
        return self.ours <= max(2 * self.eager, self.allowed)


@dataclass
class Report:
    """The result of a self-test."""

    rows: list[Accuracy] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[Accuracy]:
        """Rows that did not pass."""
        return [row for row in self.rows if not row.passed]


def tensors_of(result: Any) -> list[Tensor]:
    """Return a function's results as a list."""
    return list(result) if isinstance(result, (tuple, list)) else [result]


def results_of(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    differentiable: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return a function's outputs, then the gradients of its differentiable inputs for fixed random cotangents.

    Args:
        function: Function of the inputs.
        inputs: Tensors of any dtype; integer tensors are passed unchanged.
        differentiable: Positions of the inputs that get a gradient.
        dtype: Dtype to which floating-point inputs are converted first; None keeps theirs.

    """
    leaves = list(inputs)
    for i, tensor in enumerate(inputs):
        if tensor.is_floating_point():
            leaf = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            leaves[i] = leaf.requires_grad_(i in differentiable)
    outputs = tensors_of(function(*leaves))
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype) for out in outputs
    ]
    wanted = [leaves[i] for i in differentiable]
    gradients = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True) if wanted else ()
    return [out.detach() for out in outputs] + [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, wanted, strict=True)
    ]


def error_in_ulp(result: Tensor, truth: Tensor | np.ndarray) -> float:
    """Return the largest error in units in the last place of the true result's largest magnitude.

    The error is infinite unless infinities and NaN are in the same places.
    """
    found, exact = (
        np.asarray(x.detach().cpu().double() if isinstance(x, Tensor) else x).astype(np.longdouble)
        for x in (result, truth)
    )
    if found.shape != exact.shape:
        return math.inf
    finite = np.isfinite(exact)
    if not np.array_equal(found[~finite], exact[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    exact, found = exact[finite], found[finite]
    if not np.isfinite(found).all():
        return math.inf
    info = torch.finfo(result.dtype)
    largest = float(np.clip(np.abs(exact).max(), info.tiny, info.max))
    unit = 2.0 ** math.floor(math.log2(largest)) * info.eps
    return float(np.abs(found - exact).max() / unit)


def reference_results(case: Case, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the reference's outputs, then its gradients, in float64."""
    with _registry.set_backend("reference"):
        return results_of(case.function, inputs, case.differentiable, torch.float64)


def accuracy_of(
    case: Case, true_results: Callable[[Case, tuple[Tensor, ...]], Sequence[Tensor | np.ndarray]] = reference_results
) -> list[Accuracy]:
    """Measure a case; return one row for each output and each gradient.

    Args:
        case: Case to measure.
        true_results: Function that returns the true results; the float64 reference by default.

    """
    worst: list[list[float]] = []
    allowed: list[float] = []
    for inputs in case.samples:
        results = results_of(case.function, inputs, case.differentiable)
        truth = true_results(case, inputs)
        eager_results = results_of(case.eager, inputs, case.differentiable)
        worst = worst or [[0.0, 0.0] for _ in results]
        allowed = [ALLOWED_ULP if a.dtype.itemsize > 2 else ALLOWED_ULP_16_BITS for a in results]
        for errors, a, b, t in zip(worst, results, eager_results, truth, strict=True):
            errors[0] = max(errors[0], error_in_ulp(a, t))
            # If eager returns 16 bits and the kernels 32, both are measured in units of the kernels' result.
            errors[1] = max(errors[1], error_in_ulp(b.to(a.dtype), t))
    outputs = len(worst) - len(case.differentiable)
    names = [f"output {i}" for i in range(outputs)] + [f"gradient {i}" for i in case.differentiable]
    dtype = str(case.samples[0][0].dtype).removeprefix("torch.")
    return [
        Accuracy(f"{dtype}, {case.name}, {name}", ours, eager, limit)
        for name, (ours, eager), limit in zip(names, worst, allowed, strict=True)
    ]


def run(*, ops: Iterable[str] | None = None, dtypes: Iterable[torch.dtype] = COARSE, device: str = "cpu") -> Report:
    """Compare ops with the float64 reference, which as a backend itself is allowed 64 units in the last place.

    Args:
        ops: Names of the folders of ops; all by default.
        dtypes: Dtypes of the inputs; fp32, fp16 and bf16 by default. In fp64 the reference rounds like the kernels.
        device: Device type on which the ops run.

    """
    report = Report()
    kernels = any(backend != "reference" for backend, _ in _registry.explain(device).values())
    at_least = 0.0 if kernels else REFERENCE_ULP
    for op in registry() if ops is None else ops:
        for dtype in dtypes:
            for case in cases_of(op, dtype, device):
                rows = accuracy_of(case)
                report.rows += [
                    Accuracy(f"{op}, {row.name}", row.ours, row.eager, max(row.allowed, at_least)) for row in rows
                ]
    return report
