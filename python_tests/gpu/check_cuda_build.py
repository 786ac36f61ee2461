"""Checks of a build against a CUDA version of PyTorch, with or without a GPU; run by ``make check-cuda-build``.

Both libraries load, every op has its CUDA kernel, fake CUDA tensors pass through eager, compiled and exported code, and
the CPU library built against a CPU version of PyTorch works here too.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdkernels
from kdkernels.functional import (
    batch_norm_stat_loss,
    distillation_loss,
    gradient_reversal,
    image_prior_losses,
    js_div_with_logits,
    total_variation,
)
from kdkernels.ops import _registry

CALLS = {
    "distillation_loss": (lambda s, t: distillation_loss(s, t, temperature=3.0), ((4, 10), (4, 10))),
    "js_div_with_logits": (lambda s, t: js_div_with_logits(s, t, dim=1), ((2, 5, 3, 4), (2, 5, 3, 4))),
    "batch_norm_stat_loss": (batch_norm_stat_loss, ((4, 3, 5, 5), (3,), (3,))),
    "image_prior_losses": (lambda x: image_prior_losses(x)[0], ((2, 3, 8, 8),)),
    "total_variation": (total_variation, ((2, 3, 8, 8),)),
    "gradient_reversal": (lambda x: gradient_reversal(x).sum(), ((4, 6),)),
}
calls = pytest.mark.parametrize(("function", "shapes"), CALLS.values(), ids=CALLS)


def test_torch_has_cuda():
    assert torch.version.cuda is not None, "this PyTorch was built without CUDA"


def test_both_libraries_are_loaded():
    info = kdkernels.build_info()
    assert info["missing"] == {}
    assert info["compiled"]["_cuda"]["torch_target"] == info["compiled"]["_C"]["torch_target"] == "2.11"
    assert info["compiled"]["_cuda"]["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]


def test_every_op_has_a_kernel_of_every_kind():
    assert _registry._ops
    for name in _registry._ops:
        for key in ((name, "native", "cuda"), (name, "native", "cpu"), (name, "triton", "cuda")):
            assert key in _registry._kernels, key


def recorded(function, shapes, device):
    """Return the ops that a function calls on fake tensors, and its result."""
    names = []

    def backend(graph, _inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if "kdkernels" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        inputs = [torch.empty(shape, device=device) for shape in shapes]
        result = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return names, result


@calls
def test_fake_cuda_tensors_use_the_cuda_kernels(function, shapes):
    with FakeTensorMode():
        result = function(*(torch.empty(shape, device="cuda") for shape in shapes))
    assert result.device.type == "cuda"
    names, compiled = recorded(function, shapes, "cuda")
    assert compiled.device.type == "cuda"
    assert all(name.endswith(".native") for name in names), names


@calls
def test_export(function, shapes):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    with FakeTensorMode() as mode:
        inputs = tuple(torch.empty(shape, device="cuda") for shape in shapes)
        with mode:
            program = torch.export.export(Module(), inputs)
    assert "kdkernels" in str(program.graph)


def test_the_library_of_another_torch_works_here(tmp_path):
    """KDKERNELS_OTHER_LIBRARY names a kdkernels/_C built against a CPU version of PyTorch."""
    other = Path(os.environ["KDKERNELS_OTHER_LIBRARY"])
    package = Path(kdkernels.__file__).parent
    ignored = shutil.ignore_patterns("_C.*", "_cuda.*", "__pycache__")
    shutil.copytree(package, tmp_path / "kdkernels", ignore=ignored)
    shutil.copy(other, tmp_path / "kdkernels" / other.name)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)];"
        "import kdkernels, kdkernels.testing.selftest as s; assert kdkernels.__file__.startswith(sys.argv[1]);"
        "print(kdkernels.build_info()['backends']['cpu']['softmax_divergence'][0]); sys.exit(not s.run().passed)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["native"]


def test_triton_is_installed():
    assert importlib.util.find_spec("triton") is not None
