"""Fixtures for all tests, and the list of cases in which eager PyTorch is more accurate."""

import os
import sys
from dataclasses import replace

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", "build", "inductor"))

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers and their child processes share the cores

import pytest
import torch
from contract import ACCURACY, BACKENDS, CPU_BACKENDS, DEVICE, KERNEL_BACKEND, KERNELS, OpContract, on_device
from hypothesis import settings

import kdkernels
from kdkernels.testing.selftest import Accuracy

settings.register_profile("kdkernels", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("kdkernels")


def pytest_collection_modifyitems(config, items):
    """Deselect tests of kernels for ops that have none, and skip them if nothing was built."""
    kept, left_out = [], []
    for item in items:
        of_kernels = item.get_closest_marker("of_kernels") is not None
        is_contract = item.cls is not None and issubclass(item.cls, OpContract)
        if of_kernels and not KERNELS:
            item.add_marker(pytest.mark.skip(reason="KDKERNELS_BUILD=none: there are no kernels"))
        (left_out if of_kernels and KERNELS and is_contract and not item.cls.has_kernels() else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(autouse=True)
def _reproducible():
    """Fixed seed, and NaN in every tensor that a kernel leaves unwritten."""
    torch.manual_seed(0)
    # On a GPU, some operations of eager PyTorch are not deterministic.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    with kdkernels.set_backend("triton" if KERNELS and KERNEL_BACKEND == "triton" else "auto"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run a test on each backend that was built."""
    with kdkernels.set_backend(request.param):
        yield request.param


@pytest.fixture(params=CPU_BACKENDS)
def cpu_backend(request):
    """Run a test on each backend of an op that has kernels on the CPU alone."""
    with kdkernels.set_backend(request.param):
        yield request.param


@pytest.fixture
def scalars_on_device(monkeypatch):
    """Pass every scalar of a Triton kernel as a pointer, like one on a GPU, and hide all values."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("kdkernels.ops") and hasattr(module, "known_to_host"):
            monkeypatch.setattr(module, "known_to_host", lambda scalar: False)
    monkeypatch.setattr("kdkernels.ops._registry.values_are_visible", lambda tensor: False)


@pytest.fixture(scope="session")
def digits_teacher():
    """A network trained on the digits; tests must not change it."""
    from kdkernels.cli.demo import DemoSettings, train_teacher
    from kdkernels.data import load_digits

    return train_teacher(DemoSettings(), *load_digits().train, seed=0)


def pytest_generate_tests(metafunc):
    """Run the tests of the contract on the cases and calls of the class."""
    cls = metafunc.cls
    if cls is None or not issubclass(cls, OpContract):
        return
    if "case" in metafunc.fixturenames:
        params = [(dtype, case) for dtype in cls.dtypes for case in cls.cases(dtype)]
        ids = [f"{str(dtype).removeprefix('torch.')}: {case.name}" for dtype, case in params]
        metafunc.parametrize("case", [case for _, case in params], ids=ids)
    if "call" in metafunc.fixturenames:
        calls = [replace(call, inputs=tuple(map(on_device, call.inputs))) for call in cls.calls()]
        metafunc.parametrize("call", calls, ids=[call.name for call in calls])


def pytest_sessionfinish(session):
    """Send the accuracy of a worker's cases to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["accuracy"] = [(row.name, row.ours, row.eager) for row in ACCURACY]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    ACCURACY.extend(Accuracy(*row) for row in getattr(node, "workeroutput", {}).get("accuracy", ()))


def pytest_terminal_summary(terminalreporter):
    """List the cases in which eager PyTorch is closer to the float64 reference than the kernels."""
    if not ACCURACY:
        return
    better = [row for row in ACCURACY if row.ours > row.eager]
    terminalreporter.section("accuracy")
    terminalreporter.write_line(
        f"largest error in units in the last place, against float64: {len(ACCURACY)} results; "
        f"eager PyTorch is more accurate in {len(better)}, each within the bound of 4 units:"
    )
    for row in sorted(better, key=lambda row: row.eager - row.ours)[:60]:
        terminalreporter.write_line(f"  {row.name}: kernels {row.ours:.2f}, eager {row.eager:.2f}")
    if len(better) > 60:
        terminalreporter.write_line(f"  and {len(better) - 60} more, by smaller margins")
