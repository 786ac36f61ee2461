"""Selection of a backend, and its explanations."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from contract import BACKENDS, KERNELS

import kdkernels
from kdkernels.functional import kl_div_with_logits
from kdkernels.ops import _loader, _registry


def logits():
    return torch.randn(3, 4), torch.randn(3, 4)


def test_set_backend_is_a_function_and_a_context():
    assert kdkernels.get_backend() == "auto"
    with kdkernels.set_backend("reference"):
        assert kdkernels.get_backend() == "reference"
        with kdkernels.set_backend("native"):
            assert kdkernels.get_backend() == "native"
        assert kdkernels.get_backend() == "reference"
    assert kdkernels.get_backend() == "auto"
    kdkernels.set_backend("reference")
    assert kdkernels.get_backend() == "reference"
    kdkernels.set_backend("auto")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda'; accepted are 'auto', 'native', 'triton', 'reference'"):
        kdkernels.set_backend("cuda")


def test_a_request_never_falls_back():
    with (
        kdkernels.set_backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' was requested.*no Triton kernel"),
    ):
        kl_div_with_logits(*logits())


def test_a_device_without_kernels_uses_the_reference():
    """kdkernels has no kernels for the meta device."""
    s, t = (x.to("meta") for x in logits())
    assert kl_div_with_logits(s, t).device.type == "meta"
    with kdkernels.set_backend("native"), pytest.raises(RuntimeError, match="no native kernel of softmax_divergence"):
        kl_div_with_logits(s, t)


def test_selection_is_guarded_in_compiled_code():
    """A compiled function follows a later selection."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "softmax_divergence" in str(node.target))
        return graph.forward

    function = torch.compile(kl_div_with_logits, backend=backend, fullgraph=True)
    s, t = logits()
    function(s, t)
    with kdkernels.set_backend("reference"):
        function(s, t)
    assert seen[0].endswith("." + BACKENDS[0])
    assert seen[-1].endswith(".reference")


class _OldGpu:
    """Pretends to Python that kernels for sm_80 and sm_90 meet a GPU of compute capability 7.5."""

    def __init__(self, monkeypatch):
        ops = {op for op, _, _ in _registry._kernels} or {"softmax_divergence"}
        kernels = {(op, backend, "cuda") for op in ops for backend in ("native", "triton")}
        monkeypatch.setattr(_registry, "_kernels", _registry._kernels | kernels)
        monkeypatch.setattr(_loader, "_compiled", {"_cuda": {"architectures": ["sm_80", "sm_90"]}})
        monkeypatch.setattr(_loader, "_missing", {})
        monkeypatch.setattr(_loader, "_devices", {})
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))


def test_a_gpu_without_code_uses_triton(monkeypatch):
    _OldGpu(monkeypatch)
    op, device = _registry._ops["softmax_divergence"], torch.device("cuda", 0)
    assert op.choose(device) == "triton"
    assert "compute capability 7.5" in _registry.explain("cuda")["softmax_divergence"][1]
    with (
        kdkernels.set_backend("native"),
        pytest.raises(RuntimeError, match=r"capability 7\.5, but .* compiled for sm_80, sm_90; build with"),
    ):
        op.choose(device)


def test_without_triton_the_reference_remains(monkeypatch):
    monkeypatch.setattr(_loader, "_missing", {"_cuda": "the CUDA kernels were not built"})
    monkeypatch.setattr(_registry, "_kernels", {k for k in _registry._kernels if k[2] != "cuda"})
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert _loader.triton_keys() == ()
    backend, reason = _registry.explain("cuda")["softmax_divergence"]
    assert backend == "reference"
    assert "the CUDA kernels were not built" in reason
    assert "Triton is not installed" in reason


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 9), ["sm_80"], True),  # machine code runs on later minor versions
        ((9, 0), ["sm_80"], False),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], True),  # PTX runs on every later GPU
        ((7, 5), ["sm_80", "compute_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),  # code for one GPU only
    ],
)
def test_architectures(capability, architectures, served):
    reason = _loader._compare(capability, architectures)
    assert (reason is None) == served
    if not served:
        assert f"{capability[0]}.{capability[1]}" in reason
        assert architectures[0] in reason


def test_build_info_explains():
    info = kdkernels.build_info()
    assert info["version"] == kdkernels.__version__
    backend, reason = info["backends"]["cpu"]["softmax_divergence"]
    if KERNELS:
        assert info["compiled"]["_C"]["torch_target"] == "2.11"
        assert (backend, reason) == ("native", "the first choice")
    else:
        assert "_C" in info["missing"]
        assert backend == "reference"
        assert "KDKERNELS_BUILD was none" in reason
    assert "_cuda" in info["missing"]


def test_environment_variable_sets_the_first_choice():
    code = "import kdkernels; print(kdkernels.get_backend())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"KDKERNELS_BACKEND": "reference"}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "reference"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"KDKERNELS_BACKEND": "fast"}, capture_output=True, text=True, check=False
    )
    assert "backend is 'fast'; accepted are 'auto'" in result.stderr
