"""Every Triton kernel in Triton's interpreter, on small shapes. test_triton.py runs this file and each op's
``triton_*.py`` in python_tests/ops in a separate process.
"""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import CORE_GRID, Call, OpContract, has_kernels

from kdkernels.ops._cases import DTYPES, registry
from kdkernels.testing.selftest import accuracy_of, reference_results, results_of

OPS = Path(__file__).resolve().parents[1] / "ops"
for op in registry():
    importlib.import_module(f"test_{op}")
CONTRACTS = sorted((c for c in OpContract.__subclasses__() if has_kernels(c.op)), key=lambda contract: contract.op)
LARGEST = 5000  # elements of a sample; a program takes a few milliseconds in the interpreter
# The interpreter truncates fp32 to bf16 instead of rounding: up to one unit more, in gradients only.
TRUNCATED = {torch.bfloat16: 1.0}
# In fp64, a mean of numbers that cancel loses some units, as does a gradient that is a derivative minus a mean kept in
# one fp64 number; narrower numbers are summed in fp64.
ALLOWED_FP64 = 12.0


def cases(contract, dtype):
    """Yield one sample of the small cases: all of them in fp32, one in three in each other dtype, or the core grid."""
    small = [case for case in contract.cases(dtype) if max(t.numel() for t in case.samples[0]) <= LARGEST]
    step, first = (1, 0) if CORE_GRID or dtype == torch.float32 else (3, DTYPES.index(dtype) - 1)
    for case in small[first::step]:
        yield replace(case, samples=case.samples[:1])


def calls():
    return [call for contract in CONTRACTS for call in contract.calls()]


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.op)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(contract, dtype):
    """As accurate as the other backends in every case; the inputs are unchanged."""
    count, failures = 0, []
    for case in cases(contract, dtype):
        before = [tensor.clone() for tensor in case.samples[0]]
        is_double = torch.float64 in [t.dtype for t in case.samples[0]]
        truth = contract().extended_results if is_double else reference_results
        for row in accuracy_of(case, truth):
            more = TRUNCATED.get(dtype, 0.0)
            allowed = ALLOWED_FP64 if is_double else row.allowed + more
            count += 1
            if not row.ours <= max(row.eager + more, allowed):
                failures.append(row)
        for tensor, copy in zip(case.samples[0], before, strict=True):
            assert torch.equal(tensor, copy)
    assert count > 0
    assert not failures


@pytest.mark.parametrize("call", calls(), ids=lambda call: call.name)
class TestEveryCall:
    """The parts of the contract that small inputs can test."""

    def test_backward(self, call: Call):
        CONTRACTS[0]().test_second_backward_equals_the_first(call)
        CONTRACTS[0]().test_no_grad_gives_the_same_value(call)
        CONTRACTS[0]().test_incoming_gradients(call, "zero")
        CONTRACTS[0]().test_incoming_gradients(call, "expanded")

    def test_gradients(self, call: Call):
        CONTRACTS[0]().test_gradients_under_torch_func(call)

    def test_determinism(self, call: Call):
        first, second = (results_of(call.function, call.inputs, call.differentiable) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_compiles_without_a_break(self, call: Call):
        CONTRACTS[0]()._check_compiled(call, "aot_eager", None)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.op)
def test_opcheck(contract):
    count = 0
    for name, arguments in list(contract.op_samples())[::2]:
        overload = getattr(torch.ops.kdkernels, name).triton
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))
        count += 1
    assert count > 0
