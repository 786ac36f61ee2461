"""The contract of every op, as a class of tests; the test file of each op derives from it."""

import os
import subprocess
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import emulated
import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("KDKERNELS_TEST_TARGET") == "emulated":
    emulated.install(os.environ.get("KDKERNELS_TEST_VARIANT", "plain"))

from transforms import UnderTransforms, leaves_of

import kdkernels
from kdkernels.ops._cases import DTYPES, Call, Case, registry
from kdkernels.testing.selftest import Accuracy, accuracy_of, error_in_ulp, results_of, tensors_of

ACCURACY: list[Accuracy] = []
# Under test: the CPU kernels, the CUDA kernels executed on the CPU, or a backend of a GPU.
TARGET = os.environ.get("KDKERNELS_TEST_TARGET", "cpu")
DEVICE = "cuda" if TARGET.startswith("cuda") else "cpu"
KERNEL_BACKEND = "triton" if TARGET.endswith("triton") else "native"
# Whether to compute one case in five instead of all; each dtype has a different fifth.
CORE_GRID = os.environ.get("KDKERNELS_TEST_GRID") == "core"
# Whether the build under test must have kernels; if they are missing for another reason, tests fail.
KERNELS = os.environ.get("KDKERNELS_BUILD") != "none"
BACKENDS = (KERNEL_BACKEND, "reference") if KERNELS else ("reference",)
ROOT = Path(__file__).resolve().parents[1]
# The same of ops that have kernels on the CPU alone.
CPU_BACKENDS = BACKENDS if TARGET == "cpu" else ("reference",)
# A test of kernels: deselected if the op has none for the backend under test, skipped if nothing was built.
of_kernels = pytest.mark.of_kernels
of_cpu = pytest.mark.skipif(TARGET != "cpu", reason=f"tests the CPU kernels only; the target is {TARGET}")


def on_device(tensor: Tensor) -> Tensor:
    """Return a tensor with the same strides on the device under test."""
    if tensor.device.type == DEVICE:
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return moved.copy_(tensor).requires_grad_(tensor.requires_grad)


