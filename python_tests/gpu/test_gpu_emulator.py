"""The kernels that test the emulator in cuda_host/, run on a real device."""

import ctypes
import inspect
import os
import shutil
import subprocess
from functools import partial

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip(
        "PyTorch finds no CUDA device; `make gpu` runs these tests on a machine with one", allow_module_level=True
    )

import test_cuda_emulator as emulator_tests


@pytest.fixture(scope="module")
def unit_kernels(tmp_path_factory) -> ctypes.CDLL:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    library = tmp_path_factory.mktemp("unit") / "unit.so"
    major, minor = torch.cuda.get_device_capability()
    command = [nvcc, "-O2", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", "-o", str(library)]
    subprocess.run([*command, str(emulator_tests.HERE / "unit.cu")], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    "test",
    [
        emulator_tests.test_block_sum,
        emulator_tests.test_last_block_finishes,
        emulator_tests.test_last_warp_finishes,
        emulator_tests.test_transposition,
        emulator_tests.test_warp_collectives,
        emulator_tests.test_vector_copy,
        partial(emulator_tests.test_conversions_round_as_torch, dtype=torch.float16),
        partial(emulator_tests.test_conversions_round_as_torch, dtype=torch.bfloat16),
    ],
    ids=lambda test: getattr(test, "__name__", None) or f"{test.func.__name__}, {test.keywords['dtype']}",
)
def test_the_emulators_kernels(test, unit_kernels, monkeypatch):
    """The device passes the tests of the emulator."""

    def run(_variant, _order, _seed, launcher, reads, writes, *arguments, times=1):
        on_device = {name: x.cuda() for name, x in {**reads, **writes}.items()}
        known = {name: ctypes.c_void_p(x.data_ptr()) for name, x in on_device.items()}
        values = [known[a] if isinstance(a, str) else ctypes.c_int64(a) for a in arguments]
        for _ in range(times):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            assert getattr(unit_kernels, launcher)(*values, stream) == 0
        torch.cuda.synchronize()
        for name, x in writes.items():
            x.copy_(on_device[name])

    monkeypatch.setattr(emulator_tests, "run", run)
    parameters = inspect.signature(test).parameters
    order = {"order": "fifo", "seed": 0} if "order" in parameters else {}
    test(variant="plain", **order)
