"""What every op has to keep, as a class of tests; each op's test file derives from it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import emulated
import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("KDKERNELS_TEST_TARGET") == "emulated":
    emulated.install(os.environ.get("KDKERNELS_TEST_VARIANT", "plain"))

import kdkernels
from kdkernels.ops._cases import DTYPES, Case, cases_of
from kdkernels.testing.selftest import Accuracy, accuracy_of, error_in_ulp, results_of, tensors_of

ACCURACY: list[Accuracy] = []
# What is tested: the kernels of the CPU, those of csrc/cuda executed on the CPU, or a backend of a GPU.
TARGET = os.environ.get("KDKERNELS_TEST_TARGET", "cpu")
DEVICE = "cuda" if TARGET.startswith("cuda") else "cpu"
KERNEL_BACKEND = "triton" if TARGET.endswith("triton") else "native"
# What the build under test has to have: a kernel that is missing for another reason fails.
KERNELS = os.environ.get("KDKERNELS_BUILD") != "none"
BACKENDS = (KERNEL_BACKEND, "reference") if KERNELS else ("reference",)
of_kernels = pytest.mark.skipif(not KERNELS, reason="KDKERNELS_BUILD=none: there are no kernels")
of_cpu = pytest.mark.skipif(TARGET != "cpu", reason=f"a property of the CPU kernels; under test is {TARGET}")


def on_device(tensor: Tensor) -> Tensor:
    """Return a tensor with the same strides on the device under test."""
    if tensor.device.type == DEVICE:
        return tensor
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return moved.copy_(tensor).requires_grad_(tensor.requires_grad)


def _moved(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Scalars stay on the CPU, where users have them."""
    return tuple(
        on_device(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.dim() else a
        for a in arguments
    )


@contextmanager
def schedules() -> Iterator[Callable[[int], None]]:
    """Give a function that makes work be done in another order: threads of the CPU, or of the emulated GPU."""
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


@dataclass(frozen=True)
class Call:
    """A small call of a function, for the checks that look at how it is called and not at its numbers."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    differentiable: tuple[int, ...] = (0,)


class OpContract:
    """Derive, name the family, and give the calls; the tests come with it."""

    family: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = DTYPES

    @classmethod
    def cases(cls, dtype: torch.dtype) -> Iterator[Case]:
        return cases_of(cls.family, dtype, DEVICE)

    @classmethod
    def calls(cls) -> list[Call]:
        """Return small calls in float64, at most 50 elements an input."""
        raise NotImplementedError

    @classmethod
    def op_samples(cls) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield the name of an op, backward ops included, and arguments that it accepts."""
        raise NotImplementedError

    @classmethod
    def extended(cls, case: Case, arrays: list[np.ndarray], cotangents: list[np.ndarray]) -> list[np.ndarray]:
        """Return outputs and gradients of a case in extended precision."""
        raise NotImplementedError

    def extended_results(self, case: Case, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
        outputs = tensors_of(case.function(*inputs))
        host = [t.cpu() for t in inputs]
        arrays = [t.double().numpy().astype(np.longdouble) if t.is_floating_point() else t.numpy() for t in host]
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).numpy() for o in outputs]
        return self.extended(case, arrays, cotangents)

    @of_kernels
    def test_equals_reference(self, case: Case):
        """The error is at most eager PyTorch's own in the same dtype, or 4 units in the last place.

        What is compared with is the float64 reference; for float64 results, extended precision.
        """
        is_double = torch.float64 in [t.dtype for t in case.samples[0]]
        rows = accuracy_of(case, self.extended_results) if is_double else accuracy_of(case)
        ACCURACY.extend(Accuracy(f"{self.family}, {row.name}", row.ours, row.eager) for row in rows)
        for row in rows:
            assert row.passed, row

    def test_reference_backend_agrees(self, case: Case):
        """The reference, as a backend in the same dtype, gives the same within what its dtype allows."""
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
        leaves = _leaves(call)
        outputs = tensors_of(call.function(*leaves))
        loss = sum(out.sum() for out in outputs if out.requires_grad)
        wanted = [leaves[i] for i in call.differentiable]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_no_grad_gives_the_same_value(self, call: Call):
        with_grad = tensors_of(call.function(*_leaves(call)))
        with torch.no_grad():
            without = tensors_of(call.function(*_leaves(call)))
        for a, b in zip(with_grad, without, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=0, atol=0)
            assert b.grad_fn is None

    @pytest.mark.parametrize("grad", ["zero", "one", "expanded"])
    def test_incoming_gradients(self, call: Call, grad: str):
        """Gradients of 0, of 1, and an expanded one that must not be written to."""
        leaves = _leaves(call)
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

    def test_gradients_under_torch_func(self, call: Call):
        def loss(*inputs: Tensor) -> Tensor:
            return sum(out.sin().sum() for out in tensors_of(call.function(*inputs)) if out.is_floating_point())

        leaves = _leaves(call)
        expected = torch.autograd.grad(loss(*leaves), [leaves[i] for i in call.differentiable])
        found = torch.func.grad(loss, call.differentiable)(*call.inputs)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)

    def test_gradcheck(self, call: Call):
        assert torch.autograd.gradcheck(call.function, _leaves(call))

    def test_gradgradcheck(self, call: Call):
        assert torch.autograd.gradgradcheck(call.function, _leaves(call))

    @pytest.mark.parametrize("in_thread", [False, True])
    def test_backward_uses_the_backend_of_the_forward(self, call: Call, in_thread: bool):
        """Whatever is set by then, and in whichever thread autograd runs."""
        with kdkernels.set_backend("reference"):
            leaves = _leaves(call)
            outputs = [out for out in tensors_of(call.function(*leaves)) if out.requires_grad]
        used: list[str] = []

        def backward() -> None:
            with kdkernels.set_backend(KERNEL_BACKEND), _Recorder(used):
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
        count = 0
        for name, arguments in self.op_samples():
            for backend in BACKENDS:
                overload = getattr(getattr(torch.ops.kdkernels, name), backend)
                torch.library.opcheck(overload, _moved(arguments))
                count += 1
        assert count > 0

    def test_fake_cuda_tensors(self, call: Call):
        """Shapes, dtypes and devices are right without a device, on the backend that a GPU would take."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        real = tensors_of(call.function(*call.inputs))
        with FakeTensorMode():
            inputs = tuple(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in call.inputs)
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
    def test_other_instruction_sets(self):
        """The kernels compiled for older processors equal the reference too, in a process of their own."""
        code = (
            "import kdkernels.testing.selftest as selftest, sys;"
            f"report = selftest.run(families=[{self.family!r}]);"
            "print(*report.failures, sep='\\n');"
            "sys.exit(not report.passed)"
        )
        for capability in ("baseline", "avx2"):
            environment = {**os.environ, "KDKERNELS_CPU_CAPABILITY": capability}
            result = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, result.stdout + result.stderr


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, used: list[str]) -> None:
        super().__init__()
        self.used = used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.used.append(str(func))
        return func(*args, **(kwargs or {}))


def _leaves(call: Call) -> list[Tensor]:
    return [
        tensor.detach().clone().requires_grad_(i in call.differentiable) if tensor.is_floating_point() else tensor
        for i, tensor in enumerate(call.inputs)
    ]
