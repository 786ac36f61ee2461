"""The functions of csrc/core/fast_exp.h and the 16-bit storage, against NumPy in extended precision."""

import numpy as np
import pytest
import torch
from contract import KERNELS

if not KERNELS:
    pytest.skip("KDKERNELS_BUILD=none: there are no kernels", allow_module_level=True)
from kdkernels import _C

L = np.longdouble
# What is left after first orders cancel is up to ten times smaller than the numbers it is computed from, where the
# polynomial near 0 hands over to the plain difference: hence the larger bounds of the rests.
FUNCTIONS = {
    "exp_nonpositive": (np.exp, -80.0, 0.0, 1.1),
    "expm1": (np.expm1, -80.0, 0.0, 1.3),
    "expm1_rest": (lambda x: np.expm1(x) - x, -80.0, 0.0, 16.0),
    "product_rest": (lambda x: x * np.exp(x) - np.expm1(x), -80.0, 0.0, 16.0),
    "log_positive": (np.log, 1e-30, 1e6, 1.1),
    "log1p": (np.log1p, -0.999, 1e4, 1.3),
    "log1p_rest": (lambda x: np.log1p(x) - x, -0.999, 2.0, 16.0),
}


def numbers(low, high, count, dtype):
    """Numbers all over a range, and closer and closer to 0 if that is in the range."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(low, high, count)
    near = 10.0 ** rng.uniform(-6, 0, count) * (np.sign(low) if high <= 0 else 1)
    near = near[(near >= low) & (near <= high)]
    return np.concatenate([spread, near]).astype(dtype)


@pytest.mark.parametrize("vectors", [False, True], ids=["one by one", "vectors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accurate(name, dtype, vectors):
    exact, low, high, allowed = FUNCTIONS[name]
    x = numbers(low, high, 5000, dtype)
    evaluate = _C.evaluate_float if dtype == np.float32 else _C.evaluate_double
    found = np.array(evaluate(name, x.tolist(), vectors), dtype=dtype)
    if name.endswith("rest"):
        # In double even the exact values cancel: second-order terms are checked down to 1e-3.
        x, found = (a[np.abs(x) > (1e-3 if dtype == np.float64 else 1e-5)] for a in (x, found))
    truth = exact(x.astype(L))
    unit = np.ldexp(L(1), np.frexp(truth.astype(dtype))[1] - np.finfo(dtype).nmant - 1)
    error = np.abs(found.astype(L) - truth) / unit
    assert error.max() <= allowed, f"{error.max()} units at {x[error.argmax()]}"


@pytest.mark.parametrize("vectors", [False, True], ids=["one by one", "vectors"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_stays_nan(name, vectors):
    assert all(np.isnan(_C.evaluate_float(name, [np.nan] * 20, vectors)))
    assert all(np.isnan(_C.evaluate_double(name, [np.nan] * 20, vectors)))


@pytest.mark.parametrize("vectors", [False, True], ids=["one by one", "vectors"])
def test_limits(vectors):
    assert set(_C.evaluate_float("exp_nonpositive", [-np.inf, -104.0, -1e30], vectors)) == {0.0}
    assert _C.evaluate_float("exp_nonpositive", [0.0], vectors) == [1.0]
    assert _C.evaluate_float("expm1", [-np.inf, 0.0], vectors) == [-1.0, 0.0]
    assert _C.evaluate_double("log_positive", [1.0], vectors) == [0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_numbers_round_as_torch_rounds(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    generator = torch.Generator().manual_seed(0)
    between = torch.randn(100_000, generator=generator) * 10.0 ** torch.randint(-9, 6, (100_000,), generator=generator)
    ties = (every[:-1] + every[1:]) / 2
    edges = torch.tensor([65519.0, 65520.0, 65536.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    values = torch.cat([every, between, ties, edges])
    found = torch.tensor(_C.round_trip(values.tolist(), str(dtype).removeprefix("torch.")))
    expected = values.to(dtype).float()
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))