def _moved(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Move tensors to the device; scalars stay on the CPU, where users have them."""
    return tuple(
        on_device(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.dim() else a
        for a in arguments
    )


@contextmanager
def schedules() -> Iterator[Callable[[int], None]]:
    """Provide a function that changes the order of work: of the threads on the CPU, or on the emulated GPU."""
    threads = torch.get_num_threads()
    orders = ("fifo", "reverse", "warp_priority")

    def choose(number: int) -> None:
        if TARGET == "emulated":
            emulated.set_schedule(orders[number], seed=number)
        else:
            torch.set_num_threads(number + 1)

    try:
        yield choose
    finally:
        torch.set_num_threads(threads)
        if TARGET == "emulated":
            emulated.set_schedule("fifo")


def has_kernels(op: str) -> bool:
    """Tell whether the sources have kernels of an op for the backend under test."""
    if KERNEL_BACKEND == "triton":
        return (ROOT / "kdkernels/ops" / op / "triton.py").is_file()
    return (ROOT / "csrc" / op / ("cpu.cpp" if TARGET == "cpu" else "cuda.cpp")).is_file()


class OpContract(UnderTransforms):
    """Derive a test class from this, and define the op's name, samples, and formula in extended precision."""

    op: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = DTYPES

    @classmethod
    def all_cases(cls, dtype: torch.dtype) -> Iterator[Case]:
        return registry()[cls.op].accuracy(dtype, DEVICE)

    @classmethod
    def cases(cls, dtype: torch.dtype) -> Iterator[Case]:
        cases = cls.all_cases(dtype)
        return islice(cases, DTYPES.index(dtype), None, 5) if CORE_GRID else cases

    @classmethod
    def calls(cls) -> list[Call]:
        return registry()[cls.op].calls()

    @classmethod
    def has_kernels(cls) -> bool:
        return has_kernels(cls.op)

    @classmethod
    def backends(cls) -> tuple[str, ...]:
        return BACKENDS if cls.has_kernels() else ("reference",)

    @classmethod
    @abstractmethod
    def op_samples(cls) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield the name of an op or backward op, and arguments that it accepts."""

    @classmethod
    @abstractmethod
    def extended(cls, case: Case, arrays: list[np.ndarray], cotangents: list[np.ndarray]) -> list[np.ndarray]:
        """Return outputs and gradients of a case in extended precision."""

    def extended_results(self, case: Case, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
        outputs = tensors_of(case.function(*inputs))
        host = [t.cpu() for t in inputs]
        arrays = [t.double().numpy().astype(np.longdouble) if t.is_floating_point() else t.numpy() for t in host]
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).numpy() for o in outputs]
        return self.extended(case, arrays, cotangents)

    @of_kernels
    def test_equals_reference(self, case: Case):
        """The error is at most twice eager PyTorch's own in the same dtype, or 1e-6 of the result's scale.

        Results are compared with the float64 reference; float64 results with extended precision.
        """
        is_double = torch.float64 in [t.dtype for t in case.samples[0]]
        rows = accuracy_of(case, self.extended_results) if is_double else accuracy_of(case)
        ACCURACY.extend(Accuracy(f"{self.op}, {row.name}", row.ours, row.eager, row.allowed) for row in rows)
        for row in rows:
            assert row.passed, row

    def test_reference_backend_agrees(self, case: Case):
        """The reference backend, in the same dtype, gives the same results within the accuracy of its dtype."""
        inputs = case.samples[0]
        with kdkernels.set_backend("reference"):
            result = results_of(case.function, inputs, case.differentiable)
            truth = results_of(case.function, inputs, case.differentiable, torch.float64)
        eager = results_of(case.eager, inputs, case.differentiable)
        for a, b, t in zip(result, eager, truth, strict=True):
            allowed = max(64.0, 8 * error_in_ulp(b.to(a.dtype), t))
            assert error_in_ulp(a, t) <= allowed

    def test_inputs_are_not_written(self, case: Case):
        inputs = case.samples[0]
        before = [tensor.clone() for tensor in inputs]
        results_of(case.function, inputs, case.differentiable)
        for tensor, copy in zip(inputs, before, strict=True):
            assert torch.equal(tensor, copy)

    @of_kernels
    def test_order_of_work_does_not_change_a_bit(self, case: Case):
        results = []
        with schedules() as choose:
            for number in range(3):
                choose(number)
                results.append(results_of(case.function, case.samples[0], case.differentiable))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))

    def test_second_backward_equals_the_first(self, call: Call):
        leaves = leaves_of(call)
        outputs = tensors_of(call.function(*leaves))
        loss = sum(out.sum() for out in outputs if out.requires_grad)
        wanted = [leaves[i] for i in call.differentiable]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_no_grad_gives_the_same_value(self, call: Call):
        with_grad = tensors_of(call.function(*leaves_of(call)))
        with torch.no_grad():
            without = tensors_of(call.function(*leaves_of(call)))
        for a, b in zip(with_grad, without, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=0, atol=0)
            assert b.grad_fn is None

    @pytest.mark.parametrize("grad", ["zero", "one", "expanded"])
    def test_incoming_gradients(self, call: Call, grad: str):
        """Incoming gradients of 0 and 1, and an expanded one that must not be written to."""
        leaves = leaves_of(call)
        outputs = [out for out in tensors_of(call.function(*leaves)) if out.requires_grad]
        value = {"zero": 0.0, "one": 1.0, "expanded": 0.5}[grad]
        incoming = [out.new_full((), value).expand(out.shape) for out in outputs]
        wanted = [leaves[i] for i in call.differentiable]
        result = torch.autograd.grad(outputs, wanted, incoming, retain_graph=True)
        plain = torch.autograd.grad(outputs, wanted, [g.clone() for g in incoming])
        for a, b in zip(result, plain, strict=True):
            assert torch.equal(a, b)
            if grad == "zero":
                assert torch.equal(a, torch.zeros_like(a))

    def test_gradcheck(self, call: Call):
        assert torch.autograd.gradcheck(call.function, leaves_of(call))

    def test_gradgradcheck(self, call: Call):
        assert torch.autograd.gradgradcheck(call.function, leaves_of(call))

    @pytest.mark.parametrize("in_thread", [False, True])
    def test_backward_uses_the_backend_of_the_forward(self, call: Call, in_thread: bool):
        """Regardless of the backend set at that time, and of the thread in which autograd runs."""
        with kdkernels.set_backend("reference"):
            leaves = leaves_of(call)
            outputs = [out for out in tensors_of(call.function(*leaves)) if out.requires_grad]
        used: list[str] = []

        def backward() -> None:
            with kdkernels.set_backend(self.backends()[0]), _Recorder(used):
                torch.autograd.grad(outputs, [leaves[i] for i in call.differentiable], outputs)

        if in_thread:
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
        else:
            backward()
        assert used
        assert not [name for name in used if name.endswith(f".{KERNEL_BACKEND}")]

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_without_a_break(self, call: Call, dynamic: bool):
        self._check_compiled(call, "aot_eager", dynamic)

    def test_opcheck(self):
        """Every op on the backend under test, with the first sample that has a gradient."""
        checked = set()
        for name, arguments in self.op_samples():
            if name in checked or not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
                continue
            _opcheck(name, self.backends()[0], arguments)
            checked.add(name)
        assert checked == {name for name, _ in self.op_samples()}

    @pytest.mark.slow
    def test_opcheck_of_every_sample(self):
        for name, arguments in self.op_samples():
            for backend in self.backends():
                _opcheck(name, backend, arguments)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_fake_cuda_tensors(self, call: Call, dtype: torch.dtype):
        """Shapes, dtypes and devices are right without a GPU, on the backend that it would use."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        given = tuple(t.to(dtype) if t.is_floating_point() else t for t in call.inputs)
        real = tensors_of(call.function(*given))
        with FakeTensorMode():
            inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in given)
            fake = tensors_of(call.function(*inputs))
        for a, b in zip(real, fake, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert b.device.type == "cuda"

    def _check_compiled(self, call: Call, backend: str, dynamic: bool | None) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(call.function, backend=backend, fullgraph=True, dynamic=dynamic)
        expected = results_of(call.function, call.inputs, call.differentiable)
        found = results_of(compiled, call.inputs, call.differentiable)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)

    @of_kernels
    @of_cpu
    @pytest.mark.slow
    def test_other_instruction_sets(self):
        """The kernels compiled for older processors also equal the reference, in a separate process."""
        code = (
            "import kdkernels.testing.selftest as selftest, sys;"
            f"report = selftest.run(ops=[{self.op!r}]);"
            "print(*report.failures, sep='\\n');"
            "sys.exit(not report.passed)"
        )
        for capability in ("baseline", "avx2"):
            environment = {**os.environ, "KDKERNELS_CPU_CAPABILITY": capability}
            result = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, result.stdout + result.stderr


class OnTheCPU:
    """Derive from this before :class:`OpContract` for an op with kernels on the CPU alone beside ops with others."""

    @classmethod
    def all_cases(cls, dtype: torch.dtype) -> Iterator[Case]:
        return registry()[cls.op].cpu_accuracy(dtype, DEVICE)

    @classmethod
    def calls(cls) -> list[Call]:
        return registry()[cls.op].cpu_calls()

    @classmethod
    def has_kernels(cls) -> bool:
        return TARGET == "cpu"


def _opcheck(name: str, backend: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(getattr(torch.ops.kdkernels, name), backend), _moved(arguments))


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, used: list[str]) -> None:
        super().__init__()
        self.used = used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.used.append(str(func))
        return func(*args, **(kwargs or {}))
